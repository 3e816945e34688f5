"""Plots of an evaluation and of a tuning: what methods and baselines keep, over what they cost."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..video.plots import CONTROL_FIRST, CONTROL_HELD, FAMILY_COLOURS, KEYFRAME, LEAST_LOSS
from .points import HOLD_BY_THE_CLOCK, Point, Requirement

ROUND_TICKS = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)]
CONTROL_STYLES = ((0, ()), (0, (3, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)), (0, (6, 3)), (0, (1, 3)), (0, (8, 1)))


def plot_fidelity(report: dict) -> Figure:
    """Panels of 1 - cosine to dense over cost, logarithmic: mean, and 5th percentile; lower left is better."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    figure.suptitle(title_of(report), x=0.012, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("mean", "p5"), strict=True):
        panel.set_yscale("log")
        draw_over_cost(panel, report, lambda figures, name=name: max(LEAST_LOSS, 1 - figures["cosine"][name]))
        panel.set_ylabel(f"1 - cosine to dense, {name}")
    finish(figure, panels[0])
    return figure


def plot_accuracy(report: dict) -> Figure:
    """Right labels of videos over cost, or where those are not known, frames with dense's label; higher is better."""
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    figure.suptitle(title_of(report), x=0.012, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    panel = figure.subplots()
    if report["labels"]["true"]:
        draw_over_cost(panel, report, lambda figures: figures["accuracy"]["top1"])
        draw_intervals(panel, report)
        panel.set_ylabel(f"top-1 among {len(report['labels']['names'])} labels, share of videos")
    else:
        draw_over_cost(panel, report, lambda figures: figures["agreement"])
        panel.set_ylabel("share of frames whose best label is dense's")
    finish(figure, panel)
    return figure


def title_of(report: dict) -> str:
    """The model and the videos."""
    return f"{report['model']['name']} on {report['videos']['name']}"


def draw_over_cost(panel, report: dict, value: Callable[[dict], float]):
    """Methods as points in colours of their families, baselines as grey lines, dense as a level where it is on it."""
    families: dict[str, list[dict]] = {}
    for entry in report["methods"]:
        families.setdefault(entry["family"], []).append(entry)
    colours, styles = iter(FAMILY_COLOURS * len(families)), iter(CONTROL_STYLES * len(families))
    for family, entries in families.items():
        points = sorted((entry["figures"]["cost"], value(entry["figures"])) for entry in entries)
        xy = list(zip(*points, strict=True))
        if entries[0]["kind"] == "dense":
            panel.axhline(points[0][1], color="#111827", linewidth=1, linestyle=(0, (4, 3)), label="dense")
        elif entries[0]["kind"] == "first":
            panel.axhline(points[0][1], color=CONTROL_FIRST, linewidth=1.1, label="baseline: first frame repeated")
        elif entries[0]["control"]:
            how = {"color": CONTROL_HELD, "linewidth": 1.2, "marker": ".", "markersize": 4, "linestyle": next(styles)}
            panel.plot(*xy, label=f"baseline: {family}", **how)
        else:
            panel.plot(*xy, color=next(colours), linewidth=1.2, marker="o", markersize=6, label=family, zorder=3)
            ordered = sorted(entries, key=lambda one: one["figures"]["cost"])
            for place, (entry, point) in enumerate(zip(ordered, points, strict=True)):
                above = 5 if place % 2 == 0 else -13  # points of a family lie close together
                panel.annotate(entry["name"], point, (5, above), textcoords="offset points", fontsize=8)
    panel.set_xlabel("cost (share of dense)")
    panel.set_xlim(0, 1.05)
    panel.grid(color="#e5e7eb", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def draw_intervals(panel, report: dict):
    """Wilson's intervals of the methods' top-1."""
    for entry in report["methods"]:
        if not entry["control"]:
            accuracy = entry["figures"]["accuracy"]
            cost = entry["figures"]["cost"]
            panel.plot((cost, cost), accuracy["top1_interval"], color="#9ca3af", linewidth=1, zorder=1)


def finish(figure: Figure, panel):
    """The legend below."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=9)


def plot_tuning(
    points: Sequence[Point], requirement: Requirement, chosen: Point | None, first_frame: Point, title: str
) -> Figure:
    """
    Cost against what is lost, `1 - cosine`, both on a logarithmic scale: the lower left is where one wants to be.

    Args:
        points: everything that was measured; baselines are lines, the others points in a colour for each family.
        requirement: drawn as a line; its statistic is what is drawn of each point.
        chosen: is ringed; None if nothing meets the requirement.
        first_frame: the baseline that costs nothing, drawn as a level.
        title: in one line.

    Returns:
        A figure of its own, outside pyplot, so that nothing has to be closed.
    """
    statistic = requirement.statistic

    def loss(point: Point) -> float:
        return max(LEAST_LOSS, 1 - point.fidelity(statistic))

    figure = Figure(figsize=(10, 6), layout="constrained")
    panel = figure.subplots()
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.axhline(loss(first_frame), color=CONTROL_FIRST, linewidth=1.1, label=f"baseline: {first_frame.family}")
    colours = iter(FAMILY_COLOURS * len(points))
    for family in dict.fromkeys(point.family for point in points):
        of_family = sorted((point for point in points if point.family == family), key=Point.cost)
        xy = [point.cost() for point in of_family], [loss(point) for point in of_family]
        if family == HOLD_BY_THE_CLOCK:
            panel.plot(*xy, color=CONTROL_HELD, linewidth=1.4, label=f"baseline: {family}")
        elif of_family[0].control:
            style = {"color": CONTROL_HELD, "linestyle": (0, (3, 2)), "marker": "s", "markersize": 4}
            panel.plot(*xy, linewidth=1.1, label=f"baseline: {family}", **style)
        else:
            panel.plot(*xy, color=next(colours), linewidth=1, marker="o", markersize=6, label=family, zorder=3)
    required = {"color": KEYFRAME, "linewidth": 1.2, "linestyle": (0, (6, 3)), "label": f"required: {requirement}"}
    if requirement.min_cosine is None:
        panel.axvline(requirement.max_cost, **required)
    else:
        panel.axhline(1 - requirement.min_cosine, **required)
    if chosen is not None:
        ring = {"markersize": 13, "markeredgewidth": 2, "markerfacecolor": "none", "markeredgecolor": "#111827"}
        panel.plot([chosen.cost()], [loss(chosen)], "o", label="chosen", zorder=4, linestyle="none", **ring)
    panel.set_xlabel("cost (share of dense)")
    panel.set_ylabel(f"what is lost: 1 - cosine to dense, {statistic}")
    panel.set_xlim(right=1.05)
    for axis in (panel.xaxis, panel.yaxis):
        low, high = axis.get_view_interval()
        axis.set_ticks([tick for tick in ROUND_TICKS if low <= tick <= high])
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.grid(color="#e5e7eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=10)
    return figure
