"""The contracts of a stream: what it holds, what it must not touch, and what it refuses."""

import copy
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipVisionConfig, SiglipVisionModel

from neuroflow_hf import (
    NeuroFlowGateConfig,
    NeuroFlowSiglipConfig,
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipVisionModel,
    NeuroFlowStream,
)
from neuroflow_hf.vision.gate_config import MODE_NAMES
from tests.conftest import (
    GATED_MODES,
    NUM_PATCHES,
    TINY_VISION,
    assert_close_in_norm,
    assert_outputs_close,
    each_tower,
    play,
    random_video,
    wrap_tower,
)

OPTIONS = {"threshold": 0.3, "reference": "both", "ema_rate": 0.1, "max_age": 12}
FIELDS = ("pooler_output", "last_hidden_state", "active_mask", "surprise", "skip_rate", "cost", "token_mask")

pytestmark = pytest.mark.usefixtures("no_grad")


def assert_same(outputs, expected):
    for output, other in zip(outputs, expected, strict=True):
        for name in FIELDS:
            if other.get(name) is None:
                assert output.get(name) is None
            else:
                torch.testing.assert_close(
                    output[name], other[name], rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
                )


@each_tower
@pytest.mark.parametrize("mode", MODE_NAMES)
def test_a_still_scene_costs_the_gate_and_keeps_its_embedding_exactly(vision, mode):
    frame = random_video(1)[0]
    first, *later = play(vision, [frame] * 5, vision.new_stream(mode=mode, threshold=0))
    for output in later:
        if mode != "eliminate":  # its head sees the active patches alone
            assert torch.equal(output.pooler_output, first.pooler_output)
            assert torch.equal(output.last_hidden_state, first.last_hidden_state)
        if mode in ("mlp", "reconstruct", "context"):
            assert output.skip_rate.item() == 1
            assert 0 < output.cost.item() < 0.06  # the patch projection and the gate, on a tiny model
        if mode == "eliminate":
            assert output.active_mask.sum() == 4


@each_tower
@pytest.mark.parametrize("mode", MODE_NAMES)
def test_two_interleaved_streams_do_not_touch_each_other(vision, mode):
    videos = [random_video(5, seed=seed) for seed in (1, 2)]
    alone = [play(vision, video, vision.new_stream(mode=mode, **OPTIONS)) for video in videos]
    streams = [vision.new_stream(mode=mode, **OPTIONS) for _ in videos]
    together = [
        [vision(pixel_values=frame, stream=stream) for frame, stream in zip(frames, streams, strict=True)]
        for frames in zip(*videos, strict=True)
    ]
    for index, expected in enumerate(alone):
        assert_same([outputs[index] for outputs in together], expected)


@each_tower
@given(
    mode=st.sampled_from(MODE_NAMES),
    batch_size=st.integers(2, 4),
    seed=st.integers(0, 1000),
    changes=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=4, max_size=4),
    reset=st.none() | st.integers(0, 1),
)
@settings(deadline=None, max_examples=25)
def test_a_ragged_batch_is_as_many_single_streams(vision64, mode, batch_size, seed, changes, reset):
    videos = [random_video(5, seed=seed + index, changed=changes[index]) for index in range(batch_size)]
    singles = [vision64.new_stream(mode=mode, **OPTIONS) for _ in videos]
    batched = vision64.new_stream(batch_size, mode=mode, **OPTIONS)
    places = list(range(batch_size))
    for step in range(5):
        if step == 3 and reset is not None:
            batched.reset(reset)
            singles[reset].reset()
        if step == 2:  # parted and joined
            parts = [copy.copy(batched), copy.copy(batched)]
            parts[0].keep(places[:1])
            parts[1].keep(places[1:])
            batched = NeuroFlowStream.join(parts)
        if step == 4:
            places = places[:0:-1]  # without the first, and in another order
            batched.keep(places)
        output = vision64(pixel_values=torch.cat([videos[place][step] for place in places]), stream=batched)
        for index, place in enumerate(places):
            expected = vision64(pixel_values=videos[place][step], stream=singles[place])
            assert_close_in_norm(output.pooler_output[index : index + 1], expected.pooler_output)
            assert torch.equal(output.active_mask[index], expected.active_mask[0])
            if mode != "hold":  # by the clock, a frame is projected for all streams or none
                torch.testing.assert_close(output.cost[index], expected.cost[0])
            seen = output.last_hidden_state[index]
            if mode == "eliminate":
                prefix = vision64.num_prefix_tokens
                assert (
                    output.token_mask[index].sum() == expected.token_mask.sum() == expected.active_mask.sum() + prefix
                )
                seen = seen[output.token_mask[index]]
            assert_close_in_norm(seen, expected.last_hidden_state[0])


def with_thing(background, column):
    """The background [1, 3, 24, 24] with an object of 2 x 2 patches whose left edge is at a column of pixels."""
    frame = background.clone()
    frame[..., 8:16, column : column + 8] = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    return frame


