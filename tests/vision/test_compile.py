"""Streams under torch.compile: in one graph where a budget fixes all shapes, else with breaks; the same numbers."""

import math

import pytest
import torch

from tests.conftest import FLOAT64, assert_close_in_norm, random_video

WITH_ONE_GRAPH = ("mlp", "eliminate", "reconstruct", "context")
FIELDS = ("pooler_output", "last_hidden_state", "active_mask", "surprise", "skip_rate", "cost", "token_mask")


@pytest.fixture(autouse=True)
def no_compiled_code_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def rounding(tensor):
    return {torch.float64: FLOAT64, torch.float32: 1e-6}.get(tensor.dtype, 0)


def check(model, frames, compiled, batch_size=1, **options):
    """The compiled model in a stream, frame by frame, against the model itself in another."""
    streams = [model.new_stream(batch_size, **options) for _ in range(2)]
    interpolated = frames[0].shape[-1] != 24
    for frame in frames:
        expected, output = (
            run(pixel_values=frame, stream=stream, interpolate_pos_encoding=interpolated)
            for run, stream in zip((model, compiled), streams, strict=True)
        )
        for name in FIELDS:
            if expected.get(name) is not None:
                assert_close_in_norm(output[name], expected[name], rounding(expected[name]))
    for name, memory in streams[0].named_memory().items():
        assert_close_in_norm(streams[1].named_memory()[name], memory, rounding(memory))
    assert streams[0].frames == streams[1].frames
    return streams[1]


@pytest.mark.parametrize("mode", WITH_ONE_GRAPH)
@torch.no_grad()
def test_a_budget_makes_one_graph(vision64, mode):
    compiled = torch.compile(vision64, fullgraph=True, backend="eager")
    check(vision64, random_video(6, batch_size=2), compiled, 2, mode=mode, token_budget=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of a keyframe, and of all other frames


@pytest.mark.parametrize(
    "options, context",
    [
        ({"max_age": 20, "dilate": 1, "reference": "both"}, torch.inference_mode),
        ({"keyframe_interval": 3, "signal": "token", "memory_blend": 0.5}, torch.no_grad),
        ({"token_budget": None, "threshold": -1}, torch.enable_grad),
        ({}, torch.enable_grad),
    ],
    ids=["refreshing", "keyframes and blending", "everything active", "with gradients"],
)
def test_other_options_in_one_graph(vision64, options, context):
    compiled = torch.compile(vision64, fullgraph=True, backend="eager")
    with context():
        check(vision64, random_video(4, size=32), compiled, **{"mode": "context", "token_budget": 5, **options})


@torch.no_grad()
def test_a_graph_refuses_pixels_that_are_not_finite_and_changes_nothing(vision64):
    frames = random_video(5)
    compiled = torch.compile(vision64, fullgraph=True, backend="eager")
    stream = check(vision64, frames[:3], compiled, mode="context", token_budget=5)
    before = stream.state_dict()
    bad = frames[3].clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        compiled(pixel_values=bad, stream=stream)
    after = stream.state_dict()
    assert after["frames"] == before["frames"] and not stream.frame_in_progress
    assert all(torch.equal(memory, before["memory"][name]) for name, memory in after["memory"].items())


@torch.no_grad()
def test_with_breaks_everything_else_runs_too(vision64):
    check(vision64, random_video(3, changed=0.15), torch.compile(vision64, backend="eager"), preset="balanced")


@pytest.mark.slow
@pytest.mark.parametrize("mode", WITH_ONE_GRAPH)
def test_generated_code_gives_the_same_numbers(vision64, mode):
    compiled = torch.compile(vision64, fullgraph=True)
    with torch.no_grad():
        check(vision64, random_video(5, batch_size=2), compiled, 2, mode=mode, token_budget=5)
