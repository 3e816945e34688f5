"""`neuroflow convert` and what it writes: the same model and tokenizer, or nothing and an error that helps."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from neuroflow_hf.conversion.checkpoint import convert
from neuroflow_hf.conversion.gguf_file import read_gguf
from neuroflow_hf.loading import ModelLoadError, load_language_model
from tests.cli.test_run import assert_clean_error, call
from tests.gguf_files import make_gguf_llama, write_gguf
from tests.llama_models import make_llama
from tests.phi3_models import make_ours, make_tokenizer, random_ids


@pytest.fixture
def llama_folder(tmp_path):
    """A Llama's checkpoint in half precision, with its tokenizer."""
    folder = tmp_path / "llama"
    make_llama(vocab_size=30).half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_checkpoint_is_converted_with_its_tokenizer(llama_folder, tmp_path):
    out = tmp_path / "new" / "ours"
    result = call("convert", llama_folder, out)
    assert result.exit_code == 0, result.output
    assert f"Written to {out}: " in result.stdout and "model.safetensors" in result.stdout
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.float16}
    model, tokenizer = load_language_model(out)
    ids = random_ids(1, 8) % 30
    expected = make_llama(vocab_size=30).half().float()
    expected.model.rotary_emb = make_llama(vocab_size=30).model.rotary_emb
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert tokenizer("hello")["input_ids"] == AutoTokenizer.from_pretrained(llama_folder)("hello")["input_ids"]
    result = call("generate", "hello", "--model", out, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output


def test_texts_are_split_as_the_tokenizers_file_says(llama_folder, tmp_path):
    _, tokenizer = read_gguf(write_gguf(tmp_path / "model.gguf", make_gguf_llama()))
    tokenizer.save_pretrained(llama_folder)
    path = llama_folder / "tokenizer_config.json"  # as SmolLM2's repository has it; this class splits as GPT-2
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    convert(llama_folder, tmp_path / "ours")
    again = load_language_model(tmp_path / "ours")[1]
    assert again("\n  12 the")["input_ids"] == tokenizer("\n  12 the")["input_ids"]
    assert again.chat_template == tokenizer.chat_template and again.eos_token == tokenizer.eos_token
    assert again.model_max_length == tokenizer.model_max_length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_can_be_chosen(dtype, llama_folder, tmp_path):
    assert call("convert", llama_folder, tmp_path / "ours", "--dtype", dtype).exit_code == 0
    stored = load_file(tmp_path / "ours" / "model.safetensors").values()
    assert {weight.dtype for weight in stored} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("named", ["by its path", "in its folder"])
def test_a_gguf_file_is_converted(named, tmp_path):
    llama = make_gguf_llama()
    path = write_gguf(tmp_path / "model.gguf", llama)
    arguments = (
        [path, tmp_path / "ours"] if named == "by its path" else [tmp_path, tmp_path / "ours", "--gguf", path.name]
    )
    result = call("convert", *arguments)
    assert result.exit_code == 0, result.output
    model, tokenizer = load_language_model(tmp_path / "ours")
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)
    assert tokenizer.chat_template and tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


# --- errors --------------------------------------------------------------------------------------------------------


def test_what_is_there_stays(llama_folder, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").write_text("mine")
    assert_clean_error(call("convert", llama_folder, tmp_path / "ours"), tmp_path / "ours", "not an empty folder")
    assert_clean_error(call("convert", llama_folder, tmp_path / "ours" / "mine"), "not an empty folder")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"attention_bias": True, "mlp_bias": True}, ["attention_bias", "mlp_bias"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["`linear`"]),
        ({"head_dim": 32}, ["`head_dim` 32"]),
        ({"model_type": "mistral"}, ["'mistral'", "expected a Llama"]),
        ({"model_type": "phi3"}, ["Phi-3", "needs no conversion"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq"]),
    ],
)
def test_what_cannot_be_converted_is_named_before_weights_are_read(values, words, llama_folder, tmp_path):
    change_config(llama_folder, **values)
    (llama_folder / "model.safetensors").unlink()
    assert_clean_error(call("convert", llama_folder, tmp_path / "ours"), llama_folder, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_unusable_checkpoints(llama_folder, tmp_path):
    out = tmp_path / "ours"
    assert_clean_error(call("convert", tmp_path / "gone", out), tmp_path / "gone")
    assert_clean_error(call("convert", tmp_path, out, "--gguf", "gone.gguf"), "gone.gguf")
    assert_clean_error(call("convert", llama_folder, out, "--dtype", "int8"), "int8")
    (llama_folder / "model.safetensors").write_bytes(b"\0" * 40)
    assert_clean_error(call("convert", llama_folder, out), llama_folder)
    bare = tmp_path / "bare"
    make_llama(vocab_size=30).save_pretrained(bare)
    assert_clean_error(call("convert", bare, out), "tokenizer", bare)
    ours = tmp_path / "phi3"
    make_ours().save_pretrained(ours)
    assert_clean_error(call("convert", ours, out), "needs no conversion")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "llama", "phi3"]


def test_other_commands_name_the_conversion(llama_folder, tmp_path):
    file = write_gguf(tmp_path / "the model.gguf", make_gguf_llama())
    assert_clean_error(call("convert", tmp_path, tmp_path / "ours"), "--gguf 'the model.gguf'")
    for command in (["generate", "hello"], ["drift", "--out", tmp_path / "drift"]):
        found = call(*command, "--model", llama_folder)
        assert_clean_error(found, "holds a Llama", f"`neuroflow convert {llama_folder} OUT`")
    for source in (file, tmp_path):
        with pytest.raises(ModelLoadError, match=rf"GGUF.*`neuroflow convert '{file}' OUT`"):
            load_language_model(source)
