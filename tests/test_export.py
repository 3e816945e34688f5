"""Streams as programs of tensors: the engine's numbers, in torch.export, ONNX Runtime and OpenVINO."""

import pytest
import torch
from torch.utils import _pytree as pytree

from neuroflow_hf import export_stream
from neuroflow_hf.export import programs
from tests.conftest import (
    FLOAT64,
    GATED_MODES,
    assert_close_in_norm,
    make_stock_tower,
    play,
    random_video,
    wrap_tower,
)

BUDGET = 10  # of 36 patches: more than change on the quiet frames, fewer than on the busy ones
OPTIONS = {  # each option that the programs have to carry from frame to frame, once
    "extrapolate": {"max_age": 12, "sentinels": 0.1},
    "context": {"reference": "both", "slow_ema_rate": 0.001, "dilate": 1},
    "reconstruct": {"summary_tokens": 4, "memory_blend": 0.5},
    "eliminate": {"summary_tokens": 4, "signal": "token"},
    "mlp": {},
}
in_runtimes = pytest.mark.parametrize(  # exporting takes seconds; the presets' mode has most to translate
    "mode", [mode if mode == "extrapolate" else pytest.param(mode, marks=pytest.mark.slow) for mode in GATED_MODES]
)
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model():
    """A tiny vision model of two layers. Do not change it."""
    return wrap_tower("siglip", make_stock_tower("siglip", num_hidden_layers=2))


@pytest.fixture(scope="module")
def model64():
    """The same in float64. Do not change it."""
    return wrap_tower("siglip", make_stock_tower("siglip", num_hidden_layers=2).double())


def video(dtype, batch_size=1):
    """A keyframe, two frames on which fewer patches than the budget change, and two on which more do."""
    quiet, busy = (random_video(3, batch_size, seed=3, changed=share) for share in (0.1, 0.6))
    return [frame.to(dtype) for frame in (*quiet, *busy[1:])]


def check(run, model, frames, rtol, **options):
    """Programs that `run(name, inputs)` runs, frame by frame, against the engine's stream with the same options."""
    stream = model.new_stream(len(frames[0]), token_budget=BUDGET, **options)
    outputs = run("keyframe", {"pixel_values": frames[0]})
    changes = []
    for number, (frame, expected) in enumerate(zip(frames, play(model, frames, stream), strict=True)):
        if number:
            outputs = run("sparse", {"pixel_values": frame, "state": outputs["new_state"]})
            changes += (expected.surprise > 0.01).flatten(1).sum(1).tolist()
        assert torch.equal(outputs["active_mask"], expected.active_mask)
        for name in ("pooler_output", "last_hidden_state", "surprise"):
            atol = 1e-6 if expected[name].dtype == torch.float32 else 0
            assert_close_in_norm(outputs[name], expected[name], rtol, atol)
    assert min(changes) < BUDGET < max(changes)
    memories = {name: memory for name, memory in stream.memory.items() if name != "pooled"}
    assert outputs["new_state"].keys() == memories.keys()
    for name, memory in memories.items():
        assert_close_in_norm(outputs["new_state"][name], memory, max(rtol, 1e-6 if "ema" in name else 0))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("mode", GATED_MODES)
def test_programs_follow_the_engine_with_a_state_of_tensors_alone(model64, mode, batch_size):
    made = programs(model64, BUDGET, batch_size, mode=mode, **OPTIONS[mode])
    frames = video(torch.float64, batch_size)
    before = {name: memory.clone() for name, memory in made["sparse"][1]["state"].items()}
    check(lambda name, inputs: made[name][0](**inputs), model64, frames, FLOAT64, mode=mode, **OPTIONS[mode])
    made["sparse"][0](**made["sparse"][1])
    assert all(torch.equal(memory, before[name]) for name, memory in made["sparse"][1]["state"].items())


@pytest.mark.parametrize("mode", GATED_MODES)
def test_torch_export_gives_the_same_numbers(model64, mode):
    graphs = {
        name: torch.export.export(program, (), inputs).module()
        for name, (program, inputs) in programs(model64, BUDGET, mode=mode, **OPTIONS[mode]).items()
    }
    frames = video(torch.float64)
    check(lambda name, inputs: graphs[name](**inputs), model64, frames, FLOAT64, mode=mode, **OPTIONS[mode])


