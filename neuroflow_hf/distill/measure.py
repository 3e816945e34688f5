"""How close a student comes to the dense model on held-out clips, beside the keyframe repeated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..vision.gate_config import NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .clips import ClipSet, needs_interpolation, patch_size_of
from .losses import cosines

MEASURED_SHARE = 0.05  # of the patches, encoded on a sparse frame


@dataclass(frozen=True)
class HeldOut:
    """
    Figures over the sparse frames of all held-out clips.

    Attributes:
        mean, p5: of the cosine to the dense model's embedding.
        repeated_mean, repeated_p5: of the same where the keyframe's embedding is repeated.
        cost: of a sparse frame, relative to dense.
    """

    mean: float
    p5: float
    repeated_mean: float
    repeated_p5: float
    cost: float


def measured_gate(clips: ClipSet, summary_tokens: int, num_patches: int) -> NeuroFlowGateConfig:
    """The gate of the measurement: a keyframe at the start of a clip, then the most surprising patches."""
    budget = max(1, round(MEASURED_SHARE * num_patches))
    return clips.settings.gate(summary_tokens, threshold=0.003, token_budget=budget)


@torch.inference_mode()
def measure(model: NeuroFlowSiglipVisionModel, clips: ClipSet, summary_tokens: int, most_clips: int = 64) -> HeldOut:
    """
    Encode the held-out clips, at most `most_clips` of them, evenly chosen, at the first resolution. With several
    processes, each does all of it: the best weights are then the same everywhere.
    """
    side, settings = clips.resolutions[0], clips.settings
    num_patches = clips.preprocess_at(side).patches_per_side(patch_size_of(model)) ** 2
    gate = measured_gate(clips, summary_tokens, num_patches)
    places = torch.linspace(0, len(clips.held_out) - 1, min(most_clips, len(clips.held_out))).round().int().tolist()
    found: list[Tensor] = []
    repeated: list[Tensor] = []
    costs: list[Tensor] = []
    for first in range(0, len(places), settings.batch):
        batch = clips.batch([clips.held_out[place] for place in places[first : first + settings.batch]], side)
        stream = model.new_stream(batch.frames.shape[1], **given(gate))
        interpolate = needs_interpolation(model, side)
        for number, (frames, teacher) in enumerate(zip(batch.frames, batch.teacher, strict=True)):
            pixels = clips.preprocess_at(side).normalise(frames, model.dtype, model.device)
            output = model(pixels, interpolate_pos_encoding=interpolate, stream=stream)
            if number:
                found.append(cosines(output.pooler_output.cpu(), teacher))
                repeated.append(cosines(batch.teacher[0], teacher))
                costs.append(output.cost.cpu())
    ours, theirs = torch.cat(found), torch.cat(repeated)
    return HeldOut(
        ours.mean().item(),
        ours.quantile(0.05).item(),
        theirs.mean().item(),
        theirs.quantile(0.05).item(),
        torch.cat(costs).mean().item(),
    )


def given(gate: NeuroFlowGateConfig) -> dict:
    """A gate's options, for `new_stream`."""
    return {name: value for name, value in gate.to_dict().items() if value is not None}
