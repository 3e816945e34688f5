"""
Moving objects: connected regions of a motion mask, with embeddings from the pooling head and labels.

    (objects,) = connected_objects(motion_mask(output, stream.gate))
    with_embeddings(model, output.last_hidden_state[0], objects, labels)

Features come from the frame's forward; only the head runs again, once for each object.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from ..utils.files import significant
from ..vision.gate_config import NeuroFlowGateConfig
from .labels import Labels
from .motion import motion_mask


@dataclass(frozen=True, eq=False)
class MovingObject:
    """A connected region of a motion mask."""

    mask: Tensor  # bool [grid_h, grid_w], the object's patches
    box: tuple[int, int, int, int]  # top, left, bottom, right in patches; bottom and right are the first ones outside
    # float32 [D], the object's patches pooled by the model's head; None before `with_embeddings`
    embedding: Tensor | None = None
    label: str | None = None  # label, score: the best label and its score; None without labels
    score: float | None = None

    @property
    def patches(self) -> int:
        """Number of patches."""
        return int(self.mask.sum())


def connected_objects(mask: Tensor) -> list[list[MovingObject]]:
    """
    The connected regions of the masks of B streams, bool [B, grid_h, grid_w] from `motion_mask`: for each stream the
    largest first, equally large ones in reading order. ValueError for a mask of another shape.
    """
    if mask.ndim != 3:
        raise ValueError(f"The mask has shape {tuple(mask.shape)}; expected (streams, grid rows, grid columns).")
    streams = []
    for grid in mask.cpu():
        regions, _ = ndimage.label(grid, np.ones((3, 3)))
        objects = [
            MovingObject(torch.from_numpy(regions == number), (rows.start, columns.start, rows.stop, columns.stop))
            for number, (rows, columns) in enumerate(ndimage.find_objects(regions), start=1)
        ]
        streams.append(sorted(objects, key=lambda item: -item.patches))
    return streams


@torch.no_grad()
def with_embeddings(
    model: nn.Module, hidden_state: Tensor, objects: Sequence[MovingObject], labels: Labels | None = None
) -> list[MovingObject]:
    """
    Pool the patches of each object with the model's head, as if they were the whole image; with `labels`, find the
    best label of each.

    Patches attend to the whole frame, so an embedding also depends on the surroundings. Patches that were reused, as
    on a held frame, have the features of an earlier frame.

    Args:
        model: with or without a text tower; ValueError without a pooling head.
        hidden_state: [N, D], one stream's `last_hidden_state`; ValueError unless it has all N patches, as in mode
            `eliminate`.
        objects: of that stream.
        labels: from `embed_labels`.
    """
    vision = getattr(model, "vision_model", model)
    if not getattr(vision, "use_head", False):
        raise ValueError("The model has no pooling head to make embeddings of patches; use a model with one.")
    found = []
    for item in objects:
        if hidden_state.ndim != 2 or len(hidden_state) != item.mask.numel():
            raise ValueError(
                f"`hidden_state` has shape {tuple(hidden_state.shape)}, the grid {item.mask.numel()} patches; "
                "expected (patches, features) of one stream. Mode `eliminate` gives features of active patches only."
            )
        patches = hidden_state[item.mask.flatten().to(hidden_state.device)]
        embedding = vision.head(patches.unsqueeze(0))[0].float().cpu()
        label, score = (None, None) if labels is None else labels.best(embedding)
        found.append(replace(item, embedding=embedding, label=label, score=score))
    return found


def find_objects(
    model: nn.Module, output: Any, gate: NeuroFlowGateConfig, labels: Labels | None = None
) -> list[list[MovingObject]]:
    """
    Each stream's moving objects, from an output of B streams; with `labels`, they have embeddings and labels.

    Raises:
        ValueError: as in `motion_mask` and `with_embeddings`.
    """
    found = connected_objects(motion_mask(output, gate))
    if labels is None:
        return found
    streams = zip(output.last_hidden_state, found, strict=True)
    return [with_embeddings(model, hidden_state, objects, labels) for hidden_state, objects in streams]


def require_objects_found(gate: NeuroFlowGateConfig, labelled: bool):
    """Raise a ValueError if `find_objects` refuses every output of a stream with this gate."""
    if not gate.needs_surprise or gate.everything_active:
        raise ValueError(
            "Moving objects are found where the gate sees change, and with these options it does not look: choose "
            "a mode other than `dense` and `hold`, and a threshold above -1."
        )
    if labelled and gate.mode == "eliminate":
        raise ValueError("Labels of objects need the features of all patches, which mode `eliminate` does not keep.")


def object_line(item: MovingObject, height: int, width: int, covered: float = 1.0) -> dict:
    """
    An object in a frame's line of `frames.jsonl`: its `box` in pixels of a frame of this height and width (left, top,
    right, bottom, the last two the first ones outside), its number of `patches`, and, if labelled, `label` and
    `confidence`. Patches cover the share `covered` of each side of the frame.
    """
    rows, columns = item.mask.shape
    down, across = covered * height / rows, covered * width / columns
    top, left, bottom, right = item.box
    box = [round(left * across), round(top * down), round(right * across), round(bottom * down)]
    line: dict = {"box": box, "patches": item.patches}
    if item.label is not None:
        line |= {"label": item.label, "confidence": significant(item.score)}
    return line
