"""A stream's `cost_budget`: what it may spend, when it holds, and what is not its business."""

import warnings
from dataclasses import asdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuroflow_hf import (
    NeuroFlowGateConfig,
    NeuroFlowSiglipVisionConfig,
    NeuroFlowSiglipVisionModel,
    NeuroFlowStream,
)
from neuroflow_hf.video.records import gate_rule
from neuroflow_hf.vision.budget import MAX_DEBT
from neuroflow_hf.vision.controller import Pace
from tests.conftest import GATED_MODES, NUM_PATCHES, TINY_VISION, play, random_video

MOVING = {"keyframe_surprise": 0.0}  # whatever moves is a keyframe

pytestmark = pytest.mark.usefixtures("no_grad")


def costs_of(outputs):
    return torch.cat([output.cost for output in outputs])


def moving(num_frames, **options):
    return random_video(num_frames, changed=0.9, **options)


@given(
    mode=st.sampled_from(GATED_MODES),
    budget=st.sampled_from([0.15, 0.25, 0.6]),
    reserve=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 1000),
    changed=st.floats(0, 1),
    interval=st.none() | st.integers(11, 15),
)
@example(mode="mlp", budget=0.6, reserve=1.0, seed=0, changed=0.375, interval=None)  # few patches, and much to pay
@settings(deadline=None, max_examples=25)
def test_any_stretch_after_the_first_frame_keeps_to_the_budget(vision, mode, budget, reserve, seed, changed, interval):
    stream = vision.new_stream(
        mode=mode, cost_budget=budget, cost_reserve=reserve, keyframe_surprise=0.3, keyframe_interval=interval
    )
    costs = costs_of(play(vision, random_video(30, seed=seed, changed=changed), stream))[1:].double()
    spent = torch.cat([torch.zeros(1), costs.cumsum(0)])
    for first in range(len(spent)):
        for last in range(first + 1, len(spent)):
            assert spent[last] - spent[first] <= budget * (last - first) + reserve + MAX_DEBT


def test_moving_all_the_time_it_spends_the_budget_and_no_less(vision):
    """After the reserve is gone, one dense frame as soon as the last is paid for."""
    stream = vision.new_stream(mode="context", cost_budget=0.25, cost_reserve=1, **MOVING)
    costs = costs_of(play(vision, moving(205), stream))[5:]
    assert costs.mean().item() == pytest.approx(0.25, abs=0.01)
    assert (costs > 0.9).sum().item() == pytest.approx(200 * (0.25 - 0.03), rel=0.2)


def dense_in_a_row(outputs):
    """How many of the first frames are dense."""
    dense = (costs_of(outputs) > 0.9).tolist()
    return (*dense, False).index(False)


def test_what_quiet_frames_leave_over_is_spent_when_something_happens(vision):
    stream = vision.new_stream(mode="context", cost_budget=0.3, cost_reserve=3, **MOVING)
    first, *burst = moving(11)
    play(vision, [first], stream)
    at_first = dense_in_a_row(play(vision, burst, stream))
    assert at_first == 5  # 3 saved up, 0.3 more for each, and one that overdraws
    assert dense_in_a_row(play(vision, moving(10, seed=1), stream)) <= 1
    play(vision, moving(1, seed=2) * 40, stream)
    assert stream.credit == [3.0]
    assert dense_in_a_row(play(vision, moving(10, seed=3), stream)) == at_first


@pytest.mark.parametrize("mode", GATED_MODES)
def test_an_overdrawn_stream_returns_its_last_output(vision, mode):
    stream = vision.new_stream(mode=mode, cost_budget=0.06, cost_reserve=1, **MOVING)
    *_, last, held = play(vision, moving(4), stream)
    assert last.active_mask.all()
    assert held.skip_rate.item() == 1
    assert torch.equal(held.pooler_output, last.pooler_output)
    assert held.surprise.mean() > 0.3  # it was looked at


@pytest.mark.parametrize("mode", ["context", "extrapolate", "hold"])
def test_all_of_dense_is_no_bound(vision, mode):
    """A frame never costs more than dense and what the gate takes, so that with a reserve nothing is ever held."""
    options = {"mode": mode, "keyframe_surprise": 0.3}
    bound = {"cost_budget": 1, "cost_reserve": 10}
    frames = [*random_video(8, seed=1), *moving(8, seed=2)]
    pairs = zip(*(play(vision, frames, vision.new_stream(**options, **more)) for more in ({}, bound)), strict=True)
    for free, bounded in pairs:
        assert torch.equal(free.pooler_output, bounded.pooler_output)
        assert torch.equal(free.active_mask, bounded.active_mask)


