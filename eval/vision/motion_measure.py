"""
One composed clip through streams, and how well what moves is found. T frames, a grid of patches, S settings.

What is right: *the thing*, the patches that a thing covers now; *the change*, those that it covers now or covered on
the frame before, for the place that it has just left has changed too. Only things that moved since the frame before
count; where the camera moves, everything has changed and things are what is in the picture. Frames of which nothing
changed say something of false alarms only.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eval.vision.composed_bench import Bench, Clip, Figures
from eval.vision.composed_clips import LEAST_VISIBLE, Truth
from neuroflow_hf.video.motion import mask_iou, motion_mask, patch_mask, without_small_regions
from neuroflow_hf.video.objects import MovingObject, connected_objects

REFERENCES = ("last_update", "ema", "both")
STREAMS = {
    **{f"balanced, {reference}": {"preset": "balanced", "reference": reference} for reference in REFERENCES},
    **{f"context, {reference}": {"mode": "context", "reference": reference} for reference in REFERENCES},
}
THRESHOLDS = (0.003, 0.01, 0.03, 0.1)
PIXEL_LEVELS = (1.0, 2.0, 4.0, 8.0)
LEAST_IOU = 0.3
MASK_COLUMNS = ("thing", "change", "false share")
OBJECT_COLUMNS = ("found", "things", "matched")
LABEL_COLUMNS = ("object", "whole frame", "truth's mask")

Box = tuple[int, int, int, int]


def measure_motion(bench: Bench, clip: Clip) -> Figures:
    """
    For each way W to make a mask (a stream and a threshold, or a control) `mask: W` [T - 1, 3], MASK_COLUMNS: IoU with
    the thing, IoU with the change, and where nothing changed, the share of patches in the mask; NaN where it does not
    apply. `objects: W` int [T - 1, 3], OBJECT_COLUMNS. For streams at their own threshold `labels: W`
    [matched objects, 3], LABEL_COLUMNS: whether each names the matched thing right. The first frame is left out.
    """
    vision = bench.model.config.vision_config
    side = vision.image_size // vision.patch_size
    grid = (side, side)
    things, changes = zip(*(expected(clip, number, grid) for number in range(1, len(clip.truths))), strict=True)
    boxes = [moving_boxes(clip, number, grid) for number in range(1, len(clip.truths))]
    figures: Figures = {}

    def judge(way: str, masks: Sequence[Tensor]) -> list[list[tuple[MovingObject, int]]]:
        figures[f"mask: {way}"] = np.array(
            [mask_row(mask, thing, change) for mask, thing, change in zip(masks, things, changes, strict=True)]
        )
        found = [connected_objects(mask.unsqueeze(0))[0] for mask in masks]
        matched = [
            matches([item.box for item in items], [box for _, box in frame_boxes])
            for items, frame_boxes in zip(found, boxes, strict=True)
        ]
        figures[f"objects: {way}"] = np.array(
            [
                (len(items), len(frame_boxes), len(pairs))
                for items, frame_boxes, pairs in zip(found, boxes, matched, strict=True)
            ]
        )
        return [
            [(items[ours], frame_boxes[theirs][0]) for ours, theirs in pairs]
            for items, frame_boxes, pairs in zip(found, boxes, matched, strict=True)
        ]

    for name, options in STREAMS.items():
        stream = bench.model.new_stream(**options)
        outputs = list(bench.model.stream_frames(clip.pixels.split(1), stream))[1:]
        for threshold in THRESHOLDS:
            masks = [motion_mask(output, stream.gate, threshold=threshold)[0].cpu() for output in outputs]
            matched = judge(way_name(name, threshold), masks)
            if threshold == stream.gate.threshold:
                rows = [
                    label_row(bench, output, item, actor, clip.truths[number], grid)
                    for number, (output, pairs) in enumerate(zip(outputs, matched, strict=True), start=1)
                    for item, actor in pairs
                ]
                figures[f"labels: {name}"] = np.array(rows, dtype=np.float64).reshape(-1, len(LABEL_COLUMNS))
    difference = pixel_differences(clip.images, grid)
    for level in PIXEL_LEVELS:
        judge(f"pixels, {level:g}", [without_small_regions(frame > level, 2) for frame in difference])
    judge("everything", [torch.ones(grid, dtype=torch.bool) for _ in things])
    judge("nothing", [torch.zeros(grid, dtype=torch.bool) for _ in things])
    return figures


def way_name(stream: str, threshold: float) -> str:
    """What a mask of a stream at a threshold is called."""
    return f"{stream}, {threshold:g}"


# --- what is right: pure functions -----------------------------------------------------------------------------------


def moved(now: np.ndarray, before: np.ndarray) -> bool:
    """Whether a thing's mask [H, W] is another one than before."""
    return not np.array_equal(now, before)


