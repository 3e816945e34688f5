import numpy as np
import pytest

from neuroflow_hf.vision.budget import CostBudget
from neuroflow_hf.vision.controller import HOLD, KEYFRAME, SPARSE, Changes, Pace, allowance_of, choose
from neuroflow_hf.vision.error_estimate import ErrorEstimate

RESERVE = 4.0


def played(surprises_of, frames: int, rate: float, active: float = 1.0) -> tuple[list[str], float]:
    """
    The actions, and the credit at the end, of a stream on which `active` of the patches change;
    `surprises_of(frame, waited)` is the mean surprise of a frame that follows `waited` held ones.
    """
    budget, credit, pace, actions, waited = CostBudget(rate, RESERVE), RESERVE, Pace(), [], 0
    for frame in range(1, frames):
        surprise, allowance = surprises_of(frame, waited), allowance_of(rate, credit, RESERVE)
        action = choose(pace, Changes(active, surprise, surprise), allowance, credit, RESERVE)
        pace = pace.after(action, Changes(active, surprise, surprise), allowance)
        waited = waited + 1 if action == HOLD else 0
        credit = budget.credit_after(credit, frame, {HOLD: 0.0, SPARSE: active, KEYFRAME: 1.0}[action])
        actions.append(action)
    return actions, credit


def steady(frame: int, waited: int) -> float:
    """A camera that moves on and on: the longer the wait, the more differs."""
    return 0.02 * (waited + 1)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.75])
def test_steady_motion_is_encoded_evenly_within_the_budget(rate):
    actions, credit = played(steady, 600, rate)
    actions = actions[200:]
    encoded = np.flatnonzero([action == KEYFRAME for action in actions])
    assert SPARSE not in actions
    assert np.ptp(np.diff(encoded)) <= 1
    assert len(encoded) / len(actions) == pytest.approx(rate, rel=0.15)
    assert credit > 0.3 * RESERVE  # what a burst may take at once


@pytest.mark.parametrize("rate", [0.1, 0.25])
@pytest.mark.parametrize("cut", range(300, 312))
def test_a_cut_within_steady_motion_is_a_keyframe_at_once_and_no_spree_follows(rate, cut):
    def surprise(frame, waited):
        return 0.9 if frame == cut else steady(frame, waited) if frame < cut else 10 * steady(frame, waited)

    def seen(frame, waited):
        return 0.9 if cut <= frame <= cut + waited else surprise(frame, waited)

    actions, _ = played(seen, cut + 30, rate)
    assert actions[cut - 1] == KEYFRAME
    after = actions[cut : cut + 8]  # the new scene moves ten times as fast, which is no cut after another
    assert after.count(KEYFRAME) <= 8 * rate + 1


def test_a_milder_cut_after_a_quiet_scene_is_a_keyframe_at_once():
    """Much less has changed than at the last cut, and much was saved since."""
    pace, cut, milder = Pace(), Changes(1.0, 0.9, 0.9), Changes(1.0, 0.1, 0.1)
    for changes in (cut, milder):
        for _ in range(100):
            pace = pace.after(HOLD, Changes(0.0, 0.001, 0.0), allowance=0.1)
        assert choose(pace, changes, allowance=0.1, credit=RESERVE, reserve=RESERVE) == KEYFRAME
        pace = pace.after(KEYFRAME, changes, allowance=0.1)


@pytest.mark.parametrize(("second", "action"), [(0.4, KEYFRAME), (0.2, HOLD)])
def test_a_cut_just_after_a_cut_is_a_keyframe_at_once(second, action):
    cut = Changes(1.0, 0.9, 0.9)
    pace = Pace(usual_surprise=0.02).after(KEYFRAME, cut, allowance=0.1)
    assert choose(pace, Changes(1.0, second, second), 0.1, 1.0, RESERVE) == action


@pytest.mark.parametrize(("frames", "action"), [(1, KEYFRAME), (0, HOLD)])
def test_a_cut_in_a_scene_at_rest_is_a_keyframe_at_once(frames, action):
    pace = Pace()
    for _ in range(frames):
        pace = pace.after(HOLD, Changes(0.0, 0.001, 0.0), allowance=0.1)
    assert choose(pace, Changes(1.0, 0.5, 0.5), 0.1, 1.0, RESERVE) == action