def test_the_interval_counts_from_the_last_keyframe_and_waits_for_credit(vision):
    still = random_video(1) * 30
    stream = vision.new_stream(mode="context", cost_budget=0.25, cost_reserve=4, keyframe_interval=6)
    dense = [number for number, cost in enumerate(costs_of(play(vision, still, stream))) if cost > 0.9]
    assert dense[:4] == [0, 6, 12, 18]
    stream.credit = [-1.0]
    later = costs_of(play(vision, still, stream)) > 0.9
    assert not later[:8].any() and later.any()


def test_a_camera_that_moves_gets_keyframes_at_even_distances(vision):
    """And never waits for long, though it starts with the reserve."""
    stream = vision.new_stream(mode="extrapolate", cost_budget=0.25)
    costs = costs_of(play(vision, moving(120), stream))
    dense = (costs > 0.9).nonzero().flatten()
    assert dense.diff().max() <= 6
    assert costs[60:].mean().item() == pytest.approx(0.25, abs=0.03)


def test_a_cut_is_a_keyframe_at_once(vision):
    """Also where the camera moved before it, and all credit is spent."""
    calm, other = random_video(2, changed=1.0)
    swaying = [calm + 0.4 * torch.randn(calm.shape, generator=torch.Generator().manual_seed(n)) for n in range(40)]
    stream = vision.new_stream(mode="extrapolate", cost_budget=0.25, cost_reserve=1)
    outputs = play(vision, swaying, stream)
    assert 5 < (costs_of(outputs) > 0.9).sum() < 14
    (cut,) = play(vision, [other], stream)
    assert cut.active_mask.all()


def test_everything_active_is_beyond_any_budget(vision):
    stream = vision.new_stream(mode="context", threshold=-1, cost_budget=0.01, cost_reserve=1)
    assert all(output.active_mask.all() for output in play(vision, moving(5), stream))


def test_each_stream_of_a_batch_has_its_own_credit_and_reset_gives_new_ones(vision):
    options = {"mode": "context", "cost_budget": 0.1, "cost_reserve": 2, **MOVING}
    still, busy = random_video(1)[0], moving(8, seed=1)
    batched, alone = vision.new_stream(batch_size=2, **options), vision.new_stream(**options)
    for frame in busy:
        output = vision(pixel_values=torch.cat([still, frame]), stream=batched)
        single = vision(pixel_values=frame, stream=alone)
        assert output.cost[1] == single.cost[0]
    assert batched.credit == [2.0, alone.credit[0]] and batched.pace[1] == alone.pace[0] != batched.pace[0]
    assert batched.credit[1] < 0
    paces = list(batched.pace)
    batched.keep([1, 0])
    assert batched.pace == paces[::-1]
    batched.keep([1, 0])
    batched.reset(1)
    assert batched.credit == [2.0, 2.0] and batched.pace[1] == Pace()
    vision(pixel_values=torch.cat([still, busy[0]]), stream=batched)
    assert batched.credit == [2.0, 2.0]


def test_credit_are_saved_and_untouched_by_a_refused_frame(vision, tmp_path):
    stream = vision.new_stream(mode="context", cost_budget=0.1, cost_reserve=2, **MOVING)
    frames = moving(8)
    play(vision, frames[:5], stream)
    before, pace = list(stream.credit), list(stream.pace)
    with pytest.raises(ValueError, match="NaN"):
        vision(pixel_values=frames[5] * torch.nan, stream=stream)
    assert stream.credit == before and stream.pace == pace
    stream.save(tmp_path / "stream.safetensors")
    restored = NeuroFlowStream.load(tmp_path / "stream.safetensors")
    assert restored.credit == before and restored.pace == stream.pace != [Pace()]
    for ours, theirs in zip(play(vision, frames[5:], stream), play(vision, frames[5:], restored), strict=True):
        assert torch.equal(ours.active_mask, theirs.active_mask)


NO_NUMBERS = {
    "pace": ([None], [{}], [{**asdict(Pace()), "waited": float("nan")}], []),
    "credit": ([None], ["x"], [float("nan")], [], "1"),
}


@pytest.mark.parametrize("field, value", [(field, value) for field, values in NO_NUMBERS.items() for value in values])
def test_a_state_without_finite_numbers_is_refused(vision, field, value):
    stream = vision.new_stream(mode="context", cost_budget=0.1)
    play(vision, moving(2), stream)
    state, before = stream.state_dict(), list(getattr(stream, field))
    with pytest.raises(ValueError, match=field):
        stream.load_state_dict({**state, field: value})
    assert getattr(stream, field) == before


