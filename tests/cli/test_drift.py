"""`neuroflow drift` on a tiny random model: what it prints and writes, and clean errors."""

import json

import pytest

from neuroflow_hf import loading
from tests.cli.test_generate import PROMPT
from tests.cli.test_run import assert_clean_error, call


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "task": task} for task in ("code", "prose") for text in (PROMPT, "hello there", "ab")]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_one_bypass(phi3_folder, prompts, tmp_path):
    out = tmp_path / "out"
    options = ("--model", phi3_folder, "--prompts", prompts, "--out", out, "--new-tokens", 6, "--threshold", -1)
    result = call("drift", *options)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"drift.json", "drift.md", "drift.png"}
    report = json.loads((out / "drift.json").read_text())
    (entry,) = report["configurations"]
    assert entry["options"]["threshold"] == -1 and entry["tasks"]["all"]["bypass_rate"] == 1
    assert report["command"].startswith("neuroflow")
    for words in ("1->3, attention, threshold -1", "dense, bfloat16", "100.0%", "Written to"):
        assert words in result.stdout


def test_the_grid(phi3_folder, prompts, tmp_path):
    out = tmp_path / "out"
    how = ("--quick", "--max-prompts", 2, "--new-tokens", 6)
    options = ("--model", phi3_folder, "--prompts", prompts, "--out", out, *how)
    result = call("drift", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "drift.json").read_text())
    assert report["prompts"]["of_task"] == {"code": 2, "prose": 2} and report["settings"]["new_tokens"] == 32
    assert "1->4, attention, for 20%" in result.stdout
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
def test_bad_drift_options(phi3_folder, prompts, tmp_path, options, words):
    out = tmp_path / "out"
    result = call("drift", "--model", phi3_folder, "--prompts", prompts, "--out", out, *options)
    assert_clean_error(result, *words)
    assert not list(out.glob("*"))


def test_no_prompts(phi3_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "EMBEDDED_PROMPTS", tmp_path / "gone.jsonl")
    assert_clean_error(call("drift", "--model", phi3_folder), "gone.jsonl", "--prompts")


def test_ctrl_c_says_how_to_go_on(phi3_folder, prompts, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("neuroflow_hf.drift.run.DriftEvaluation.run", interrupted)
    result = call("drift", "--model", phi3_folder, "--prompts", prompts, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "the same command continues" in result.stderr