@pytest.mark.parametrize("reference", ["last_update", "both"])
def test_no_ghost_after_a_visit(vision64, stock_vision64, reference):
    background = random_video(1, seed=5)[0]
    stream, never_visited = vision64.new_stream(reference=reference), vision64.new_stream(reference=reference)
    *_, output = play(vision64, [background, with_thing(background, 8), background], stream)
    play(vision64, [background], never_visited)
    dense = stock_vision64(pixel_values=background)
    assert_outputs_close(output, dense)
    for name, tensor in never_visited.memory.items():
        if name != "ema":
            assert_close_in_norm(stream.memory[name], tensor)


def test_the_running_mean_alone_leaves_a_ghost(vision, stock_vision):
    background = random_video(1, seed=5)[0]
    stream = vision.new_stream(reference="ema", ema_rate=0.001)
    *_, output = play(vision, [background, with_thing(background, 8), background], stream)
    error = output.last_hidden_state - stock_vision(pixel_values=background).last_hidden_state
    assert not output.active_mask.any()
    assert error.abs().amax(-1).gt(0.5).sum() == 4


@pytest.mark.parametrize("mode", ["mlp", "reconstruct", "context"])
def test_an_object_that_crosses_leaves_no_stale_patch_behind(vision, mode):
    background = random_video(1, seed=5)[0]
    frames = [background, *(with_thing(background, column) for column in range(0, 20, 4)), background, background]
    stream = vision.new_stream(mode=mode)
    outputs = play(vision, frames, stream)
    counts = [int(output.active_mask.sum()) for output in outputs]
    # it stands on 4 patches; from one frame to the next it leaves a column of 2, all its patches change
    assert counts == [NUM_PATCHES, 4, 6, 6, 6, 6, 4, 0]
    never_visited = vision.new_stream(mode=mode)
    play(vision, [background], never_visited)
    assert torch.equal(stream.memory["last_update"], never_visited.memory["last_update"])


@each_tower
@pytest.mark.parametrize("mode", MODE_NAMES)
def test_saved_restored_and_continued_is_as_never_stopped(vision, mode, tmp_path):
    frames = random_video(8, batch_size=2, seed=7)
    stream = vision.new_stream(2, mode=mode, **OPTIONS)
    play(vision, frames[:4], stream)
    state = stream.state_dict()
    stream.save(tmp_path / "stream.safetensors")
    expected = play(vision, frames[4:], stream)

    from_state = vision.new_stream(2, mode=mode, **OPTIONS)
    from_state.load_state_dict(state)
    assert_same(play(vision, frames[4:], from_state), expected)
    from_file = NeuroFlowStream.load(tmp_path / "stream.safetensors")
    assert from_file.gate == stream.gate
    assert_same(play(vision, frames[4:], from_file), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["stream.safetensors"]


@each_tower
@pytest.mark.parametrize("mode", [mode for mode in MODE_NAMES if mode != "eliminate"])
def test_hidden_states_are_kept_as_the_output_is(vision64, mode, tmp_path):
    """Without the final layer norm, the last one is the output, whatever was left out, corrected or blended."""
    model = copy.deepcopy(vision64)
    setattr(model, "layernorm" if hasattr(model, "layernorm") else "post_layernorm", torch.nn.Identity())
    options = {"mode": mode, "threshold": 0.3} | ({} if mode in ("dense", "hold", "mlp") else {"memory_blend": 0.5})
    stream = model.new_stream(2, **options)
    for number, frame in enumerate(random_video(5, batch_size=2)):
        output = model(frame.double(), stream=stream, output_hidden_states=[-1, 1])
        assert torch.equal(output.hidden_states[3], output.last_hidden_state)
        assert output.hidden_states[0] is None and output.hidden_states[2] is None
        if number == 0:
            dense = model(frame.double(), output_hidden_states=True)
            assert_close_in_norm(output.hidden_states[1], dense.hidden_states[1])
        if number == 2:
            stream.save(tmp_path / "stream.safetensors")
            stream = NeuroFlowStream.load(tmp_path / "stream.safetensors")
    assert stream.hidden_states == (1, 3)


def test_hidden_states_that_are_not_kept_are_refused(vision):
    frame = random_video(1)[0]
    stream = vision.new_stream(mode="context")
    assert vision(frame, stream=stream, output_hidden_states=-2).hidden_states[2].shape == (1, NUM_PATCHES, 32)
    assert vision(frame, stream=stream).hidden_states is None
    for request, words in (([1, 2], r"states \[1\], and this stream keeps \[2\]"), (4, "state 4; expected 0 to 3")):
        with pytest.raises(ValueError, match=words):
            vision(frame, stream=stream, output_hidden_states=request)
    with pytest.raises(ValueError, match="not supported in mode `eliminate`"):
        vision(frame, stream=vision.new_stream(mode="eliminate"), output_hidden_states=True)
    stream.reset()
    everything = vision(frame, stream=stream, output_hidden_states=True).hidden_states
    dense = vision(frame, output_hidden_states=True).hidden_states
    for kept, own in zip(everything, dense, strict=True):
        torch.testing.assert_close(kept, own, rtol=1e-5, atol=1e-5)


def test_a_state_is_a_copy_and_a_fresh_stream_has_one_too(vision):
    frames = random_video(3)
    stream = vision.new_stream()
    other = vision.new_stream()
    other.load_state_dict(stream.state_dict())
    assert_same(play(vision, frames, other), play(vision, frames, stream))
    state = stream.state_dict()
    before = {name: tensor.clone() for name, tensor in state["memory"].items()}
    play(vision, random_video(3, seed=1), stream)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state["memory"].items())


