"""`neuroflow generate` on a tiny random model: what it prints, and clean errors."""

import shutil
import warnings

import pytest
import torch
from typer.testing import CliRunner

from neuroflow_hf import loading
from neuroflow_hf.cli.main import app
from tests.cli.test_run import assert_clean_error, call
from tests.phi3_models import make_chat_tokenizer, save_checkpoint

PROMPT = "the quick brown"
TOKENS = ("--max-new-tokens", 12)


@pytest.fixture(scope="module")
def dense_text(phi3_folder):
    model, tokenizer = loading.load_language_model(phi3_folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    return tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)


def test_nothing_is_bypassed_unless_asked_for(phi3_folder, dense_text):
    result = call("generate", PROMPT, "--model", phi3_folder, *TOKENS)
    assert result.exit_code == 0, result.output
    assert result.stdout == dense_text + "\n"
    assert "12 tokens in" in result.stderr and "Bypassed" not in result.stderr


def test_the_bypass_rate_is_said(phi3_folder):
    result = call("generate", PROMPT, "--model", phi3_folder, "--threshold", -1, *TOKENS)
    assert result.exit_code == 0, result.output
    assert "Bypassed 100.0% of 11 steps (gate layer 1, reusing the attention of layer 3, thres" in result.stderr
    assert "P50" in result.stderr and "Warning" not in result.stderr


def test_a_threshold_that_is_nearly_always_reached_warns(phi3_folder):
    options = ("--threshold", -0.999, "--max-new-tokens", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the command says it once, in its own words
        result = call("generate", PROMPT, "--model", phi3_folder, *options)
    assert result.stderr.count("Warning: The threshold -0.999 bypassed more than 90%") == 1, result.output


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
    assert (" and 0 to draft" in result.stderr) == (not options)


@pytest.mark.parametrize("options", [("--rate", 0.3), ("--rate", 0.3, "--lossless")])
def test_a_rate_without_calibration_calibrates(phi3_folder, options):
    result = call("generate", PROMPT, "--model", phi3_folder, *options, *TOKENS)
    assert result.exit_code == 0, result.output
    assert "8 built-in prompts" in result.stderr and "neuroflow calibrate" in result.stderr


def test_an_answer_in_the_chat_template(chat_folder):
    model, tokenizer = loading.load_language_model(chat_folder)

    def expected(*ids):
        ids = torch.tensor([ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=30)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"

    def found(*options):
        return call("generate", "ab", "--model", chat_folder, *options, *TOKENS).stdout

    assert found() == expected(32, 3, 4, 30, 33)
    assert found("--system", "c") == expected(31, 5, 30, 32, 3, 4, 30, 33)
    assert found("--raw") == expected(3, 4)


def test_a_text_that_ends_at_once(tmp_path):
    folder = save_checkpoint(tmp_path, make_chat_tokenizer())
    model, _ = loading.load_language_model(folder)
    model.lm_head.weight.data[:] = 0  # all tokens are equal, and the first one is taken
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    result = call("generate", PROMPT, "--model", folder, "--threshold", 0.5, *TOKENS)
    assert result.exit_code == 0 and result.stdout == "\n"
    assert "ended the text at once" in result.stderr and "nan" not in result.stderr


def test_prompts_that_are_piped_in(phi3_folder, dense_text):
    options = ["--model", str(phi3_folder), "--max-new-tokens", "12"]
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
        (["--gate-layer", 9, "--rate", 0.2], ["layer 9", "5 layers, 0 to 4"]),
        (["--cache-layers", "7"], ["layer 7", "5 layers"]),
        (["--cache-layers", "high"], ["--cache-layers", "24, or 20,24"]),
        (["--cache-layers", "4-2"], ["2-4"]),
        (["--threshold", "nan"], ["threshold", "finite cosine"]),
        (["--target", "heads"], ["target"]),
        (["--max-consecutive", 0], ["max_consecutive", "at least 1"]),
        (["--guard-entropy", -1], ["guard_entropy"]),
        (["--rate", 1.5], ["rate", "at most 1"]),
        (["--rate", 0.2, "--threshold", 0.5], ["threshold", "rate", "one of them"]),
        (["--bypass"], ["has no bypass", "neuroflow calibrate"]),
        (["--bypass", "--lossless"], ["--lossless", "--bypass"]),
        (["--lossless", "--gate-layer", 9], ["layer 9"]),
        (["--temperature", -1], ["temperature"]),
        (["--top-p", 0.5], ["top_p", "temperature"]),
        (["--temperature", 1, "--compare"], ["--compare"]),
        (["--max-new-tokens", 0], ["max_new_tokens"]),
        (["--system", "be good"], ["no chat template"]),
        (["--system", "be good", "--raw"], ["chat template"]),
        (["--dtype", "float8"], ["float8"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_bad_options(phi3_folder, options, words):
    result = call("generate", PROMPT, "--model", phi3_folder, *options)
    assert_clean_error(result, *words)
    assert not result.stdout


def test_bad_prompts(phi3_folder):
    assert_clean_error(call("generate", " ", "--model", phi3_folder), "empty")
    assert_clean_error(call("generate", "a" * 300, "--model", phi3_folder), "300 tokens", "256")
    assert_clean_error(call("generate", "--model", phi3_folder), "empty")
    found = CliRunner().invoke(app, ["generate", "--model", str(phi3_folder)], input=b"\xff")
    assert_clean_error(found, "UTF-8")


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
