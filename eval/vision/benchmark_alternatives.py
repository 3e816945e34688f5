"""
Is a stream faster than what one would take instead, on the same frames in the same run?

    python -m eval.vision.benchmark_alternatives    # 15 minutes on two idle cores

Dense in five forms: transformers' model with torch's attention, the same by torch.compile, by ONNX Runtime and by
OpenVINO, and with int8 weights. Against them presets, modes with a token budget, and the method as it was published.
The tower of `models/neuroflow-siglip-small` over the shipped street clip, enlarged above 224 pixels. The methods take
turns: each encodes a stretch of the clip, then the next one does. The first two frames are not timed. Times are means,
since a preset's frames take unlike times, and cosines are to transformers' dense output. Writes
`eval/results/benchmark_alternatives.json`, shown in `docs/results/speed.md` and README.
"""

import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import openvino
import torch
import typer
from rich.console import Console
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import SiglipVisionModel

from eval.docs.speed import alternatives_table
from eval.report import RESULTS, provenance, publish
from neuroflow_hf import PRESETS, NeuroFlowSiglipVisionModel, export_stream
from neuroflow_hf.loading import default_model
from neuroflow_hf.utils.jobs import timed
from neuroflow_hf.video import Preprocessor, bundled_clip, read_frames

STOCK = "dense, torch"
CHANGED = 0.01  # the presets' threshold
STRETCHES = 7
FRAMES = {224: 98, 448: 56, 896: 21}  # by resolution, that are encoded
UNTIMED = 2
FIXED = "context, 3% of the patches"  # the same number on every frame, which programs without Python can encode
STREAMS = {
    **{preset: {"preset": preset} for preset in PRESETS},
    "context": {"mode": "context", "threshold": CHANGED},
    "reconstruct": {"mode": "reconstruct", "threshold": CHANGED},
    FIXED: {"mode": "context", "token_budget": 0.03},
    "reconstruct, as published": {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.05, "threshold": CHANGED},
}
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]  # inputs and outputs of a program, by name
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, float]]  # embeddings [B, D] and cost of a frame [B, C, H, W]


class PooledOutput(nn.Module):
    """A vision tower of which only the embedding is read, for exporters."""

    def __init__(self, tower: nn.Module, **options: bool):
        super().__init__()
        self.tower, self.options = tower, options

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, D]."""
        return self.tower(pixel_values=pixel_values, **self.options).pooler_output


def int8_copy(model: nn.Module) -> nn.Module:
    """A copy whose linear layers have int8 weights, and round activations as they come."""
    with warnings.catch_warnings():  # deprecated in favour of torchao
        warnings.simplefilter("ignore")
        how = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), how)


def onnx_session(path: Path) -> Run:
    """A program by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow down others' turns
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def openvino_compiled(program: Path | openvino.Model) -> openvino.CompiledModel:
    """A program for OpenVINO."""
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(program, "CPU", settings)


def openvino_session(path: Path) -> Run:
    """A program by OpenVINO."""
    compiled = openvino_compiled(path)
    return lambda inputs: {port.any_name: value.copy() for port, value in compiled(inputs).items()}