@pytest.mark.parametrize(
    "options, named",
    [
        ({"mode": "mlp"}, "mode"),
        ({"signal": "token"}, "signal"),
        ({"reference": "ema"}, "reference"),
        ({"max_age": 3}, "max_age"),
    ],
)
def test_a_state_of_another_kind_of_stream_is_refused_and_changes_nothing(vision, options, named):
    frames = random_video(3)
    donor, stream = vision.new_stream(**options), vision.new_stream(threshold=0.1)
    play(vision, frames[:2], donor)
    play(vision, frames[:2], stream)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=named):
        stream.load_state_dict(donor.state_dict())
    assert stream.frames == before["frames"]
    assert all(torch.equal(tensor, before["memory"][name]) for name, tensor in stream.memory.items())
    with pytest.raises(ValueError, match="state_dict"):
        stream.load_state_dict({"format": 99})


def test_a_file_without_a_stream_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no stream"):
        NeuroFlowStream.load(tmp_path / "other.safetensors")


def test_outputs_do_not_change_when_the_stream_goes_on_nor_the_stream_when_outputs_are_changed(vision):
    frames = random_video(4)
    expected = play(vision, frames, vision.new_stream())
    stream, outputs = vision.new_stream(), []
    for frame in frames:
        output = vision(pixel_values=frame, stream=stream)
        outputs.append(type(output)(**{name: output[name].clone() for name in FIELDS if output.get(name) is not None}))
        for name in ("pooler_output", "last_hidden_state"):
            output[name].div_(1e9)
    assert_same(outputs, expected)
    kept = play(vision, frames, vision.new_stream())
    assert_same(kept, expected)


def test_bytes_are_those_of_the_memories(vision):
    stream = vision.new_stream(mode="context")
    assert stream.nbytes == 0
    play(vision, random_video(1), stream)
    # keys and values of 3 layers, the stored output and the reference, in float32; the embedding
    assert stream.nbytes == 4 * 32 * (NUM_PATCHES * (2 * 3 + 1 + 1) + 1)
    assert "context" in repr(stream)
    stream.reset()
    assert stream.nbytes == 0


def test_half_precision_halves_the_memory():
    torch.manual_seed(0)
    model = NeuroFlowSiglipVisionModel.from_siglip(SiglipVisionModel(SiglipVisionConfig(**TINY_VISION)).bfloat16())
    stream = model.new_stream(mode="context")
    model(pixel_values=random_video(1)[0], stream=stream)
    assert stream.nbytes == 2 * 32 * (NUM_PATCHES * (2 * 3 + 1 + 1) + 1)


def test_memory_stays_constant_over_a_long_stream(vision):
    stream = vision.new_stream(**OPTIONS)
    sizes = set()
    for frame in random_video(60, changed=0.1):
        vision(pixel_values=frame, stream=stream)
        sizes.add(stream.nbytes)
    assert len(sizes) == 1


def test_moving_a_stream(vision):
    stream = vision.new_stream()
    play(vision, random_video(2), stream)
    assert stream.to("meta") is stream
    assert {tensor.device.type for tensor in stream.memory.values()} == {"meta"}
    with pytest.raises(ValueError, match="device was meta and is now cpu"):
        vision(pixel_values=random_video(1)[0], stream=stream)


def test_reset_of_one_stream_makes_its_next_frame_a_keyframe(vision):
    frames = random_video(3, batch_size=3, changed=0)
    stream = vision.new_stream(3)
    play(vision, frames[:2], stream)
    stream.reset([1])
    output = vision(pixel_values=frames[2], stream=stream)
    assert output.active_mask.flatten(1).sum(1).tolist() == [0, NUM_PATCHES, 0]
    assert output.surprise[1].eq(1).all()
    assert stream.frames == [3, 1, 3]
    with pytest.raises(IndexError, match="no stream 3"):
        stream.reset([0, 3])
    assert stream.frames == [3, 1, 3]


@pytest.mark.parametrize("mode", GATED_MODES)
def test_max_age_bounds_what_is_stored(vision, mode):
    frame = random_video(1)[0]
    outputs = play(vision, [frame] * 13, vision.new_stream(mode=mode, max_age=6, min_active_tokens=0))
    masks = torch.cat([output.active_mask for output in outputs[1:]])
    assert masks.sum(dim=(1, 2)).tolist() == [6] * 12
    assert masks[:6].any(0).all()
    assert masks[6:].any(0).all()


