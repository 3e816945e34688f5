"""
Does a method name what is seen as often as dense does? Zero-shot top-1 and top-5, by kind of motion, over cost.

    python -m eval.vision.accuracy --quick                                  # 1,000 frames of each motion
    torchrun --nproc_per_node 2 -m eval.vision.accuracy                     # everything; run again to continue
    python -m eval.vision.accuracy --quick --methods "balanced|every|surprise"

Frames of composed clips, of held-out drawings before held-out photographs, asked for one of all the things that the
checkpoint was trained on or `nothing`. Counted are frames on which a thing is seen, drawn by chance, without the first
of each clip; every method, dense too, is asked about the same frames. Each clip counts as much as any other. Intervals
are 95 %, from drawing clips with all their frames, paired: frames of one clip are no independent answers, and the
number of clips, not of frames, is what an interval's width goes by. Of fewer than three clips none is given.
Baselines: the first frame repeated, dense every k frames, dense when the mean surprise or the pixels' difference since
the last dense frame exceeds a level, fewer pixels, token merging (ToMe); between two settings of a family anybody can
mix, so each has a value at a method's own cost. Writes `eval/results/accuracy.json` and `docs/accuracy.png`.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from eval.recordings import Scene
from eval.report import RESULTS, tidy, wide_console, with_interval, write_figure, write_json
from eval.vision.composed_bench import CHECKPOINT
from eval.vision.equal_cost import best_baseline, families_of, statistic_interval
from eval.vision.evidence import (
    Checkpoint,
    Clips,
    DenseEvery,
    Dtype,
    Evidence,
    FewSettings,
    Folder,
    Frames,
    Methods,
    Plan,
    Quick,
    gather_evidence,
    rounded,
)
from neuroflow_hf.evaluation.methods import MethodSpec

TOP = (1, 5)
CLOSE, CLOSE_COST = (0.9, 1.05), 0.03  # of the close-up's axes
PLOT = RESULTS.parents[1] / "docs" / "accuracy.png"
COLOURS = ("#d97706", "#2563eb", "#7c3aed", "#0d9488", "#be185d", "#65a30d", "#854d0e")
BASELINE_COLOURS = ("#111827", "#6b7280", "#9ca3af", "#374151", "#4b5563", "#a8a29e", "#78716c", "#1f2937", "#94a3b8")
BASELINE_MARKERS = ("s", "^", "v", "D", "x", "+", "P", "1", "p")
LEAST_COST = 0.01  # of the axis; what costs nothing is drawn here


def is_right(embeddings: Tensor, texts: Tensor, places: Tensor, k: int) -> Tensor:
    """
    Whether the right text is among the k that fit best: embeddings [M, D], unit texts [L, D] and the right ones'
    places [M] to bool [M]. A text that fits as well as the right one counts as before it.
    """
    scores = functional.normalize(embeddings.float(), dim=-1) @ texts.T
    own = scores.gather(1, places[:, None])
    return (scores >= own).sum(1) - 1 < k


def scene_accuracy(evidence: Evidence, name: str, batch: int, scene: Scene, k: int) -> float:
    """Share of a scene's drawn frames with a thing in them on which a method is right; NaN if there are none."""
    recording = evidence.recording(name, batch)
    frames, embeddings = recording.of(scene.name, drawn=True)
    labels = recording.labels_of(scene.name)
    labelled = torch.tensor([labels[frame] is not None for frame in frames.tolist()], dtype=torch.bool)
    if not labelled.any():
        return float("nan")
    places = torch.tensor([evidence.names.index(labels[frame]) for frame in frames[labelled].tolist()])
    return is_right(embeddings[labelled], evidence.texts, places, k).double().mean().item()