def test_a_scene_at_rest_is_encoded_in_full_once_where_half_of_the_reserve_is_left():
    still, moving = Changes(0.0, 0.001, 0.0), Changes(0.05, 0.02, 0.02)
    paces = [Pace().after(SPARSE, moving, 0.1)]
    for _ in range(3):
        paces.append(paces[-1].after(HOLD, still, 0.1))
    assert [choose(pace, still, 0.1, RESERVE, RESERVE) for pace in paces] == [SPARSE, SPARSE, KEYFRAME, KEYFRAME]
    assert choose(paces[-1], still, 0.1, RESERVE / 2 + 0.9, RESERVE) == SPARSE
    assert choose(paces[-1], moving, 0.1, RESERVE, RESERVE) == SPARSE
    settled = paces[-1].after(KEYFRAME, still, 0.1)
    assert settled.usual_surprise == 0  # how much frames change that are encoded is not learned from it
    for _ in range(10):
        settled = settled.after(HOLD, still, 0.1)
        assert choose(settled, still, 0.1, RESERVE, RESERVE) == SPARSE  # of no patch: nothing is left to put right


def test_few_active_patches_are_encoded_on_every_frame_that_pays_for_them():
    assert set(played(steady, 200, 0.25, active=0.1)[0]) == {SPARSE}


def test_in_a_debt_of_a_dense_frame_nothing_is_encoded():
    assert choose(Pace(paid=1.0), Changes(0.01, 1.0, 1.0), 0.5, -1.0, RESERVE) == HOLD
    assert choose(Pace(paid=1.0), Changes(0.01, 1.0, 1.0), 0.5, -0.9, RESERVE) == SPARSE


def test_the_estimate_learns_a_higher_rate_at_once_and_a_lower_one_slowly():
    estimate = ErrorEstimate(rate=0.2).after_keyframe(0.1)
    assert estimate.learned(0.05).rate == pytest.approx(0.5)
    assert 0.1 < estimate.learned(0.0).rate < 0.2
    assert estimate.after_hold().learned(0.05).rate == 0.2  # nothing was encoded that could teach anything


def test_what_sparse_frames_leave_over_adds_up_until_a_keyframe():
    estimate, held = ErrorEstimate(rate=0.2), [0.0]
    for _ in range(3):
        expected = estimate.if_sparse(0.1, 0.1)
        assert expected < estimate.if_held(0.1)
        estimate = estimate.after_sparse(0.1)
        held.append(estimate.if_held(0.0))
        assert held[-1] == pytest.approx(expected)
    assert held == sorted({*held})
    assert estimate.after_keyframe(0.1).if_held(0.0) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (Changes(0.1, 0.01, 0.01), HOLD),
        (Changes(0.1, 0.1, 0.1), SPARSE),
        (Changes(0.1, 0.1, 0.01), KEYFRAME),  # the change is spread over patches that are not active
        (Changes(0.6, 0.1, 0.1), KEYFRAME),  # a keyframe costs little more
    ],
)
def test_the_cheapest_action_that_keeps_the_fidelity(changes, expected):
    pace = Pace(error=ErrorEstimate(rate=0.2))
    assert choose(pace, changes, allowance=1.0, credit=RESERVE, reserve=RESERVE, min_fidelity=0.99) == expected


def test_a_budget_decides_where_holding_would_not_keep_the_fidelity():
    pace = Pace(error=ErrorEstimate(rate=0.2))
    options = {"allowance": 0.05, "credit": RESERVE, "reserve": RESERVE, "min_fidelity": 0.99}
    assert choose(pace, Changes(0.04, 0.01, 0.01), **options) == HOLD  # which the budget would pay for
    assert choose(pace, Changes(0.04, 0.1, 0.1), **options) == SPARSE
    assert choose(pace, Changes(0.9, 0.1, 0.1), **options) == HOLD
    # a spread change: the budget would encode the few active patches, the fidelity needs a keyframe
    spread = Changes(0.04, 0.1, 0.01)
    assert choose(pace, spread, **options) == SPARSE
    assert choose(pace, spread, **options | {"allowance": 1.04}) == KEYFRAME
