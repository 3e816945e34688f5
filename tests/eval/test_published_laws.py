"""The published laws: figures of hand-made cases with known answers, and rules that can fail."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.report import FAILS, HOLDS, UNKNOWN
from eval.vision.clip_statistics import correlation, difference, estimate, mean, ranks, share, shown
from eval.vision.composed_bench import measure_clips
from eval.vision.published_laws import (
    FIRST,
    LAST_UPDATE_THRESHOLDS,
    MEMORY,
    SETTINGS,
    SWAPS,
    displacement,
    equal_cost,
    findings,
    gone,
    head_entropy,
    measure_laws,
    saturation,
    stability,
    swapped,
    travelled,
)
from neuroflow_hf.utils.processes import Processes
from recipes.composed_clips import specify
from tests.clip_bench import TinyBench

# --- statistics ------------------------------------------------------------------------------------------------------


def test_a_mean_is_over_frames_and_its_interval_over_clips():
    clips = [np.array([1.0, 1.0, 1.0]), np.array([0.0]), np.array([np.nan]), np.array([0.5, 0.5])]
    found = mean(clips)
    assert found.value == pytest.approx(4 / 6) and found.clips == 3 and found.low <= found.value <= found.high
    assert mean([np.array([2.0])] * 2) == (2.0, None, None, 2)
    assert mean([]).value is None and shown(mean([])) == "no frames"


def test_a_difference_of_groups_and_a_share():
    found = difference([np.ones(3)] * 4, [np.zeros(2)] * 4)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert share([np.array([3.0])] * 3, [np.array([1.0])] * 3).value == 0.75
    assert estimate([], lambda total: total[:, 0]).value is None


def test_ranks_share_places_and_the_correlation_is_spearmans():
    np.testing.assert_allclose(ranks(np.array([5.0, 1.0, 5.0, 9.0])), np.array([1.5, 0, 1.5, 3]) / 3)
    xs = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0]), np.array([6.0, 7.0])]
    assert correlation(xs, [np.exp(x) for x in xs]).value == pytest.approx(1)
    assert correlation(xs, [-(x**3) for x in xs]).value == pytest.approx(-1)
    assert correlation(xs, [np.ones(len(x)) for x in xs]).value is None


# --- figures of a frame ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_entropy_is_that_of_the_heads_own_attention(vision):
    hidden = torch.randn(2, 36, 32, generator=torch.Generator().manual_seed(0))
    alike = hidden[:, :1].expand(-1, 36, -1)
    np.testing.assert_allclose(head_entropy(vision.head, alike).numpy(), np.log(36), rtol=1e-5)
    assert (head_entropy(vision.head, hidden) < np.log(36)).all()
    attention, dim, heads = vision.head.attention, 32, 4
    query = vision.head.probe[0] @ attention.in_proj_weight[:dim].T + attention.in_proj_bias[:dim]
    key = hidden[0] @ attention.in_proj_weight[dim : 2 * dim].T + attention.in_proj_bias[dim : 2 * dim]
    entropies = []
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
        weights = (key[:, part] @ query[0, part] / (dim // heads) ** 0.5).softmax(0)
        entropies.append(-(weights * weights.log()).sum().item())
    assert head_entropy(vision.head, hidden)[0].item() == pytest.approx(np.mean(entropies), rel=1e-4)


@torch.inference_mode()
def test_swapping_what_differs_closes_the_gap_and_what_is_dense_already_gains_nothing(vision):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(36, 32, generator=generator)
    active = torch.zeros(36, dtype=torch.bool)
    active[:9] = True
    hidden = torch.where(active.unsqueeze(1), torch.randn(36, 32, generator=generator), dense)
    gain = dict(zip(SWAPS, swapped(vision.head, hidden, dense, active, active, generator), strict=True))
    gap = 1 - torch.cosine_similarity(vision.head(hidden[None]), vision.head(dense[None])).item()
    assert gap > 1e-3 and gain["active"] == pytest.approx(gap, rel=1e-3)
    assert gain["all stored"] == 0 == gain["stored dense"] and np.isnan(gain["stored sparse"])
    assert gain["random as many as active"] < gain["active"]


def test_stability_is_apart_for_active_and_inactive():
    now = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    before = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
    found = stability(now, before, torch.tensor([[False, True, False]]))
    assert found.tolist() == [2, 2, 0, 1]


def test_a_thing_is_gone_once_it_was_seen_and_is_nowhere():
    truths = tuple(SimpleNamespace(visible=(value,)) for value in (0.0, 0.6, 0.2, 0.0, 0.0, 0.3))
    assert gone(truths).tolist() == [False, False, False, True, True, False]
    never = tuple(SimpleNamespace(visible=(value,)) for value in (0.3, 0.0))
    assert not gone(never).any()


def test_distance_travelled_is_that_of_the_path(model):
    material = TinyBench(model).material
    still, swinging = (specify(material, motion, 0, frames=16) for motion in ("still", "moving camera"))
    assert [travelled(still, number) for number in range(16)] == [0] * 16
    assert travelled(swinging, 0) == 0 and travelled(swinging, 8) > 0.05
    leaving = specify(material, "leaving", 0, frames=32)
    assert travelled(leaving, 0) == 0 and travelled(leaving, 31) > 0.5


# --- laws ------------------------------------------------------------------------------------------------------------


def made_up(motion, number, *, loss, right, dense_right=1.0, skips=None, frames=21):
    """A clip's figures with given loss and accuracy of each setting (numbers, or by setting)."""

    def of(value, setting):
        return value.get(setting, value["else"]) if isinstance(value, dict) else value

    rng = np.random.default_rng(number)
    label = np.zeros(frames, dtype=int)
    figures = {
        "label": label,
        "gone": np.zeros(frames, dtype=bool),
        "travelled": np.linspace(0, 0.5 if motion == "crossing" else 0, frames),
        "dense: place": (np.arange(frames) >= round(dense_right * frames)).astype(int),
        "dense: entropy": np.full(frames, 4.0),
        f"{FIRST}: cosine": np.ones(frames),
        f"{FIRST}: place": np.zeros(frames, dtype=int),
        "stability": np.array([[8.3, 10, 4.1, 10]] * 2),
        "floor": np.full(frames, 0.2),
        "swap: gain": np.full((frames, len(SWAPS)), 0.01),
    }
    for setting in SETTINGS:
        wrong = np.arange(frames) >= round(of(right, setting) * frames)
        cost = 0.3 + 0.1 * list(SETTINGS).index(setting) / len(SETTINGS)
        figures |= {
            f"{setting}: skip": np.full(frames, (skips or {}).get(setting, 0.7)),
            f"{setting}: cost": np.full(frames, cost),
            f"{setting}: cosine": 1 - of(loss, setting) - 0.001 * rng.random(frames),
            f"{setting}: place": wrong.astype(int),
            f"{setting}: entropy": np.full(frames, 4.5),
        }
    return motion, figures


