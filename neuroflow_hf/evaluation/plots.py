"""Plots of an evaluation and of a tuning: fidelity and accuracy over cost."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..utils import plots as style
from .tuning import Point, Requirement

BASELINE_STYLES = ((0, ()), (0, (3, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)), (0, (6, 3)), (0, (1, 3)), (0, (8, 1)))


def plot_fidelity(report: dict) -> Figure:
    """`1 - cosine to dense` over cost, mean and 5th percentile, logarithmic; lower left is better."""
    figure = style.titled_figure(f"{report['model']['name']} on {report['videos']['name']}", 11, 5.4)
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("mean", "p5"), strict=True):
        panel.set_yscale("log")
        draw_over_cost(panel, report, lambda figures, name=name: max(style.LEAST_LOSS, 1 - figures["cosine"][name]))
        panel.set_ylabel(f"1 - cosine to dense, {name}")
    style.legend_below(figure, panels[0])
    return figure


def plot_accuracy(report: dict) -> Figure:
    """Top-1 accuracy over videos with Wilson's intervals, or, without true labels, agreement with dense; by cost."""
    figure = style.titled_figure(f"{report['model']['name']} on {report['videos']['name']}", 8, 5.4)
    panel = figure.subplots()
    if report["labels"]["true"]:
        draw_over_cost(panel, report, lambda figures: figures["accuracy"]["top1"])
        for entry in report["methods"]:
            if not entry["control"]:
                cost, interval = entry["figures"]["cost"], entry["figures"]["accuracy"]["top1_interval"]
                panel.plot((cost, cost), interval, color="#9ca3af", lw=1, zorder=1)
        panel.set_ylabel(f"top-1 accuracy among {len(report['labels']['names'])} labels, share of videos")
    else:
        draw_over_cost(panel, report, lambda figures: figures["agreement"])
        panel.set_ylabel("share of frames with dense's best label")
    style.legend_below(figure, panel)
    return figure


def draw_over_cost(panel: Axes, report: dict, value: Callable[[dict], float], named: bool = True):
    """
    Draw methods as points coloured by family, with their names if `named`, baselines as grey lines, dense and the
    first frame as levels.
    """
    families: dict[str, list[dict]] = {}
    for entry in report["methods"]:
        families.setdefault(entry["family"], []).append(entry)
    colours, styles = iter(style.FAMILY_COLOURS * len(families)), iter(BASELINE_STYLES * len(families))
    for family, entries in families.items():
        entries.sort(key=lambda entry: entry["figures"]["cost"])
        points = [(entry["figures"]["cost"], value(entry["figures"])) for entry in entries]
        xy = list(zip(*points, strict=True))
        if entries[0]["kind"] == "dense":
            panel.axhline(points[0][1], color=style.DARK, lw=1, ls=(0, (4, 3)), label="dense")
        elif entries[0]["kind"] == "first":
            panel.axhline(points[0][1], color=style.BASELINE_FIRST, lw=1.1, label="baseline: first frame repeated")
        elif entries[0]["control"]:
            how = {"color": style.BASELINE_HELD, "lw": 1.2, "marker": ".", "ms": 4, "ls": next(styles)}
            panel.plot(*xy, label=f"baseline: {family}", **how)
        else:
            panel.plot(*xy, color=next(colours), lw=1.2, marker="o", ms=6, label=family, zorder=3)
            for place, (entry, point) in enumerate(zip(entries, points, strict=True) if named else ()):
                above = 5 if place % 2 == 0 else -13  # points of a family lie close together
                panel.annotate(entry["name"], point, (5, above), textcoords="offset points", fontsize=8)
    panel.set_xlabel("cost relative to dense")
    panel.set_xlim(0, 1.05)
    style.tidy(panel)


def plot_tuning(points: Sequence[Point], requirement: Requirement, chosen: Point | None, title: str) -> Figure:
    """
    `1 - cosine to dense` over cost, both logarithmic; lower left is better. Baselines are lines, other settings points
    coloured by family; the requirement's bound is a line. The chosen point has a ring.
    """
    statistic = requirement.statistic

    def loss(point: Point) -> float:
        return max(style.LEAST_LOSS, 1 - point.fidelity(statistic))

    figure = style.titled_figure(title, 10, 6)
    panel = figure.subplots()
    entries = [vars(one) | {"kind": "", "figures": {"cost": one.cost, "loss": loss(one)}} for one in points]
    draw_over_cost(panel, {"methods": entries}, lambda figures: figures["loss"], named=False)
    panel.set_xscale("log")
    panel.set_yscale("log")
    required = {"color": style.KEYFRAME, "lw": 1.2, "ls": (0, (6, 3)), "label": f"required: {requirement}"}
    if requirement.min_cosine is None:
        panel.axvline(requirement.max_cost, **required)
    else:
        panel.axhline(1 - requirement.min_cosine, **required)
    if chosen is not None:
        ring = {"ms": 13, "markeredgewidth": 2, "markerfacecolor": "none", "markeredgecolor": style.DARK}
        panel.plot([chosen.cost], [loss(chosen)], "o", label="chosen", zorder=4, ls="none", **ring)
    panel.set_ylabel(f"1 - cosine to dense, {statistic}")
    panel.set_xlim(0.9 * min(point.cost for point in points), 1.05)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    style.legend_below(figure, panel, columns=2)
    return figure
