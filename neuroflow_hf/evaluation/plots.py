"""An evaluation drawn: what methods and controls keep, over what they cost."""

from collections.abc import Callable

from matplotlib.figure import Figure

from ..video.plots import CONTROL_FIRST, CONTROL_HELD, FAMILY_COLOURS, LEAST_LOSS

CONTROL_STYLES = ((0, ()), (0, (3, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)), (0, (6, 3)), (0, (1, 3)), (0, (8, 1)))


def plot_fidelity(report: dict) -> Figure:
    """Panels of 1 - cosine to dense over cost, logarithmic: mean, and 5th percentile; lower left is better."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    figure.suptitle(title_of(report), x=0.012, ha="left", fontsize=12, fontweight="bold")
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
    figure.suptitle(title_of(report), x=0.012, ha="left", fontsize=12, fontweight="bold")
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
    """The model and the videos, as matplotlib takes them."""
    return f"{report['model']['name']} on {report['videos']['name']}".replace("$", r"\$")


def draw_over_cost(panel, report: dict, value: Callable[[dict], float]):
    """Methods as points in colours of their families, controls as grey lines, dense as a level where it is on it."""
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
            panel.axhline(points[0][1], color=CONTROL_FIRST, linewidth=1.1, label="control: first frame repeated")
        elif entries[0]["control"]:
            how = {"color": CONTROL_HELD, "linewidth": 1.2, "marker": ".", "markersize": 4, "linestyle": next(styles)}
            panel.plot(*xy, label=f"control: {family}", **how)
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
