"""
How well do the patches that the gate marks as changed fit what moves? Masks, boxes, and labels of moving objects.

    torchrun --nproc_per_node 2 -m eval.vision.motion_masks
    python -m eval.vision.motion_masks --clips 2
    python -m eval.vision.motion_masks --quick

In composed clips, the pixels of every thing are known. Masks are compared with *the thing*, the patches that a thing
covers now, and with *the change*, the patches that it covers now or covered on the frame before. Only things that
moved since the frame before count. If the camera moves, everything has changed, and all things in the picture count.
Frames without change measure false alarms only. Baselines: the difference of pixels to the frame before, by patch, at
several levels; all patches. Objects are connected regions. An object is found if its box has an IoU of at least 0.3
with the box of a thing that moved. The labels of objects, among 165, are compared with those of the whole frame and of
the thing's true patches, through the same head. Intervals are 95 %, from a bootstrap over clips. Writes
`eval/results/motion_masks.json`, shown in `docs/results/motion-masks.md`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import typer
from torch import Tensor

from eval.docs.labels import motion_table
from eval.vision.clip_statistics import Estimate, estimate, mean, rounded
from eval.vision.composed_bench import Bench, Clip, Figures, Measured, command
from neuroflow_hf.video.motion import motion_mask, without_small_regions
from neuroflow_hf.video.objects import MovingObject, connected_objects
from recipes.composed_clips import LEAST_VISIBLE, Truth

REFERENCES = ("last_update", "ema")
STREAMS = {
    **{f"balanced, {reference}": {"preset": "balanced", "reference": reference} for reference in REFERENCES},
    **{f"context, {reference}": {"mode": "context", "reference": reference} for reference in REFERENCES},
}
THRESHOLDS = (0.01, 0.03)
PIXEL_LEVELS = (1.0, 2.0, 4.0, 8.0)
LEAST_IOU = 0.3
MASK_COLUMNS = ("thing", "change", "false share")
OBJECT_COLUMNS = ("found", "things", "matched")
LABEL_COLUMNS = ("object", "whole frame", "truth's mask")

WAYS = (
    *(f"{name}, {threshold:g}" for name in STREAMS for threshold in THRESHOLDS),
    *(f"pixels, {level:g}" for level in PIXEL_LEVELS),
    "everything",
)

Box = tuple[int, int, int, int]


def measure_motion(bench: Bench, clip: Clip) -> Figures:
    """
    Figures of each way W to make a mask, which is a stream with a threshold or a baseline. `mask: W` [T - 1, 3] has
    MASK_COLUMNS: IoU with the thing, IoU with the change and, where nothing changed, the share of patches in the mask;
    NaN where a figure does not apply. `objects: W` int [T - 1, 3] has OBJECT_COLUMNS. For streams at their own
    threshold, `labels: W` [matched objects, 3] has LABEL_COLUMNS: whether each label is the matched thing's. The first
    frame is left out.
    """
    vision = bench.model.config.vision_config
    side = vision.image_size // vision.patch_size
    grid = (side, side)
    things, changes = zip(*(expected(clip, number, grid) for number in range(1, len(clip.truths))), strict=True)
    boxes = [moving_boxes(clip, number, grid) for number in range(1, len(clip.truths))]
    figures: Figures = {}

    def judge(way: str, masks: Sequence[Tensor]) -> list[list[tuple[MovingObject, int]]]:
        """Store a way's figures. Returns for each frame the objects that match a thing, with its actor."""
        rows = zip(masks, things, changes, strict=True)
        figures[f"mask: {way}"] = np.array([mask_row(*row) for row in rows])
        counts, matched = [], []
        for mask, frame_boxes in zip(masks, boxes, strict=True):
            items = connected_objects(mask.unsqueeze(0))[0]
            pairs = matches([item.box for item in items], [box for _, box in frame_boxes])
            counts.append((len(items), len(frame_boxes), len(pairs)))
            matched.append([(items[ours], frame_boxes[theirs][0]) for ours, theirs in pairs])
        figures[f"objects: {way}"] = np.array(counts)
        return matched

    for name, options in STREAMS.items():
        stream = bench.model.new_stream(**options)
        outputs = list(bench.model.stream_frames(clip.pixels.split(1), stream))[1:]
        for threshold in THRESHOLDS:
            masks = [motion_mask(output, stream.gate, threshold=threshold)[0].cpu() for output in outputs]
            matched = judge(f"{name}, {threshold:g}", masks)
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
    return figures


# --- the truth: pure functions ---------------------------------------------------------------------------------------