def test_controls_are_ordinary_options(vision64, stock_vision64):
    frames = random_video(9, changed=0.1, seed=11)
    dense = [stock_vision64(pixel_values=frame).pooler_output for frame in frames]

    repeated = play(vision64, frames, vision64.new_stream(mode="hold"))
    every_third = play(vision64, frames, vision64.new_stream(mode="hold", keyframe_interval=3))
    for index, (first, held) in enumerate(zip(repeated, every_third, strict=True)):
        assert_close_in_norm(first.pooler_output, dense[0])
        assert_close_in_norm(held.pooler_output, dense[index - index % 3])
        assert (held.cost.item() == 0) == (index % 3 != 0)
        assert held.surprise is None

    triggered = play(vision64, frames, vision64.new_stream(mode="hold", keyframe_fraction=0.3, threshold=0.01))
    last = 0
    for index, output in enumerate(triggered):
        projections = [vision64.embeddings.patch_embedding(frames[i].double()) for i in (last, index)]
        share = (projections[0] - projections[1]).abs().amax(1).gt(1e-5).float().mean()
        if index and share > 0.3:
            last = index
        assert bool(output.active_mask.all()) == (last == index)
        assert_close_in_norm(output.pooler_output, dense[last])
    assert 0 < last < 8


def test_a_scene_cut_is_a_keyframe(vision):
    quiet, cut = random_video(1)[0], random_video(1, seed=9)[0]
    stream = vision.new_stream(keyframe_fraction=0.5, memory_blend=0.5, reference="ema")
    output = play(vision, [quiet, quiet, cut], stream)[-1]
    begun_with_it = vision.new_stream(reference="ema")
    fresh = play(vision, [cut], begun_with_it)[0]
    assert torch.equal(output.last_hidden_state, fresh.last_hidden_state)
    assert torch.equal(stream.memory["ema"], begun_with_it.memory["ema"])


def test_global_motion_norm_looks_past_a_change_of_the_whole_frame(vision):
    frame = random_video(1)[0]
    brighter = frame + 1.5
    brighter[..., :4, :4] = 5
    plain, normed = (
        play(vision, [frame, brighter], vision.new_stream(global_motion_norm=norm, threshold=0.05))[-1].active_mask
        for norm in (False, True)
    )
    assert normed.sum() < plain.sum()
    assert normed[0, 0, 0]


class TestRefusals:
    """A refused frame leaves the stream as it was: what comes after is as if it had never been shown."""

    @pytest.mark.parametrize(
        "bad, words",
        [
            (torch.zeros(2, 1, 24, 24), r"expected \(streams, 3, height, width\)"),
            (torch.zeros(3, 24, 24), "unsqueeze"),
            (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), "torch.uint8; expected floating point"),
            (torch.zeros(1, 3, 24, 24), "batch size was 2 and is now 1"),
            (torch.zeros(2, 3, 32, 32), "interpolate_pos_encoding=True"),
            (torch.zeros(2, 3, 2, 2), "holds no 4-pixel patch"),
        ],
    )
    def test_a_frame_that_does_not_fit(self, vision, bad, words):
        self.check(vision, lambda stream: vision(pixel_values=bad, stream=stream), words)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("mode", MODE_NAMES)
    def test_pixels_that_are_not_finite(self, vision, mode, value):
        bad = random_video(1, batch_size=2)[0]
        bad[1, 2, 5, 7] = value
        looks = mode != "hold"  # by the clock, it does not look at the frame
        if looks:
            self.check(vision, lambda stream: vision(pixel_values=bad, stream=stream), r"stream 1 \(of 2\)", mode=mode)
        with pytest.raises(ValueError, match="stream 1"):
            vision(pixel_values=bad, stream=vision.new_stream(2, mode=mode))

    def test_not_finite_in_a_stream_that_was_just_reset(self, vision):
        frames = random_video(2, batch_size=2)
        stream = vision.new_stream(2)
        vision(pixel_values=frames[0], stream=stream)
        stream.reset(1)
        frames[1][1, 0, 0, 0] = math.nan
        with pytest.raises(ValueError, match="stream 1"):
            vision(pixel_values=frames[1], stream=stream)

    def test_a_budget_too_small_for_the_refresh(self, vision):
        stream = vision.new_stream(max_age=6, token_budget=5)
        with pytest.raises(ValueError, match="needs 6 of 36 patches encoded on every frame"):
            vision(pixel_values=random_video(1)[0], stream=stream)

    def test_another_resolution(self, vision):
        bad = torch.zeros(2, 3, 32, 32)
        self.check(
            vision,
            lambda stream: vision(pixel_values=bad, stream=stream, interpolate_pos_encoding=True),
            r"grid was \(6, 6\) and is now \(8, 8\)",
        )

    def test_another_dtype(self, vision):
        frame = random_video(1, batch_size=2)[0]

        def in_half_precision(stream):
            with torch.autocast("cpu", torch.bfloat16):
                vision(pixel_values=frame, stream=stream)

        self.check(vision, in_half_precision, "dtype was torch.float32 and is now torch.bfloat16")

    def test_another_model(self, vision):
        deeper = SiglipVisionModel(SiglipVisionConfig(**TINY_VISION | {"num_hidden_layers": 4}))
        other = NeuroFlowSiglipVisionModel.from_siglip(deeper)
        frame = random_video(1, batch_size=2)[0]
        self.check(vision, lambda stream: other(pixel_values=frame, stream=stream), "num layers was 3 and is now 4")

    @pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
    def test_recording(self, vision, name):
        frame = random_video(1, batch_size=2)[0]
        self.check(vision, lambda stream: vision(pixel_values=frame, stream=stream, **{name: True}), name)

    def check(self, vision, refused, words, mode="context"):
        frames = random_video(4, batch_size=2, seed=3)
        expected = play(vision, frames, vision.new_stream(2, mode=mode, **OPTIONS))
        stream = vision.new_stream(2, mode=mode, **OPTIONS)
        outputs = play(vision, frames[:2], stream)
        with pytest.raises(ValueError, match=words):
            refused(stream)
        assert_same(outputs + play(vision, frames[2:], stream), expected)


