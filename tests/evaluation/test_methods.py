"""Methods behind one interface: each is what it says, at the cost that it says."""

import pytest
import torch

from neuroflow_hf.evaluation.methods import (
    KINDS,
    Dense,
    DenseFrames,
    EveryFrames,
    PatchSurprise,
    PixelDifference,
    Smaller,
    Streamed,
    dense_cost,
    make_methods,
)
from neuroflow_hf.evaluation.settings import (
    DENSE,
    FIRST,
    hold_baselines,
    mode_methods,
    preset_methods,
    smaller_baselines,
)
from tests.conftest import NUM_PATCHES, assert_close_in_norm, each_tower, random_video

FLOAT32_EMBEDDINGS = 1e-6  # methods return float32, whatever the model's dtype


def run(method, frames):
    """Embeddings [T, B, D] and costs [T, B]."""
    method.start(len(frames[0]))
    with torch.inference_mode():
        steps = [method.step(frame) for frame in frames]
    return torch.stack([step.embeddings for step in steps]), torch.stack([step.cost for step in steps])


def streamed(vision, frames, **options):
    stream = vision.new_stream(batch_size=len(frames[0]), **options)
    with torch.inference_mode():
        outputs = [vision(pixel_values=frame, stream=stream) for frame in frames]
    return torch.stack([one.pooler_output for one in outputs]), torch.stack([one.cost for one in outputs])


def held_video(batch_size=1):
    """Every third frame differs from the one before."""
    return [frame for frame in random_video(5, batch_size, seed=4, changed=0.3) for _ in range(3)]


@pytest.mark.parametrize("mode", ["context", "extrapolate", "reconstruct", "mlp", "eliminate"])
def test_a_stream_is_the_models_own(vision, mode):
    frames = random_video(6, 2)
    embeddings, costs = run(Streamed(vision, mode=mode, threshold=0.02), frames)
    expected, expected_costs = streamed(vision, frames, mode=mode, threshold=0.02)
    assert torch.equal(embeddings, expected) and torch.equal(costs, expected_costs)


def test_a_streams_options_are_laid_over_the_packages_defaults(vision):
    assert vision.new_stream().gate.mode == "context"  # the model's own are others
    assert Streamed(vision, preset="thrifty").gate.keyframe_interval == 60
    assert Streamed(vision).gate.mode == "extrapolate"


@each_tower
@pytest.mark.parametrize("level", [0.01, 0.1, 0.4])
def test_triggered_by_surprise_is_mode_hold(vision64, level):
    frames = held_video()
    embeddings, costs = run(PatchSurprise(vision64, level), frames)
    expected, expected_costs = streamed(vision64, frames, mode="hold", keyframe_surprise=level)
    assert_close_in_norm(embeddings, expected.float(), FLOAT32_EMBEDDINGS)
    torch.testing.assert_close(costs[1:], expected_costs[1:], atol=1e-5, rtol=1e-5)
    if level < 0.4:
        assert 0 < (costs[1:] > 0.5).sum() < 14


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_a_budget_is_that_of_mode_hold(vision64, budget):
    frames = [torch.cat(some) for some in zip(random_video(1) * 40, random_video(40, changed=0.9), strict=True)]
    level = 0.05
    embeddings, costs = run(PatchSurprise(vision64, level, budget=budget), frames)
    expected, expected_costs = streamed(vision64, frames, mode="hold", keyframe_surprise=level, cost_budget=budget)
    assert_close_in_norm(embeddings, expected.float(), FLOAT32_EMBEDDINGS)
    torch.testing.assert_close(costs[1:], expected_costs[1:], atol=1e-5, rtol=1e-5)
    assert costs[1:, 0].max() < 0.1 and 4 < (costs[1:, 1] > 0.5).sum() < 20


@pytest.mark.parametrize("k", [1, 3, 5])
def test_every_k_frames_is_mode_hold(vision64, k):
    frames = random_video(8)
    embeddings, costs = run(EveryFrames(vision64, k), frames)
    expected, _ = streamed(vision64, frames, mode="hold", keyframe_interval=k)
    assert_close_in_norm(embeddings, expected.float(), FLOAT32_EMBEDDINGS)
    assert costs[:, 0].tolist() == [float(number % k == 0) for number in range(8)]


def test_videos_take_turns_with_their_keyframes(vision):
    _, costs = run(EveryFrames(vision, 6), random_video(13, 5))
    assert costs[0].tolist() == [1] * 5
    keyframes = [tuple(column.nonzero()[:, 0].tolist()) for column in costs[1:].T]
    assert len(set(keyframes)) > 2
    assert all(len(found) in (2, 3) for found in keyframes)


