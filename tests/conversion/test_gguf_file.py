"""GGUF files: the same model, the same tokens, and clear errors."""

import gguf
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaTokenizer

from neuroflow_hf.conversion.gguf_file import read_gguf
from neuroflow_hf.loading import ModelLoadError
from tests.gguf_files import BYTE_LEVEL, SENTENCE_PIECE, TOKENS, corrupt_type, make_gguf_llama, write_gguf
from tests.phi3_models import random_ids


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)])
def test_the_model_is_the_one_that_was_written(tied, heads, tmp_path):
    llama = make_gguf_llama(
        tie_word_embeddings=tied,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        hidden_size=16 * heads[0],
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        num_hidden_layers=2,
    )
    read, _ = read_gguf(write_gguf(tmp_path / "model.gguf", llama))
    ids = random_ids(2, 12)
    assert torch.equal(logits(read, ids), logits(llama, ids))
    ours, theirs = read.config.to_dict(), llama.config.to_dict()
    assert {name for name in theirs if ours.get(name) != theirs[name]} <= {"dtype", "_name_or_path"}
    assert read.generation_config.eos_token_id == 2


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_quantised_weights_are_those_that_transformers_reads(quantisation, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_gguf_llama(), quantisation=quantisation)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = random_ids(2, 12)
    assert torch.equal(logits(read_gguf(path)[0], ids), logits(theirs, ids))


# --- tokenizers ----------------------------------------------------------------------------------------------------


def read_tokenizer(tmp_path, tokenizer=BYTE_LEVEL, **more):
    path = write_gguf(tmp_path / "model.gguf", make_gguf_llama(num_hidden_layers=1), tokenizer, more=more)
    return read_gguf(path)[1]


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("smollm", ["ĊĠĠ", "1", "2"]),  # transformers' own reader leaves a space with the digit
        ("gpt-2", ["ĊĠ", "Ġ", "12"]),
        ("llama-bpe", ["Ċ", "Ġ", "Ġ", "12"]),
    ],
)
def test_texts_are_split_as_the_file_says(pre, expected, tmp_path):
    assert pieces(read_tokenizer(tmp_path, **{"tokenizer.ggml.pre": pre}), "\n  12") == expected


def test_the_tokenizer_is_complete_and_saved(tmp_path):
    tokenizer = read_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    text = "<|im_start|>the the\n  12 é <|im_end|>"
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert pieces(one, text)[:3] == ["<|im_start|>", "t", "he"] and pieces(one, text)[-1] == "<|im_end|>"
        assert one.decode(one(text)["input_ids"]) == text
        assert one.decode(one(text)["input_ids"], skip_special_tokens=True) == "the the\n  12 é "
        assert (one.bos_token, one.eos_token, one.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
        assert one.model_max_length == 128 and len(one) == len(TOKENS)
        assert one.apply_chat_template([{"content": "the"}], tokenize=False) == "<|im_start|>the<|im_end|>"
        assert isinstance(one.added_tokens_decoder[1], AddedToken)


def test_a_first_token_is_added_where_the_file_says_so(tmp_path):
    tokenizer = read_tokenizer(tmp_path, **{"tokenizer.ggml.add_bos_token": True})
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert pieces(one, "the") == ["<|im_start|>", "t", "he"]
        assert one("the", add_special_tokens=False)["input_ids"] == one("the")["input_ids"][1:]


def test_ends_of_turns_end_a_text(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_gguf_llama(), more={"tokenizer.ggml.eot_token_id": 0})
    model, _ = read_gguf(path)
    assert model.generation_config.eos_token_id == [2, 0]


def test_sentence_pieces_are_split_as_transformers_does(tmp_path):
    tokenizer = read_tokenizer(tmp_path, SENTENCE_PIECE)
    tokenizer.save_pretrained(tmp_path / "saved")
    theirs = LlamaTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("the a the", " the", "hat\né</s>"):
        for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
            assert one(text)["input_ids"] == theirs(text)["input_ids"]
    assert pieces(tokenizer, "the a") == ["<s>", "▁the", "▁a"]


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"more": {"general.architecture": "qwen2"}}, "architecture 'qwen2'; expected 'llama'"),
        ({"more": {"split.count": 3}}, "one of 3 parts"),
        ({"more": {"llama.rope.scaling.type": "yarn"}}, "RoPE scaling of type `yarn`"),
        ({"more": {"llama.logit_scale": 2.0}}, r"not known here: llama\.logit_scale"),
        ({"more": {"llama.expert_count": 8}}, "expert_count"),
        ({"more": {"llama.rope.dimension_count": 8}}, "keys have the size 16, but values or rotations 8"),
        ({"more": {"llama.attention.key_length": 32}}, "keys have the size 32"),
        (
            {"more": {f"llama.{name}": 32 for name in ("attention.key_length", "rope.dimension_count")}},
            "values or rotations|`head_dim` 32",
        ),
        ({"more": {"llama.feed_forward_length": [64, 64, 64]}}, "feed_forward_length|intermediate_size"),
        ({"more": {"llama.feed_forward_length": 128}}, "do not fit its settings"),
        ({"without": ["llama.block_count"]}, "lacks 'block_count'"),
        ({"without": ["token_embd.weight"]}, r"lacks 'token_embd\.weight'"),
        ({"without": ["blk.1.attn_q.weight"]}, r"lacks tensors: 1 of them, such as blk\.1\.attn_q\.weight"),
        ({"tensors": {"rope_freqs.weight": torch.ones(8).numpy()}}, r"rope_freqs\.weight.*RoPE scaling"),
        ({"tensors": {"blk.0.attn_q.bias": torch.ones(64).numpy()}}, r"blk\.0\.attn_q\.bias.*biases"),
        ({"more": {"tokenizer.ggml.model": "bert"}}, "tokenizer of type 'bert'"),
        ({"more": {"tokenizer.ggml.pre": "deepseek-llm"}}, "'deepseek-llm'; known here: gpt-2, smollm, llama-bpe"),
    ],
)
def test_what_cannot_be_read_is_named(changes, words, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_gguf_llama(), **changes)
    with pytest.raises(ModelLoadError, match=words) as caught:
        read_gguf(path)
    assert "model.gguf" in str(caught.value)


def test_unknown_quantisations_are_named(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_gguf_llama(num_hidden_layers=1))
    corrupt_type(path, "blk.0.ffn_up.weight", 250)
    with pytest.raises(ModelLoadError, match=r"250.*does not know"):
        read_gguf(path)
    corrupt_type(path, "blk.0.ffn_up.weight", gguf.GGMLQuantizationType.Q8_1)
    with pytest.raises(ModelLoadError, match=r"blk\.0\.ffn_up\.weight.*Q8_1.*cannot undo"):
        read_gguf(path)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="no file"):
        read_gguf(tmp_path / "gone.gguf")
    path = tmp_path / "text.gguf"
    path.write_text("not a model" * 9)
    with pytest.raises(ModelLoadError, match=r"text\.gguf as GGUF"):
        read_gguf(path)
    whole = write_gguf(tmp_path / "model.gguf", make_gguf_llama()).read_bytes()
    for length in (0, 10, 500, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match=r"text\.gguf"):
            read_gguf(path)