@pytest.mark.parametrize("seen", [0, 2])
def test_a_refused_frame_of_another_kind_does_not_cost_the_memory(vision, seen):
    frames, bad = random_video(4), random_video(1, batch_size=2, size=32)[0]
    bad[1, 0, 0, 0] = math.nan
    stream = vision.new_stream(on_change="keyframe" if seen else "error")
    outputs = play(vision, frames[:seen], stream)
    with pytest.raises(ValueError, match="stream 1" if seen else "batch size"):
        vision(pixel_values=bad, stream=stream, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="stream 0"):
        vision(pixel_values=bad[1:], stream=stream, interpolate_pos_encoding=True)
    assert (stream.frames, stream.batch_size) == ([seen], 1)
    assert_same(outputs + play(vision, frames[seen:], stream), play(vision, frames, vision.new_stream()))


@pytest.mark.parametrize(
    "options, change",
    [
        ({}, {"mode": "mlp"}),
        ({"mode": "context"}, {"mode": "reconstruct"}),
        ({}, {"signal": "token"}),
        ({"reference": "both"}, {"reference": "last_update"}),
        ({}, {"reference": "ema"}),
        ({"reference": "ema"}, {"slow_ema_rate": 0.001}),
        ({"max_age": 9}, {"max_age": None}),
        ({"mode": "hold"}, {"keyframe_fraction": 0.5}),
    ],
)
def test_a_change_of_what_is_stored_is_refused_until_the_stream_is_reset(vision, options, change):
    frames = random_video(4, changed=0.3)
    stream = vision.new_stream(**options)
    play(vision, frames[:2], stream)
    ((name, value),) = change.items()
    before = getattr(stream.gate, name)
    setattr(stream.gate, name, value)
    with pytest.raises(ValueError, match=rf"`{name}( or \w+)?( set)?` was"):
        vision(pixel_values=frames[2], stream=stream)
    setattr(stream.gate, name, before)
    assert_same(play(vision, frames[2:], stream), play(vision, frames, vision.new_stream(**options))[2:])
    setattr(stream.gate, name, value)
    stream.reset()
    assert_same(play(vision, frames, stream), play(vision, frames, vision.new_stream(**{**options, **change})))


def test_options_that_are_not_stored_may_be_changed_but_not_out_of_range(vision):
    frames = random_video(3)
    stream = vision.new_stream(reference="ema")
    play(vision, frames[:2], stream)
    for name, value in {"threshold": math.nan, "ema_rate": 5.0, "keyframe_interval": 0, "dilate": -1}.items():
        before = getattr(stream.gate, name)
        setattr(stream.gate, name, value)
        with pytest.raises(ValueError, match=f"`{name}` is"):
            vision(pixel_values=frames[2], stream=stream)
        setattr(stream.gate, name, before)
    stream.gate.threshold = -1
    assert vision(pixel_values=frames[2], stream=stream).active_mask.all()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda state: state.pop("frames"), "lacks frames"),
        (lambda state: state.update(frames=[3]), "2 streams"),
        (lambda state: state.update(batch_size=3), "3 streams"),
        (lambda state: state["memory"].clear(), "`ema` has shape None; expected"),
        (lambda state: state["memory"].pop("layers.1.key"), "`layers.1.key` has shape None"),
        (lambda state: state["memory"].update({"layers.-1.key": torch.zeros(1)}), "`layers.-1.key`.*expected None"),
        (lambda state: state["memory"].update(ema=torch.zeros(1, 36, 32)), r"\(1, 36, 32\); expected \(2, 36, 32\)"),
        (lambda state: state["memory"].update(pooled=torch.zeros(2, 31)), r"`pooled` has shape \(2, 31\)"),
    ],
)
def test_a_state_that_is_not_whole_is_refused_and_changes_nothing(vision, spoil, words):
    frames = random_video(3, batch_size=2)
    stream, donor = vision.new_stream(2, reference="both"), vision.new_stream(2, reference="both")
    play(vision, frames[:2], stream)
    play(vision, frames, donor)
    state = donor.state_dict()
    spoil(state)
    with pytest.raises(ValueError, match=words):
        stream.load_state_dict(state)
    expected = play(vision, frames, vision.new_stream(2, reference="both"))[2:]
    assert_same(play(vision, frames[2:], stream), expected)


