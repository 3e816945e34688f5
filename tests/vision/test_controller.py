import numpy as np
import pytest

from neuroflow_hf.vision.budget import CostBudget
from neuroflow_hf.vision.controller import HOLD, KEYFRAME, SPARSE, Pace, choose

RESERVE = 4.0


def played(surprises_of, frames: int, rate: float, active: float = 1.0) -> tuple[list[str], float]:
    """
    The actions, and the credit at the end, of a stream on which `active` of the patches change;
    `surprises_of(frame, waited)` is the mean surprise of a frame that follows `waited` held ones.
    """
    budget, credit, pace, actions = CostBudget(rate, RESERVE), RESERVE, Pace(), []
    for frame in range(1, frames):
        surprise = surprises_of(frame, pace.waited)
        action = choose(pace, rate, credit, RESERVE, active, surprise)
        pace = pace.after(action, surprise)
        credit = budget.credit_after(credit, frame, {HOLD: 0.0, SPARSE: active, KEYFRAME: 1.0}[action])
        actions.append(action)
    return actions, credit


def steady(frame: int, waited: int) -> float:
    """A camera that moves on and on: the longer the wait, the more differs."""
    return 0.02 * (waited + 1)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
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


def test_few_active_patches_are_encoded_on_every_frame_that_pays_for_them():
    assert set(played(steady, 200, 0.25, active=0.1)[0]) == {SPARSE}


def test_in_a_debt_of_a_dense_frame_nothing_is_encoded():
    assert choose(Pace(waited=500), 0.5, -1.0, RESERVE, 0.01, 1.0) == HOLD
    assert choose(Pace(waited=500), 0.5, -0.9, RESERVE, 0.01, 1.0) == SPARSE