NOWHERE_NEAR = dict.fromkeys(("ema 0.0003", "ema 0.003", "ema 0.1", "ema 0.4"), 0.0)
SKIPS = {"ema 0.0003": 0.555, "ema 0.01": 0.66, "ema 0.4": 0.84}


def test_saturation_holds_where_nothing_depends_on_the_skip_rate_and_fails_where_much_does():
    level = [made_up("still", number, loss=0.05, right=0.7, skips=SKIPS) for number in range(5)]
    assert [one["verdict"] for one in saturation(level)] == [HOLDS, HOLDS]
    steep = [
        made_up("still", n, loss={"ema 0.4": 0.3, "else": 0.05}, right={"ema 0.4": 0.4, "else": 0.7}, skips=SKIPS)
        for n in range(5)
    ]
    assert [one["verdict"] for one in saturation(steep)] == [FAILS, FAILS]
    assert "ema 0.0003: 55.5% skipped, ema 0.4: 84.0%" in saturation(steep)[0]["measured"]
    assert [one["verdict"] for one in saturation(level[:2])] == [UNKNOWN, UNKNOWN]


def test_saturation_cannot_be_told_by_a_setting_beside_itself():
    same = [made_up("still", n, loss=0.05, right=0.7, skips={"ema 0.01": 0.8, **NOWHERE_NEAR}) for n in range(5)]
    assert [one["verdict"] for one in saturation(same)] == [UNKNOWN, UNKNOWN]
    assert "ema 0.01: 80.0% skipped, ema 0.01: 80.0%" in saturation(same)[0]["measured"]


@pytest.mark.parametrize("travelling, staying, verdict", [(0.2, 0.8, HOLDS), (0.8, 0.2, FAILS)])
def test_displacement_is_decided_by_who_loses_more(travelling, staying, verdict):
    clips = [made_up("crossing", number, loss=1 - travelling, right=travelling) for number in range(4)]
    clips += [made_up("still", number, loss=1 - staying, right=staying) for number in range(4)]
    found = displacement(clips)
    assert [one["verdict"] for one in found[:2]] == [verdict, verdict]
    assert all(one["control"].startswith("first frame repeated") for one in found)
    assert displacement(clips[:4]) == []


def test_equal_cost_is_a_mixture_of_the_two_neighbours_or_the_nearest():
    name, figures = made_up("still", 0, loss=0.1, right=0.5)
    costs = np.linspace(0.2, 0.5, len(LAST_UPDATE_THRESHOLDS))
    for level, cost in zip(LAST_UPDATE_THRESHOLDS, costs, strict=True):
        figures[f"last_update {level:g}: cost"][:] = cost
    figures[f"{MEMORY}: cost"][:] = costs[1] + 0.25 * (costs[2] - costs[1])
    mixture, (ours, theirs) = equal_cost([(name, figures)])
    shares, settings = zip(*mixture.parts, strict=True)
    assert list(settings) == [f"last_update {level:g}" for level in LAST_UPDATE_THRESHOLDS[1:3]]
    assert shares == pytest.approx([0.75, 0.25]) and ours == pytest.approx(theirs)
    figures[f"{MEMORY}: cost"][:] = 0.9
    mixture, costs = equal_cost([(name, figures)])
    assert mixture.parts == [(1.0, f"last_update {LAST_UPDATE_THRESHOLDS[-1]:g}")]
    assert costs == (pytest.approx(0.9), pytest.approx(0.5))


# --- measuring -------------------------------------------------------------------------------------------------------


def test_clips_are_measured_and_every_law_is_decided(model, tmp_path):
    motions = ("still", "crossing", "leaving", "replaced")
    measured = measure_clips(TinyBench(model), measure_laws, 1, 16, Processes(), tmp_path, motions)
    assert [motion for motion, _ in measured] == list(motions)
    still, leaving = measured[0][1], measured[2][1]
    np.testing.assert_allclose(still[f"{MEMORY}: cosine"], 1, atol=1e-5)
    np.testing.assert_allclose(still[f"{MEMORY}: skip"][1:], 1)
    np.testing.assert_allclose(still[f"{MEMORY}: entropy"], still["dense: entropy"], rtol=1e-4)
    assert leaving["gone"].any() and not still["gone"].any()
    decided = findings(measured)
    assert len(decided) == 14
    assert all(one["verdict"] in (HOLDS, FAILS, UNKNOWN) and one["control"] and one["rule"] for one in decided)