def test_the_state_of_an_interrupted_frame_is_that_of_a_fresh_stream(stock_vision):
    model = NeuroFlowSiglipVisionModel.from_siglip(stock_vision)
    frame, stream = random_video(1)[0], model.new_stream()

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.head.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            model(pixel_values=frame, stream=stream)
    finally:
        handle.remove()
    other = model.new_stream()
    other.load_state_dict(stream.state_dict())
    assert other.nbytes == 0
    with pytest.raises(ValueError, match="NaN"):
        model(pixel_values=frame * math.nan, stream=other)


@pytest.mark.parametrize("mode", ["mlp", "reconstruct", "context"])
def test_what_hooks_kept_does_not_change_when_the_stream_goes_on(mode, stock_vision):
    model = NeuroFlowSiglipVisionModel.from_siglip(stock_vision)
    kept = []

    def keep(module, args, output):
        kept.append((output, output.clone()))

    names = (
        "embeddings.patch_embedding",
        "post_layernorm",
        "encoder.layers.0.self_attn.k_proj",
        "encoder.layers.0.mlp",
    )
    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        frames = [frame.to(memory_format=torch.channels_last) for frame in random_video(3)]
        play(model, frames, model.new_stream(mode=mode))
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept) >= 9
    assert all(torch.equal(output, copy) for output, copy in kept)


def test_changing_what_hooks_kept_does_not_change_the_memory(stock_vision):
    model = NeuroFlowSiglipVisionModel.from_siglip(stock_vision)
    stream, kept = model.new_stream(reference="both"), []
    handle = model.embeddings.patch_embedding.register_forward_hook(lambda *args: kept.append(args[-1]))
    try:
        # in this layout the projection's output is what the gate compares, not a copy of it
        play(model, [random_video(1)[0].to(memory_format=torch.channels_last)], stream)
    finally:
        handle.remove()
    before = stream.state_dict()["memory"]
    kept[0].zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stream.memory.items())


@pytest.mark.parametrize("mode", GATED_MODES)
@pytest.mark.parametrize("trained", ["head", "encoder.layers.1.mlp", "encoder.layers.0.self_attn.q_proj", ""])
def test_a_loss_over_several_frames_trains_any_part(stock_vision, mode, trained):
    model = NeuroFlowSiglipVisionModel.from_siglip(SiglipVisionModel(stock_vision.config))
    model.requires_grad_(False)
    model.get_submodule(trained).requires_grad_(True)
    stream, frames, loss = model.new_stream(mode=mode, threshold=0.3), random_video(4), 0
    with torch.enable_grad():
        for frame in frames[:3]:
            output = model(pixel_values=frame, stream=stream)
            assert not output.surprise.requires_grad
            loss = loss + output.pooler_output.square().sum()
    model(pixel_values=frames[3], stream=stream)  # without gradients, written in place
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.get_submodule(trained).parameters())


def test_threads_that_share_a_model_leave_its_checkpointing_on(stock_vision):
    model = NeuroFlowSiglipVisionModel.from_siglip(SiglipVisionModel(stock_vision.config)).eval()
    for layer in model.encoder.layers:
        layer.gradient_checkpointing = True
    first_inside, second_inside = threading.Event(), threading.Event()

    def meet(module, args):
        if threading.current_thread() is first:
            first_inside.set()
            second_inside.wait(10)
        else:
            second_inside.set()
            first.join(10)

    def one_frame():
        with torch.no_grad():
            model(pixel_values=random_video(1)[0], stream=model.new_stream())

    model.encoder.layers[0].layer_norm1.register_forward_pre_hook(meet)
    first, second = (threading.Thread(target=one_frame) for _ in range(2))
    first.start()
    first_inside.wait(10)
    second.start()
    second.join(20)
    assert all(layer.gradient_checkpointing for layer in model.encoder.layers)


@pytest.mark.parametrize("streams", [[False, True], torch.tensor([False, True]), [0, 1.0], True])
def test_a_mask_does_not_pass_for_indices(vision, streams):
    stream = vision.new_stream(2)
    play(vision, random_video(2, batch_size=2), stream)
    with pytest.raises(TypeError, match="indices of streams"):
        stream.reset(streams)
    assert stream.frames == [2, 2]
    stream.reset(torch.tensor([1]))
    assert stream.frames == [2, 0]


