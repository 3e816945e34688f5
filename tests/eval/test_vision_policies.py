import json

import numpy as np
import pytest
import torch
import typer
from torch.nn import functional

from eval.vision import vision_policies as policies
from eval.vision.clip_recorder import between_frames, cosines_of_held_patches, there_and_back
from eval.vision.clip_statistics import drawn_blocks
from eval.vision.clips import Clip
from eval.vision.codec_motion import codec_motion
from neuroflow_hf.evaluation.statistics import middle
from neuroflow_hf.video.preprocess import Preprocessor
from tests.conftest import IMAGE_SIZE, make_stock_tower

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


def test_blocks_are_of_neighbouring_frames():
    drawn = drawn_blocks(np.random.default_rng(1), 50, 40, policies.BLOCK)
    assert drawn.shape == (50, 40)
    assert ((np.diff(drawn.reshape(-1, 4, policies.BLOCK), axis=-1) % 40) == 1).all()
    assert len(set(drawn[:, 0])) > 10


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


def test_a_triggered_hold_encodes_where_the_distance_to_the_held_frame_exceeds_the_level():
    places = torch.tensor([0.0, 1.0, 2.5, 3.0, 6.0, 6.5])
    distance = (places[:, None] - places).abs()
    assert policies.held_when(distance, 2.0) == [0, 0, 2, 2, 4, 4]
    assert policies.held_when(distance, 9.0) == [0] * 6
    assert policies.held_when(distance, 0.0) == [0, 1, 2, 3, 4, 5]


def test_held_patches_equal_a_naive_loop():
    dense, found = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)), []
    for phase in range(3):
        held = None
        for frame in range(7):
            if frame % 3 == phase:
                held = dense[frame]
            if held is not None and frame:
                found.append(functional.cosine_similarity(dense[frame], held, dim=-1))
    torch.testing.assert_close(cosines_of_held_patches(between_frames(dense), 3), torch.stack(found))


def test_a_held_frame_is_replaced_when_what_happened_since_adds_up():
    amounts = torch.tensor([9.0, 0.5, 0.5, 0.25, 0.0, 2.0, 0.1])
    assert policies.held_since(amounts, 1.0) == [0, 0, 0, 3, 3, 5, 5]
    assert policies.held_since(amounts, 100.0) == [0] * 7


def test_the_codec_sees_what_moves_and_a_still_picture_costs_nothing():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = [picture] * 3 + [np.roll(picture, 8 * shift, axis=1) for shift in range(1, 4)]
    displacement, size = codec_motion(frames)
    assert len(displacement) == len(size) == 6
    assert displacement[0] == size[0] == 0
    assert displacement[1:3].max() < 0.005 < displacement[3:].min()
    assert displacement[3:].max() < 0.2  # 8 of 128 columns
    assert size[1:3].max() < size[3:].min()


def made_up(method, baselines, name="clip"):
    """A clip with a method's outcome, a family of baselines, and dense."""
    dense = policies.Outcome(1.0, np.ones((1, 40)), np.zeros(0), 1.0)
    drawn = drawn_blocks(np.random.default_rng(0), 50, 40, policies.BLOCK)
    clip = Clip(name, "", lambda: iter(()))
    return policies.Measured(
        clip, dense, {"ours": method}, {}, {"every k": baselines, policies.ORACLE: [dense]}, drawn
    )


def test_a_method_stands_beside_the_mixture_of_the_baselines_nearest_in_cost():
    cosines = np.random.default_rng(0).uniform(0.2, 0.6, (1, 40))
    cheap, dear = (
        policies.Outcome(cost, cosines + gain, np.zeros(0), cost) for cost, gain in ((0.1, 0.0), (0.5, 0.2))
    )
    measured = made_up(policies.Outcome(0.2, cosines + 0.15, np.zeros(0), 0.3), [dear, cheap])
    row, draws = policies.judge("ours", {"mode": "context", "cost_budget": 0.4}, measured)
    for name in policies.STATISTICS:
        value, control, family, low, high, verdict = row["equal_cost"][name]
        assert control == pytest.approx(policies.statistic(name, cosines).item() + 0.25 * 0.2)
        assert value - control == pytest.approx(0.1) and (family, verdict) == ("every k", "above")
        np.testing.assert_allclose(draws[name], 0.1)  # both sides are resampled alike
        assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
        value, control, *_ = row["equal_time"][name]  # half-way between the two
        assert value - control == pytest.approx(0.05)
        assert row["oracle"][name] == pytest.approx(1)
        value, control, *_, verdict = row["beforehand"][name]  # at the budget, not at the method's cost
        assert value - control == pytest.approx(0) and verdict == "level"
    row, _ = policies.judge("ours", {"mode": "context", "min_fidelity": 0.5}, measured)
    assert "beforehand" not in row
    assert row["promise"] == {"cosine": 0.5, "kept": (cosines + 0.15 >= 0.5).mean()}


