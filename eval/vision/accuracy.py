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
Controls: the first frame repeated, dense every k frames, dense when the mean surprise or the pixels' difference since
the last dense frame exceeds a level, fewer pixels, token merging (ToMe); between two settings of a family anybody can
mix, so each has a value at a method's own cost. Writes `eval/results/accuracy.json` and `docs/accuracy.png`.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from eval.recordings import Scene
from eval.report import RESULTS, write_json
from eval.vision.cost_curves import draw_over_cost
from eval.vision.equal_cost import best_control, families_of, statistic_interval
from eval.vision.evidence import (
    CHECKPOINT,
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
from neuroflow_hf.utils.provenance import write_whole_bytes

TOP = (1, 5)
CLOSE, CLOSE_COST = (0.9, 1.05), 0.03  # of the close-up's axes
PLOT = RESULTS.parents[1] / "docs" / "accuracy.png"


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
        "interval": statistic_interval(values[name], mean_of_scenes, values[dense]),
        "retained": float(own / theirs) if theirs else None,
        "scenes": int((~np.isnan(values[name])).sum()),
    }


def accuracy_report(evidence: Evidence) -> dict:
    """All figures: of every method, pooled, by motion, and beside the best controls at its cost."""
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
            compared = best_control(spec.name, values[1], costs, families, mean_of_scenes)
            row["top1"]["best control"] = None if compared is None else compared.to_dict()
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
    for heading in ("method", "cost", "top-1", "less dense", "best control", "difference", "top-5"):
        overall.add_column(heading, justify="left" if heading in ("method", "best control") else "right")
    for row in report["results"]:
        compared = row["top1"].get("best control")
        overall.add_row(
            ("control: " if row["control"] else "") + row["name"],
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
    if difference is None:
        return "-"
    between = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return f"{100 * difference:+.2f}{between}"


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
    picture = io.BytesIO()
    plot_accuracy(evidence, report).savefig(picture, dpi=130, format="png")
    write_whole_bytes(plot, picture.getvalue())
    console = Console()
    console.width = max(console.width, 140)
    console.print(*tables(report))


if __name__ == "__main__":
    typer.run(main)