@pytest.mark.parametrize("streams, error", [([], ValueError), ([1, 1], ValueError), ([2], IndexError)])
def test_streams_to_keep_that_do_not_exist(vision, streams, error):
    stream = vision.new_stream(2)
    play(vision, random_video(1, batch_size=2), stream)
    with pytest.raises(error):
        stream.keep(streams)
    assert stream.frames == [1, 1] and stream.memory["pooled"].shape[0] == 2


def test_streams_that_cannot_be_joined(vision):
    streams = [vision.new_stream(), vision.new_stream()]
    with pytest.raises(ValueError, match="is empty"):
        NeuroFlowStream.join([])
    assert NeuroFlowStream.join(streams).frames == [0, 0]
    play(vision, random_video(1), streams[0])
    vision(pixel_values=random_video(1)[0][..., :16, :16], stream=streams[1], interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match=r"cannot be joined: grid was \(6, 6\) and is now \(4, 4\)"):
        NeuroFlowStream.join(streams)
    other = vision.new_stream(mode="reconstruct")
    play(vision, random_video(1), other)
    with pytest.raises(ValueError, match="store different things"):
        NeuroFlowStream.join([streams[0], other])
    assert streams[0].frames == [1]


def test_a_stream_that_is_none(vision):
    with pytest.raises(TypeError, match=r"`stream` is a method; expected what `model.new_stream\(\)` returns"):
        vision(pixel_values=random_video(1)[0], stream=vision.new_stream)


@pytest.mark.parametrize("options", [{"mode": "dense"}, {"mode": "hold"}, {"threshold": -1}])
def test_a_budget_does_not_count_where_everything_or_nothing_is_active(vision, options):
    vision(pixel_values=random_video(1)[0], stream=vision.new_stream(max_age=6, token_budget=5, **options))


@pytest.mark.parametrize("dilate", [0, 1])
def test_dilation_does_not_make_a_scene_cut(vision, dilate):
    frame = random_video(1)[0]
    changed = frame.clone()
    for row, column in ((4, 4), (4, 16), (16, 4), (16, 16)):
        changed[..., row : row + 4, column : column + 4] += torch.randn(3, 4, 4)
    stream = vision.new_stream(keyframe_fraction=0.5, dilate=dilate, reference="ema", ema_rate=0.5)
    play(vision, [frame, changed], stream)
    signal = vision.embeddings.patch_embedding(changed).flatten(2).transpose(1, 2)
    assert not torch.allclose(stream.memory["ema"], signal)  # a keyframe would have started it anew


def test_a_grid_of_another_shape_with_as_many_patches_needs_interpolation(vision):
    with pytest.raises(ValueError, match="4x9 patches, the checkpoint has positions for 6x6"):
        vision(pixel_values=torch.zeros(1, 3, 16, 36), stream=vision.new_stream())


@each_tower
def test_positions_are_not_interpolated_for_a_still_frame(vision, monkeypatch):
    calls, original = [], vision.embeddings.interpolate_pos_encoding
    monkeypatch.setattr(
        vision.embeddings, "interpolate_pos_encoding", lambda *args: calls.append(1) or original(*args)
    )
    frame, stream = random_video(1, size=32)[0], vision.new_stream()
    for _ in range(3):
        vision(pixel_values=frame, stream=stream, interpolate_pos_encoding=True)
    assert calls == [1]


def test_classifier_of_no_active_patch_is_refused():
    classifier = NeuroFlowSiglipForImageClassification(NeuroFlowSiglipConfig(vision_config=dict(TINY_VISION))).eval()
    stream = classifier.new_stream(mode="eliminate", min_active_tokens=0)
    with pytest.raises(ValueError, match="min_active_tokens"):
        classifier(pixel_values=random_video(1)[0], stream=stream)
    assert stream.frames == [0]


def test_clips_of_a_model_that_returns_tuples(stock_vision):
    model = NeuroFlowSiglipVisionModel.from_siglip(stock_vision)
    model.config.return_dict = False
    assert model.get_video_features(torch.stack(random_video(3), dim=1)).pooler_output.shape == (1, 3, 32)


