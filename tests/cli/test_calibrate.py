"""`neuroflow calibrate` on a tiny random model: what it writes, and that nothing is half written."""

import json
import shutil

import pytest

from neuroflow_hf import NeuroFlowPhi3ForCausalLM, loading
from neuroflow_hf.conversion import smollm2
from neuroflow_hf.drift.calibrate import PROMPTS
from tests.cli.test_generate import PROMPT, TOKENS
from tests.cli.test_run import assert_clean_error, call


@pytest.fixture
def checkpoint(chat_folder, tmp_path):
    """A copy to change."""
    return shutil.copytree(chat_folder, tmp_path / "checkpoint")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_calibrated_copy(checkpoint, tmp_path):
    before, out = contents(checkpoint), tmp_path / "new" / "out"
    result = call("calibrate", "--model", checkpoint, "--out", out, "--rate", 0.3, "--cache-layers", "3,4")
    assert result.exit_code == 0, result.output
    after = contents(out)
    assert contents(checkpoint) == before and after.keys() == before.keys()
    assert all(after[name] == content for name, content in before.items() if name != "config.json")
    config = NeuroFlowPhi3ForCausalLM.from_pretrained(out).config
    threshold = config.bypass_similarities["1"][70]
    assert config.bypass == {"cache_layers": [3, 4], "threshold": pytest.approx(threshold, abs=2e-6)}
    for words in (f"rate of 0.3: {config.bypass['threshold']:g}", f"{len(PROMPTS)} prompts"):
        assert words in result.stdout
    # what the commands make of it
    assert "Bypassed" not in call("generate", PROMPT, "--model", out, *TOKENS).stderr
    for options in (["--bypass"], ["--rate", 0.3]):
        result = call("generate", PROMPT, "--model", out, *options, *TOKENS)
        assert "layer 3, 4, threshold" in result.stderr and "built-in prompts" not in result.stderr, result.output


@pytest.mark.parametrize("options", [[], ["--model", "smollm2"], ["--model", "some/name"]])
def test_a_copy_of_smollm2_and_of_a_name_on_the_hub(checkpoint, tmp_path, monkeypatch, options):
    load = loading.load_language_model
    monkeypatch.setattr(smollm2, "smollm2_folder", lambda *_: checkpoint)
    monkeypatch.setattr("neuroflow_hf.loading.load_language_model", lambda _, *more: load(checkpoint, *more))
    monkeypatch.setattr("neuroflow_hf.drift.calibrate.snapshot_download", lambda _: str(checkpoint))
    before, out = contents(checkpoint), tmp_path / "out"
    result = call("calibrate", *options, "--out", out, "--new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert contents(checkpoint) == before and contents(out).keys() == before.keys()
    assert NeuroFlowPhi3ForCausalLM.from_pretrained(out).config.bypass_similarities.keys() == {"1"}


def test_in_place(checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\nab\n")
    before = contents(checkpoint)
    options = ("--out", checkpoint, "--prompts", prompts, "--gate-layer", 2, "--new-tokens", 8)
    result = call("calibrate", "--model", checkpoint, *options)
    assert result.exit_code == 0, result.output
    after = contents(checkpoint)
    old, new = (json.loads(files.pop("config.json")) for files in (before, after))
    assert after == before
    assert (old.pop("bypass_similarities"), new.pop("bypass_similarities").keys()) == (None, {"2"})
    assert new == old and new["bypass"] is None
    assert call("calibrate", "--model", checkpoint, "--out", checkpoint, "--new-tokens", 8).exit_code == 0
    assert json.loads((checkpoint / "config.json").read_text())["bypass_similarities"].keys() == {"1", "2"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cache-layers", "3"], ["--rate"]),
        (["--rate", 2], ["rate", "at most 1"]),
        (["--gate-layer", 9], ["layer 9"]),
        (["--new-tokens", 1], ["at least 2"]),
        (["--new-tokens", 255], ["room for 256"]),
        (["--prompts", "gone.txt"], ["gone.txt"]),
    ],
)
def test_what_cannot_be_calibrated_changes_nothing(checkpoint, options, words):
    before = contents(checkpoint)
    assert_clean_error(call("calibrate", "--model", checkpoint, "--out", checkpoint, *options), *words)
    assert contents(checkpoint) == before


def test_nothing_is_half_written(checkpoint, tmp_path, monkeypatch):
    before, out = contents(checkpoint), tmp_path / "out"

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("neuroflow_hf.drift.calibrate.write_whole", full)
    for target in (checkpoint, out):
        assert_clean_error(call("calibrate", "--model", checkpoint, "--new-tokens", 8, "--out", target), "no space")
    assert contents(checkpoint) == before and sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert_clean_error(call("calibrate", "--model", checkpoint, "--out", tmp_path / "taken"), "not an empty folder")
