"""Plots of a run over time: cost, cosine to dense, and the labels' confidence."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..utils import plots as style
from .records import FrameRecord, compare_with_dense, sampled_records, shortened

LABEL_COLOURS = (*style.FAMILY_COLOURS, style.DARK, "#22d3ee", "#78350f", "#f472b6")


def plot_run(
    records: Sequence[FrameRecord], title: str, names: Sequence[str] = (), held: dict | None = None
) -> Figure:
    """
    Panels over time: the cost of every frame; the cosine to dense on sampled frames, of the stream and the baselines;
    and each label's confidence on every frame. The panels of samples and of labels are drawn only if there are any.
    `held` is the baseline of `held_at_cost`.
    """
    compared, labelled = len(sampled_records(records)) > 0, len(names) > 0
    legend_height = 0.12 * min(len(names), len(LABEL_COLOURS))  # inches, in two columns
    figure = style.titled_figure(title, 10, 3.2 + 2.4 * compared + 2.4 * labelled + legend_height)
    panels = figure.subplots(1 + compared + labelled, 1, sharex=True, squeeze=False)[:, 0]
    draw_cost(panels[0], records)
    if compared:
        draw_fidelity(panels[1], records, held)
    if labelled:
        draw_labels(panels[-1], records, names)
    for panel in panels:
        style.tidy(panel, "y")
        panel.margins(x=0.01)
        if labelled and panel is panels[-1]:
            style.legend_below(figure, panel, columns=2)
        else:
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=10)
    figure.align_ylabels()
    panels[-1].set_xlabel("time in the video (s)")
    return figure


def draw_cost(panel: Axes, records: Sequence[FrameRecord]):
    """Cost of every frame as a filled curve, keyframes as points."""
    times, costs = [record.time for record in records], [record.cost for record in records]
    panel.fill_between(times, costs, color=style.OURS, alpha=0.25, linewidth=0)
    panel.plot(times, costs, color=style.OURS, lw=1.6, label="cost of each frame")
    keyframes = [(record.time, record.cost) for record in records if record.keyframe]
    if keyframes and len(keyframes) < len(records):
        panel.plot(*zip(*keyframes, strict=True), "o", color=style.KEYFRAME, ms=5, label="keyframe", clip_on=False)
    panel.axhline(1, color=style.DARK, lw=1, ls=(0, (4, 3)), label="dense")
    panel.set_ylim(0, max(1.08, 1.05 * max(costs)))
    panel.set_ylabel("cost relative to dense")


def draw_fidelity(panel: Axes, records: Sequence[FrameRecord], held: dict | None):
    """Cosine to dense on the sampled frames; the baselines as thin lines."""
    times, (streamed, first) = [one.time for one in sampled_records(records)], compare_with_dense(records).values()
    marks = {"marker": "o", "ms": 3.5} if len(times) <= 120 else {}
    panel.plot(times, streamed, color=style.OURS, lw=1.8, label="streamed", zorder=3, **marks)
    panel.plot(times, first, color=style.BASELINE_FIRST, lw=1.1, label="baseline: first frame repeated")
    if held is not None:
        label = f"baseline: dense every {held['every']} frames, mean"
        panel.axhline(held["cosine"]["mean"], color=style.BASELINE_HELD, lw=1.1, ls=(0, (3, 2)), label=label)
    panel.set_ylabel("cosine to dense")


def draw_labels(panel: Axes, records: Sequence[FrameRecord], names: Sequence[str]):
    """Confidence over the frames of the labels that are highest at some time, as many as there are colours."""
    times = [record.time for record in records]
    scores = torch.stack([record.label_logits for record in records]).sigmoid()  # [T, L]
    highest = scores.amax(0).argsort(descending=True, stable=True)[: len(LABEL_COLOURS)]
    for place, colour in zip(sorted(highest.tolist()), LABEL_COLOURS, strict=False):
        text = shortened(names[place], 50)
        # without what matplotlib hides or sets as a formula
        label = " " * text.startswith("_") + text.replace("$", r"\$")
        panel.plot(times, scores[:, place].tolist(), color=colour, lw=1.4, label=label)
    # probabilities of labels that do not fit are far below 1, and their order still matters
    panel.set_ylim(0, max(1e-6, 1.05 * scores.max().item()))
    panel.set_ylabel("label's confidence")