def test_towers_with_tokens_before_the_patches(model64):
    model = wrap_tower("registers", make_stock_tower("registers", num_hidden_layers=2).double())
    made = programs(model, BUDGET, mode="extrapolate")
    graph = torch.export.export(made["sparse"][0], (), made["sparse"][1]).module()

    def run(name, inputs):
        return graph(**inputs) if name == "sparse" else made[name][0](**inputs)

    check(run, model, video(torch.float64), FLOAT64, mode="extrapolate")


@in_runtimes
def test_onnx_runtime_gives_the_same_numbers_from_the_files_alone(model, tmp_path, mode):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    options = {"mode": mode, **OPTIONS[mode]}
    export_stream(model, tmp_path, BUDGET, **options)

    sessions = {name: onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("keyframe", "sparse")}

    def run(name, inputs):
        session = sessions[name]
        state = {f"state.{name}": memory.numpy() for name, memory in inputs.pop("state", {}).items()}
        feed = {"pixel_values": inputs["pixel_values"].numpy(), **state}
        outputs = zip(session.get_outputs(), session.run(None, feed), strict=True)
        return nested({output.name: torch.from_numpy(value) for output, value in outputs})

    check(run, model, video(torch.float32), 1e-5, **options)


@in_runtimes
def test_openvino_gives_the_same_numbers_from_the_files_alone(model, tmp_path, mode):
    openvino = pytest.importorskip("openvino", reason="needs the extra `export`")
    options = {"mode": mode, **OPTIONS[mode]}
    export_stream(model, tmp_path, BUDGET, format="openvino", **options)
    files = {name: tmp_path / f"openvino_{name}.xml" for name in ("keyframe", "sparse")}
    compiled = {name: openvino.Core().compile_model(file, "CPU") for name, file in files.items()}

    def run(name, inputs):
        state = {f"state.{name}": memory.numpy() for name, memory in inputs.pop("state", {}).items()}
        outputs = compiled[name]({"pixel_values": inputs["pixel_values"].numpy(), **state})
        return nested({port.get_any_name(): torch.from_numpy(value.copy()) for port, value in outputs.items()})

    check(run, model, video(torch.float32), 1e-5, **options)


@pytest.mark.parametrize("option", ["token_budget", "min_active_tokens"])
def test_rounding_does_not_choose_the_patches_that_fill_up(model, option):
    frame, *_ = random_video(1)
    rounded = frame * torch.linspace(0, 1, frame.shape[-2]).mul(1e-6).add(1).unsqueeze(1)  # most at the lower edge
    stream = model.new_stream(mode="context", **{option: BUDGET})
    _, output = play(model, [frame, rounded + torch.linspace(0, 1e-6, frame.shape[-1])], stream)
    assert 0 < output.surprise.max() < 1e-10
    assert output.active_mask.flatten().nonzero().flatten().tolist() == list(range(BUDGET))


def nested(outputs):
    """Outputs by name, with those of the state in a dictionary of their own."""
    prefix = "new_state."
    state = {name.removeprefix(prefix): value for name, value in outputs.items() if name.startswith(prefix)}
    return {name: value for name, value in outputs.items() if not name.startswith(prefix)} | {"new_state": state}


def test_a_stream_is_no_input_of_torch_export_and_says_what_to_do(model):
    for stream in (model.new_stream(), model.new_stream(token_budget=BUDGET)):
        frame, *_ = random_video(1)
        if stream.gate.token_budget:
            model(frame, stream=stream)
        with pytest.raises(TypeError, match="export_stream"):
            torch.export.export(model, (frame,), {"stream": stream})
    assert pytree.tree_map(lambda leaf: 1 / 0, stream) is stream


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "export the model itself"),
        ({"mode": "hold"}, "keep its last output"),
        ({"threshold": -1}, "every frame is dense"),
        ({"keyframe_interval": 30}, "`keyframe_interval` is not exported"),
        ({"keyframe_fraction": 0.5}, "`keyframe_fraction` is not exported"),
        ({"keyframe_surprise": 0.1}, "`keyframe_surprise` is not exported"),
        ({"cost_budget": 0.25}, "`cost_budget` is not exported"),
        ({"min_fidelity": 0.99}, "`min_fidelity` is not exported"),
        ({"format": "tflite"}, "Unknown format 'tflite'; expected one of onnx, openvino, dynamo"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_stream(model, tmp_path, BUDGET, **options)
    assert not list(tmp_path.iterdir())


def test_openvino_takes_a_float32_model(model64, tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match=r"in torch\.float64, .* Load it in float32"):
        export_stream(model64, tmp_path, BUDGET, format="openvino")
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Cannot export streams of a SiglipVisionModel"):
        export_stream(make_stock_tower("siglip"), tmp_path, BUDGET)
