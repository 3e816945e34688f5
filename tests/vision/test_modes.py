"""Every mode against the patch-by-patch reference, against dense, and against the multiply-adds that it claims."""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from neuroflow_hf import NeuroFlowGateConfig, NeuroFlowSiglipVisionModel
from neuroflow_hf.vision.frame import frame_cost, geometry_of
from neuroflow_hf.vision.gate_config import MODE_NAMES
from neuroflow_hf.vision.modes import MODES
from neuroflow_hf.vision.naive import NaiveStream
from neuroflow_hf.vision.pooling import can_fold_probe, pool_with_folded_probe
from tests.conftest import (
    GATED_MODES,
    NUM_PATCHES,
    assert_close_in_norm,
    assert_outputs_close,
    each_tower,
    make_stock_tower,
    random_video,
    wrap_tower,
)


def only_where_there_are_any(options):
    """Summary tokens are an option of two modes."""
    return options if options["mode"] in ("eliminate", "reconstruct") else options | {"summary_tokens": 0}


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
        "cost_budget": maybe | st.floats(0.2, 1),
        "cost_reserve": st.sampled_from([1.0, 2.5]),
        "min_fidelity": maybe | st.sampled_from([0.3, 0.9, 0.99]),
        "sentinels": st.sampled_from([0, 0.1, 1]),
        "ema_rate": st.sampled_from([0.05, 0.5, 1.0]),
        "memory_blend": st.sampled_from([1.0, 0.5]),
        "summary_tokens": st.sampled_from([0, 1, 4, 9]),
    }
).map(only_where_there_are_any)


def assume_consistent(options, num_patches):
    if options["max_age"] and options["token_budget"]:
        assume(options["max_age"] * options["token_budget"] >= num_patches)


def in_debt(mode):
    """Options with which the second frame overdraws, and those after it are held."""
    return NeuroFlowGateConfig(mode=mode, cost_budget=0.2, cost_reserve=1, keyframe_surprise=0).to_dict()


