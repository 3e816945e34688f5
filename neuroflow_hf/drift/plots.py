"""Plots of a drift report: drift by bypass rate, and the highest bypass rate without drift."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..evaluation.statistics import zero_failure_bound
from ..utils.plots import BASELINE_HELD, DARK, FAMILY_COLOURS, legend_below, tidy, titled_figure
from .grid import LAST, PUBLISHED_RATE
from .metrics import beyond_rounding, rate_of
from .tables import tasks_of

NOISE_LINES = {"batch": (0, (1, 2)), "dtype": (0, (5, 1))}


def families(report: dict) -> dict[str, list[dict]]:
    """The configurations, grouped by all options but the threshold."""
    found: dict[str, list[dict]] = {}
    for entry in report["configurations"]:
        found.setdefault(entry["family"], []).append(entry)
    return found


def style_of(entries: list[dict]) -> dict:
    """The line style of a family: colour by target, guard and direction; dashed for the last layer."""
    first = entries[0]
    kinds = ["attention", "mlp", "block", "guarded", "inverted"]
    kind = "guarded" if first["guarded"] else "inverted" if first["inverted"] else first["options"]["target"]
    colour = BASELINE_HELD if kind == "inverted" else FAMILY_COLOURS[kinds.index(kind)]
    dashed = {"linestyle": (0, (4, 2)), "marker": "s"} if first["pair"] == LAST else {"marker": "o"}
    return {"color": colour, "linewidth": 1.5, "markersize": 4.5, **dashed}


def plot_drift(report: dict, published: Sequence[dict[str, float]] = ()) -> Figure:
    """
    Drift over the share of steps bypassed: a panel for each task, a line for each family of configurations, and the
    noise floor.

    Args:
        report: of `DriftEvaluation`.
        published: published drifts to mark, by task.
    """
    tasks = tasks_of(report)
    figure = titled_figure("Token drift by share of steps bypassed", 4.2 * len(tasks) + 1, 5.4)
    panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for name, entries in families(report).items():
            points = sorted((rate_of(entry, task), entry["tasks"][task]["drift"]) for entry in entries)
            panel.plot(*zip(*points, strict=True), label=name, clip_on=False, **style_of(entries))
        for entry in report["noise"]:
            line = {"color": "#9ca3af", "linewidth": 1.2, "linestyle": NOISE_LINES[entry["kind"]]}
            panel.axhline(entry["tasks"][task]["drift"], label=entry["name"], **line)
        for drifts in published:
            if task in drifts:
                cross = {"color": DARK, "markersize": 8, "clip_on": False, "zorder": 4}
                panel.plot(PUBLISHED_RATE, drifts[task], "x", label="published (Phi-3-mini)", **cross)
        panel.set_title(task, loc="left", fontsize=11)
        tidy(panel, "y")
        panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="steps bypassed")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel("drift (share of positions with another token)")
    legend_below(figure, panels[0])
    return figure


def reachable(report: dict, task: str) -> dict[str, float]:
    """
    The highest bypass rate of each family at which no prompt of a task diverges beyond rounding; 0 if every threshold
    changes a text.
    """
    return {
        name: max((rate_of(entry, task) for entry in entries if not beyond_rounding(report, entry, task)), default=0.0)
        for name, entries in families(report).items()
    }


def plot_reachable(report: dict) -> Figure:
    """A bar chart of `reachable` by task and family."""
    tasks, found = tasks_of(report), families(report)
    height = 0.9 + (0.26 * len(found) + 0.5) * len(tasks)
    figure = titled_figure("Steps bypassed while no prompt's text changes", 9, height)
    panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    for panel, task in zip(panels, tasks, strict=True):
        names = list(found)[::-1]
        rates = reachable(report, task)
        colours = [style_of(found[name])["color"] for name in names]
        bars = panel.barh(names, [rates[name] for name in names], color=colours, height=0.7)
        labels = [f"{rates[name]:.1%}" if rates[name] else "every threshold tried changes a text" for name in names]
        panel.bar_label(bars, labels, padding=3, fontsize=8)
        prompts = report["prompts"]["of_task"][task]
        bound = zero_failure_bound(prompts)
        title = f"{task}: none of {prompts} prompts changes, so at most {bound:.0%} of such prompts do"
        panel.set_title(title, loc="left", fontsize=11)
        tidy(panel)
        panel.tick_params(axis="y", labelsize=8)
    # of all panels, which share the axis
    panels[-1].set_xlim(0, 1.12 * max([0.01, *(rate for task in tasks for rate in reachable(report, task).values())]))
    panels[-1].xaxis.set_major_formatter(PercentFormatter(1))
    panels[-1].set_xlabel("highest share of steps bypassed among the thresholds tried")
    return figure
