"""
Which of the paper's observations hold on the embedded checkpoint, on composed clips of which everything is known.

    python -m eval.vision.published_laws --quick
    python -m eval.vision.published_laws
    torchrun --nproc_per_node 2 -m eval.vision.published_laws    # over two processes

Six observations about the published dual memory: that accuracy hardly depends on the skip rate; that it is lost where
things travel; what the pooling head's entropy tells; that inactive patches' features are stable; which of shifted
active and stale inactive patches costs more; what the running mean's ghosts cost. Each is decided by a rule, from
figures with 95 % intervals of a bootstrap over clips, beside a control. What was measured before is reused. Writes
`eval/results/published_laws.json` and `docs/laws.png`.
"""

import io
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eval.report import RESULTS, provenance
from eval.vision.composed_bench import CHECKPOINT, SPLIT, Bench, clip_names, measure_clips
from eval.vision.laws_findings import (
    PUBLISHED_SKIPS,
    PUBLISHED_TOP1,
    Measured,
    after_first,
    findings,
    loss,
    loss_of_first,
    motions_table,
    settings_table,
    stability_table,
    swaps_table,
)
from eval.vision.laws_measure import DISTANCES, MEMORY, SETTINGS, THRESHOLDS, measure_laws
from eval.vision.vision_policies import tidy
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, report_text, write_whole, write_whole_bytes

COLOURS = {"holds": "green", "does not hold": "red"}


