"""Training of a drafter: it learns what drafts will read, goes on where it was stopped, and says whether it pays."""

import json

import pytest
import torch
from safetensors.torch import load_file

from neuroflow_hf.drift import train_drafter
from neuroflow_hf.drift.drafter_texts import read_texts, write_texts
from neuroflow_hf.drift.train_drafter import DrafterSettings, Learner, fit_drafter, frequent_tokens, judge
from neuroflow_hf.language.drafter import DrafterState
from tests.cli.test_run import assert_clean_error, call
from tests.conftest import assert_close_in_norm
from tests.phi3_models import FLOAT32, make_drafter, make_ours, random_ids, save_checkpoint

ROWS = [random_ids(1, 3 + number % 4, seed=number)[0].tolist() for number in range(24)]
SETTINGS = DrafterSettings(head_size=50, intermediate_size=16, epochs=2, batch=4)
NEW = 12


@pytest.fixture(scope="module")
def model():
    return make_ours()


@pytest.fixture(scope="module")
def texts(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(model, ROWS, NEW, folder)
    return read_texts(folder)


@torch.no_grad()
def test_texts_are_the_models_own(model, texts, tmp_path):
    assert [text.index for text in texts] == list(range(len(ROWS)))
    for text, row in zip(texts, ROWS, strict=True):
        ids = torch.tensor([row])
        assert torch.equal(text.tokens[None], model.generate(ids, max_new_tokens=NEW))
        output = model(text.tokens[None, :-1], output_hidden_states=True)
        assert_close_in_norm(text.states.float(), output.hidden_states[-1][0], 2e-3)  # half precision
        assert torch.equal(text.targets, output.logits[0].argmax(dim=-1))
        assert torch.equal(text.targets[text.begin - 1 :], text.tokens[text.begin :])


def test_finished_texts_are_kept(model, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("neuroflow_hf.drift.drafter_texts.BATCH", 8)
    write_texts(model, ROWS, NEW, tmp_path, done.append)
    assert done == [8, 16, 24]
    path = sorted(tmp_path.iterdir())[1]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    path.unlink()
    write_texts(model, ROWS, NEW, tmp_path)
    changed = [file for file in before if file.stat().st_mtime_ns != before[file]]
    assert path in changed and len(changed) == 8 < len(before)  # its batch


@torch.no_grad()
def test_training_sees_what_a_draft_sees(model, texts):
    """The n-th pass predicts at every place what the n-th token of a draft from there is predicted from."""
    drafter = make_drafter(model)
    learner, some = Learner(model, drafter), [texts[0], texts[5]]
    passes = [predicted for predicted, _, _ in learner.passes(some, 3)]
    for row, text in enumerate(some):
        tokens = text.tokens.tolist()
        for place in range(len(tokens) - 4):
            state = DrafterState(drafter, model)
            state.unread.append(text.states[: place + 1].float())
            for depth in range(3):
                state.logits_after(tokens[: place + 2 + depth])
                assert_close_in_norm(passes[depth][row, place], state.predicted[0, 0], FLOAT32)


def test_targets_are_those_after_the_tokens_read(model, texts):
    learner = Learner(model, make_drafter(model, range(61)))
    for depth, (predicted, states, targets) in enumerate(learner.passes(texts[:3], 2)):
        assert predicted.shape == states.shape
        for row, text in enumerate(texts[:3]):
            expected = text.targets[1 + depth :]
            assert torch.equal(targets[row, : len(expected)], expected)
            assert (targets[row, len(expected) :] == train_drafter.IGNORED).all()
            assert_close_in_norm(states[row, : len(expected)], text.states[1 + depth :].float(), FLOAT32)


def test_learns(model, texts, tmp_path):
    settings = DrafterSettings(head_size=61, intermediate_size=48, epochs=60, batch=4, learning_rate=1e-2)
    found = fit_drafter(model, texts[:8], texts[:8], tmp_path, "tiny", settings)
    assert sum(found["losses"][-4:]) < sum(found["losses"][:4])
    assert found["agreement"][found["best_epoch"] - 1][0] > 0.8


def test_an_interrupted_training_comes_to_the_same(model, texts, tmp_path, monkeypatch):
    whole = fit_drafter(model, texts[4:], texts[:4], tmp_path / "whole", "tiny", SETTINGS)
    stopped, out = [], tmp_path / "stopped"

    class Stop:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def is_set(self):
            stopped.append(1)
            return len(stopped) == 4

    with monkeypatch.context() as patched:
        patched.setattr(train_drafter, "stop_on_interrupt", Stop)
        assert fit_drafter(model, texts[4:], texts[:4], out, "tiny", SETTINGS) is None
    again = fit_drafter(model, texts[4:], texts[:4], out, "tiny", SETTINGS)
    assert again == whole
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(load_file(out / "model.safetensors")[name], value), name
    other = DrafterSettings(**vars(SETTINGS) | {"seed": 1})
    with pytest.raises(ValueError, match="training with other settings"):
        fit_drafter(model, texts[4:], texts[:4], out, "tiny", other)


def test_the_most_frequent_tokens(texts):
    found = frequent_tokens(texts, 5, 61)
    counts = torch.bincount(torch.cat([text.targets for text in texts]), minlength=61)
    assert counts[found].sum() == counts.sort(descending=True).values[:5].sum()


def test_the_expected_speed():
    class Agreeing:
        def agreement(self, _):
            return torch.tensor([50.0, 30.0, 10.0]).numpy(), 100

    found = judge(Agreeing(), [], [1, 1.2, 1.3, 1.6], 0.1)
    assert found["length"] == 2
    assert found["speed"] == pytest.approx(1.8 / 1.5)
    assert judge(Agreeing(), [], [1, 2, 3, 4], 0.1)["length"] == 0


def test_the_command(tmp_path):
    folder, prompts, out = save_checkpoint(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("".join(f"{'abcdefghij'[number]} text\n" for number in range(10)))
    how = ("tune-drafts", "--model", folder, "--prompts", prompts, "--out", out, "--new-tokens", 8, "--epochs", 2)
    result = call(*how)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "drafter.json").read_text())
    assert report["texts"] == 9 and len(report["agreement"]) == 2
    assert ("does not pay" in result.stdout) == (report["held_out"]["own"]["length"] == 0)
    for more, words in ((["--lossless"], "draft tokens accepted"), ([], "--lossless")):
        text = call("generate", "hello", "--model", folder, "--drafter", out, "--max-new-tokens", 9, *more)
        assert words in text.stderr, text.stderr
    prompts.write_text("hello\n")
    assert_clean_error(call(*how), "at least 10")
