"""
Every mode on the shipped clip against the baselines that it has to beat.

    python -m eval.vision.vision_controls

Question: at which cost does which mode give which fidelity, and would holding the last dense embedding do as well?
Every method sees the same frames; every frame is compared with a dense forward of the same frame. Writes
`eval/results/vision_controls.json`.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.report import RESULTS, percentile, provenance, write_json
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import bundled_clip, read_frames
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir

METHODS = {
    "control: repeat the first frame's embedding": {"mode": "hold"},
    "control: dense every 12th frame, held between": {"mode": "hold", "keyframe_interval": 12},
    "control: dense every 6th frame, held between": {"mode": "hold", "keyframe_interval": 6},
    "control: dense every 3rd frame, held between": {"mode": "hold", "keyframe_interval": 3},
    "control: dense when over 12% of patches changed since the last keyframe": {
        "mode": "hold",
        "keyframe_fraction": 0.12,
    },
    "control: the same, 8% changed by more than 0.1": {"mode": "hold", "keyframe_fraction": 0.08, "threshold": 0.1},
    "`eliminate`, running mean 0.05 (paper's B, not distilled)": {
        "mode": "eliminate",
        "reference": "ema",
        "ema_rate": 0.05,
    },
    "`reconstruct`, running mean 0.05 (paper's C)": {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.05},
    "`reconstruct`": {"mode": "reconstruct"},
    "`mlp`": {"mode": "mlp"},
    "`context`, threshold 0.05": {"mode": "context", "threshold": 0.05},
    "`context`": {"mode": "context"},
    "`context`, threshold 0.001": {"mode": "context", "threshold": 0.001},
    "`context`, every patch within 10 frames": {"mode": "context", "max_age": 10},
    "`context`, keyframe every 12th frame": {"mode": "context", "keyframe_interval": 12},
    "`extrapolate`": {"mode": "extrapolate"},
    "`extrapolate`, 3% sentinels, keyframe every 25th frame": {
        "mode": "extrapolate",
        "sentinels": 0.03,
        "keyframe_interval": 25,
    },
    "`extrapolate`, 10% sentinels": {"mode": "extrapolate", "sentinels": 0.1},
    "preset `thrifty`": {"preset": "thrifty"},
    "preset `balanced` (default)": {"preset": "balanced"},
    "preset `faithful`": {"preset": "faithful"},
}


def measure(model, frames, dense, options) -> dict:
    """One method over the clip: cost, fidelity to dense of the pooled output and of the patches, milliseconds."""
    stream = model.new_stream(**options)
    pooled_cosine, patch_cosine, costs, skips, milliseconds = [], [], [], [], []
    for frame, reference in zip(frames, dense, strict=True):
        start = time.perf_counter()
        output = model(pixel_values=frame, stream=stream)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        costs.append(output.cost.item())
        skips.append(output.skip_rate.item())
        pooled_cosine.append(torch.cosine_similarity(output.pooler_output, reference["pooled"]).item())
        if output.token_mask is None:
            similarity = torch.cosine_similarity(output.last_hidden_state, reference["patches"], dim=-1)
            patch_cosine.append(similarity.mean().item())
    # the first frame is dense in every method
    after_first = slice(1, None)
    return {
        "options": options,
        "cost_mean": statistics.fmean(costs),
        "cost_after_first_frame": statistics.fmean(costs[after_first]),
        "skip_rate_after_first_frame": statistics.fmean(skips[after_first]),
        "cosine_mean": statistics.fmean(pooled_cosine[after_first]),
        "cosine_p5": percentile(pooled_cosine[after_first], 0.05),
        "cosine_min": min(pooled_cosine[after_first]),
        "patch_cosine_mean": statistics.fmean(patch_cosine[after_first]) if patch_cosine else None,
        "milliseconds_median": statistics.median(milliseconds[after_first]),
    }


@torch.inference_mode()
def main(
    max_frames: Annotated[int, typer.Option(help="Stop after N frames.")] = 100,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "vision_controls.json",
):
    """Run all methods and write the table as JSON."""
    folder = build_tower(default_tower_dir())
    model = NeuroFlowSiglipVisionModel.from_pretrained(folder).eval()
    preprocess = Preprocessor.from_pretrained(folder)
    frames = [preprocess(frame.image) for frame in read_frames(bundled_clip(), max_frames=max_frames)]
    dense, milliseconds = [], []
    for frame in track(frames, "dense"):
        start = time.perf_counter()
        result = model(pixel_values=frame)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        dense.append({"pooled": result.pooler_output, "patches": result.last_hidden_state})
    rows = {name: measure(model, frames, dense, options) for name, options in track(METHODS.items(), "methods")}
    report = {
        **provenance(),
        "clip": bundled_clip().name,
        "frames": len(frames),
        "tower": "DINOv2-small in SigLIP's architecture, 224 px, float32",
        "dense_milliseconds_median": statistics.median(milliseconds),
        "methods": rows,
    }
    write_json(output, report)

    table = Table("method", "cost", "skip", "cosine", "p5", "min", "patches", "ms")
    for name, row in rows.items():
        figures = (row[key] for key in ("cost_after_first_frame", "skip_rate_after_first_frame"))
        patches = "" if row["patch_cosine_mean"] is None else f"{row['patch_cosine_mean']:.4f}"
        table.add_row(
            name,
            *(f"{figure:.3f}" for figure in figures),
            *(f"{row[key]:.4f}" for key in ("cosine_mean", "cosine_p5", "cosine_min")),
            patches,
            f"{row['milliseconds_median']:.0f}",
        )
    Console().print(table, f"dense: {report['dense_milliseconds_median']:.0f} ms")


if __name__ == "__main__":
    typer.run(main)
