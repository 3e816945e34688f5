"""
How long a frame takes in every mode, against dense in the same run.

    python eval/benchmark_vision.py                       # 224 and 448 px, minutes
    python eval/benchmark_vision.py --resolutions 1792    # dense takes about a minute a frame

Geometry of SigLIP-base (patch 16), random weights: time does not depend on them. A token budget fixes how many
patches are active; the whole forward is timed, from pixel values to the embedding. Dense and mode take turns, so that
both meet the same machine. Writes `eval/results/benchmark_vision.json`.
"""

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from report import RESULTS, provenance, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table

from neuroflow_hf import NeuroFlowSiglipVisionConfig, NeuroFlowSiglipVisionModel
from neuroflow_hf.run import timed

MODES = ("mlp", "eliminate", "reconstruct", "context")


def spread(values: list[float]) -> dict:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_mode(model, resolution: int, options: dict, repeats: int) -> dict:
    """Milliseconds of a mode and of dense, taking turns over frames of noise."""
    kwargs = {"interpolate_pos_encoding": resolution != model.config.image_size}
    shape = (1, 3, resolution, resolution)
    stream = model.new_stream(**options)
    model(pixel_values=torch.randn(shape).to(model.device, model.dtype), stream=stream, **kwargs)
    streamed, dense = [], []
    for _ in range(repeats + 1):
        frame = torch.randn(shape).to(model.device, model.dtype)
        output, milliseconds = timed(lambda x=frame: model(pixel_values=x, stream=stream, **kwargs), model.device)
        streamed.append(milliseconds)
        dense.append(timed(lambda x=frame: model(pixel_values=x, **kwargs), model.device)[1])
    # the first of each warmed up
    return {"cost": output.cost.item(), "streamed": spread(streamed[1:]), "dense": spread(dense[1:])}


@torch.inference_mode()
def main(
    resolutions: Annotated[str, typer.Option(help="Sides in pixels, with commas.")] = "224,448",
    fractions: Annotated[str, typer.Option(help="Shares of active patches, with commas.")] = "0.03,0.1,1",
    modes: Annotated[str, typer.Option(help="Modes, with commas.")] = ",".join(MODES),
    repeats: Annotated[int, typer.Option(help="Frames timed of each.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "benchmark_vision.json",
):
    """Time all modes at all resolutions and shares, and print the table."""
    torch.manual_seed(0)
    config = NeuroFlowSiglipVisionConfig(image_size=224, patch_size=16)
    model = NeuroFlowSiglipVisionModel(config).eval().to(device, getattr(torch, dtype))
    cases = [
        (int(resolution), float(fraction), mode)
        for resolution in resolutions.split(",")
        for fraction in fractions.split(",")
        for mode in modes.split(",")
    ]
    rows = []
    for resolution, fraction, mode in track(cases, "cases"):
        budget = max(1, round(fraction * (resolution // config.patch_size) ** 2))
        options = {"mode": mode, "token_budget": budget, "min_active_tokens": 0}
        rows.append(
            {
                "resolution": resolution,
                "active": fraction,
                "mode": mode,
                **time_mode(model, resolution, options, repeats),
            }
        )
    write_json(
        output, {**provenance(), "dtype": dtype, "device": str(model.device), "repeats": repeats, "cases": rows}
    )
    table = Table("px", "active", "mode", "cost", "ms", "dense ms", "times faster")
    for row in rows:
        ratio = row["dense"]["median"] / row["streamed"]["median"]
        table.add_row(
            str(row["resolution"]),
            f"{row['active']:.0%}",
            row["mode"],
            f"{row['cost']:.3f}",
            f"{row['streamed']['median']:.1f}",
            f"{row['dense']['median']:.1f}",
            f"{ratio:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