def by_onnx(dense: nn.Module, example: torch.Tensor) -> Encode:
    """The model by ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dense.onnx")
        torch.onnx.export(dense, (example,), path, dynamo=True, verbose=False)
        run = onnx_session(path)
    return lambda pixel_values: (
        torch.from_numpy(next(iter(run({"pixel_values": pixel_values.numpy()}).values()))),
        1.0,
    )


def by_openvino(dense: nn.Module, example: torch.Tensor) -> Encode:
    """The model by OpenVINO."""
    compiled = openvino_compiled(openvino.convert_model(dense, example_input=example))
    return lambda pixel_values: (torch.from_numpy(compiled(pixel_values.numpy())[0].copy()), 1.0)


def in_patches(options: dict, model: NeuroFlowSiglipVisionModel, example: torch.Tensor) -> dict:
    """Options whose `token_budget`, if it is a share of the patches, is a number of them."""
    if (budget := options.get("token_budget", 1)) < 1:
        return {**options, "token_budget": round(budget * (example.shape[-1] // model.config.patch_size) ** 2)}
    return options


def by_stream(model: NeuroFlowSiglipVisionModel, options: dict, example: torch.Tensor) -> Encode:
    """A stream of the model."""
    stream = model.new_stream(**in_patches(options, model, example))

    def encode(pixel_values: torch.Tensor) -> tuple[torch.Tensor, float]:
        output = model(pixel_values=pixel_values, interpolate_pos_encoding=True, stream=stream)
        return output.pooler_output, output.cost.item()

    return encode


def by_export(model: NeuroFlowSiglipVisionModel, format: str, options: dict, example: torch.Tensor) -> Encode:
    """A stream as exported: the first frame by the keyframe program, the others by the sparse one."""
    options, in_torch = in_patches(options, model, example), by_stream(model, options, example)
    cost = [in_torch(example)[1] for _ in range(2)][1]  # the same on every sparse frame
    file, session = {"onnx": ("{}.onnx", onnx_session), "openvino": ("openvino_{}.xml", openvino_session)}[format]
    with tempfile.TemporaryDirectory() as folder:
        export_stream(model, folder, format=format, **options)
        keyframe, sparse = (session(Path(folder, file.format(name))) for name in ("keyframe", "sparse"))
    state: dict[str, np.ndarray] = {}

    def encode(pixel_values: torch.Tensor) -> tuple[torch.Tensor, float]:
        outputs = (sparse if state else keyframe)({"pixel_values": pixel_values.numpy(), **state})
        state.update({name[4:]: value for name, value in outputs.items() if name.startswith("new_state.")})
        return torch.from_numpy(outputs["pooler_output"]), cost

    return encode


def preparations(example: torch.Tensor) -> dict[str, Callable[[], Encode]]:
    """For each method a function that prepares it for frames like `example`."""
    checkpoint, options = default_model(), {"dtype": torch.float32}
    stock = SiglipVisionModel.from_pretrained(checkpoint, **options, attn_implementation="sdpa").eval()
    model = NeuroFlowSiglipVisionModel.from_pretrained(checkpoint, **options).eval()
    is_native = example.shape[-1] == stock.config.image_size
    dense = PooledOutput(stock, interpolate_pos_encoding=not is_native).eval()
    exported = {
        f"{FIXED}, {runtime}": lambda format=format: by_export(model, format, STREAMS[FIXED], example)
        for runtime, format in (("ONNX Runtime", "onnx"), ("OpenVINO", "openvino"))
    }

    def by_torch(model: Callable[[torch.Tensor], torch.Tensor]) -> Encode:
        return lambda pixel_values: (model(pixel_values), 1.0)

    return {
        STOCK: lambda: by_torch(dense),
        "dense, torch.compile": lambda: by_torch(torch.compile(dense)),
        "dense, ONNX Runtime": lambda: by_onnx(dense, example),
        "dense, OpenVINO": lambda: by_openvino(dense, example),
        "dense, int8 weights": lambda: by_torch(int8_copy(dense)),
        **{name: lambda options=options: by_stream(model, options, example) for name, options in STREAMS.items()},
        f"{FIXED}, torch.compile": lambda: by_stream(torch.compile(model, fullgraph=True), STREAMS[FIXED], example),
        **(exported if is_native else {}),  # programs have the checkpoint's own resolution
        "balanced, int8 weights": lambda: by_stream(int8_copy(model), {"preset": "balanced"}, example),
    }


def measure(name: str, times: list[float], encoded: list, dense: list) -> dict:
    """A row: mean milliseconds of a frame with their range over the stretches, cost, and cosine to dense."""
    outputs, wanted = (torch.cat([output for output, _ in part]) for part in (encoded, dense))
    timed_frames = np.array_split(times[UNTIMED:], STRETCHES)
    return {
        "method": name,
        "ms": statistics.mean(times[UNTIMED:]),
        "least_ms": min(part.mean() for part in timed_frames),
        "most_ms": max(part.mean() for part in timed_frames),
        "cost": statistics.mean(cost for _, cost in encoded[UNTIMED:]),
        "cosine": cosine_similarity(outputs, wanted)[UNTIMED:].mean().item(),
    }


def measure_resolution(resolution: int, console: Console) -> list[dict]:
    """The rows of all methods at one resolution."""
    preprocess = Preprocessor.from_pretrained(default_model(), resolution=resolution)
    count = FRAMES[resolution]
    frames = [preprocess(frame.image) for frame in read_frames(bundled_clip(), max_frames=count)]
    encoders = {name: prepare() for name, prepare in preparations(frames[0]).items()}
    times: dict[str, list[float]] = {name: [] for name in encoders}
    encoded: dict[str, list] = {name: [] for name in encoders}
    for stretch in np.array_split(np.arange(count), STRETCHES):
        for name, encode in encoders.items():
            for frame in (frames[place] for place in stretch):
                result, milliseconds = timed(lambda encode=encode, frame=frame: encode(frame), frame.device)
                times[name].append(milliseconds)
                encoded[name].append(result)
            console.print(f"{resolution} px, {len(times[name])} of {count} frames, {name}: {times[name][-1]:.0f} ms")
    rows = [measure(name, times[name], encoded[name], encoded[STOCK]) for name in encoders]
    return [{"resolution": resolution, **row} for row in rows]


@torch.inference_mode()
def main(
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "benchmark_alternatives.json",
):
    """Time all methods at all resolutions, and show the table."""
    console = Console(stderr=True)
    rows = [row for side in FRAMES for row in measure_resolution(side, console)]
    packages = {module.__name__: module.__version__.split("-")[0] for module in (onnxruntime, openvino)}
    report = {**provenance(), "alternatives": packages, "frames": FRAMES, "stretches": STRETCHES, "rows": rows}
    publish(output, report, alternatives_table(report))


if __name__ == "__main__":
    typer.run(main)