# --- all clips ---


def test_over_clips_the_interval_has_what_differs_between_clips():
    rng = np.random.default_rng(0)
    alike = rng.normal(0.1, 0.001, (20, 400))
    unlike = alike + rng.normal(0, 0.05, (20, 1))
    narrow, wide = (np.ptp(middle(policies.pooled_draws(draws))) for draws in (alike, unlike))
    assert narrow < 0.002 < 0.02 < wide


@pytest.fixture
def suite(vision, monkeypatch, tmp_path):
    """The script with two clips and the tiny model; gives what it writes."""

    def load_clip(name, home):
        shown = np.random.default_rng(len(name)).integers(0, 256, (4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        return Clip(name, "fixed camera", lambda: iter(shown.repeat(4, axis=0)), (4, 12), FRAMES)

    monkeypatch.setattr(policies, "build_tower", lambda folder: tmp_path / "cache" / "tower")
    monkeypatch.setattr(policies.NeuroFlowSiglipVisionModel, "from_pretrained", lambda folder: vision)
    monkeypatch.setattr(policies.Preprocessor, "from_pretrained", lambda folder: Preprocessor(IMAGE_SIZE))
    monkeypatch.setattr(policies, "load_clip", load_clip)
    monkeypatch.setattr(policies, "NAMES", ("one", "walker"))
    methods = {"exact": {"mode": "dense"}, "context": {"mode": "context"}, "first": {"mode": "hold"}}
    monkeypatch.setattr(policies, "METHODS", methods)
    monkeypatch.setattr(policies, "RESAMPLES", 50)
    monkeypatch.setattr(policies, "FRAMES", FRAMES)
    monkeypatch.setattr(policies, "LONGEST_INTERVAL", FRAMES)

    def run(**options):
        output = tmp_path / "out" / "policies.json"
        policies.main(**{"methods": ",".join(methods), "output": output, **options})
        assert (output.parent / ("policies_dinov2.png" if "tower" in options else "policies.png")).is_file()
        return json.loads(output.read_text())

    return run


def test_from_clips_to_the_report_and_the_picture(suite, vision, monkeypatch):
    report = suite()
    pooled = {(row["method"], row["clips"]): row for row in report["pooled"]}
    assert {(part, pooled[method, part]["count"]) for method, part in pooled} == {
        ("all", 2),
        ("held out", 1),  # one of the names is of a clip that the controller was made on
        ("fixed camera", 2),
    }
    assert len(report["clips"]) == 2 * 3 and report["frames"] == FRAMES
    for name in policies.STATISTICS:
        assert pooled["exact", "all"][name]["value"] == pytest.approx(1, abs=1e-5)
        assert pooled["exact", "all"][name]["control"] == pytest.approx(1, abs=1e-5)
        assert pooled["exact", "all"][name]["clips"] == {"above": 0, "level": 2, "below": 0}
        assert pooled["first", "all"][name]["difference"] == pytest.approx(0, abs=1e-5)
        assert pooled["first", "all"][name]["value"] < 0.999
    assert pooled["first", "all"]["cost"] == 0
    assert pooled["exact", "all"]["patches"]["own"]["p1"] == pytest.approx(1, abs=1e-5)
    assert pooled["exact", "all"]["delay"]["events"] == 4
    assert pooled["exact", "all"]["delay"]["method"] == 0 < pooled["first", "all"]["delay"]["method"]

    monkeypatch.setattr(vision, "forward", None)  # all of it was recorded
    again = suite(methods="exact,context")
    assert again["pooled"][0] == report["pooled"][0]
    with pytest.raises(typer.BadParameter, match="Unknown methods: contxt"):
        suite(methods="contxt")


def test_dinov2_is_measured_as_it_is(suite, monkeypatch):
    monkeypatch.setattr(policies, "load_original_from_wheels", lambda folder: make_stock_tower("dinov2"))
    report = suite(tower="dinov2")
    (exact,) = (row for row in report["pooled"] if row["method"] == "exact" and row["clips"] == "all")
    assert report["tower"].startswith("DINOv2-small, ") and exact["cost"] == 1
    assert exact["patches"]["own"]["p1"] == pytest.approx(1, abs=1e-5)
    assert len(exact["patches"]["held"]) == len(exact["patches"]["own"])


def test_a_short_clip_is_played_forward_and_back():
    frames = list(there_and_back(lambda: iter(np.arange(4)), 9))
    assert frames == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert list(there_and_back(lambda: iter(np.arange(4)), 3)) == [0, 1, 2]
