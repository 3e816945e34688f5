"""
At which cost does which mode give which fidelity, and would holding the last dense embedding do as well?

    python -m eval.vision.vision_controls

Every mode and baseline on the shipped clip: all see the same frames, and every frame is compared with a dense forward
of the same frame. Writes `eval/results/vision_controls.json`, shown in `docs/results/fidelity.md`.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from eval.docs.tables import controls_table
from eval.report import RESULTS, provenance, publish
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.utils.jobs import timed
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import bundled_clip, read_frames
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir

EMA = {"reference": "ema", "ema_rate": 0.05}
CHANGED = "control: dense when over 12% of patches changed since the last keyframe"
SENTINELS = "`extrapolate`, 3% sentinels, keyframe every 25th frame"
METHODS = {
    "control: repeat the first frame's embedding": {"mode": "hold"},
    "control: dense every 12th frame, held between": {"mode": "hold", "keyframe_interval": 12},
    "control: dense every 6th frame, held between": {"mode": "hold", "keyframe_interval": 6},
    "control: dense every 3rd frame, held between": {"mode": "hold", "keyframe_interval": 3},
    CHANGED: {"mode": "hold", "keyframe_fraction": 0.12},
    "control: the same, 8% changed by more than 0.1": {"mode": "hold", "keyframe_fraction": 0.08, "threshold": 0.1},
    "`eliminate`, running mean 0.05 (paper's B, not distilled)": {"mode": "eliminate", **EMA},
    "`reconstruct`, running mean 0.05 (paper's C)": {"mode": "reconstruct", **EMA},
    "`reconstruct`": {"mode": "reconstruct"},
    "`mlp`": {"mode": "mlp"},
    "`context`, threshold 0.05": {"mode": "context", "threshold": 0.05},
    "`context`": {"mode": "context"},
    "`context`, threshold 0.001": {"mode": "context", "threshold": 0.001},
    "`context`, every patch within 10 frames": {"mode": "context", "max_age": 10},
    "`context`, keyframe every 12th frame": {"mode": "context", "keyframe_interval": 12},
    "`extrapolate`": {"mode": "extrapolate"},
    SENTINELS: {"mode": "extrapolate", "sentinels": 0.03, "keyframe_interval": 25},
    "`extrapolate`, 10% sentinels": {"mode": "extrapolate", "sentinels": 0.1},
    "preset `thrifty`": {"preset": "thrifty"},
    "preset `balanced` (default)": {"preset": "balanced"},
    "preset `faithful`": {"preset": "faithful"},
}


def measure(model, frames, dense, options) -> dict:
    """One method over the clip: cost, fidelity to dense of the pooled output and of the patches, milliseconds."""
    stream = model.new_stream(**options)
    rows, patch_cosines = [], []
    for frame, reference in zip(frames, dense, strict=True):
        output, milliseconds = timed(lambda frame=frame: model(pixel_values=frame, stream=stream), model.device)
        cosine = torch.cosine_similarity(output.pooler_output, reference.pooler_output).item()
        rows.append((output.cost.item(), output.skip_rate.item(), cosine, milliseconds))
        if output.token_mask is None:
            patches = torch.cosine_similarity(output.last_hidden_state, reference.last_hidden_state, dim=-1)
            patch_cosines.append(patches.mean().item())
    # the first frame is dense in every method
    costs, skips, cosines, milliseconds = np.array(rows[1:]).T
    return {
        "options": options,
        "cost_after_first_frame": costs.mean(),
        "skip_rate_after_first_frame": skips.mean(),
        "cosine_mean": cosines.mean(),
        "cosine_p5": np.quantile(cosines, 0.05),
        "cosine_min": cosines.min(),
        "patch_cosine_mean": np.mean(patch_cosines[1:]) if patch_cosines else None,
        "milliseconds_median": np.median(milliseconds),
    }


@torch.inference_mode()
def main(
    max_frames: Annotated[int, typer.Option(help="Stop after N frames.")] = 100,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "vision_controls.json",
):
    """Run all methods, and write and show the table."""
    folder = build_tower(default_tower_dir())
    model = NeuroFlowSiglipVisionModel.from_pretrained(folder).eval()
    preprocess = Preprocessor.from_pretrained(folder)
    frames = [preprocess(frame.image) for frame in read_frames(bundled_clip(), max_frames=max_frames)]
    bar = {"console": Console(stderr=True)}
    pairs = [
        timed(lambda frame=frame: model(pixel_values=frame), model.device) for frame in track(frames, "dense", **bar)
    ]
    dense, milliseconds = zip(*pairs, strict=True)
    report = {
        **provenance(),
        "clip": bundled_clip().name,
        "frames": len(frames),
        "tower": "DINOv2-small in SigLIP's architecture, 224 px, float32",
        "dense_milliseconds_median": np.median(milliseconds),
        "methods": {
            name: measure(model, frames, dense, options)
            for name, options in track(METHODS.items(), "methods", console=Console(stderr=True))
        },
    }
    publish(output, report, controls_table(report))


if __name__ == "__main__":
    typer.run(main)
