"""`neuroflow generate` on a tiny random model: what it prints, and clean errors."""

import shutil

import pytest
import torch
from typer.testing import CliRunner

from neuroflow_hf import loading
from neuroflow_hf.cli.main import app
from neuroflow_hf.cli.options import parse_layers
from tests.cli.test_run import assert_clean_error, call

PROMPT = "the quick brown"
TOKENS = ("--max-new-tokens", 12)


@pytest.fixture(scope="module")
def dense_text(phi3_folder):
    model, tokenizer = loading.load_language_model(phi3_folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    return tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)


def test_dense_text(phi3_folder, dense_text):
    result = call("generate", PROMPT, "--model", phi3_folder, "--dense", *TOKENS)
    assert result.exit_code == 0, result.output
    assert result.stdout == dense_text + "\n"
    assert "12 tokens in" in result.stderr and "Bypassed" not in result.stderr


def test_the_bypass_rate_is_said(phi3_folder):
    result = call("generate", PROMPT, "--model", phi3_folder, "--threshold", -1, *TOKENS)
    assert result.exit_code == 0, result.output
    assert "Bypassed 100.0% of 11 steps (gate layer 1, reusing the attention of layer 3, thres" in result.stderr
    assert "P50" in result.stderr


def test_never_is_dense_and_compared(phi3_folder, dense_text):
    result = call("generate", PROMPT, "--model", phi3_folder, "--threshold", 2, "--compare", *TOKENS)
    assert result.stdout == dense_text + "\n"
    assert "Bypassed 0.0%" in result.stderr and "Against dense: the same 12 tokens." in result.stderr


def test_drift_is_said(phi3_folder):
    options = ("--threshold", -1, "--target", "block", "--cache-layers", "2-4", "--gate-layer", 0, "--compare")
    result = call("generate", PROMPT, "--model", phi3_folder, *options, *TOKENS)
    assert "of 12 positions; first other token at position" in result.stderr, result.output


@pytest.mark.parametrize("options", [(), ("--cache-layers", "2,3", "--threshold", -1, "--target", "block")])
def test_lossless_is_dense(phi3_folder, dense_text, options):
    result = call("generate", PROMPT, "--model", phi3_folder, "--lossless", "--compare", *options, *TOKENS)
    assert result.exit_code == 0, result.output
    assert result.stdout == dense_text + "\n"
    assert "Lossless: " in result.stderr and "the same 12 tokens" in result.stderr


def test_prompts_from_elsewhere(phi3_folder, dense_text, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    options = ["--model", str(phi3_folder), "--dense", "--max-new-tokens", "12"]
    assert call("generate", "--prompt-file", file, *options).stdout == dense_text + "\n"
    for prompt in ([], ["-"]):
        result = CliRunner().invoke(app, ["generate", *prompt, *options], input=PROMPT + "\n")
        assert result.stdout == dense_text + "\n"


def test_drawn_texts_follow_their_seed(phi3_folder):
    def text(seed):
        return call("generate", PROMPT, "--model", phi3_folder, "--temperature", 2, "--seed", seed, *TOKENS).stdout

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gate-layer", 9], ["layer 9", "5 layers, 0 to 4"]),
        (["--cache-layers", "7"], ["layer 7", "5 layers"]),
        (["--cache-layers", "high"], ["--cache-layers", "24, or 20,24"]),
        (["--cache-layers", "4-2"], ["2-4"]),
        (["--threshold", "nan"], ["threshold", "finite cosine"]),
        (["--target", "heads"], ["target"]),
        (["--max-consecutive", 0], ["max_consecutive", "at least 1"]),
        (["--guard-entropy", -1], ["guard_entropy"]),
        (["--dense", "--lossless"], ["--dense"]),
        (["--dense", "--threshold", 0.5], ["--dense"]),
        (["--temperature", -1], ["temperature"]),
        (["--temperature", 1, "--compare"], ["--compare"]),
        (["--max-new-tokens", 0], ["max_new_tokens"]),
        (["--max-new-tokens", 999], ["15 tokens", "256"]),
        (["--dtype", "float8"], ["float8"]),
        (["--device", "abacus"], ["abacus"]),
        (["--prompt-file", "gone"], ["PROMPT or --prompt-file"]),
    ],
)
def test_bad_options(phi3_folder, options, words):
    assert_clean_error(call("generate", PROMPT, "--model", phi3_folder, *options), *words)


def test_bad_prompts(phi3_folder, tmp_path):
    assert_clean_error(call("generate", " ", "--model", phi3_folder), "empty")
    assert_clean_error(call("generate", "--model", phi3_folder), "empty")
    assert_clean_error(call("generate", "--prompt-file", tmp_path / "gone", "--model", phi3_folder), "gone")
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert_clean_error(call("generate", "--prompt-file", tmp_path / "bytes", "--model", phi3_folder), "UTF-8")


def test_unusable_models(phi3_folder, stock_folder, tmp_path):
    assert_clean_error(call("generate", PROMPT, "--model", tmp_path / "gone"), tmp_path / "gone")
    assert_clean_error(call("generate", PROMPT, "--model", stock_folder), "siglip", "Phi-3")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(phi3_folder / name, bare / name)
    assert_clean_error(call("generate", PROMPT, "--model", bare), "tokenizer", bare)
    (bare / "model.safetensors").write_bytes(b"\0" * 40)
    assert_clean_error(call("generate", PROMPT, "--model", bare), bare)


def test_layers_are_parsed():
    assert parse_layers("24") == [24]
    assert parse_layers("20, 24-26") == [20, 24, 25, 26]