@pytest.fixture(scope="module")
def smallest_vision(tower):
    """A vision model of 16 patches and 2 layers: the reference takes a while for each patch."""
    sizes = {"image_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    return wrap_tower(tower, make_stock_tower(tower, **sizes).double())


@given(options=gate_options, seed=st.integers(0, 1000))
@example(options=NeuroFlowGateConfig(mode="extrapolate", token_budget=1, dilate=1, threshold=0.9).to_dict(), seed=0)
@example(options=in_debt("context"), seed=0)
@example(options=in_debt("extrapolate"), seed=1)
@example(options=in_debt("mlp"), seed=3)
@example(options=in_debt("hold"), seed=4)
@example(options=NeuroFlowGateConfig(mode="eliminate", threshold=0.3, summary_tokens=9).to_dict(), seed=0)
@example(options=NeuroFlowGateConfig(mode="reconstruct", threshold=0.3, summary_tokens=9).to_dict(), seed=0)
@settings(deadline=None, max_examples=60)
def test_fast_path_equals_the_patch_by_patch_reference(smallest_vision, options, seed):
    assume_consistent(options, num_patches=16)
    model, gate = smallest_vision, NeuroFlowGateConfig(**options)
    follow_reference(model, gate, random_video(5, seed=seed, size=16))


@each_tower
@pytest.mark.parametrize("mode", MODE_NAMES)
def test_each_tower_equals_the_reference_in_each_mode(smallest_vision, mode):
    options = {"mode": mode, "threshold": 0.3, "reference": "both", "signal": "token", "keyframe_interval": 4}
    options |= {"memory_blend": 0.5, "summary_tokens": 4 if mode in ("eliminate", "reconstruct") else 0}
    follow_reference(smallest_vision, NeuroFlowGateConfig(**options), random_video(6, seed=1, size=16))


def test_the_budget_is_paced_as_by_the_reference(smallest_vision):
    """Quiet, busy and cut: every action of the controller, many times."""
    frames = [
        frame
        for seed, changed in enumerate((0.1, 0.9, 0.3, 0.6, 0.0, 0.5))
        for frame in random_video(12, seed=seed, changed=changed, size=16)
    ]
    for budget in (0.3, 0.9):
        gate = NeuroFlowGateConfig(cost_budget=budget, cost_reserve=2, keyframe_interval=9)
        actives = follow_reference(smallest_vision, gate, frames)
        assert {0, 16} < {*actives} and 9 < actives.count(16) < 45


def test_a_scene_at_rest_becomes_a_keyframe_as_by_the_reference(smallest_vision):
    moving, other = random_video(4, seed=1, changed=0.2, size=16), random_video(1, seed=9, size=16)
    gate = NeuroFlowGateConfig(cost_budget=0.3, keyframe_interval=None)
    actives = follow_reference(smallest_vision, gate, [*moving, *moving[-1:] * 8, *other * 4])
    assert 0 < max(actives[1:5]) < 16
    assert actives[5:12] == [0, 0, 16, 0, 0, 0, 0]  # once, since it leaves no error
    assert actives[12:] == [16, 0, 0, 0]  # a cut


@pytest.mark.parametrize("budget", [None, 0.6])
def test_the_fidelity_is_kept_as_by_the_reference(smallest_vision, budget):
    """Frames that are held, encoded sparsely, and keyframes."""
    parts = [random_video(8, seed=seed, changed=share, size=16) for seed, share in enumerate((0.1, 0.2, 0.8, 0, 0.1))]
    frames = [frame for part in parts for frame in part]
    gate = NeuroFlowGateConfig(min_fidelity=0.9, cost_budget=budget, threshold=0.05)
    actives = follow_reference(smallest_vision, gate, frames)
    assert 0 in actives and 16 in actives and any(0 < count < 16 for count in actives)


def follow_reference(model, gate, frames):
    """Pass the frames through both paths, which must agree; return how many patches were active on each."""
    pooling, geometry = model.pooling(exact=False), geometry_of(model, frames[0], False)
    looking = frame_cost(model, gate, MODES[gate.mode], geometry, 0, 0, True, pooling)
    naive, stream, actives = NaiveStream(model, gate, looking), model.new_stream(**gate.to_dict()), []
    with torch.no_grad():
        for frame in frames:
            pooled, seen, active = naive.step(frame.double())
            output = model(pixel_values=frame, stream=stream)
            naive.pay(output.cost.item())
            assert output.active_mask.flatten().nonzero().flatten().tolist() == active
            assert_close_in_norm(output.last_hidden_state[0], seen.double())  # of no patch, naive has float32
            assert_close_in_norm(output.pooler_output[0], pooled)
            actives.append(len(active))
    return actives


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


@each_tower
@given(
    mode=st.sampled_from(MODE_NAMES),
    threshold=st.sampled_from([-1, -3.5]),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 1000),
    options=gate_options,
)
@settings(deadline=None, max_examples=15)
def test_everything_active_equals_dense_whatever_the_other_options_say(
    vision64, stock_vision64, mode, threshold, batch_size, seed, options
):
    assume_consistent(options, NUM_PATCHES)
    options = only_where_there_are_any({**options, "mode": mode, "threshold": threshold})
    stream = vision64.new_stream(batch_size, **options)
    with torch.no_grad():
        for frame in random_video(3, batch_size, seed):
            output, dense = vision64(pixel_values=frame, stream=stream), stock_vision64(pixel_values=frame)
            assert_outputs_close(output, dense)
            assert output.active_mask.all()
            assert output.skip_rate.eq(0).all()


@each_tower
@pytest.mark.parametrize("mode", ["eliminate", "reconstruct"])
def test_each_stream_of_a_batch_has_its_own_summary(vision64, mode):
    """Streams with other numbers of active patches, with none, and a keyframe of one of them, as each one alone."""
    options = {"mode": mode, "threshold": 0.3, "summary_tokens": 4, "keyframe_fraction": 0.4}
    videos = [random_video(5, seed=seed, changed=share) for seed, share in ((0, 0.2), (1, 0.3), (2, 0.0))]
    videos[0][3] = torch.randn_like(videos[0][3])
    together, alone = vision64.new_stream(3, **options), [vision64.new_stream(**options) for _ in videos]
    keyframes = []
    with torch.no_grad():
        for frames in zip(*videos, strict=True):
            output = vision64(pixel_values=torch.cat(frames), stream=together)
            keyframes.append(output.skip_rate.eq(0).tolist())
            for index, (frame, stream) in enumerate(zip(frames, alone, strict=True)):
                assert_close_in_norm(output.pooler_output[index], vision64(pixel_values=frame, stream=stream)[1][0])
    assert keyframes[3] == [True, False, False]


