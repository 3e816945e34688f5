"""Every mode against the patch-by-patch reference, against dense, and against the multiply-adds that it claims."""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from neuroflow_hf import NeuroFlowGateConfig, NeuroFlowSiglipVisionModel
from neuroflow_hf.vision.gate_config import MODE_NAMES
from neuroflow_hf.vision.naive import NaiveStream
from neuroflow_hf.vision.shortcuts import can_fold_probe, pool_with_folded_probe
from tests.conftest import (
    GATED_MODES,
    NUM_PATCHES,
    TINY_VISION,
    assert_close_in_norm,
    assert_outputs_close,
    lively,
    random_video,
)

maybe = st.none()
gate_options = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(MODE_NAMES),
        "signal": st.sampled_from(["patch", "token"]),
        "reference": st.sampled_from(["last_update", "ema", "both"]),
        "threshold": st.sampled_from([1e-6, 0.3, 0.9]),
        "token_budget": maybe | st.integers(1, 20),
        "min_active_tokens": maybe | st.integers(0, 6),
        "global_motion_norm": st.booleans(),
        "dilate": st.integers(0, 1),
        "max_age": maybe | st.integers(1, 20),
        "keyframe_interval": maybe | st.integers(2, 4),
        "keyframe_fraction": maybe | st.floats(0.1, 0.9),
        "keyframe_surprise": maybe | st.floats(0.1, 0.9),
        "hold_fraction": maybe | st.floats(0.1, 0.9),
        "max_hold": maybe | st.integers(1, 2),
        "cost_budget": maybe | st.floats(0.2, 1),
        "cost_reserve": st.sampled_from([1.0, 2.5]),
        "sentinels": st.sampled_from([0, 0.1, 1]),
        "ema_rate": st.sampled_from([0.05, 0.5, 1.0]),
        "memory_blend": st.sampled_from([1.0, 0.5]),
    }
)


def assume_consistent(options, num_patches):
    if options["max_age"] and options["token_budget"]:
        assume(options["max_age"] * options["token_budget"] >= num_patches)
    if options["hold_fraction"]:
        rules = ("max_hold", "keyframe_interval", "keyframe_fraction", "keyframe_surprise")
        assume(any(options[rule] for rule in rules))
    if options["cost_budget"] and options["keyframe_interval"]:
        assume(options["cost_budget"] > 0.15 + 1 / options["keyframe_interval"])  # so small a model pays for looking


def in_debt(mode):
    """Options with which the second frame overdraws, and those after it are held."""
    return NeuroFlowGateConfig(mode=mode, cost_budget=0.2, cost_reserve=1, keyframe_surprise=0).to_dict()


