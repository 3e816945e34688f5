import json
import math

import numpy as np
import pytest
import torch

from eval.vision import clips
from eval.vision import vision_policies as policies
from neuroflow_hf.video.preprocess import Preprocessor
from tests.conftest import IMAGE_SIZE, random_video

FRAMES = 30
CONTEXT = {"mode": "context"}


def random_pairs(frames=12, seed=0):
    """Symmetric [frames, frames], zero on the diagonal, larger between frames that are far apart."""
    rng = np.random.default_rng(seed)
    path = rng.uniform(0, 1, frames).cumsum()
    return np.abs(path[:, None] - path)


@pytest.fixture(scope="module")
def footage():
    """One frame [1, 3, H, W] after the other; something changes in every third."""
    return [frame for frame in random_video(FRAMES // 3, seed=3) for _ in range(3)]


@pytest.fixture(scope="module")
def dense(vision, footage):
    with torch.inference_mode():
        return policies.measure_dense(vision, footage)


# --- baselines ---


@pytest.mark.parametrize("interval", [1, 3, 5, 12, 40])
def test_hold_every_is_the_mean_over_phases_of_a_naive_loop(interval):
    pairs = 1 - random_pairs(20) / 20
    expected, dense_frames = [], 0
    for phase in range(interval):
        held, cosines = 0, []
        for frame in range(1, 20):
            if frame % interval == phase:
                held, dense_frames = frame, dense_frames + 1
            cosines.append(pairs[frame, held])
        expected.append(cosines)
    baseline = policies.hold_every(interval, 20)
    found = pairs[np.arange(20), baseline.references][:, 1:]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(baseline.weights, 1 / interval)
    assert baseline.cost == pytest.approx(dense_frames / interval / 19)


@pytest.mark.parametrize(
    "options", [{"keyframe_surprise": 0.05}, {"keyframe_surprise": 0.4}, {"keyframe_fraction": 0.3}]
)
def test_a_triggered_hold_from_pairs_is_mode_hold(vision, footage, dense, options):
    ((name, level),) = options.items()
    pairs = dense["pair_surprise" if name == "keyframe_surprise" else "pair_changed"].numpy()
    baseline = policies.hold_triggered(pairs, level, dense["trigger_costs"].tolist())
    stream = vision.new_stream(mode="hold", **options)
    with torch.inference_mode():
        outputs = [vision(pixel_values=frame, stream=stream) for frame in footage]
    held = dense["pooled"][torch.from_numpy(baseline.references[0])]
    torch.testing.assert_close(torch.cat([output.pooler_output for output in outputs]), held)
    assert 1 < len(set(baseline.references[0])) < FRAMES
    assert baseline.cost == pytest.approx(np.mean([output.cost.item() for output in outputs[1:]]))


def test_a_mixture_at_a_cost_lies_between_its_two_neighbours():
    pairs = 1 - random_pairs(20) / 20
    index = np.arange(20)
    family = [policies.first_repeated(20), *(policies.hold_every(interval, 20) for interval in (2, 4, 8))]
    baseline = policies.mixed(family, policies.shares_at([one.cost for one in family], 0.2))
    assert baseline.cost == pytest.approx(0.2)
    assert baseline.weights.sum() == pytest.approx(1)

    def p5(one):
        looked_up = pairs[index, one.references]
        runs = policies.Runs.of(looked_up, looked_up, looked_up, one.weights)
        return {name: policies.statistic(name, runs).item() for name in policies.STATISTICS}

    found, above, below = p5(baseline), p5(family[2]), p5(family[3])
    for name in policies.STATISTICS:
        assert found[name] == pytest.approx(0.6 * above[name] + 0.4 * below[name])


def test_beyond_the_ends_the_last_baseline_is_taken():
    costs = [0.5, 0.1, 0.1, 1.0]
    assert policies.shares_at(costs, 0.0) == [(1.0, 1)]
    assert policies.shares_at(costs, 1.3) == [(1.0, 3)]
    assert policies.shares_at(costs, 1.0)[-1] == (1.0, 3)
    assert dict(map(reversed, policies.shares_at(costs, 0.75))) == pytest.approx({0: 0.5, 3: 0.5})
    assert policies.shares_at([0.0], 0.4) == [(1.0, 0)]


# --- statistics ---


def one_run(values):
    values = np.asarray(values)[None]
    return policies.Runs.of(values, values, values, np.ones(1))


def test_the_fifth_percentile_is_numpys():
    values = np.random.default_rng(0).normal(size=(3, 4, 27))
    np.testing.assert_allclose(policies.fifth_percentile(values), np.quantile(values, 0.05, axis=-1))
    assert policies.fifth_percentile(np.array([2.0])) == 2


def test_blocks_are_of_neighbouring_frames_and_the_same_for_the_same_seed():
    drawn = policies.block_resamples(40, seed=1, block=10, resamples=50)
    assert drawn.shape == (50, 40)
    blocks = drawn.reshape(50, 4, 10)
    assert ((np.diff(blocks, axis=-1) % 40) == 1).all()
    assert (drawn == policies.block_resamples(40, seed=1, block=10, resamples=50)).all()
    assert (drawn != policies.block_resamples(40, seed=2, block=10, resamples=50)).any()
    assert policies.block_resamples(3, seed=1).max() == 2


def test_both_sides_are_resampled_alike():
    baseline = np.random.default_rng(0).uniform(0.2, 0.6, 50)
    for name in policies.STATISTICS:
        one = policies.compare(
            name, "", one_run(baseline + 0.1), one_run(baseline), policies.block_resamples(49, seed=0)
        )
        np.testing.assert_allclose(one.draws, 0.1)
        assert one.verdict == "above"


def test_the_interval_covers_a_known_difference_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        baseline = rng.normal(0.9, 0.01, 100)
        method = baseline + rng.normal(0.003, 0.01, 100)
        one = policies.compare(
            "pooled_mean", "", one_run(method), one_run(baseline), policies.block_resamples(99, seed, resamples=300)
        )
        low, high = one.interval
        covered += low <= 0.003 <= high
    assert 82 <= covered <= 99


def test_of_nothing_the_interval_is_not_a_number_and_the_verdict_level():
    assert policies.block_resamples(0, seed=0).shape == (policies.RESAMPLES, 0)
    for draws in (np.zeros(0), policies.pooled_draws(np.zeros((0, 20)))):
        interval = policies.interval_of(draws)
        assert all(math.isnan(end) for end in interval)
        assert policies.verdict_of(0.5, interval) == "level"


@pytest.mark.parametrize(
    ("difference", "interval", "verdict"),
    [
        (0.01, (0.002, 0.02), "above"),
        (-0.01, (-0.02, -0.002), "below"),
        (-0.01, (-0.02, 0.001), "level"),
        (-0.00009, (-0.0001, -0.00005), "level"),
    ],
)
def test_verdicts(difference, interval, verdict):
    assert policies.verdict_of(difference, interval) == verdict


def test_over_clips_the_interval_has_what_differs_between_clips():
    rng = np.random.default_rng(0)
    alike = rng.normal(0.1, 0.001, (20, 400))
    unlike = alike + rng.normal(0, 0.05, (20, 1))
    narrow, wide = (np.ptp(policies.interval_of(policies.pooled_draws(draws))) for draws in (alike, unlike))
    assert narrow < 0.002 < 0.02 < wide


# --- delay ---


def test_delay_counts_until_the_output_is_nearer_to_now_than_to_before():
    before, after = np.eye(2)
    dense = np.stack([before] * 10 + [after] * 40)
    late = np.stack([before] * 14 + [after] * 36)
    assert policies.method_delay(dense, dense, 10) == 0
    assert policies.method_delay(late, dense, 10) == 4
    assert policies.method_delay(np.stack([before] * 50), dense, 10) == policies.DELAY_CAP
    assert policies.method_delay(np.stack([before] * 50)[:15], dense[:15], 10) == 5
    pairs = dense @ dense.T
    assert policies.baseline_delay(policies.hold_every(4, 50), pairs, 10) == np.mean([0, 1, 2, 3])
    assert policies.baseline_delay(policies.always_dense(50), pairs, 10) == 0


# --- the cache ---


def test_keys_follow_the_options_and_the_code(vision, tmp_path):
    keys = {
        policies.key_of(gate=vision.new_stream(**options).gate.to_dict())
        for options in (CONTEXT, {"mode": "context", "threshold": 0.02}, {"preset": "balanced"})
    }
    assert len(keys) == 3
    path = tmp_path / "code.py"
    versions = []
    for text in ('"""One."""\nx = 1\n', '"""Two."""\n# why\nx = 1\n', "x = 2\n"):
        path.write_text(text)
        versions.append(policies.code_version([path]))
    assert versions[0] == versions[1] != versions[2]


@pytest.fixture
def suite(vision, monkeypatch):
    """Two clips for the tiny model, and a list of what was measured."""

    def frames(seed):
        shown = np.random.default_rng(seed).integers(0, 256, (4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        return lambda: iter(shown.repeat(4, axis=0))

    measured = []
    counted = policies.measure_method
    monkeypatch.setattr(policies, "load_tower", lambda: (vision, Preprocessor(IMAGE_SIZE), "weights"))
    monkeypatch.setattr(
        policies,
        "load_clip",
        lambda name: clips.Clip(name, "", name == "one", "", frames(len(name)), events=(4, 12)),
    )
    monkeypatch.setattr(
        policies, "measure_method", lambda *arguments: measured.append(arguments[-1]) or counted(*arguments)
    )
    return measured


def test_what_was_measured_is_reused_unless_options_change(suite, tmp_path):
    first = policies.measure_clip("one", 16, {"a": CONTEXT}, tmp_path)
    assert policies.measure_clip("one", 16, {"a": CONTEXT}, tmp_path) == first
    assert suite == [CONTEXT]
    changed = {"mode": "context", "threshold": 0.05}
    second = policies.measure_clip("one", 16, {"a": changed, "b": CONTEXT}, tmp_path)
    assert suite == [CONTEXT, changed]
    assert second.dense == first.dense and second.methods["b"] == first.methods["a"] != second.methods["a"]
    assert policies.measure_clip("one", 15, {"a": CONTEXT}, tmp_path).dense != first.dense


def test_from_clips_to_the_report_and_the_picture(suite, tmp_path):
    methods = {"exact": {"mode": "dense"}, "context": CONTEXT, "first": {"mode": "hold"}}
    measured = [policies.measure_clip(name, 16, methods, tmp_path) for name in ("one", "three")]
    baselines = [policies.ClipBaselines.load(policies.load_clip(one.clip), one.dense) for one in measured]
    results = {
        method: [policies.judge(one, found.methods[method]) for one, found in zip(baselines, measured, strict=True)]
        for method in methods
    }
    rows = [row for method, found in results.items() for row in policies.pooled_rows(method, found)]
    assert len(rows) == len(methods) * 3
    by_method = {row["method"]: row for row in rows if row["clips"] == "all" and row["equal"] == "cost"}
    for name in policies.STATISTICS:
        assert by_method["exact"][name]["value"] == pytest.approx(1, abs=1e-5)
        assert by_method["exact"][name]["control"] == pytest.approx(1, abs=1e-5)
        assert by_method["exact"][name]["clips"] == {"above": 0, "level": 2, "below": 0}
        assert by_method["first"][name]["difference"] == pytest.approx(0, abs=1e-5)
        assert by_method["first"][name]["value"] < 0.999
    assert by_method["first"]["cost"] == 0
    assert by_method["exact"]["delay"]["events"] == 4
    assert by_method["exact"]["delay"]["method"] == 0 < by_method["first"]["delay"]["method"]

    clip_rows = [policies.clip_row(method, one) for method, found in results.items() for one in found]
    text = policies.report_text({"command": "x"}, {"pooled": rows, "clips": clip_rows})
    assert json.loads(text) == {"command": "x", "pooled": rows, "clips": clip_rows}
    policies.plot_policies(baselines, results, list(by_method.values()), "context").savefig(tmp_path / "plot.png")
    assert policies.pooled_table(rows[:2], "two").row_count == 2 * len(policies.STATISTICS)


def test_a_mode_that_returns_some_patches_only_is_refused(vision, footage, dense):
    with torch.inference_mode(), pytest.raises(ValueError, match="eliminate"):
        policies.measure_method(vision, footage, dense["pooled"], dense["patches"], {"mode": "eliminate"})