def mean_of_scenes(values: np.ndarray) -> np.ndarray:
    """Mean over scenes of [R, S, 1], those without a value left out: [R]."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=(1, 2)) / (~np.isnan(values)).sum((1, 2))


def figures(values: dict[str, np.ndarray], dense: str, name: str) -> dict:
    """A method's accuracy beside dense's, from accuracies by scene [S, 1]."""
    own, theirs = (mean_of_scenes(values[one][None])[0] for one in (name, dense))
    return {
        "accuracy": float(own),
        "dense": float(theirs),
        "difference": float(own - theirs),
        "interval": statistic_interval(
            values[name], mean_of_scenes, lambda drawn: mean_of_scenes(values[dense][drawn])
        ),
        "retained": float(own / theirs) if theirs else None,
        "scenes": int((~np.isnan(values[name])).sum()),
    }


def accuracy_report(evidence: Evidence) -> dict:
    """All figures: of every method, pooled, by motion, and beside the best baselines at its cost."""
    scenes, names = evidence.scenes, [spec.name for spec in evidence.specs]
    dense = next(spec.name for spec in evidence.specs if spec.kind == "dense")
    motions = list(dict.fromkeys(scene.group for _, scene in scenes))
    values = {
        k: {
            name: np.array([[scene_accuracy(evidence, name, *one, k)] for one in scenes], dtype=np.float64)
            for name in names
        }
        for k in TOP
    }
    costs = {name: evidence.cost(name, scenes) for name in names}
    families = families_of(evidence.specs)
    methods = []
    for spec in evidence.specs:
        row: dict = {"name": spec.name, "family": spec.family, "control": spec.control, "cost": costs[spec.name]}
        for k in TOP:
            row[f"top{k}"] = figures(values[k], dense, spec.name)
        if not spec.control and spec.name != dense:
            compared = best_baseline(spec.name, values[1], costs, families, mean_of_scenes)
            row["top1"]["best control"] = compared
        row["motions"] = {}
        for motion in motions:
            rows = [place for place, (_, scene) in enumerate(scenes) if scene.group == motion]
            of_motion = {k: {name: values[k][name][rows] for name in (spec.name, dense)} for k in TOP}
            row["motions"][motion] = {
                "cost": evidence.cost(spec.name, [scenes[place] for place in rows]),
                **{f"top{k}": figures(of_motion[k], dense, spec.name) for k in TOP},
            }
        methods.append(row)
    counted = sum(
        int((evidence.recording(dense, batch).labels[:, column][drawn[:, column]] >= 0).sum())
        for batch, some in enumerate(evidence.batches)
        for drawn in [evidence.recording(dense, batch).drawn]
        for column in range(len(some))
    )
    return rounded({**evidence.about, "texts": len(evidence.names), "frames_counted": counted, "results": methods})


def draw_over_cost(
    panel, specs: Sequence[MethodSpec], costs: dict[str, float], values: dict[str, float], dense: float
):
    """
    A panel of values over cost.

    Args:
        panel: of matplotlib.
        specs: the methods; those of one family are joined.
        costs, values: of each by name; without a value it is left out.
        dense: what dense reaches, a line across.
    """
    families: dict[str, list[MethodSpec]] = {}
    for spec in specs:
        if spec.kind != "dense":
            families.setdefault(spec.family, []).append(spec)
    colours = itertools.cycle(COLOURS)
    baseline_looks = itertools.cycle(zip(BASELINE_COLOURS, BASELINE_MARKERS, strict=True))
    panel.axhline(dense, color="#b91c1c", linewidth=1, linestyle=(0, (4, 3)), label="dense")
    for family, members in families.items():
        is_baseline = members[0].control
        colour, marker = next(baseline_looks) if is_baseline else (next(colours), "o")
        if family == "presets":
            marker = "*"
        points = sorted(
            (max(costs[spec.name], LEAST_COST), values[spec.name]) for spec in members if spec.name in values
        )
        if points:
            panel.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=9 if marker == "*" else 4,
                linewidth=1.0 if is_baseline else 1.6,
                linestyle="--" if is_baseline else "-",
                label=f"baseline: {family}" if is_baseline else family,
                zorder=2 if is_baseline else 3,
            )
    panel.set_xscale("log")
    drawn = [costs[spec.name] for spec in specs if spec.name in values]
    panel.set_xlim(LEAST_COST * 0.9, 1.1 * max([1.0, *drawn]))
    tidy(panel)


def plot_accuracy(evidence: Evidence, report: dict) -> Figure:
    """Top-1 over cost, relative to dense: all clips above, whole and close up, and a panel for each motion."""
    rows = report["results"]
    motions = list(rows[0]["motions"])
    columns = 5
    lines = -(-len(motions) // columns)
    figure = Figure(figsize=(15, 5 + 2.4 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[2, *[1] * lines])
    top, near = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    for panel in (top, near):
        draw_over_cost(
            panel,
            evidence.specs,
            {row["name"]: row["cost"] for row in rows},
            relative({row["name"]: row["top1"] for row in rows}),
            1.0,
        )
        panel.set_xlabel("cost (share of dense)")
    top.set_title(f"Top-1, share of dense's ({rows[0]['top1']['dense']:.1%}), all motions", loc="left", fontsize=11)
    near.set_title("The same, close to dense's", loc="left", fontsize=11)
    near.set_ylim(CLOSE)
    near.set_xlim(left=CLOSE_COST)
    top.legend(loc="lower left", frameon=False, fontsize=8, ncols=2)
    for place, motion in enumerate(motions):
        panel = figure.add_subplot(grid[1 + place // columns, place % columns])
        of_motion = {row["name"]: row["motions"][motion] for row in rows}
        draw_over_cost(
            panel,
            evidence.specs,
            {name: found["cost"] for name, found in of_motion.items()},
            relative({name: found["top1"] for name, found in of_motion.items()}),
            1.0,
        )
        theirs = of_motion[rows[0]["name"]]["top1"]["dense"]
        panel.set_title(f"{motion} ({'none' if theirs is None else f'{theirs:.0%}'})", loc="left", fontsize=9)
        panel.tick_params(labelsize=7)
    return figure


def relative(found: dict[str, dict]) -> dict[str, float]:
    """What methods retain of dense's accuracy, of those that have a value."""
    return {name: one["retained"] for name, one in found.items() if one["retained"] is not None}