def test_never_repeats_the_first_frame_at_no_cost(vision):
    frames = random_video(5, 2)
    embeddings, costs = run(EveryFrames(vision, None), frames)
    assert torch.equal(embeddings, embeddings[:1].expand(5, -1, -1))
    assert costs.tolist() == [[1, 1]] + [[0, 0]] * 4


def test_the_pixel_gate_compares_with_the_last_frame_that_was_computed(vision64):
    first = random_video(1)[0]
    frames = [first + 0.04 * number for number in range(8)]
    embeddings, costs = run(PixelDifference(vision64, 0.1), frames)
    assert (costs[:, 0] > 0.9).tolist() == [number in (0, 3, 6) for number in range(8)]
    dense, _ = run(Dense(vision64), frames)
    assert_close_in_norm(embeddings, dense[[0, 0, 0, 3, 3, 3, 6, 6]], FLOAT32_EMBEDDINGS)
    looking = first[0].numel() / dense_cost(vision64, NUM_PATCHES)
    assert costs[1:3, 0].tolist() == pytest.approx([looking] * 2)


def test_fewer_pixels(vision64):
    frames = random_video(2, 2)
    embeddings, costs = run(Smaller(vision64, 16), frames)
    side = torch.nn.functional.interpolate(frames[1], size=(16, 16), mode="bilinear", antialias=True)
    with torch.inference_mode():
        expected = vision64(pixel_values=side, interpolate_pos_encoding=True).pooler_output
    assert_close_in_norm(embeddings[1], expected.float(), FLOAT32_EMBEDDINGS)
    assert costs[0].tolist() == pytest.approx([dense_cost(vision64, 16) / dense_cost(vision64, NUM_PATCHES)] * 2)
    whole, whole_costs = run(Smaller(vision64, 24), frames)
    assert_close_in_norm(whole, run(Dense(vision64), frames)[0], FLOAT32_EMBEDDINGS)
    assert whole_costs.unique().tolist() == [1.0]


def test_what_is_not_wanted_is_left_out_by_those_that_do_not_follow(vision64):
    (frame,) = random_video(1, 3)
    wanted = torch.tensor([True, False, True])
    for method in (Dense(vision64), Smaller(vision64, 16)):
        assert not method.follows
        with torch.inference_mode():
            part, whole = (method.step(frame, only).embeddings for only in (wanted, None))
        assert_close_in_norm(part[wanted], whole[wanted], FLOAT32_EMBEDDINGS)
        assert part[1].isnan().all() and not whole.isnan().any()


def test_dense_frames_are_computed_once_for_all_that_return_them(vision):
    frames = DenseFrames(vision)
    counted = []
    handle = vision.register_forward_hook(lambda module, arguments, output: counted.append(len(output.pooler_output)))
    methods = [Dense(vision, frames=frames), EveryFrames(vision, 2, frames=frames)]
    for method in methods:
        method.start(3)
    asked = 0
    with torch.inference_mode():
        for frame in random_video(4, 3):
            held, dense = (method.step(frame, torch.tensor([True, False, False])) for method in reversed(methods))
            keyframes = held.cost > 0
            asked += len({0, *keyframes.nonzero()[:, 0].tolist()})
            if keyframes[0]:
                assert torch.equal(held.embeddings[0], dense.embeddings[0])
    handle.remove()
    assert sum(counted) == asked < 12


def test_the_standard_methods_can_be_made_and_told_apart(model, vision):
    methods = [DENSE, *preset_methods(), *mode_methods()]
    specs = [*methods, FIRST, *hold_baselines(), *smaller_baselines(4, 24)]
    assert len({spec.name for spec in specs}) == len(specs)
    kinds = {"dense", "stream", "first", "every", "surprise", "pixels", "smaller"}
    assert {spec.kind for spec in specs} == kinds <= set(KINDS)
    assert {"balanced", "thrifty", "faithful"} <= {spec.name for spec in specs}
    frames = random_video(2, 2)
    for method in make_methods(model, specs):
        embeddings, costs = run(method, frames)
        assert embeddings.shape == (2, 2, 32) and costs.shape == (2, 2)
        assert torch.isfinite(embeddings).all() and (costs >= 0).all()


def test_smaller_inputs_keep_their_proportions():
    sides, doubled = ([spec.options["resolution"] for spec in smaller_baselines(14, size)] for size in (224, 448))
    assert sides == [56, 84, 112, 140, 168] and doubled == [2 * side for side in sides]
    assert [spec.options["resolution"] for spec in smaller_baselines(14, 224, few=True)] == [56, 112]
