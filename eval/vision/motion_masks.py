"""
How well does what the gate sees change fit what moves: masks, boxes, and names of moving objects.

    python -m eval.vision.motion_masks --quick
    python -m eval.vision.motion_masks
    python -m eval.vision.motion_masks --pictures boxes      # also pictures of frames with boxes
    torchrun --nproc_per_node 2 -m eval.vision.motion_masks

Composed clips, of which every frame's things are known to the pixel. Masks are compared with the thing and with the
change (what it covers now or covered on the frame before). Controls: the difference of pixels to the frame before, by
patch, at several levels; everything; nothing. Objects: connected regions whose box has an IoU of at least 0.3 with
that of a thing that moved; their labels among 165, beside the whole frame's label and that of the thing's true
patches, through the same head. Intervals: 95 % of a bootstrap over clips. What was measured before is reused. Writes
`eval/results/motion_masks.json`.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from eval.report import RESULTS, provenance, wide_console
from eval.vision.clip_statistics import Estimate, estimate, mean, rounded
from eval.vision.composed_bench import CHECKPOINT, SPLIT, Bench, ClipName, Figures, clip_names, measure_clips
from eval.vision.motion_measure import (
    LABEL_COLUMNS,
    LEAST_IOU,
    MASK_COLUMNS,
    OBJECT_COLUMNS,
    PIXEL_LEVELS,
    STREAMS,
    THRESHOLDS,
    measure_motion,
    way_name,
)
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, report_text, write_whole
from neuroflow_hf.video.motion import motion_mask
from neuroflow_hf.video.objects import connected_objects, pixel_box
from neuroflow_hf.video.overlay import outline_objects

PIXEL_WAYS = tuple(f"pixels, {level:g}" for level in PIXEL_LEVELS)
WAYS = (
    *(way_name(name, threshold) for name in STREAMS for threshold in THRESHOLDS),
    *PIXEL_WAYS,
    "everything",
    "nothing",
)
ALL = "all motions"

Measured = Sequence[tuple[ClipName, Figures]]


def masks_table(measured: Measured) -> dict[str, dict]:
    """By motion and way: MASK_COLUMNS with intervals."""
    return {
        motion: {
            way: {
                column: rounded(mean([one[f"mask: {way}"][:, place] for one in clips]))
                for place, column in enumerate(MASK_COLUMNS)
            }
            for way in WAYS
        }
        for motion, clips in by_motion(measured).items()
    }


def objects_table(measured: Measured) -> dict[str, dict]:
    """By motion and way: recall and precision of boxes, with intervals."""
    table: dict[str, dict] = {}
    for motion, clips in by_motion(measured).items():
        table[motion] = {}
        for way in WAYS:
            rows = [tuple(float(number) for number in one[f"objects: {way}"].sum(0)) for one in clips]
            table[motion][way] = {
                "recall": rounded(ratio(rows, "things")),
                "precision": rounded(ratio(rows, "found")),
                **{name: int(sum(row[place] for row in rows)) for place, name in enumerate(OBJECT_COLUMNS)},
            }
    return table


def ratio(rows: list[tuple[float, ...]], of: str) -> Estimate:
    """Matched objects over the things, or over the objects found."""
    place, matched = OBJECT_COLUMNS.index(of), OBJECT_COLUMNS.index("matched")
    return estimate([row for row in rows if row[place]], lambda total: total[:, matched] / total[:, place])


def labels_table(measured: Measured) -> dict[str, dict]:
    """By motion and stream: how often the matched objects are named right, beside the controls, and differences."""
    table: dict[str, dict] = {}
    for motion, clips in by_motion(measured).items():
        table[motion] = {}
        for stream in STREAMS:
            rows = [one[f"labels: {stream}"] for one in clips]
            own, frame, oracle = ([clip[:, place] for clip in rows] for place in range(len(LABEL_COLUMNS)))
            table[motion][stream] = {
                "objects": int(sum(len(clip) for clip in rows)),
                **{
                    name: rounded(mean(values))
                    for name, values in zip(LABEL_COLUMNS, (own, frame, oracle), strict=True)
                },
                "object less whole frame": rounded(mean([a - b for a, b in zip(own, frame, strict=True)])),
                "object less truth's mask": rounded(mean([a - b for a, b in zip(own, oracle, strict=True)])),
            }
    return table


def by_motion(measured: Measured) -> dict[str, list[Figures]]:
    """The clips of each motion, and of all."""
    motions = dict.fromkeys(name.motion for name, _ in measured)
    parts = {motion: [one for name, one in measured if name.motion == motion] for motion in motions}
    return {ALL: [one for _, one in measured], **parts}


def shown_table(report: dict) -> Table:
    """All motions together: each way's masks and boxes."""
    table = Table("mask", "thing", "change", "where nothing changed", "recall", "precision", title="all motions")

    def cell(found):
        return "" if found["value"] is None else f"{found['value']:.2f}"

    for way in WAYS:
        masks, objects = report["masks"][ALL][way], report["objects"][ALL][way]
        cells = [cell(masks[name]) for name in MASK_COLUMNS]
        cells += [cell(objects[name]) for name in ("recall", "precision")]
        table.add_row(way, *cells)
    return table


