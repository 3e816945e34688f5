import json

import numpy as np
import pytest
import torch
import typer
from torch.nn import functional

from eval.vision import vision_policies as policies
from eval.vision.clip_statistics import drawn_blocks
from eval.vision.clips import Clip
from neuroflow_hf.evaluation.statistics import middle
from neuroflow_hf.video.preprocess import Preprocessor
from tests.conftest import IMAGE_SIZE

FRAMES = 16


def unit(*shape, seed=0):
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- one clip ---


@pytest.mark.parametrize("interval", [1, 3, 5, 12, 40])
def test_hold_every_is_the_mean_over_phases_of_a_naive_loop(interval):
    dense, dense_frames = unit(20, 8), 0
    outputs = policies.held_every(interval, dense)
    assert outputs.shape == (interval, 20, 8)
    for phase in range(interval):
        held = 0
        for frame in range(1, 20):
            if frame % interval == phase:
                held, dense_frames = frame, dense_frames + 1
            assert torch.equal(outputs[phase, frame], dense[held])
    assert dense_frames / interval / 19 == pytest.approx(1 / interval)


def test_delay_counts_until_the_output_is_nearer_to_now_than_to_before():
    before, after = torch.eye(2)
    dense = torch.stack([before] * 10 + [after] * 40)
    late = torch.stack([before] * 14 + [after] * 36)
    never = torch.stack([before] * 50)

    def delay(outputs, dense=dense):
        (found,) = policies.outcome(0, outputs, dense, [10]).delays
        return found

    assert delay(dense[None]) == 0 and delay(late[None]) == 4
    assert delay(never[None]) == policies.DELAY_CAP
    assert delay(never[None, :15], dense[:15]) == 5
    assert delay(policies.held_every(4, dense)) == np.mean([0, 1, 2, 3])


def test_a_statistic_is_taken_within_each_run():
    cosines = np.random.default_rng(0).uniform(0.5, 1, (3, 27))
    assert policies.statistic("pooled_mean", cosines).item() == pytest.approx(cosines.mean())
    p5 = np.quantile(cosines, 0.05, axis=1)
    assert policies.statistic("pooled_p5", cosines).item() == pytest.approx(p5.mean())
    drawn = np.tile(np.arange(27), (4, 1))
    np.testing.assert_allclose(policies.statistic("pooled_p5", cosines, drawn), p5.mean())


def test_blocks_are_of_neighbouring_frames_and_the_same_for_the_same_seed():
    drawn = policies.resampled_frames(40, seed=1)
    assert drawn.shape == (policies.RESAMPLES, 40)
    blocks = drawn.reshape(-1, 4, policies.BLOCK)
    assert ((np.diff(blocks, axis=-1) % 40) == 1).all()
    assert (drawn == policies.resampled_frames(40, seed=1)).all()
    assert (drawn != policies.resampled_frames(40, seed=2)).any()
    assert policies.resampled_frames(3, seed=1).max() == 2


def test_the_interval_covers_a_known_difference_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        baseline = rng.normal(0.9, 0.01, 100)
        method = baseline + rng.normal(0.003, 0.01, 100)
        drawn = drawn_blocks(np.random.default_rng(seed), 300, 100, policies.BLOCK)
        low, high = middle(
            policies.statistic("pooled_mean", method[None], drawn)
            - policies.statistic("pooled_mean", baseline[None], drawn)
        )
        covered += low <= 0.003 <= high
    assert 82 <= covered <= 99


def made_up(method, baselines, name="clip"):
    """A clip with a method's outcome, a family of baselines, and dense."""
    dense = policies.Outcome(1.0, np.ones((1, 40)), np.zeros(0))
    drawn = policies.resampled_frames(40, seed=0)
    clip = Clip(name, "", True, "", lambda: iter(()))
    return policies.Measured(clip, dense, {"ours": method}, {"ours": 0.5}, {"every k": baselines}, drawn)


