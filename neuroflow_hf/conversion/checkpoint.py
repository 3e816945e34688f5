"""Checkpoints of Llama as checkpoints of this package's Phi-3."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import cached_file

from ..language.configuration_neuroflow_phi3 import NeuroFlowPhi3Config
from ..language.from_llama import phi3_config
from ..language.modeling_neuroflow_phi3 import NeuroFlowPhi3ForCausalLM
from ..loading import (
    ModelLoadError,
    load_errors,
    load_tokenizer,
    quiet_transformers,
    read_config,
    read_model,
    require_place,
)
from ..utils.files import new_folder

OnStep = Callable[[str, float, float | None], object]


def convert(
    source: str | Path,
    out: str | Path,
    gguf: str | None = None,
    dtype: torch.dtype | None = None,
    on_step: OnStep = lambda *_: None,
) -> list[str]:
    """
    Write a Llama's checkpoint as one of this package, with its tokenizer: all of it or nothing.

    Args:
        source: folder or Hub name of a Llama's checkpoint with its tokenizer, or a GGUF file.
        out: folder to write; it must not exist, or be empty.
        gguf: name of a GGUF file in `source`, which is read instead of the checkpoint.
        dtype: of the weights; default: the checkpoint's own, and float32 for a GGUF file.
        on_step: called with what is done, how much of it, and the total.

    Returns:
        Names of the files written.

    Raises:
        ModelLoadError: if the source does not exist, is damaged or incomplete, is no Llama, or cannot be a Phi-3.
        FileExistsError: if `out` is not empty.
    """
    with new_folder(out) as folder, quiet_transformers():
        llama, tokenizer = load_llama(source, gguf, dtype, on_step)
        with load_errors(f"Cannot convert {source}", ValueError):
            model = NeuroFlowPhi3ForCausalLM.from_llama(llama)
        del llama
        if dtype is not None:
            model = model.to(dtype)
        on_step("Writing", 0, None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return sorted(path.name for path in folder.iterdir())


def load_llama(
    source: str | Path, gguf: str | None, dtype: torch.dtype | None, on_step: OnStep
) -> tuple[LlamaForCausalLM, Any]:
    """A Llama that can be a Phi-3, and its tokenizer; arguments and errors as in `convert`."""
    if gguf is not None or Path(source).is_file():
        from .gguf_file import read_gguf

        if gguf is not None:
            require_place(source)
            with load_errors(f"Cannot get {gguf} from {source}", OSError):
                source = cached_file(source, gguf)
        return read_gguf(source, on_step)
    files = sorted(path.name for path in Path(source).glob("*.gguf"))
    if files and not (Path(source) / "config.json").exists():
        raise ModelLoadError(f"{source} has no config.json, but GGUF files; name one: --gguf {shlex.quote(files[0])}.")
    settings = read_config(LlamaConfig, "Llama", source)
    kind = settings.get("model_type")
    if kind in ("phi3", NeuroFlowPhi3Config.model_type):
        raise ModelLoadError(f"{source} holds a Phi-3, which needs no conversion.")
    if kind != LlamaConfig.model_type:
        raise ModelLoadError(f"{source} holds a model of type {kind!r}; expected a Llama checkpoint (`llama`).")
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method", "an unknown method")
        raise ModelLoadError(f"{source} holds weights quantised by {method}; expected weights that are not quantised.")
    with load_errors(f"Cannot convert {source}", ValueError):
        phi3_config(LlamaConfig.from_dict(settings))
    # some classes of transformers 5, such as `GPT2Tokenizer`, ignore how `tokenizer.json` splits texts
    # (https://github.com/huggingface/transformers/issues/45920)
    try:
        cached_file(source, "tokenizer.json")
        tokenizer_class: type = PreTrainedTokenizerFast
    except OSError:
        tokenizer_class = AutoTokenizer
    tokenizer = load_tokenizer(source, tokenizer_class)
    on_step("Reading weights", 0, None)
    return read_model(LlamaForCausalLM, "Llama", source, "auto" if dtype is None else dtype), tokenizer