def test_without_a_budget_nothing_is_counted():
    gate = NeuroFlowGateConfig()
    assert gate.budget.credit_after(gate.cost_reserve, 5, cost=1.0) == gate.cost_reserve


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cost_budget": 0}, "`cost_budget` is 0; expected a share above 0"),
        ({"cost_budget": 1.5}, "`cost_budget` is 1.5"),
        ({"cost_reserve": 0.5}, "`cost_reserve` is 0.5; expected at least 1 dense frame"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        NeuroFlowGateConfig(**options)


def test_a_budget_does_not_change_what_is_stored(vision):
    """So it may be set while a stream runs."""
    stream = vision.new_stream(mode="context", **MOVING)
    frames = moving(30)
    play(vision, frames[:10], stream)
    before = stream.nbytes
    stream.gate.cost_budget = 0.2
    outputs = play(vision, frames[10:], stream)
    assert costs_of(outputs).sum().item() < 0.2 * 20 + stream.gate.cost_reserve + 1
    assert stream.nbytes == before == NUM_PATCHES * 32 * 4 * (2 + 2 * 3) + 32 * 4


def test_a_debt_of_options_that_were_changed_is_forgiven(vision):
    stream = vision.new_stream(mode="context", cost_budget=0.25, cost_reserve=1, **MOVING)
    stream.gate.threshold = -1
    frames = moving(100)
    play(vision, frames[:50], stream)
    stream.gate.threshold = 0.01
    assert stream.credit == [-2.0]
    dense = costs_of(play(vision, frames[50:], stream)) > 0.9
    assert 7 <= dense[10:].sum() <= 10


def test_a_budget_that_does_not_pay_for_looking_is_refused_and_changes_nothing(vision):
    frame = random_video(1)[0]
    stream = vision.new_stream(mode="context", cost_budget=0.02)
    with pytest.raises(ValueError, match=r"looking at every frame costs 0\.04"):
        vision(pixel_values=frame, stream=stream)
    assert stream.frames == [0] and not stream.memory
    for options in (
        {"mode": "hold", "keyframe_interval": 90},
        {"mode": "context", "threshold": -1},
        {"mode": "dense"},
    ):
        vision(pixel_values=frame, stream=vision.new_stream(**options, cost_budget=0.02))


def test_a_run_says_what_it_may_cost():
    assert gate_rule(NeuroFlowGateConfig()) == "threshold 0.01"
    assert gate_rule(NeuroFlowGateConfig(token_budget=9, cost_budget=0.1)) == "9 patches, cost budget 0.1"
    assert gate_rule(NeuroFlowGateConfig(min_fidelity=0.99)) == "threshold 0.01, fidelity 0.99"


@pytest.fixture
def small_vision():
    """A model on which looking at a frame, and a keyframe every 30, costs more than the default's budget."""
    sizes = {"image_size": 32, "patch_size": 16, "num_hidden_layers": 2}
    return NeuroFlowSiglipVisionModel(NeuroFlowSiglipVisionConfig(**TINY_VISION | sizes)).eval()


def test_the_default_s_budget_is_lifted_for_a_model_that_cannot_keep_it(small_vision, tmp_path):
    frames = random_video(6, changed=0.5, size=32)
    stream = small_vision.new_stream()
    with pytest.warns(UserWarning, match="`cost_budget` of 0.25 is lifted") as warned:
        play(small_vision, frames, stream)
    assert len(warned) == 1
    assert 0.25 < stream.gate.cost_budget <= 1
    stream.save(tmp_path / "stream.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        play(small_vision, frames, NeuroFlowStream.load(tmp_path / "stream.safetensors"))


def test_the_default_s_budget_is_lifted_for_a_stream_that_was_saved_before_its_first_frame(small_vision, tmp_path):
    small_vision.new_stream().save(tmp_path / "stream.safetensors")
    stream = NeuroFlowStream.load(tmp_path / "stream.safetensors")
    with pytest.warns(UserWarning, match="is lifted"):
        play(small_vision, random_video(1, size=32), stream)
    small_vision.new_stream(cost_budget=0.25).save(tmp_path / "stream.safetensors")
    with pytest.raises(ValueError, match=r"is 0\.25, and looking"):
        play(small_vision, random_video(1, size=32), NeuroFlowStream.load(tmp_path / "stream.safetensors"))


def test_a_lifted_budget_is_lifted_further_where_a_lower_resolution_needs_it(small_vision):
    stream, budgets = small_vision.new_stream(on_change="keyframe"), []
    for size in (256, 64):
        with pytest.warns(UserWarning, match="is lifted"):
            small_vision(random_video(1, size=size)[0], stream=stream, interpolate_pos_encoding=True)
        budgets.append(stream.gate.cost_budget)
    assert 0.25 < budgets[0] < budgets[1] <= 1


@pytest.mark.parametrize("options", [{"cost_budget": 0.25}, {"cost_budget": 0.2}])
def test_a_budget_that_the_user_set_is_not_lifted(small_vision, options):
    frame = random_video(1, size=32)[0]
    with pytest.raises(ValueError, match=f"`cost_budget` is {options['cost_budget']}, and looking"):
        small_vision(pixel_values=frame, stream=small_vision.new_stream(**options))
    stream = small_vision.new_stream(preset="thrifty")
    stream.gate.cost_budget = options["cost_budget"]
    with pytest.raises(ValueError, match="`cost_budget`"):
        small_vision(pixel_values=frame, stream=stream)