def test_a_method_stands_beside_the_mixture_of_the_baselines_nearest_in_cost():
    cosines = np.random.default_rng(0).uniform(0.2, 0.6, (1, 40))
    cheap, dear = (policies.Outcome(cost, cosines + gain, np.zeros(0)) for cost, gain in ((0.1, 0.0), (0.5, 0.2)))
    row, draws = policies.judge("ours", made_up(policies.Outcome(0.2, cosines + 0.15, np.zeros(0)), [dear, cheap]))
    for name in policies.STATISTICS:
        value, control, family, low, high, verdict = row["equal_cost"][name]
        assert control == pytest.approx(policies.statistic(name, cosines).item() + 0.25 * 0.2)
        assert value - control == pytest.approx(0.1) and (family, verdict) == ("every k", "above")
        np.testing.assert_allclose(draws[name], 0.1)  # both sides are resampled alike
        assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


# --- all clips ---


def test_over_clips_the_interval_has_what_differs_between_clips():
    rng = np.random.default_rng(0)
    alike = rng.normal(0.1, 0.001, (20, 400))
    unlike = alike + rng.normal(0, 0.05, (20, 1))
    narrow, wide = (np.ptp(middle(policies.pooled_draws(draws))) for draws in (alike, unlike))
    assert narrow < 0.002 < 0.02 < wide


@pytest.fixture
def suite(vision, monkeypatch, tmp_path):
    """The script with two clips and the tiny model; gives what it writes, and what it says of recording."""

    def frames(seed):
        shown = np.random.default_rng(seed).integers(0, 256, (4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        return lambda: iter(shown.repeat(4, axis=0))

    def load_clips(names):
        return [Clip(name, "", True, "", frames(len(name)), (4, 12), FRAMES) for name in names]

    monkeypatch.setattr(policies, "build_tower", lambda folder: tmp_path / "cache" / "tower")
    monkeypatch.setattr(policies.NeuroFlowSiglipVisionModel, "from_pretrained", lambda folder: vision)
    monkeypatch.setattr(policies.Preprocessor, "from_pretrained", lambda folder: Preprocessor(IMAGE_SIZE))
    monkeypatch.setattr(policies, "load_clips", load_clips)
    methods = {"exact": {"mode": "dense"}, "context": {"mode": "context"}, "first": {"mode": "hold"}}
    monkeypatch.setattr(policies, "METHODS", methods)

    def run(**options):
        output = tmp_path / "out" / "policies.json"
        policies.main(clips="one,three", frames=FRAMES, output=output, **options)
        assert (output.parent / "policies.png").is_file()
        return json.loads(output.read_text())

    return run


def test_from_clips_to_the_report_and_the_picture(suite, capsys):
    report = suite()
    by_method = {row["method"]: row for row in report["pooled"]}
    assert len(report["clips"]) == 2 * len(by_method) == 6 and report["clips_measured"] == {"one": 16, "three": 16}
    for name in policies.STATISTICS:
        assert by_method["exact"][name]["value"] == pytest.approx(1, abs=1e-5)
        assert by_method["exact"][name]["control"] == pytest.approx(1, abs=1e-5)
        assert by_method["exact"][name]["clips"] == {"above": 0, "level": 2, "below": 0}
        assert by_method["first"][name]["difference"] == pytest.approx(0, abs=1e-5)
        assert by_method["first"][name]["value"] < 0.999
    assert by_method["first"]["cost"] == 0
    assert by_method["exact"]["delay"]["events"] == 4
    assert by_method["exact"]["delay"]["method"] == 0 < by_method["first"]["delay"]["method"]
    assert "pass" in capsys.readouterr().err
    again = suite(methods="exact,context")
    assert again["pooled"][0] == report["pooled"][0]
    assert "pass" not in capsys.readouterr().err  # all of it was recorded
    with pytest.raises(typer.BadParameter, match="Unknown methods: contxt"):
        suite(methods="contxt")