def expected(clip: Clip, number: int, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """The patches of the things that moved, and of what changed with them, bool [*grid]; None where nothing did."""
    now, before = clip.truths[number].masks, clip.truths[number - 1].masks
    if clip.name.motion == "moving camera":
        return patches_or_none(now.any(0), grid), torch.ones(grid, dtype=torch.bool)
    moving = [place for place in range(len(now)) if moved(now[place], before[place])]
    thing = np.logical_or.reduce([now[place] for place in moving], initial=False, axis=0) if moving else None
    left = np.logical_or.reduce([before[place] for place in moving], initial=False, axis=0) if moving else None
    if thing is None:
        return None, None
    return patches_or_none(thing, grid), patches_or_none(thing | left, grid)


def patches_or_none(pixels: np.ndarray, grid: tuple[int, int]) -> Tensor | None:
    """A mask of pixels on a grid of patches; None if it is empty."""
    mask = patch_mask(torch.from_numpy(np.asarray(pixels)), grid)
    return mask if mask.any() else None


def moving_boxes(clip: Clip, number: int, grid: tuple[int, int]) -> list[tuple[int, Box]]:
    """Which actors of a frame moved and are seen, each with its box in patches."""
    now, before = clip.truths[number], clip.truths[number - 1]
    found = []
    for place, mask in enumerate(now.masks):
        camera = clip.name.motion == "moving camera"
        if now.visible[place] >= LEAST_VISIBLE and (camera or moved(mask, before.masks[place])):
            found.append((place, box_of(patch_mask(torch.from_numpy(mask), grid))))
    return found


def box_of(mask: Tensor) -> Box:
    """First row, first column, last row + 1, last column + 1 of a mask that is not empty."""
    rows, columns = (mask.any(dim).nonzero() for dim in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, height) * max(0, width)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def matches(found: Sequence[Box], boxes: Sequence[Box]) -> list[tuple[int, int]]:
    """Pairs of found and right boxes with an IoU of at least LEAST_IOU, each in one pair, the best ones first."""
    pairs = sorted(
        ((-box_iou(ours, theirs), i, j) for i, ours in enumerate(found) for j, theirs in enumerate(boxes)),
    )
    taken: list[tuple[int, int]] = []
    for negative, ours, theirs in pairs:
        if -negative >= LEAST_IOU and all(ours != i and theirs != j for i, j in taken):
            taken.append((ours, theirs))
    return taken


def mask_row(mask: Tensor, thing: Tensor | None, change: Tensor | None) -> tuple[float, float, float]:
    """A frame's MASK_COLUMNS."""
    return (
        np.nan if thing is None else mask_iou(mask, thing).item(),
        np.nan if change is None else mask_iou(mask, change).item(),
        mask.float().mean().item() if change is None else np.nan,
    )


def pixel_differences(images: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Mean absolute difference to the frame before, in grey levels: uint8 [T, H, W, 3] to float32 [T - 1, *grid]."""
    levels = torch.from_numpy(images).float().mean(-1)
    changed = (levels[1:] - levels[:-1]).abs()
    return changed.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1)).mean(dim=(-3, -1))


def label_row(
    bench: Bench, output, item: MovingObject, actor: int, truth: Truth, grid: tuple[int, int]
) -> tuple[float, float, float]:
    """Whether the label of an object, of the whole frame, and of the thing's true patches is the thing's."""
    head, hidden = bench.model.vision_model.head, output.last_hidden_state[0]
    true_patches = patch_mask(torch.from_numpy(truth.masks[actor]), grid, 0.5)
    if not true_patches.any():
        true_patches = patch_mask(torch.from_numpy(truth.masks[actor]), grid)
    embeddings = [
        head(hidden[item.mask.flatten().to(hidden.device)].unsqueeze(0))[0],
        output.pooler_output[0],
        head(hidden[true_patches.flatten().to(hidden.device)].unsqueeze(0))[0],
    ]
    name = truth.things[actor]
    best = bench.labels.logits(torch.stack(embeddings)).argmax(-1).tolist()
    return tuple(float(bench.things[place] == name) for place in best)
