"""A run over time as a picture: what each frame cost, and how close its embedding came to the dense one."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

OURS, CONTROL_FIRST, CONTROL_HELD, KEYFRAME = "#d97706", "#9ca3af", "#475569", "#b91c1c"


def plot_run(
    times: Sequence[float],
    costs: Sequence[float],
    keyframes: Sequence[bool],
    sampled_times: Sequence[float],
    fidelity: dict[str, Sequence[float]],
    title: str,
) -> Figure:
    """
    Two panels over time: cost of every frame, and cosine to dense on the sampled frames beside the controls.

    Args:
        times: seconds, one for each frame.
        costs: share of a dense frame's multiply-adds, one for each frame.
        keyframes: whether all patches were encoded, one for each frame.
        sampled_times: seconds, one for each frame that was compared with dense; may be empty, and then there is no
            second panel.
        fidelity: cosines to dense, one for each sampled frame, under `"streamed"`, `"first_frame"` and `"held"`.
        title: in one line.

    Returns:
        A figure of its own, outside pyplot, so that nothing has to be closed.
    """
    compared = len(sampled_times) > 0
    figure = Figure(figsize=(10, 5.6 if compared else 3.2), layout="constrained")
    panels = figure.subplots(2 if compared else 1, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    draw_cost(panels[0], times, costs, keyframes)
    if compared:
        draw_fidelity(panels[1], sampled_times, fidelity)
    for panel in panels:
        panel.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=10)
    figure.align_ylabels()
    panels[-1].set_xlabel("time in the video (s)")
    return figure


def draw_cost(panel, times: Sequence[float], costs: Sequence[float], keyframes: Sequence[bool]):
    """Cost of every frame as a filled curve, keyframes as points."""
    panel.fill_between(times, costs, color=OURS, alpha=0.25, linewidth=0)
    panel.plot(times, costs, color=OURS, linewidth=1.6, label="cost of each frame")
    at = [(time, cost) for time, cost, keyframe in zip(times, costs, keyframes, strict=True) if keyframe]
    if at and len(at) < len(costs):
        panel.plot(*zip(*at, strict=True), "o", color=KEYFRAME, markersize=5, label="keyframe", clip_on=False)
    panel.axhline(1, color="#111827", linewidth=1, linestyle=(0, (4, 3)), label="dense")
    panel.set_ylim(0, max(1.08, 1.05 * max(costs)))
    panel.set_ylabel("cost (share of dense)")


def draw_fidelity(panel, times: Sequence[float], fidelity: dict[str, Sequence[float]]):
    """Cosine to dense on the sampled frames; the controls as thin lines."""
    marks = {"marker": "o", "markersize": 3.5} if len(times) <= 120 else {}
    panel.plot(times, fidelity["streamed"], color=OURS, linewidth=1.8, label="streamed", zorder=3, **marks)
    panel.plot(
        times, fidelity["first_frame"], color=CONTROL_FIRST, linewidth=1.1, label="control: first frame repeated"
    )
    panel.plot(
        times,
        fidelity["held"],
        color=CONTROL_HELD,
        linewidth=1.1,
        linestyle=(0, (3, 2)),
        label="control: last dense sample held",
    )
    panel.set_ylabel("cosine to dense")


def save_plot(figure: Figure, path: Path):
    """Write `figure` as a PNG file at 160 dots per inch."""
    figure.savefig(path, dpi=160, format="png")