def tables(report: dict) -> list[Table]:
    """The figures of all clips, and the presets' by motion."""
    overall = Table(title="zero-shot accuracy, all motions", title_justify="left")
    for heading in ("method", "cost", "top-1", "less dense", "best baseline", "difference", "top-5"):
        overall.add_column(heading, justify="left" if heading in ("method", "best baseline") else "right")
    for row in report["results"]:
        compared = row["top1"].get("best control")
        overall.add_row(
            ("baseline: " if row["control"] else "") + row["name"],
            f"{row['cost']:.3f}",
            percent(row["top1"]["accuracy"]),
            points(row["top1"]["difference"], row["top1"]["interval"]),
            "" if compared is None else f"{percent(compared['control'])} {compared['family']}",
            "" if compared is None else points(compared["difference"], compared["interval"]),
            percent(row["top5"]["accuracy"]),
        )
    presets = [row for row in report["results"] if row["family"] == "presets"]
    by_motion = Table(title="top-1 less dense's, points, by motion", title_justify="left")
    for heading in ("motion", "dense", *(row["name"] for row in presets)):
        by_motion.add_column(heading, justify="right")
    for motion in report["results"][0]["motions"]:
        found = [row["motions"][motion] for row in presets]
        dense = report["results"][0]["motions"][motion]["top1"]["accuracy"]
        by_motion.add_row(
            motion, percent(dense), *(points(one["top1"]["difference"], one["top1"]["interval"]) for one in found)
        )
    return [overall, by_motion]


def percent(share: float | None) -> str:
    """A share in percent."""
    return "-" if share is None else f"{share:.1%}"


def points(difference: float | None, interval: Sequence[float] | None) -> str:
    """A difference of shares in points, with its interval."""
    return with_interval(difference, interval, "{:+.2f}", 100)


def main(
    quick: Quick = False,
    few_settings: FewSettings = False,
    clips: Clips = 5,
    frames: Frames = None,
    dense_every: DenseEvery = 8,
    methods: Methods = None,
    checkpoint: Checkpoint = CHECKPOINT,
    dtype: Dtype = "bfloat16",
    folder: Folder = None,
    output: Path = RESULTS / "accuracy.json",
    plot: Path = PLOT,
):
    """Record what is missing, compare, and write the report and the picture."""
    plan = Plan(clips, frames, dense_every, quick, methods, few_settings)
    evidence, processes = gather_evidence(plan, checkpoint, dtype, folder)
    if not processes.is_main:
        return
    report = accuracy_report(evidence)
    write_json(output, report)
    write_figure(plot, plot_accuracy(evidence, report))
    wide_console().print(*tables(report))


if __name__ == "__main__":
    typer.run(main)
