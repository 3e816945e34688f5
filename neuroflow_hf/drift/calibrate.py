"""Calibrate the bypass of a checkpoint: on prompts, in memory and on disk."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..language.bypass_config import NeuroFlowBypassConfig
from ..loading import quiet_transformers
from ..utils.files import report_text, write_whole
from .chat_template import encode_text

# of several kinds, since similarities depend on the text
PROMPTS = (
    "Explain what a hash map is.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me a JSON object that describes a book, with its title, authors and year.",
    "Write the first lines of a story about a lighthouse keeper.",
    "What is the capital of France?",
    "List five fruits with their colours.",
    "How do I find out which process listens on a port?",
    "Why is the sky blue? Answer a child.",
)


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    gate_layer: int | None = None,
    new_tokens: int = 32,
    raw: bool = False,
    on_prompts: Callable[[int], object] = lambda done: None,
):
    """
    Store the similarities of the gate, along the model's answers to some prompts, in the model's configuration.

    Args:
        model, tokenizer: a [`NeuroFlowPhi3ForCausalLM`], and its tokenizer.
        prompts: texts; in the chat template, if the tokenizer has one.
        raw: leave the chat template out.
        gate_layer, new_tokens, on_prompts: as in `calibrate_bypass`.

    Raises:
        ValueError: as `calibrate_bypass`, and for prompts without tokens or too long for the model.
    """
    rows = [encode_text(tokenizer, text, raw=raw) for text in prompts]
    room = model.config.max_position_embeddings
    for text, row in zip(prompts, rows, strict=True):
        if len(row) + new_tokens > room:
            raise ValueError(f"The prompt {text[:40]!r} has {len(row)} tokens; the model has room for {room} in all.")
    with quiet_transformers():
        model.calibrate_bypass(rows, gate_layer, new_tokens, on_prompts=on_prompts)


def with_threshold(
    model: Any,
    tokenizer: Any,
    options: dict,
    raw: bool = False,
    on_prompts: Callable[[int], object] = lambda done: None,
) -> dict:
    """
    The options of a bypass with the threshold that the model's similarities give for their rate. A model without them
    is calibrated first: `on_prompts` is called with 0, and then as in `calibrate`, of whose arguments `raw` is one.
    ValueError for options that do not exist or are out of range.
    """
    asked = NeuroFlowBypassConfig.from_options(model.config.bypass, **options)
    asked.resolve_layers(model.config.num_hidden_layers)
    if asked.rate is not None and str(asked.gate_layer) not in (model.config.bypass_similarities or {}):
        on_prompts(0)
        calibrate(model, tokenizer, gate_layer=asked.gate_layer, raw=raw, on_prompts=on_prompts)
    if "rate" not in options:
        return options
    kept = {name: value for name, value in options.items() if name != "rate"}
    return {**kept, "threshold": model.bypass_options(options).threshold}


def write_calibration(source: str | Path, folder: Path, config: Any):
    """
    Write the bypass and the similarities of a model's configuration into the `config.json` of a checkpoint. A `folder`
    other than `source`, a folder or Hub name, becomes a copy of it first.
    """
    if folder != Path(source):
        checkpoint = source if Path(source).exists() else snapshot_download(str(source))
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    file = folder / "config.json"
    changed = {"bypass": config.bypass, "bypass_similarities": config.bypass_similarities}
    write_whole(file, report_text(json.loads(file.read_text(encoding="utf-8")) | changed))