@pytest.mark.parametrize("mode", ["eliminate", "reconstruct"])
def test_a_saved_stream_has_its_summary(vision64, tmp_path, mode):
    frames = random_video(3, changed=0.2)
    stream = vision64.new_stream(mode=mode, threshold=0.3, summary_tokens=4)
    with torch.no_grad():
        for frame in frames[:2]:
            vision64(pixel_values=frame, stream=stream)
        stream.save(tmp_path / "stream.safetensors")
        loaded = type(stream).load(tmp_path / "stream.safetensors")
        outputs = [vision64(pixel_values=frames[2], stream=each) for each in (stream, loaded)]
    assert torch.equal(outputs[0].pooler_output, outputs[1].pooler_output)
    names = {"summary_key", "summary_value"} | ({"summary_output"} if mode == "eliminate" else set())
    assert {name.rsplit(".", 1)[-1] for name in loaded.memory if "summary" in name} == names


def test_summary_tokens_cost_what_they_add(vision64):
    frames, costs = random_video(2, changed=0.2), {}
    for tokens in (0, 4, 9):
        stream = vision64.new_stream(mode="reconstruct", token_budget=6, summary_tokens=tokens)
        with torch.no_grad():
            costs[tokens] = [vision64(pixel_values=frame, stream=stream).cost.item() for frame in frames]
    assert costs[0][0] == costs[4][0] == costs[9][0]
    assert costs[0][1] < costs[4][1] < costs[9][1]
    assert (costs[9][1] - costs[0][1]) / (costs[4][1] - costs[0][1]) == pytest.approx(9 / 4, rel=1e-4)


def test_summary_tokens_are_refused_where_they_cannot_be(vision64):
    for options, message in (
        ({"mode": "context", "summary_tokens": 4}, "`eliminate` and `reconstruct`"),
        ({"mode": "eliminate", "summary_tokens": 5}, "a square number"),
        ({"mode": "eliminate", "summary_tokens": -4}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            vision64.new_stream(**options)
    stream = vision64.new_stream(mode="eliminate", summary_tokens=49)
    with pytest.raises(ValueError, match="7x7 patches or more, and a frame has 6x6; choose at most 36"):
        vision64(pixel_values=random_video(1)[0], stream=stream)
    assert stream.frames == [0]


@each_tower
def test_dense_mode_is_the_stock_model_bit_for_bit(vision, stock_vision):
    stream = vision.new_stream(mode="dense")
    with torch.no_grad():
        for frame in random_video(2):
            output, dense = vision(pixel_values=frame, stream=stream), stock_vision(pixel_values=frame)
            assert torch.equal(output.pooler_output, dense.pooler_output)
            assert output.cost.item() == 1


def eager(tower, stock):
    """A copy that shares parameters and whose attention is made of products that can be counted."""
    copy = wrap_tower(tower, stock)
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


@each_tower
@pytest.mark.parametrize("mode", MODE_NAMES)
def test_cost_is_what_a_counter_of_multiply_adds_sees(tower, stock_vision, mode):
    model = eager(tower, stock_vision)
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


@each_tower
def test_grids_need_not_be_square(vision64, stock_vision64):
    frames = [torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    stream = vision64.new_stream(threshold=0)
    with torch.no_grad():
        for frame in frames:
            output = vision64(pixel_values=frame, stream=stream, interpolate_pos_encoding=True)
            dense = vision64(pixel_values=frame, interpolate_pos_encoding=True)
            assert output.active_mask.shape == (1, 4, 8)
            assert_outputs_close(output, dense)
