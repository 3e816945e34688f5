"""
Do exported streams give the engine's outputs in float32, and how close are they in float16?

    python -m eval.vision.export_fidelity

The small SigLIP follows the shipped clips in mode `extrapolate`. The engine in float32 is what the others are compared
with: the engine in float16, and the programs of `export_stream` in ONNX Runtime and OpenVINO, each on a state of its
own. Beside them, dense in float16 says what the type does without a stream. Writes
`eval/results/export_fidelity.json`.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from eval.docs.speed import export_table
from eval.report import RESULTS, provenance, rounded, show, write_json
from neuroflow_hf import export_stream
from neuroflow_hf.export import programs
from neuroflow_hf.loading import load_model
from neuroflow_hf.video.reader import bundled_clip, labelled_clip, read_frames

MODEL = "models/neuroflow-siglip-small"
FRAMES, EVERY = 20, 2  # so many frames of each clip, every second one
TOKEN_BUDGET, INTERVAL = 64, 10  # patches of a sparse frame, of 256; every tenth frame is a keyframe
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
DENSE = "baseline: dense, no stream"
Run = Callable[[str, dict[str, Any]], dict[str, Any]]  # a program's name and its inputs to its outputs


def follow(run: Run, frames: Iterable[Tensor], interval: int) -> list[dict[str, Tensor]]:
    """Each frame's outputs; every `interval`-th goes to the keyframe program, the others to the sparse one."""
    state: dict[str, Tensor] = {}
    kept = []
    for number, frame in enumerate(frames):
        sparse = number % interval > 0
        outputs = run(
            "sparse" if sparse else "keyframe", {"pixel_values": frame} | ({"state": state} if sparse else {})
        )
        state = {name: memory.clone() for name, memory in outputs.pop("new_state").items()}
        kept.append({name: value.clone() for name, value in outputs.items()} | {"sparse": torch.tensor(sparse)})
    return kept


def dense(model: Any, frames: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """Each frame's outputs without a stream."""
    names = ("pooler_output", "last_hidden_state")
    return [{name: output[name] for name in names} for output in (model(frame) for frame in frames)]


def cosines(outputs: list[dict[str, Tensor]], reference: list[dict[str, Tensor]], name: str) -> Tensor:
    """Cosine of every vector of one output to the reference's, in float64: [frames, vectors]."""
    pairs = zip(outputs, reference, strict=True)
    return torch.stack([cosine_similarity(o[name].double(), r[name].double(), dim=-1).flatten() for o, r in pairs])


def compare(outputs: list[dict[str, Tensor]], engine: list[dict[str, Tensor]], dense: list[dict[str, Tensor]]) -> dict:
    """
    Figures of one way: largest difference to the engine in float32, as a share of the largest element; cosine to the
    engine, mean and least over frames, and the least over patches; cosine to dense; and the share of sparse frames on
    which the same patches were encoded.
    """
    pooled, to_dense = cosines(outputs, engine, "pooler_output"), cosines(outputs, dense, "pooler_output")
    differences = [
        ((o["pooler_output"] - e["pooler_output"]).abs().max() / e["pooler_output"].abs().max()).item()
        for o, e in zip(outputs, engine, strict=True)
    ]
    same = [
        torch.equal(o["active_mask"], e["active_mask"])
        for o, e in zip(outputs, engine, strict=True)
        if "active_mask" in o and e["sparse"]
    ]
    return {
        "difference": max(differences),
        "to_engine": pooled.mean().item(),
        "to_engine_least": pooled.min().item(),
        "patches_to_engine_least": cosines(outputs, engine, "last_hidden_state").min().item(),
        "to_dense": to_dense.mean().item(),
        "to_dense_p5": to_dense.quantile(0.05).item(),
        "same_patches": sum(same) / len(same) if same else None,
    }


def ways(model: Any, folder: Path) -> Iterable[tuple[str, str, Run]]:
    """What is compared: its name, its type, and how it runs; the engine in float32 comes first."""
    models = {"float32": model, "float16": copy.deepcopy(model).half()}
    for dtype, of_dtype in models.items():
        eager = programs(of_dtype, TOKEN_BUDGET)
        yield "engine", dtype, lambda name, inputs, eager=eager: eager[name][0](**inputs)
    yield (
        DENSE,
        "float16",
        lambda name, inputs: {**dense(models["float16"], [inputs["pixel_values"]])[0], "new_state": {}},
    )
    for format in RUNTIMES:
        for dtype, of_dtype in models.items():
            if (format, dtype) == ("openvino", "float16"):
                continue  # refused by `export_stream`
            runners = export_stream(of_dtype, folder / f"{format}-{dtype}", TOKEN_BUDGET, format).runners
            yield RUNTIMES[format], dtype, lambda name, inputs, runners=runners: runners[name](**inputs)


@torch.no_grad()
def main(
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "export_fidelity.json",
):
    """Measure one way after the other, and show the table."""
    model, preprocess = load_model(MODEL)
    clips = [
        [preprocess(frame.image, torch.float32, "cpu") for frame in list(read_frames(clip))[::EVERY][:FRAMES]]
        for clip in (bundled_clip(), labelled_clip())
    ]
    truth = [outputs for clip in clips for outputs in dense(model, clip)]
    sizes = {"frames": len(truth), "every": EVERY, "token_budget": TOKEN_BUDGET, "interval": INTERVAL}
    report: dict[str, Any] = {**provenance(), "settings": {**sizes, "model": MODEL}, "rows": []}
    report["versions"] |= {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime", "openvino")}
    engine: list[dict[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, run in ways(model, Path(folder)):
            in_dtype = [[frame.to(getattr(torch, dtype)) for frame in clip] for clip in clips]
            found = [outputs for clip in in_dtype for outputs in follow(run, clip, INTERVAL)]
            engine = engine or found
            report["rows"].append({"way": name, "dtype": dtype, **compare(found, engine, truth)})
            write_json(output, rounded(report, 9))  # the next takes minutes
    show(export_table(report))


if __name__ == "__main__":
    typer.run(main)