def expected(clip: Clip, number: int, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """The patches of the things that moved, and those that they changed, bool [*grid]; None if there are none."""
    now, before = clip.truths[number].masks, clip.truths[number - 1].masks
    if clip.spec.motion == "moving camera":
        return patches_or_none(now.any(0), grid), torch.ones(grid, dtype=torch.bool)
    moving = (now != before).any((1, 2))
    thing, left = now[moving].any(0), before[moving].any(0)
    return patches_or_none(thing, grid), patches_or_none(thing | left, grid)


def patches_or_none(pixels: np.ndarray, grid: tuple[int, int]) -> Tensor | None:
    """A mask of pixels on a grid of patches; None if it is empty."""
    mask = patch_mask(pixels, grid)
    return mask if mask.any() else None


def moving_boxes(clip: Clip, number: int, grid: tuple[int, int]) -> list[tuple[int, Box]]:
    """The indices of a frame's actors that moved and are seen, each with its box in patches."""
    now, before = clip.truths[number], clip.truths[number - 1]
    moving = (now.masks != before.masks).any((1, 2)) | (clip.spec.motion == "moving camera")
    return [
        (place, box_of(patch_mask(now.masks[place], grid)))
        for place in np.flatnonzero(moving & (np.array(now.visible) >= LEAST_VISIBLE)).tolist()
    ]


def box_of(mask: Tensor) -> Box:
    """First row, first column, last row + 1 and last column + 1 of a mask, which must not be empty."""
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
    """Pairs of found and true boxes with an IoU of at least LEAST_IOU, best first; each box is in at most one pair."""
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
        np.nan if thing is None else mask_iou(mask, thing),
        np.nan if change is None else mask_iou(mask, change),
        mask.float().mean().item() if change is None else np.nan,
    )


def patch_means(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means of pixels' values [..., H, W] over each patch, float32 [..., *grid]."""
    return values.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1)).float().mean(dim=(-3, -1))


def patch_mask(pixels: np.ndarray, grid: tuple[int, int], least_share: float = 0.0) -> Tensor:
    """The patches, bool [*grid], of which a mask of pixels, bool [H, W], covers more than `least_share`."""
    return patch_means(torch.from_numpy(pixels), grid) > least_share


def mask_iou(mask: Tensor, truth: Tensor) -> float:
    """Intersection over union of two masks, bool [h, w] each; 1 if both are empty."""
    both, either = (mask & truth).sum(), (mask | truth).sum()
    return (both / either).item() if either else 1.0


def pixel_differences(images: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Mean absolute difference to the frame before, in grey levels: uint8 [T, H, W, 3] to float32 [T - 1, *grid]."""
    return patch_means(torch.from_numpy(images).float().mean(-1).diff(dim=0).abs(), grid)


def label_row(
    bench: Bench, output, item: MovingObject, actor: int, truth: Truth, grid: tuple[int, int]
) -> tuple[float, ...]:
    """Whether the label of an object, of the whole frame, and of the thing's true patches is the thing's."""
    head, hidden = bench.model.vision_model.head, output.last_hidden_state[0]
    true_patches = patch_mask(truth.masks[actor], grid, 0.5)
    if not true_patches.any():
        true_patches = patch_mask(truth.masks[actor], grid)
    own, true = (head(hidden[mask.flatten().to(hidden.device)][None])[0] for mask in (item.mask, true_patches))
    best = bench.labels.logits(torch.stack([own, output.pooler_output[0], true])).argmax(-1).tolist()
    return tuple(float(bench.things[place] == truth.things[actor]) for place in best)


# --- all clips -------------------------------------------------------------------------------------------------------


def masks_table(clips: Sequence[Figures]) -> dict[str, dict]:
    """By way: MASK_COLUMNS with intervals."""
    return {
        way: {
            column: rounded(mean([one[f"mask: {way}"][:, place] for one in clips]))
            for place, column in enumerate(MASK_COLUMNS)
        }
        for way in WAYS
    }


def objects_table(clips: Sequence[Figures]) -> dict[str, dict]:
    """By way: recall and precision of boxes, with intervals."""
    table: dict[str, dict] = {}
    for way in WAYS:
        rows = [tuple(float(number) for number in one[f"objects: {way}"].sum(0)) for one in clips]
        table[way] = {
            "recall": rounded(ratio(rows, "things")),
            "precision": rounded(ratio(rows, "found")),
            **{name: int(sum(row[place] for row in rows)) for place, name in enumerate(OBJECT_COLUMNS)},
        }
    return table


def ratio(rows: list[tuple[float, ...]], of: str) -> Estimate:
    """Matched objects relative to the things, or to the objects found."""
    place, matched = OBJECT_COLUMNS.index(of), OBJECT_COLUMNS.index("matched")
    return estimate([row for row in rows if row[place]], lambda total: total[:, matched] / total[:, place])


def labels_table(clips: Sequence[Figures]) -> dict[str, dict]:
    """By stream: the number of matched objects, and LABEL_COLUMNS with intervals."""
    table: dict[str, dict] = {}
    for stream in STREAMS:
        found = [one[f"labels: {stream}"] for one in clips]
        shares = {name: rounded(mean([rows[:, at] for rows in found])) for at, name in enumerate(LABEL_COLUMNS)}
        table[stream] = {"objects": sum(map(len, found)), **shares}
    return table


def masks_report(bench: Bench, measured: Measured) -> dict:
    """All figures."""
    clips = [figures for _, figures in measured]
    return {
        "labels_known": len(bench.things),
        "least_iou": LEAST_IOU,
        "options": STREAMS,
        "masks": masks_table(clips),
        "objects": objects_table(clips),
        "labels": labels_table(clips),
    }


main = command(measure_motion, masks_report, motion_table, name="motion_masks", default_clips=3, quick_frames=20)

if __name__ == "__main__":
    typer.run(main)
