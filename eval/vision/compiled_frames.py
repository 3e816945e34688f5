"""
What would a compiled graph for each bucket of row counts gain, or fewer threads for few rows?

    python -m eval.vision.compiled_frames    # ten minutes; best on an idle machine

A graph has a fixed number of rows, so a preset's frames would be padded up to the next bucket. Here every frame has
exactly as many active patches as a bucket, which is the most that buckets could gain. The small SigLIP over the
shipped street clip in mode `extrapolate`, as the presets use it, with a token budget: by PyTorch on all threads
and on one, and by `torch.compile` as one graph. The ways take turns on every frame, and the figure is the median.
Writes `eval/results/compiled_frames.json`, shown in `docs/results/speed.md`.
"""

import statistics
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from eval.docs.speed import compiled_frames_table
from eval.report import RESULTS, provenance, publish
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.loading import default_model
from neuroflow_hf.utils.jobs import timed
from neuroflow_hf.video import Preprocessor, bundled_clip, read_frames

PATCHES = (8, 16, 32, 64, 128)
FRAMES, UNTIMED = 60, 6
USUAL, ONE_THREAD, COMPILED = "all threads", "one thread", "torch.compile"


def measure(model: NeuroFlowSiglipVisionModel, frames: list[torch.Tensor], patches: int, threads: int) -> dict:
    """A row: median milliseconds of a frame with `patches` active patches, by way, and its cost."""
    torch.compiler.reset()  # graphs for other numbers of patches are not used again
    ways = {USUAL: (model, threads), ONE_THREAD: (model, 1), COMPILED: (torch.compile(model, fullgraph=True), threads)}
    streams = {name: model.new_stream(mode="extrapolate", token_budget=patches) for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for frame in frames:
        for name, (encode, count) in ways.items():
            torch.set_num_threads(count)
            output, milliseconds = timed(
                lambda encode=encode, name=name, frame=frame: encode(pixel_values=frame, stream=streams[name]),
                frame.device,
            )
            times[name].append(milliseconds)
    ms = {name: statistics.median(values[UNTIMED:]) for name, values in times.items()}
    return {"patches": patches, "cost": output.cost.item(), "ms": ms}


@torch.inference_mode()
def main(
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "compiled_frames.json",
):
    """Time all ways for all numbers of patches, and show the table."""
    warnings.filterwarnings("ignore", module="torch")  # the compiler's own
    threads, console, rows = torch.get_num_threads(), Console(stderr=True), []
    model = NeuroFlowSiglipVisionModel.from_pretrained(default_model(), dtype=torch.float32).eval()
    preprocess = Preprocessor.from_pretrained(default_model())
    frames = [preprocess(frame.image) for frame in read_frames(bundled_clip(), max_frames=FRAMES)]
    for patches in PATCHES:
        rows.append(measure(model, frames, patches, threads))
        console.print(f"{patches} patches are timed.")
    report = {**provenance(), "rows": rows}
    publish(output, report, compiled_frames_table(report))


if __name__ == "__main__":
    typer.run(main)
