"""
How many frames per second do several cameras give: one call for all, against a call for each, against dense?

    python -m eval.vision.benchmark_streams     # some minutes on two cores

SigLIP-base's geometry at 224 px, random weights, see `benchmark_vision.py`. The streams are ragged: from one frame to
the next, between 1% and 10% of a camera's patches change, in each camera another share; the three ways take turns on
the same frames. Writes `eval/results/benchmark_streams.json`, shown in `docs/results/cameras.md`.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from eval.docs.speed import streams_table
from eval.report import RESULTS, provenance, publish
from eval.vision.benchmark_vision import base_model, change_patches, spread
from neuroflow_hf.utils.jobs import timed

MODES = ("reconstruct", "context", "extrapolate")
LEAST, MOST = 0.01, 0.1
WAYS = ("one_call", "separate_calls", "dense")


def changing_patches(cameras: int, num_patches: int) -> list[int]:
    """How many patches change in each camera: evenly from the least share to the most, at least one."""
    shares = torch.linspace(LEAST, MOST, cameras) if cameras > 1 else [(LEAST + MOST) / 2]
    return [max(1, round(float(share) * num_patches)) for share in shares]


def time_cameras(model, mode: str, cameras: int, repeats: int) -> dict:
    """Frames per second of so many cameras, in the three ways, and the mean cost of a frame."""
    size, patch = model.config.image_size, model.config.patch_size
    counts = changing_patches(cameras, (size // patch) ** 2)
    together = model.new_stream(cameras, mode=mode, threshold=0)
    apart = [model.new_stream(mode=mode, threshold=0) for _ in range(cameras)]
    frames = [torch.randn(1, 3, size, size) for _ in range(cameras)]
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    active, cost = [], 1.0
    for turn in range(repeats + 2):  # a keyframe, a warm-up, and what counts
        frames = [change_patches(frame, count, patch) for frame, count in zip(frames, counts, strict=True)]
        single = [frame.to(model.device, model.dtype) for frame in frames]
        batch = torch.cat(single)

        def one_call(batch=batch):
            return model(pixel_values=batch, stream=together)

        def separate_calls(single=single):
            return [model(pixel_values=frame, stream=own) for frame, own in zip(single, apart, strict=True)]

        def dense(batch=batch):
            return model(pixel_values=batch)

        for way in (one_call, separate_calls, dense):
            output, milliseconds = timed(way, model.device)
            if turn > 1:
                rates[way.__name__].append(1000 * cameras / milliseconds)
            if way is one_call:
                active, cost = output.active_mask.flatten(1).sum(1).tolist(), output.cost.mean().item()
    return {
        "mode": mode,
        "cameras": cameras,
        "active_patches": active,
        "cost": cost,
        "frames_per_second": {way: spread(values) for way, values in rates.items()},
    }


@torch.inference_mode()
def main(
    cameras: Annotated[str, typer.Option(help="Numbers of cameras, separated by commas.")] = "1,4,16",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Time N frames of each camera.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "benchmark_streams.json",
):
    """Time all modes with all numbers of cameras, and show the table."""
    torch.manual_seed(0)
    model = base_model(dtype, device)
    pairs = [(mode, int(number)) for mode in MODES for number in cameras.split(",")]
    cases = [time_cameras(model, *pair, repeats) for pair in track(pairs, "cases", console=Console(stderr=True))]
    report = {**provenance(device), "dtype": dtype, "device": device, "cases": cases}
    publish(output, report, streams_table(report))


if __name__ == "__main__":
    typer.run(main)
