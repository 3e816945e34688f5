"""How close a student comes to the dense model on held-out clips, beside the keyframe repeated."""

import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..vision.gate_config import NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .clips import Clip, ClipSet
from .losses import cosines

# The share of the patches that is encoded on a sparse frame, by name; None: as many as are above the threshold. An
# adapter may help at the one and harm at the other, so both are measured.
SHARES: dict[str, float | None] = {"5% of the patches": 0.05, "what changed": None}
THRESHOLD = 0.01  # of the gate, as in the presets
MOST_CLIPS = 48  # a measurement takes a minute or two


@dataclass(frozen=True)
class HeldOut:
    """Figures over the sparse frames of all held-out clips."""

    mean: float  # mean, p5: of the cosine to the dense model's embedding
    p5: float
    repeated_mean: float  # repeated_mean, repeated_p5: of the same where the keyframe's embedding is repeated
    repeated_p5: float
    cost: float  # of a sparse frame, relative to dense
    by_clip: list[float] = field(default_factory=list)  # the mean cosine of each clip, for paired comparisons


def plain_values(held_out: dict[int, dict[str, HeldOut]]) -> dict[int, dict[str, dict]]:
    """Figures by step and share, as JSON can hold them."""
    return {step: {name: asdict(found) for name, found in by_share.items()} for step, by_share in held_out.items()}


def improvement(before: dict[str, HeldOut], after: dict[str, HeldOut]) -> float:
    """
    How much smaller the mean errors became, as the mean over SHARES of log(error before / error after), where an error
    is 1 - mean cosine. Minus infinity if one of them became larger: nobody wants an adapter that does harm.
    """
    gains = [math.log((1 - before[name].mean) / max(1e-9, 1 - after[name].mean)) for name in before]
    return -math.inf if min(gains) < 0 else sum(gains) / len(gains)


def measured_clips(clips: ClipSet) -> list[Clip]:
    """The held-out clips that are measured."""
    count = len(clips.held_out)
    numbers = torch.linspace(0, count - 1, min(MOST_CLIPS, count)).round().int().tolist()
    return [clips.held_out[number] for number in numbers]


@torch.inference_mode()
def measure(model: NeuroFlowSiglipVisionModel, clips: ClipSet) -> dict[str, HeldOut]:
    """
    Encode the held-out clips, at most MOST_CLIPS of them, evenly chosen, at the first resolution: figures by the
    names of SHARES. With several processes, each does all of it: the best weights are then the same everywhere.
    """
    side, batch = clips.resolutions[0], clips.settings.batch
    num_patches, chosen = clips.grid_at(side) ** 2, measured_clips(clips)
    found = {}
    for name, share in SHARES.items():
        budget = {} if share is None else {"token_budget": max(1, round(share * num_patches))}
        gate = clips.settings.gate(threshold=THRESHOLD, **budget)
        parts = [
            measure_batch(model, clips, chosen[first : first + batch], gate) for first in range(0, len(chosen), batch)
        ]
        ours, theirs, costs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        found[name] = HeldOut(
            ours.mean().item(),
            ours.quantile(0.05).item(),
            theirs.mean().item(),
            theirs.quantile(0.05).item(),
            costs.mean().item(),
            ours.mean(dim=0).tolist(),
        )
    return found


def measure_batch(
    model: NeuroFlowSiglipVisionModel, clips: ClipSet, chosen: list[Clip], gate: NeuroFlowGateConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Cosines to dense of the model and of the keyframe repeated, and costs, each for all sparse frames of B clips:
    three times [T - 1, B].
    """
    side = clips.resolutions[0]
    batch, stream, rows = clips.batch(chosen, side), model.new_stream(len(chosen), **gate.to_dict()), []
    for number, (frames, teacher) in enumerate(zip(batch.frames, batch.teacher, strict=True)):
        pixels = clips.preprocess_at(side).normalise(frames, model.dtype, model.device)
        output = model(pixels, interpolate_pos_encoding=True, stream=stream)
        if number:
            found = cosines(output.pooler_output.cpu(), teacher)
            rows.append((found, cosines(batch.teacher[0], teacher), output.cost.cpu()))
    ours, theirs, costs = (torch.stack(column) for column in zip(*rows, strict=True))
    return ours, theirs, costs