def plot_laws(report: dict, measured: Measured) -> Figure:
    """Top-1 over skip rate, loss by motion, stability by distance, what each group of patches costs."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    settings = report["settings"]
    names = [f"ema {threshold:g}" for threshold in THRESHOLDS]
    skips = [settings[name]["skip"] for name in names]
    draw_estimates(top_left, skips, [settings[name]["top1"] for name in names], "#d97706", "dual memory, running mean")
    top_left.plot(PUBLISHED_SKIPS, PUBLISHED_TOP1, "o--", color="#9ca3af", label="published (UCF-101)")
    for name, colour in (("dense", "#111827"), ("control: first frame repeated", "#2563eb")):
        top_left.axhline(settings[name]["top1"]["value"], color=colour, linewidth=1, label=name)
    top_left.set_title("Zero-shot top-1 by skip rate", loc="left", fontsize=11)
    top_left.set_xlabel("share of patches skipped")
    top_left.legend(frameon=False, fontsize=9)

    motions = sorted(report["motions"], key=lambda motion: report["motions"][motion]["loss"]["value"])
    for offset, part, colour in ((0.15, loss, "#d97706"), (-0.15, None, "#2563eb")):
        for place, motion in enumerate(motions):
            clips = [figures for name, figures in measured if name.motion == motion]
            values = [(loss(one, MEMORY) if part is not None else loss_of_first(one)).mean() for one in clips]
            top_right.plot(values, [place + offset] * len(values), "o", color=colour, markersize=4, alpha=0.7)
    top_right.set_yticks(range(len(motions)), motions, fontsize=9)
    top_right.set_title("1 - cosine to dense by motion (blue: first frame repeated)", loc="left", fontsize=11)
    top_right.set_xscale("symlog", linthresh=1e-3)

    stable = report["stability"]
    rows = [f"change, {distance}" for distance in DISTANCES]
    for kind, colour in (("inactive", "#0d9488"), ("active", "#dc2626")):
        pairs = [(d, stable[row][kind]) for d, row in zip(DISTANCES, rows, strict=True) if stable[row][kind]["clips"]]
        draw_estimates(bottom_left, [d for d, _ in pairs], [found for _, found in pairs], colour, kind)
    floor = stable["control: another patch of the same frame"]["all"]["value"]
    bottom_left.axhline(floor, color="#9ca3af", linewidth=1, label="another patch of the same frame")
    bottom_left.set_xscale("log", base=2)
    bottom_left.set_xlabel("distance in frames")
    bottom_left.set_title("Last layer: a patch's cosine between two frames", loc="left", fontsize=11)
    bottom_left.legend(frameon=False, fontsize=9)

    swaps = {name: row["gain"] for name, row in report["swaps"].items()}
    for place, found in enumerate(swaps.values()):
        bottom_right.plot(found["interval"] or [found["value"]] * 2, [place] * 2, color="#7c3aed", linewidth=2)
        bottom_right.plot(found["value"], place, "o", color="#7c3aed")
    bottom_right.set_yticks(range(len(swaps)), list(swaps), fontsize=9)
    bottom_right.set_title("Gain in cosine with these patches dense", loc="left", fontsize=11)
    for panel in (top_left, top_right, bottom_left, bottom_right):
        tidy(panel)
    return figure


def draw_estimates(panel, places: list[float], found: list[dict], colour: str, label: str):
    """Values with their intervals, joined by a line."""
    panel.plot(places, [one["value"] for one in found], "o-", color=colour, label=label)
    for place, one in zip(places, found, strict=True):
        if one["interval"]:
            panel.plot([place, place], one["interval"], color=colour, linewidth=1)


def findings_table(found: list[dict]) -> Table:
    """The laws with what was measured, the control and the verdict."""
    table = Table("observation", "measured", "control", "verdict", title_justify="left", show_lines=True)
    for one in found:
        table.add_row(one["claim"], one["measured"], one["control"], one["verdict"], style=COLOURS.get(one["verdict"]))
    return table


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    quick: Annotated[bool, typer.Option(help="A clip of each motion, 24 frames: minutes.")] = False,
    clips: Annotated[int, typer.Option(help="Clips of each motion.", min=1)] = 4,
    frames: Annotated[int, typer.Option(help="Frames of each clip.", min=16)] = 48,
    seed: Annotated[int, typer.Option(help="Of the clips.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Measure again what was measured before.")] = False,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "published_laws.json",
    plot: Annotated[Path, typer.Option(help="The picture to write.")] = RESULTS.parents[1] / "docs" / "laws.png",
):
    """Measure what is missing, decide, and write the report and the picture."""
    processes, console, start = Processes(), Console(stderr=True), time.perf_counter()
    if quick:
        clips, frames = 1, 24
    bench = Bench(checkpoint, str(processes.device or "cpu"))
    names = clip_names(clips, frames, seed)

    def say(done, total):
        if processes.is_main:
            console.print(f"clips: {done} of {total} of this process")

    found = measure_clips(bench, names, measure_laws, {"settings": SETTINGS}, processes, fresh=fresh, on_clip=say)
    if not processes.is_main:
        return
    measured = list(zip(names, found, strict=True))
    report = {
        **provenance(),
        "commit": checkout_commit(),
        "checkpoint": {"name": checkpoint.name, "weights": bench.weights},
        "clips": {"of_each_motion": clips, "frames": frames, "seed": seed, "drawings": SPLIT, "in_all": len(names)},
        "labels": len(bench.things),
        "processes": processes.count,
        "seconds": round(time.perf_counter() - start, 1),
        "options": SETTINGS,
        "published_method": MEMORY,
        "settings": settings_table(measured),
        "motions": motions_table(measured),
        "stability": stability_table(measured),
        "swaps": swaps_table(measured),
        "frames_after_something_left": int(sum(after_first(one["gone"]).sum() for one in found)),
        "findings": findings(measured),
    }
    write_whole(output, report_text(report))
    picture = io.BytesIO()
    plot_laws(report, measured).savefig(picture, dpi=110, format="png")
    write_whole_bytes(plot, picture.getvalue())
    console = Console()
    console.width = max(console.width, 140)
    console.print(findings_table(report["findings"]))
    console.print(f"{np.sum([len(one['label']) for one in found])} frames, {report['seconds']} s, {os.fspath(output)}")


if __name__ == "__main__":
    typer.run(main)
