"""`neuroflow generate` and `neuroflow drift` on a tiny random model: what they print and write, and clean errors."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from neuroflow_hf import loading
from neuroflow_hf.cli.main import app
from neuroflow_hf.cli.options import parse_layers
from tests.cli.test_main import assert_clean_error, call
from tests.phi3_models import make_ours, make_tokenizer

PROMPT = "the quick brown"
TOKENS = ("--max-new-tokens", 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with its tokenizer."""
    path = tmp_path_factory.mktemp("phi3")
    make_ours(num_hidden_layers=5, vocab_size=30).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense_text(folder):
    model, tokenizer = loading.load_language_model(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    return tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)


# --- generate ------------------------------------------------------------------------------------------------------


def test_dense_text(folder, dense_text):
    result = call("generate", PROMPT, "--model", folder, "--dense", *TOKENS)
    assert result.exit_code == 0, result.output
    assert result.stdout == dense_text + "\n"
    assert "12 tokens in" in result.stderr and "Bypassed" not in result.stderr


def test_the_bypass_rate_is_said(folder):
    result = call("generate", PROMPT, "--model", folder, "--threshold", -1, *TOKENS)
    assert result.exit_code == 0, result.output
    assert "Bypassed 100.0% of 11 steps (gate layer 1, reusing the attention of layer 3, thres" in result.stderr
    assert "P50" in result.stderr


def test_never_is_dense_and_compared(folder, dense_text):
    result = call("generate", PROMPT, "--model", folder, "--threshold", 2, "--compare", *TOKENS)
    assert result.stdout == dense_text + "\n"
    assert "Bypassed 0.0%" in result.stderr and "Against dense: the same 12 tokens." in result.stderr


def test_drift_is_said(folder):
    options = ("--threshold", -1, "--target", "block", "--cache-layers", "2-4", "--gate-layer", 0, "--compare")
    result = call("generate", PROMPT, "--model", folder, *options, *TOKENS)
    assert "of 12 positions; first other token at position" in result.stderr, result.output


@pytest.mark.parametrize("options", [(), ("--cache-layers", "2,3", "--threshold", -1, "--target", "block")])
def test_lossless_is_dense(folder, dense_text, options):
    result = call("generate", PROMPT, "--model", folder, "--lossless", "--compare", *options, *TOKENS)
    assert result.exit_code == 0, result.output
    assert result.stdout == dense_text + "\n"
    assert "Lossless: " in result.stderr and "the same 12 tokens" in result.stderr


def test_prompts_from_elsewhere(folder, dense_text, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    options = ["--model", str(folder), "--dense", "--max-new-tokens", "12"]
    assert call("generate", "--prompt-file", file, *options).stdout == dense_text + "\n"
    for prompt in ([], ["-"]):
        result = CliRunner().invoke(app, ["generate", *prompt, *options], input=PROMPT + "\n")
        assert result.stdout == dense_text + "\n"


def test_drawn_texts_follow_their_seed(folder):
    def text(seed):
        return call("generate", PROMPT, "--model", folder, "--temperature", 2, "--seed", seed, *TOKENS).stdout

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
        (["--temperature", 1, "--lossless"], ["greedy"]),
        (["--max-new-tokens", 0], ["max_new_tokens"]),
        (["--max-new-tokens", 999], ["15 tokens", "256"]),
        (["--dtype", "float8"], ["float8"]),
        (["--device", "abacus"], ["abacus"]),
        (["--prompt-file", "gone"], ["PROMPT or --prompt-file"]),
    ],
)
def test_bad_options(folder, options, words):
    assert_clean_error(call("generate", PROMPT, "--model", folder, *options), *words)


def test_bad_prompts(folder, tmp_path):
    assert_clean_error(call("generate", " ", "--model", folder), "empty")
    assert_clean_error(call("generate", "--model", folder), "empty")
    assert_clean_error(call("generate", "--prompt-file", tmp_path / "gone", "--model", folder), "gone")
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert_clean_error(call("generate", "--prompt-file", tmp_path / "bytes", "--model", folder), "UTF-8")


