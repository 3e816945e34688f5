"""A Llama and its tokenizer from a GGUF file, as llama.cpp uses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..language.from_llama import phi3_config
from ..loading import ModelLoadError, load_errors
from ..utils.files import one_line

try:
    import gguf
except ImportError as error:
    raise ImportError('GGUF files need the extra `convert`: pip install "neuroflow-hf[convert]".') from error

HEAD = "output.weight"  # not in files of models with tied embeddings
# Keys of the architecture that are read here, or change nothing. A file with others may hold a model that computes
# something else.
KEYS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
}

# How a byte-level BPE splits a text first, by llama.cpp's name for it
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
CONTROL, USER_DEFINED = 3, 4  # types of tokens


def read_gguf(
    path: str | Path, on_step: Callable[[str, float, float | None], object] = lambda *_: None
) -> tuple[LlamaForCausalLM, Any]:
    """
    The model in a GGUF file in float32, and its tokenizer. ModelLoadError if the file is missing, damaged, incomplete
    or split, has another architecture or what is not known here, or cannot be a Phi-3.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelLoadError(f"There is no file {path}; expected a GGUF file.")
    causes = "It is no GGUF file, damaged or cut short, or quantised in a way that the package `gguf` does not know."
    with load_errors(f"Cannot read {path} as GGUF", advice=f". {causes}"):
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    names = {tensor.name: tensor for tensor in reader.tensors}
    config = read_config(path, values, names)
    tokenizer = read_tokenizer(path, values, config)
    weights = {}
    for place, (stored, name) in enumerate(expected_tensors(path, config, names).items()):
        on_step("Reading tensors", place, len(names))
        weights[name] = read_tensor(path, names[stored], config)
    with load_errors(f"The tensors in {path} do not fit its settings"):
        model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval(), tokenizer


def read_config(path: Path, values: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    """The configuration in a file's `values`; ModelLoadError if it is not a Llama that can be a Phi-3."""
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise ModelLoadError(f"{path} holds a model of the architecture {architecture!r}; expected 'llama'.")
    if values.get("split.count", 1) > 1:
        raise ModelLoadError(f"{path} is one of {values['split.count']} parts; merge them with `llama-gguf-split`.")
    own = {name.removeprefix("llama."): value for name, value in values.items() if name.startswith("llama.")}
    scaling = own.pop("rope.scaling.type", "none")
    if scaling != "none":
        raise ModelLoadError(f"{path} cannot be a Phi-3, which lacks RoPE scaling of type `{scaling}`.")
    unknown = sorted(name for name, value in own.items() if name not in KEYS and value)
    if unknown:
        raise ModelLoadError(f"{path} has settings that are not known here: llama.{', llama.'.join(unknown)}.")
    try:
        width, heads = own["embedding_length"], own["attention.head_count"]
        head_dim = own.get("attention.key_length", width // heads)
        sizes = {own.get(name, head_dim) for name in ("attention.value_length", "rope.dimension_count")}
        if sizes != {head_dim}:
            others = ", ".join(map(str, sorted(sizes - {head_dim})))
            raise ValueError(f"keys have the size {head_dim}, but values or rotations {others}, unlike Phi-3's.")
        config = LlamaConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            hidden_size=width,
            intermediate_size=own["feed_forward_length"],
            num_hidden_layers=own["block_count"],
            num_attention_heads=heads,
            num_key_value_heads=own.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=own["context_length"],
            # the shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06
            rms_norm_eps=float(str(np.float32(own["attention.layer_norm_rms_epsilon"]))),
            rope_parameters={"rope_type": "default", "rope_theta": float(own.get("rope.freq_base", 10000.0))},
            tie_word_embeddings=HEAD not in tensors,
            bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=end_tokens(values),
            pad_token_id=values.get("tokenizer.ggml.padding_token_id"),
            dtype=torch.float32,
        )
        phi3_config(config)
    except KeyError as error:
        raise ModelLoadError(f"{path} is not complete: it lacks {error}.") from error
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{path}: {one_line(error, 300)}") from error
    return config


def end_tokens(values: dict[str, Any]) -> int | list[int] | None:
    """The token that ends a text, or those that end a text and a turn."""
    found = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens = list(dict.fromkeys(token for token in found if token is not None))
    return tokens if len(tokens) > 1 else tokens[0] if tokens else None


# --- weights -------------------------------------------------------------------------------------------------------


def expected_tensors(path: Path, config: LlamaConfig, found: dict[str, Any]) -> dict[str, str]:
    """Transformers' name for each tensor of the file; ModelLoadError for tensors that lack or are too many."""
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    to_gguf = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    names = {to_gguf.get_name(name, [".weight"]): name for name in wanted}
    if config.tie_word_embeddings:
        del names[HEAD]
    for what, wrong in (("lacks", names.keys() - found.keys()), ("has unknown", found.keys() - names.keys())):
        if wrong:
            hint = " RoPE scaling and biases cannot be a Phi-3's." if what == "has unknown" else ""
            examples = ", ".join(sorted(wrong)[:3])
            raise ModelLoadError(f"{path} {what} tensors: {len(wrong)} of them, such as {examples}.{hint}")
    return names


def read_tensor(path: Path, tensor: Any, config: LlamaConfig) -> torch.Tensor:
    """A tensor in float32, in transformers' order of rows."""
    try:
        weight = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise ModelLoadError(
            f"{tensor.name} in {path} is quantised as {tensor.tensor_type.name}, which the package `gguf` cannot "
            "undo. Use a file of another quantisation, such as Q8_0 or F16."
        ) from error
    part = tensor.name.split(".")[-2]
    if part in ("attn_q", "attn_k"):
        # llama.cpp rotates pairs of neighbours, transformers a head's first half with its second
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        weight = weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
    return torch.from_numpy(np.ascontiguousarray(weight))


# --- tokenizer -----------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path, values: dict[str, Any], config: LlamaConfig) -> Any:
    """The tokenizer in a file's `values`; ModelLoadError if it is of a kind that is not known here."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in values.items()}
    kind = own.get("model")
    if kind == "gpt2":
        backend = byte_level_tokenizer(path, own)
    elif kind == "llama":
        backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    else:
        raise ModelLoadError(f"{path} has a tokenizer of type {kind!r}; expected 'gpt2' or 'llama'.")
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{name}_token": own.get(f"{key}_token_id") for name, key in ids.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **{name: own["tokens"][number] for name, number in special.items() if number is not None},
    )


def byte_level_tokenizer(path: Path, own: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE, as GPT-2's."""
    pre = own.get("pre")
    if pre not in PRE_TOKENIZERS:
        raise ModelLoadError(
            f"{path} splits texts in the way {pre!r}; known here: {', '.join(PRE_TOKENIZERS)}. Convert the checkpoint "
            "that the file was made of instead: it has its own tokenizer."
        )
    tokens = own["tokens"]
    merges = [tuple(merge.split(" ")) for merge in own["merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, own["token_type"], strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    first = own.get("bos_token_id")
    if own.get("add_bos_token") and first is not None:
        begin = tokens[first]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, first)]
        )
    return tokenizer
