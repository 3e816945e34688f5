"""
How close to dense are patch features, which video language models read, in every preset?

    python -m eval.vision.patch_fidelity

Cosine of each patch of `last_hidden_state` to the dense forward of the same frame, on the two shipped clips, with the
tower of the shipped SigLIP. The baseline returns the dense patches of every k-th frame; k is the largest at which it
costs at least what the preset does, and all k phases count. The first frame, dense in every method, is left out.
Writes `eval/results/patch_fidelity.json` and a table of `docs/guides/vlms.md`.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from eval.docs.tables import patch_fidelity_table
from eval.report import RESULTS, provenance, publish, rounded
from eval.vision.composed_bench import CHECKPOINT
from neuroflow_hf import PRESETS, NeuroFlowSiglipVisionModel
from neuroflow_hf.video import Preprocessor, bundled_clip, read_frames
from neuroflow_hf.video.reader import labelled_clip


def closeness(cosines: Tensor) -> dict[str, float]:
    """Of cosines [M, N] of N patches on M frames: mean and low percentiles over all, and the mean worst of a frame."""
    low = np.percentile(cosines.double().numpy(), (5, 1))
    return {
        "mean": cosines.mean().item(),
        "p5": float(low[0]),
        "p1": float(low[1]),
        "worst": cosines.min(dim=1).values.mean().item(),
    }


def held(dense: Tensor, every: int) -> Tensor:
    """Cosines [M, N] of dense patches [T, N, D] to those of the last of every k-th frame, over all phases."""
    phases = []
    for phase in range(every):
        frames = torch.arange(max(phase, 1), len(dense))
        phases.append(cosine_similarity(dense[frames], dense[frames - (frames - phase) % every], dim=-1))
    return torch.cat(phases)


def measure(model: NeuroFlowSiglipVisionModel, frames: list[Tensor]) -> list[dict]:
    """A row for each preset on one clip of frames [1, C, H, W]."""
    dense = torch.cat([model(frame).last_hidden_state for frame in frames])
    rows = []
    for preset in PRESETS:
        outputs = list(model.stream_frames(frames, preset=preset))[1:]
        cost = torch.cat([output.cost for output in outputs]).mean().item()
        patches = torch.cat([output.last_hidden_state for output in outputs])
        every = max(int(1 / cost), 1)
        own = closeness(cosine_similarity(patches, dense[1:], dim=-1))
        rows.append({"preset": preset, "cost": cost, **own, "every": every, "baseline": closeness(held(dense, every))})
    return rows


@torch.inference_mode()
def main(
    frames: Annotated[int, typer.Option(help="Frames of each clip.")] = 100,
    output: Annotated[Path, typer.Option(help="The JSON file.")] = RESULTS / "patch_fidelity.json",
):
    """Measure patch features of every preset beside a held dense frame at equal cost."""
    model = NeuroFlowSiglipVisionModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    preprocess = Preprocessor.from_pretrained(CHECKPOINT)
    rows = []
    for path in (bundled_clip(), labelled_clip()):
        clip = [preprocess(frame.image) for frame in read_frames(path, max_frames=frames)]
        rows += [{"clip": path.stem, "frames": len(clip), **row} for row in measure(model, clip)]
    report = {**provenance(), "presets": PRESETS, "rows": rounded(rows)}
    publish(output, report, patch_fidelity_table(report))


if __name__ == "__main__":
    typer.run(main)
