"""
Does a method recognise as much as dense? Zero-shot top-1 and top-5, by kind of motion, over cost.

    torchrun --nproc_per_node 2 -m eval.vision.accuracy                     # everything; run again to continue
    python -m eval.vision.accuracy --quick                                  # 1,000 frames of each motion

Composed clips show held-out drawings on held-out photographs. The labels are all things that the checkpoint was
trained on, and `nothing`. Random frames on which a thing is seen are counted, never the first of a clip, and the same
for every method and dense. All clips have the same weight. Intervals are 95 %, from a paired bootstrap over clips:
frames of one clip are not independent, so the width of an interval depends on the number of clips. Fewer than three
clips give no interval. Baselines: the first frame repeated, dense every k frames, dense when the mean surprise or the
difference of pixels since the last dense frame exceeds a level, fewer pixels, token merging (ToMe). A baseline can
switch between two settings of its family, so it has a value at any cost.

Writes `eval/results/accuracy.json` and `docs/accuracy.png`, shown in `docs/results/labels.md`.
"""

import math

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from eval.docs.labels import accuracy_table
from eval.recordings import Recording, Scene
from eval.report import rounded
from eval.vision.evidence import (
    Evidence,
    best_baseline,
    command,
    families_of,
    mean_of_scenes,
    statistic_interval,
)
from neuroflow_hf.evaluation.plots import draw_over_cost
from neuroflow_hf.evaluation.settings import DENSE, FIRST

TOP = (1, 5)
CLOSE, CLOSE_COST = (0.9, 1.05), 0.03  # limits of the close-up's axes
LEAST_COST = 0.01  # where the axis begins


def is_right(embeddings: Tensor, texts: Tensor, places: Tensor, k: int) -> Tensor:
    """
    Whether the right text is among the k best: from embeddings [M, D], unit texts [L, D] and the indices of the right
    texts [M] to bool [M]. A text with the same score as the right one counts as better.
    """
    scores = functional.normalize(embeddings.float(), dim=-1) @ texts.T
    own = scores.gather(1, places[:, None])
    return (scores >= own).sum(1) - 1 < k


def scene_accuracy(evidence: Evidence, name: str, scene: Scene, k: int) -> float:
    """A method's accuracy on a scene's drawn frames on which a thing is seen; NaN if there are none."""
    recording = evidence.recordings[name][scene.name]
    labels = labels_asked(recording, scene)
    if not labels:
        return float("nan")
    places = torch.tensor([evidence.names.index(label) for label in labels.values()])
    return is_right(recording.embeddings[list(labels)], evidence.texts, places, k).double().mean().item()


def labels_asked(recording: Recording, scene: Scene) -> dict[int, str]:
    """The right labels of a scene's drawn frames on which a thing is seen, by index among the sampled frames."""
    labels = ((place, scene.labels[recording.frames[place]]) for place in recording.drawn.nonzero()[:, 0].tolist())
    return {place: label for place, label in labels if label is not None}


def figures(values: dict[str, np.ndarray], name: str) -> dict:
    """A method's accuracy beside dense's, from accuracies by scene [S, 1]."""
    dense = values[DENSE.name]
    own, theirs = (mean_of_scenes(one[None]).item() for one in (values[name], dense))
    return {
        "accuracy": own,
        "dense": theirs,
        "difference": own - theirs,
        "interval": statistic_interval(values[name], mean_of_scenes, lambda drawn: mean_of_scenes(dense[drawn])),
        "retained": own / theirs if theirs else None,
    }


def accuracy_report(evidence: Evidence) -> dict:
    """All figures of every method: over all clips, by motion, and compared with the best baselines at its cost."""
    values = {
        k: {
            name: np.array([[scene_accuracy(evidence, name, scene, k)] for scene in evidence.scenes])
            for name in evidence.recordings
        }
        for k in TOP
    }
    costs, families = evidence.costs(range(len(evidence.scenes))), families_of(evidence.specs)
    costs_by_motion = {motion: evidence.costs(places) for motion, places in evidence.motions.items()}
    results = []
    for spec in evidence.specs:
        row: dict = {"name": spec.name, "family": spec.family, "control": spec.control, "cost": costs[spec.name]}
        row |= {f"top{k}": figures(values[k], spec.name) for k in TOP}
        if not spec.control and spec != DENSE:
            row["top1"]["best control"] = best_baseline(spec.name, values[1], costs, families, mean_of_scenes)
        row["motions"] = {}
        for motion, places in evidence.motions.items():
            found = {name: values[1][name][places] for name in (spec.name, DENSE.name)}
            cost = costs_by_motion[motion][spec.name]
            row["motions"][motion] = {"cost": cost, "top1": figures(found, spec.name)}
        results.append(row)
    recordings = evidence.recordings[DENSE.name]
    counted = sum(len(labels_asked(recordings[scene.name], scene)) for scene in evidence.scenes)
    return rounded({**evidence.about, "texts": len(evidence.names), "frames_counted": counted, "results": results})


def draw_retained(panel: Axes, rows: list[dict], found: dict[str, dict]):
    """Draw top-1 relative to dense's over cost, by `cost` and `top1` of each method in `rows`."""
    kinds = {DENSE.name: "dense", FIRST.name: "first"}
    entries = [{**row, "kind": kinds.get(row["name"], ""), "figures": found[row["name"]]} for row in rows]

    def retained(figures: dict) -> float:
        share = figures["top1"]["retained"]
        return math.nan if share is None else share

    draw_over_cost(panel, {"methods": entries}, retained, named=False)
    panel.set_xscale("log")
    panel.set_xlim(LEAST_COST, 1.1 * max(1.0, *(one["cost"] for one in found.values())))


def plot_accuracy(evidence: Evidence, report: dict) -> Figure:
    """Top-1 over cost, relative to dense: all clips in the upper row, with a close-up, and a panel for each motion."""
    rows = report["results"]
    motions, columns = list(rows[0]["motions"]), 5
    lines = -(-len(motions) // columns)
    figure = Figure(figsize=(15, 5 + 2.4 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[2, *[1] * lines])
    top, near = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    for panel in (top, near):
        draw_retained(panel, rows, {row["name"]: row for row in rows})
    top.set_title(f"Top-1, share of dense's ({rows[0]['top1']['dense']:.1%}), all motions", loc="left", fontsize=11)
    near.set_title("The same, close to dense's", loc="left", fontsize=11)
    near.set_ylim(CLOSE)
    near.set_xlim(left=CLOSE_COST)
    top.legend(loc="lower left", frameon=False, fontsize=8, ncols=2)
    for place, motion in enumerate(motions):
        panel = figure.add_subplot(grid[1 + place // columns, place % columns])
        draw_retained(panel, rows, {row["name"]: row["motions"][motion] for row in rows})
        dense = rows[0]["motions"][motion]["top1"]["dense"]
        panel.set_title(f"{motion} ({'none' if dense is None else f'{dense:.0%}'})", loc="left", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set_xlabel("")
    return figure


main = command(accuracy_report, accuracy_table, "accuracy", plot_accuracy)

if __name__ == "__main__":
    typer.run(main)