@pytest.fixture(scope="module")
def smallest_vision():
    """A vision model of 16 patches and 2 layers: the reference takes a while for each patch."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    stock = lively(SiglipVisionModel(SiglipVisionConfig(**TINY_VISION | sizes))).double()
    return NeuroFlowSiglipVisionModel.from_siglip(stock)


@given(options=gate_options, seed=st.integers(0, 1000))
@example(options=NeuroFlowGateConfig(mode="extrapolate", token_budget=1, dilate=1, threshold=0.9).to_dict(), seed=0)
@example(options=in_debt("context"), seed=0)
@example(options=in_debt("extrapolate"), seed=1)
@example(options=in_debt("mlp"), seed=3)
@example(options=in_debt("hold"), seed=4)
@settings(deadline=None, max_examples=60)
def test_fast_path_equals_the_patch_by_patch_reference(smallest_vision, options, seed):
    assume_consistent(options, num_patches=16)
    model, gate = smallest_vision, NeuroFlowGateConfig(**options)
    naive, stream = NaiveStream(model, gate), model.new_stream(**options)
    with torch.no_grad():
        for frame in random_video(5, seed=seed, size=16):
            pooled, seen, active = naive.step(frame.double())
            output = model(pixel_values=frame, stream=stream)
            naive.pay(output.cost.item())
            assert output.active_mask.flatten().nonzero().flatten().tolist() == active
            assert_close_in_norm(output.last_hidden_state[0], seen.double())  # of no patch, naive has float32
            assert_close_in_norm(output.pooler_output[0], pooled)


def test_second_running_mean_keeps_a_stopped_object_active(vision):
    empty, stopped = random_video(2, seed=3, changed=0.3)
    options = {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.5, "threshold": 0.05}
    active = {}
    for slow in (None, 0.02):
        stream = vision.new_stream(slow_ema_rate=slow, **options)
        with torch.no_grad():
            for frame in [empty] * 3 + [stopped] * 10:
                output = vision(pixel_values=frame, stream=stream)
        active[slow] = int(output.active_mask.sum())
    assert active[None] == 0 < active[0.02]


@given(
    mode=st.sampled_from(MODE_NAMES),
    threshold=st.sampled_from([-1, -3.5]),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 1000),
    options=gate_options,
)
@settings(deadline=None, max_examples=30)
def test_everything_active_equals_dense_whatever_the_other_options_say(
    vision64, stock_vision64, mode, threshold, batch_size, seed, options
):
    assume_consistent(options, NUM_PATCHES)
    stream = vision64.new_stream(batch_size, **{**options, "mode": mode, "threshold": threshold})
    with torch.no_grad():
        for frame in random_video(3, batch_size, seed):
            output, dense = vision64(pixel_values=frame, stream=stream), stock_vision64(pixel_values=frame)
            assert_outputs_close(output, dense)
            assert output.active_mask.all()
            assert output.skip_rate.eq(0).all()


def test_dense_mode_is_the_stock_model_bit_for_bit(vision, stock_vision):
    stream = vision.new_stream(mode="dense")
    with torch.no_grad():
        for frame in random_video(2):
            output, dense = vision(pixel_values=frame, stream=stream), stock_vision(pixel_values=frame)
            assert torch.equal(output.pooler_output, dense.pooler_output)
            assert output.cost.item() == 1


def eager(model):
    """A copy that shares parameters and whose attention is made of products that can be counted."""
    copy = NeuroFlowSiglipVisionModel.from_siglip(model)
    copy.set_attn_implementation("eager")
    return copy


def addmm_flops(target, left, right, **kwargs):
    """Of the product in place, which the counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def counted(function):
    """Multiply-adds of all matrix products and convolutions in a call."""
    known = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, torch.no_grad():
        result = function()
    return result, counter.get_total_flops() / 2


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_cost_is_what_a_counter_of_multiply_adds_sees(vision, mode):
    model = eager(vision)
    stream = model.new_stream(mode=mode, threshold=0.3, sentinels=0.1)
    _, dense = counted(lambda: model(pixel_values=random_video(1)[0]))
    spent = []
    for frame in random_video(5, changed=0.15):
        output, multiply_adds = counted(lambda frame=frame: model(pixel_values=frame, stream=stream))
        # the counter does not see element-wise work, of which the cost counts the gate's, nor matrix inverses
        unseen = 4 * NUM_PATCHES * model.config.hidden_size if stream.gate.needs_surprise else 0
        if mode == "extrapolate" and not output.active_mask.all():
            sentinels = int((output.active_mask & (output.surprise <= 0.3)).sum())
            assert sentinels > 0
            unseen += sentinels**3 // 2
        assert output.cost.item() == pytest.approx((multiply_adds + unseen) / dense, rel=1e-5)
        spent.append((int(output.active_mask.sum()), multiply_adds))
    if mode != "dense":
        assert len({count for count, _ in spent}) > 1
    for (few, less), (many, more) in zip(sorted(spent), sorted(spent)[1:], strict=False):
        assert less < more if few < many else less == more


def test_more_active_patches_cost_more_in_every_gated_mode(vision):
    frame, changed = random_video(2, changed=1.0)
    for mode in GATED_MODES:
        costs = []
        for budget in (4, 9, 18, 36):
            stream = vision.new_stream(mode=mode, token_budget=budget)
            with torch.no_grad():
                vision(pixel_values=frame, stream=stream)
                output = vision(pixel_values=changed, stream=stream)
            assert output.active_mask.sum() == budget
            costs.append(output.cost.item())
        assert costs == sorted(set(costs))


@pytest.mark.parametrize("mode", GATED_MODES)
@pytest.mark.parametrize("budget", [34, 35])
def test_nearly_everything_active_is_a_keyframe_where_that_takes_no_longer(vision64, stock_vision64, mode, budget):
    first, second = random_video(2, changed=1.0)
    stream = vision64.new_stream(mode=mode, token_budget=budget, memory_blend=0.5)
    with torch.no_grad():
        vision64(pixel_values=first, stream=stream)
        output, dense = vision64(pixel_values=second, stream=stream), stock_vision64(pixel_values=second)
    if mode in ("context", "extrapolate") and budget > 0.95 * NUM_PATCHES:
        assert output.active_mask.all()
        assert_outputs_close(output, dense)
    else:
        assert output.active_mask.sum() == budget


def test_folded_probe_pools_as_the_head_does(stock_vision64):
    hidden = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0)).double()
    head = stock_vision64.head
    assert can_fold_probe(head)
    with torch.no_grad():
        assert_close_in_norm(pool_with_folded_probe(head, hidden), head(hidden))


def test_a_hooked_head_is_called_as_a_module(stock_vision):
    model = NeuroFlowSiglipVisionModel.from_siglip(stock_vision)
    seen = []
    handle = stock_vision.head.attention.register_forward_hook(lambda *args: seen.append(1))
    try:
        assert not can_fold_probe(model.head)
        with torch.no_grad():
            model(pixel_values=random_video(1)[0], stream=model.new_stream())
    finally:
        handle.remove()
    assert seen == [1]


def test_grids_need_not_be_square(vision64, stock_vision64):
    frames = [torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    stream = vision64.new_stream(threshold=0)
    with torch.no_grad():
        for frame in frames:
            output = vision64(pixel_values=frame, stream=stream, interpolate_pos_encoding=True)
            dense = stock_vision64(pixel_values=frame, interpolate_pos_encoding=True)
            assert output.active_mask.shape == (1, 4, 8)
            assert_outputs_close(output, dense)
