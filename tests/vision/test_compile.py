"""Streams under torch.compile: in one graph where a budget fixes all shapes, else with breaks; the same numbers."""

import math

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from neuroflow_hf import NeuroFlowSiglipVisionModel
from tests.conftest import FLOAT64, TINY_VISION, assert_close_in_norm, lively, random_video

WITH_ONE_GRAPH = ("mlp", "eliminate", "reconstruct", "context", "extrapolate")
FIELDS = ("pooler_output", "last_hidden_state", "active_mask", "surprise", "skip_rate", "cost", "token_mask")


@pytest.fixture(scope="module")
def model():
    """A tiny vision model in float64, of two layers: tracing takes its time for each layer and frame."""
    torch.manual_seed(0)
    stock = lively(SiglipVisionModel(SiglipVisionConfig(**TINY_VISION | {"num_hidden_layers": 2})))
    return NeuroFlowSiglipVisionModel.from_siglip(stock.double(), mode="context")


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
            # a graph takes all encoded patches as sources of corrections
            if expected.get(name) is not None and not (name == "cost" and streams[0].gate.mode == "extrapolate"):
                assert_close_in_norm(output[name], expected[name], rounding(expected[name]))
    for name, memory in streams[0].memory.items():
        assert_close_in_norm(streams[1].memory[name], memory, rounding(memory))
    assert streams[0].frames == streams[1].frames
    return streams[1]


@torch.no_grad()
def test_a_graph_refuses_pixels_that_are_not_finite_and_changes_nothing(model):
    frames = random_video(5, batch_size=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    stream = check(model, frames[:4], compiled, 2, mode="context", token_budget=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of a keyframe, and of all other frames
    before = stream.state_dict()
    bad = frames[4].clone()
    bad[1, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        compiled(pixel_values=bad, stream=stream)
    after = stream.state_dict()
    assert after["frames"] == before["frames"] and not stream.frame_in_progress
    assert all(torch.equal(memory, before["memory"][name]) for name, memory in after["memory"].items())


# each mode, each kind of option and each way to record gradients at least once; every case takes seconds
@pytest.mark.parametrize(
    "mode, options, context, graphs",
    [
        ("mlp", {"keyframe_interval": 3, "signal": "token", "memory_blend": 0.5}, torch.no_grad, 3),
        ("eliminate", {"max_age": 20, "dilate": 1, "reference": "both"}, torch.inference_mode, 2),
        ("reconstruct", {}, torch.enable_grad, 2),
        ("context", {"token_budget": None, "threshold": -1}, torch.enable_grad, 2),
        ("extrapolate", {}, torch.no_grad, 2),
    ],
    ids=["keyframes and blending", "refreshing", "with gradients", "everything active", "corrections"],
)
def test_other_options_in_one_graph(model, mode, options, context, graphs):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with context():
        check(model, random_video(4, size=32), compiled, **{"mode": mode, "token_budget": 5, **options})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_with_breaks_everything_else_runs_too(model):
    check(model, random_video(3, changed=0.15), torch.compile(model, backend="eager"), preset="balanced")


@pytest.mark.slow
@pytest.mark.parametrize("mode", WITH_ONE_GRAPH)
def test_generated_code_gives_the_same_numbers(model, mode):
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        check(model, random_video(5, batch_size=2), compiled, 2, mode=mode, token_budget=5)