def test_unusable_models(folder, stock_folder, tmp_path, monkeypatch):
    assert_clean_error(call("generate", PROMPT, "--model", tmp_path / "gone"), tmp_path / "gone")
    assert_clean_error(call("generate", PROMPT, "--model", stock_folder), "siglip", "Phi-3")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare / name)
    assert_clean_error(call("generate", PROMPT, "--model", bare), "tokenizer", bare)
    (bare / "model.safetensors").write_bytes(b"\0" * 40)
    assert_clean_error(call("generate", PROMPT, "--model", bare), bare)
    monkeypatch.setattr(loading, "EMBEDDED_LANGUAGE_MODEL", tmp_path / "none")
    assert_clean_error(call("generate", PROMPT), "none", "--model")


def test_layers_are_parsed():
    assert parse_layers("24") == [24]
    assert parse_layers("20, 24-26") == [20, 24, 25, 26]


# --- drift ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "task": task} for task in ("code", "prose") for text in (PROMPT, "hello there", "ab")]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_one_bypass(folder, prompts, tmp_path):
    out = tmp_path / "out"
    options = ("--model", folder, "--prompts", prompts, "--out", out, "--new-tokens", 6, "--threshold", -1)
    result = call("drift", *options)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"drift.json", "drift.md", "drift.png"}
    report = json.loads((out / "drift.json").read_text())
    (entry,) = report["configurations"]
    assert entry["options"]["threshold"] == -1 and entry["tasks"]["all"]["bypass_rate"] == 1
    assert report["command"].startswith("neuroflow")
    for words in ("own, attention, threshold -1", "dense, bfloat16", "100.0%", "Written to"):
        assert words in result.stdout


def test_the_grid(folder, prompts, tmp_path):
    out = tmp_path / "out"
    options = ("--model", folder, "--prompts", prompts, "--out", out, "--quick", "--max-prompts", 2, "--new-tokens", 6)
    result = call("drift", *options)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"drift.json", "drift.md", "drift.png", "reachable.png"}
    report = json.loads((out / "drift.json").read_text())
    assert report["prompts"]["of_task"] == {"code": 2, "prose": 2} and report["settings"]["new_tokens"] == 32
    assert "1->24, attention" in result.stdout
    again = call("drift", *options)
    assert again.exit_code == 0 and json.loads((out / "drift.json").read_text())["noise"] == report["noise"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cache-layers", "9"], ["layer 9", "5 layers"]),
        (["--threshold", "nan"], ["threshold"]),
        (["--new-tokens", 1], ["new_tokens", "at least 2"]),
        (["--new-tokens", 256], ["room for 256"]),
        (["--batch-size", 0], ["batch_size"]),
        (["--max-prompts", 0], ["--max-prompts"]),
        (["--prompts", "gone.jsonl"], ["gone.jsonl"]),
    ],
)
def test_bad_drift_options(folder, prompts, tmp_path, options, words):
    out = tmp_path / "out"
    result = call("drift", "--model", folder, "--prompts", prompts, "--out", out, *options)
    assert_clean_error(result, *words)
    assert not list(out.glob("*"))


def test_bad_files_of_prompts(folder, prompts, tmp_path, monkeypatch):
    prompts.write_text(prompts.read_text() + "\n{")
    result = call("drift", "--model", folder, "--prompts", prompts)
    assert_clean_error(result, "prompts.jsonl, line 7", "not JSON")
    prompts.write_text("")
    assert_clean_error(call("drift", "--model", folder, "--prompts", prompts), "no prompts")
    monkeypatch.setattr(loading, "EMBEDDED_PROMPTS", tmp_path / "gone.jsonl")
    assert_clean_error(call("drift", "--model", folder), "gone.jsonl", "--prompts")


def test_ctrl_c_says_how_to_go_on(folder, prompts, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("neuroflow_hf.drift.run.DriftEvaluation.run", interrupted)
    result = call("drift", "--model", folder, "--prompts", prompts, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "the same command continues" in result.stderr


def test_help():
    assert {"generate", "drift"} <= set(call("--help").stdout.split())