def save_pictures(bench: Bench, names: Sequence[ClipName], folder: Path):
    """Of each clip's stream with the default preset, six frames with the boxes of what moves, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        clip, stream = bench.clip(name), bench.model.new_stream()
        chosen, pictures = set(np.linspace(1, name.frames - 1, 6).round().astype(int).tolist()), []
        for number, pixels in enumerate(clip.pixels.split(1)):
            output = bench.model.get_image_features(pixels, stream=stream)
            if number in chosen:
                (objects,) = connected_objects(motion_mask(output, stream.gate))
                height, width = clip.images.shape[1:3]
                boxes = [pixel_box(item, height, width) for item in objects]
                pictures.append(outline_objects(clip.images[number], boxes, [""] * len(boxes)))
        Image.fromarray(np.concatenate(pictures, axis=1)).save(folder / f"{name}.png")


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    quick: Annotated[bool, typer.Option(help="A clip of each motion, 20 frames: minutes.")] = False,
    clips: Annotated[int, typer.Option(help="Clips of each motion.", min=1)] = 3,
    frames: Annotated[int, typer.Option(help="Frames of each clip.", min=16)] = 48,
    seed: Annotated[int, typer.Option(help="Of the clips.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Measure again what was measured before.")] = False,
    pictures: Annotated[Path | None, typer.Option(help="Folder for pictures of the first clips with boxes.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "motion_masks.json",
):
    """Measure what is missing, and write the report."""
    processes, console, start = Processes(), Console(stderr=True), time.perf_counter()
    if quick:
        clips, frames = 1, 20
    bench = Bench(checkpoint, str(processes.device or "cpu"))
    names = clip_names(clips, frames, seed)

    def say(done, total):
        if processes.is_main:
            console.print(f"clips: {done} of {total} of this process")

    options = {"streams": STREAMS, "thresholds": THRESHOLDS, "levels": PIXEL_LEVELS}
    found = measure_clips(bench, names, measure_motion, options, processes, fresh=fresh, on_clip=say)
    if not processes.is_main:
        return
    if pictures is not None:
        save_pictures(bench, [name for name in names if name.number == 0], pictures)
    measured = list(zip(names, found, strict=True))
    report = {
        **provenance(),
        "commit": checkout_commit(),
        "checkpoint": {"name": checkpoint.name, "weights": bench.weights},
        "clips": {"of_each_motion": clips, "frames": frames, "seed": seed, "drawings": SPLIT, "in_all": len(names)},
        "labels_known": len(bench.things),
        "least_iou": LEAST_IOU,
        "processes": processes.count,
        "seconds": round(time.perf_counter() - start, 1),
        "options": STREAMS,
        "masks": masks_table(measured),
        "objects": objects_table(measured),
        "labels": labels_table(measured),
    }
    write_whole(output, report_text(report))
    wide_console(110).print(shown_table(report))


if __name__ == "__main__":
    typer.run(main)
