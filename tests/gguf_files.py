"""Tiny GGUF files of Llama models, as llama.cpp's converter writes them."""

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.llama_models import make_llama

CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
MERGES = ["Ġ t", "h e", "Ġt he", "Ċ Ġ", "ĊĠ Ġ", "1 2", "Ġ 1"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
WORD_PIECES = ["▁", "t", "h", "e", "a", "th", "the", "▁the", "▁a"]
SENTENCE_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORD_PIECES]
# by llama.cpp's names
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# settings of the tokenizer, without the architecture's
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHAT,
}
SENTENCE_PIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SENTENCE_PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(place) for place in range(len(WORD_PIECES))],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORD_PIECES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def make_gguf_llama(**options):
    """A Llama of the size that the files' tokenizers need."""
    return make_llama(vocab_size=len(TOKENS), pad_token_id=2, eos_token_id=2, **options)


def write_gguf(path, llama, tokenizer=BYTE_LEVEL, quantisation="F32", more=None, without=(), tensors=None):
    """
    Write a Llama's weights: projections in a quantisation, norms in float32.

    Args:
        more: settings that are added or replaced; an int, a float, a bool, a str or a list.
        without: names of settings and tensors that are left out.
        tensors: float32 arrays that are added.
    """
    config = llama.config
    settings = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
    }
    settings |= tokenizer | (more or {})
    writer = gguf.GGUFWriter(path, settings.pop("general.architecture", "llama"))
    for name, value in settings.items():
        if name not in without:
            add_setting(writer, name, value)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, weight in (llama_tensors(llama) | (tensors or {})).items():
        if name not in without:
            stored = weight if weight.ndim == 1 else gguf.quantize(weight, kind)
            writer.add_tensor(name, stored, raw_dtype=None if weight.ndim == 1 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_setting(writer, name, value):
    """Add a setting of the type that llama.cpp gives it."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(name, value)


def llama_tensors(llama):
    """A Llama's weights by llama.cpp's names, in its order of rows."""
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(llama.config.num_hidden_layers):
        for name, target in LAYER_TENSORS.items():
            names[f"model.layers.{layer}.{target}"] = f"blk.{layer}.{name}"
    tensors = {}
    for name, weight in llama.state_dict().items():
        if name == "lm_head.weight" and llama.config.tie_word_embeddings:
            continue
        array, target = weight.numpy().astype(np.float32), names[name.removesuffix(".weight")]
        if target.endswith(("attn_q", "attn_k")):
            heads = llama.config.num_attention_heads if target.endswith("q") else llama.config.num_key_value_heads
            halves = array.reshape(heads, 2, -1, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        tensors[f"{target}.weight"] = np.ascontiguousarray(array)
    return tensors


def corrupt_type(path, name, number):
    """Give a tensor of the file a type of this number."""
    content = bytearray(path.read_bytes())
    place = content.index(name.encode()) + len(name)
    dimensions = int.from_bytes(content[place : place + 4], "little")
    place += 4 + 8 * dimensions
    content[place : place + 4] = number.to_bytes(4, "little")
    path.write_bytes(content)
