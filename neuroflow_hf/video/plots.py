"""Plots of a run over time: cost, cosine to dense, and the labels' confidence."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..utils.plots import (
    BASELINE_FIRST,
    BASELINE_HELD,
    DARK,
    FAMILY_COLOURS,
    KEYFRAME,
    OURS,
    legend_below,
    tidy,
    titled_figure,
)
from .label_records import shortened
from .records import FrameRecord, compare_with_dense

LABEL_COLOURS = (*FAMILY_COLOURS, DARK, "#22d3ee", "#78350f", "#f472b6")


def plot_run(
    records: Sequence[FrameRecord], title: str, names: Sequence[str] = (), held: dict | None = None
) -> Figure:
    """
    Panels over time: the cost of every frame; the cosine to dense on sampled frames, of the stream and the baselines;
    and each label's confidence on every frame. The panels of samples and of labels are drawn only if there are any.
    `held` is the baseline of `held_at_cost`.
    """
    times = [record.time for record in records if record.dense_embedding is not None]
    compared, labelled = len(times) > 0, len(names) > 0
    legend_height = 0.12 * min(len(names), len(LABEL_COLOURS))  # inches, in two columns
    figure = titled_figure(title, 10, 3.2 + 2.4 * compared + 2.4 * labelled + legend_height)
    panels = figure.subplots(1 + compared + labelled, 1, sharex=True, squeeze=False)[:, 0]
    draw_cost(panels[0], records)
    if compared:
        draw_fidelity(panels[1], times, compare_with_dense(records), held)
    if labelled:
        scores = torch.stack([record.label_logits for record in records]).sigmoid()
        confidences = dict(zip(names, scores.T.tolist(), strict=True))
        draw_labels(panels[-1], [record.time for record in records], confidences)
    for panel in panels:
        tidy(panel, "y")
        panel.margins(x=0.01)
        if labelled and panel is panels[-1]:
            legend_below(figure, panel, columns=2)
        else:
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=10)
    figure.align_ylabels()
    panels[-1].set_xlabel("time in the video (s)")
    return figure


def draw_cost(panel: Axes, records: Sequence[FrameRecord]):
    """Cost of every frame as a filled curve, keyframes as points."""
    times, costs = [record.time for record in records], [record.cost for record in records]
    panel.fill_between(times, costs, color=OURS, alpha=0.25, linewidth=0)
    panel.plot(times, costs, color=OURS, linewidth=1.6, label="cost of each frame")
    keyframes = [(record.time, record.cost) for record in records if record.keyframe]
    if keyframes and len(keyframes) < len(records):
        panel.plot(*zip(*keyframes, strict=True), "o", color=KEYFRAME, markersize=5, label="keyframe", clip_on=False)
    panel.axhline(1, color=DARK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
    panel.set_ylim(0, max(1.08, 1.05 * max(costs)))
    panel.set_ylabel("cost relative to dense")


def draw_fidelity(panel: Axes, times: Sequence[float], cosines: dict[str, list[float]], held: dict | None):
    """Cosine to dense on the sampled frames; the baselines as thin lines."""
    marks = {"marker": "o", "markersize": 3.5} if len(times) <= 120 else {}
    streamed, first = cosines["streamed"], cosines["first_frame"]
    panel.plot(times, streamed, color=OURS, linewidth=1.8, label="streamed", zorder=3, **marks)
    panel.plot(times, first, color=BASELINE_FIRST, linewidth=1.1, label="baseline: first frame repeated")
    if held is not None:
        label = f"baseline: dense every {held['every']} frames, mean"
        panel.axhline(held["cosine"]["mean"], color=BASELINE_HELD, linewidth=1.1, linestyle=(0, (3, 2)), label=label)
    panel.set_ylabel("cosine to dense")


def draw_labels(panel: Axes, times: Sequence[float], labels: dict[str, Sequence[float]]):
    """Confidence over the frames of the labels that are highest at some time, as many as there are colours."""
    highest = sorted(labels, key=lambda name: -max(labels[name]))[: len(LABEL_COLOURS)]
    for name, colour in zip(filter(highest.__contains__, labels), LABEL_COLOURS, strict=False):
        panel.plot(times, labels[name], color=colour, linewidth=1.4, label=legend_text(name))
    # probabilities of labels that do not fit are far below 1, and their order still matters
    panel.set_ylim(0, max(1e-6, 1.05 * max(labels[highest[0]])))
    panel.set_ylabel("label's confidence")


def legend_text(name: str) -> str:
    """A label for a legend: shortened, and without what matplotlib hides or sets as a formula."""
    text = shortened(name, 50)
    return " " * text.startswith("_") + text.replace("$", r"\$")