@each_tower
def test_an_interrupted_frame_is_followed_by_a_keyframe(tower, stock_vision64):
    frames = random_video(3)
    model = wrap_tower(tower, stock_vision64)
    stream = model.new_stream()
    play(model, frames[:1], stream)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.encoder_layers()[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(pixel_values=frames[1], stream=stream)
    handle.remove()
    assert stream.state_dict()["frames"] == [0]
    output = model(pixel_values=frames[2], stream=stream)
    assert output.active_mask.all()
    assert_outputs_close(output, stock_vision64(pixel_values=frames[2]))


@pytest.mark.parametrize("batch_size, size", [(1, 24), (3, 24), (2, 32)])
def test_a_change_is_a_keyframe_if_the_gate_says_so(vision64, stock_vision64, batch_size, size):
    stream = vision64.new_stream(2, on_change="keyframe")
    play(vision64, random_video(2, batch_size=2), stream)
    frame = random_video(1, batch_size=batch_size, size=size)[0]
    output = vision64(pixel_values=frame, stream=stream, interpolate_pos_encoding=True)
    assert output.active_mask.all()
    assert len(output.pooler_output) == batch_size == stream.batch_size
    assert_outputs_close(output, stock_vision64(pixel_values=frame, interpolate_pos_encoding=True))


class TestOverFrames:
    """The generator and the method for clips, on all three models."""

    def test_generator(self, model):
        frames = random_video(4, seed=2)
        expected = play_images(model, frames, model.new_stream(threshold=0.1))
        assert_same(list(model.stream_frames(frames, threshold=0.1)), expected)
        assert_same(list(model.stream_frames((frame[0] for frame in frames), threshold=0.1)), expected)
        stream = model.new_stream(threshold=0.1)
        assert_same(list(model.stream_frames(frames[:2], stream)), expected[:2])
        assert_same(list(model.stream_frames(frames[2:], stream)), expected[2:])
        with pytest.raises(ValueError, match="threshold"):
            list(model.stream_frames(frames, stream, threshold=0.2))

    def test_generator_takes_frames_as_they_come(self, model):
        taken = []

        def camera():
            for index, frame in enumerate(random_video(4)):
                taken.append(index)
                yield frame

        outputs = model.stream_frames(camera())
        next(outputs)
        assert taken == [0]

    def test_clips(self, model):
        video = random_video(4, batch_size=2, seed=2)
        clips = torch.stack(video, dim=1)
        output = model.get_video_features(clips, threshold=0.1)
        expected = play_images(model, video, model.new_stream(2, threshold=0.1))
        for name in ("pooler_output", "active_mask", "surprise", "skip_rate", "cost"):
            assert torch.equal(output[name], torch.stack([frame[name] for frame in expected], dim=1))
        assert output.last_hidden_state is None
        with pytest.raises(ValueError, match=r"expected \(clips, frames, channels, height, width\)"):
            model.get_video_features(video[0])

    @pytest.mark.parametrize("mode", MODE_NAMES)
    def test_classifier(self, mode):
        torch.manual_seed(0)
        config = NeuroFlowSiglipConfig(vision_config=dict(TINY_VISION), num_labels=5)
        classifier = NeuroFlowSiglipForImageClassification(config).eval().double()
        frames = random_video(3, batch_size=2)
        for output, frame in zip(classifier.stream_frames(frames, mode=mode, threshold=-1), frames, strict=True):
            assert_close_in_norm(output.logits, classifier(pixel_values=frame).logits)
        ragged = torch.cat([frames[2][:1], torch.where(torch.arange(24) < 12, frames[2], frames[0])[1:]])
        stream = classifier.new_stream(2, mode=mode, threshold=0.3)
        classifier(pixel_values=frames[2], stream=stream)
        output = classifier(pixel_values=ragged, stream=stream, labels=torch.tensor([1, 2]))
        assert output.logits.shape == (2, 5)
        assert output.loss.isfinite()
        assert output.cost.shape == (2,)

    def test_dual_model_compares_a_streamed_frame_with_texts(self, model):
        model, frame = copy.deepcopy(model).double(), random_video(1)[0]
        ids = torch.tensor([[5, 6, 7, 0], [8, 9, 1, 0]])
        plain = model(input_ids=ids, pixel_values=frame)
        streamed = model(input_ids=ids, pixel_values=frame, stream=model.new_stream())
        assert_close_in_norm(streamed.logits_per_image, plain.logits_per_image)
        assert streamed.vision_model_output.active_mask.all()


def play_images(model, frames, stream):
    return [model.get_image_features(frame, stream=stream) for frame in frames]


def test_tuples_on_request(vision):
    frame = random_video(1)[0]
    output = vision(pixel_values=frame, stream=vision.new_stream())
    as_tuple = vision(pixel_values=frame, stream=vision.new_stream(), return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, output.to_tuple(), strict=True))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "2"])
def test_a_batch_size_that_is_none(vision, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        vision.new_stream(batch_size)


def test_misspelt_gate_option(vision):
    with pytest.raises(ValueError, match="Did you mean `threshold`"):
        vision.new_stream(treshold=0.1)
    assert vision.new_stream(threshold=0.2).gate == NeuroFlowGateConfig(mode="context", threshold=0.2)


def test_streams_of_a_model_without_a_pooling_head():
    torch.manual_seed(0)
    headless = SiglipVisionModel(SiglipVisionConfig(**TINY_VISION, vision_use_head=False)).eval()
    model = NeuroFlowSiglipVisionModel.from_siglip(headless)
    for mode in MODE_NAMES:
        output = play(model, random_video(3), model.new_stream(mode=mode))[-1]
        assert output.pooler_output is None
        assert output.last_hidden_state.shape[-1] == 32
