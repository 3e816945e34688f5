"""A plot of a drift report."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..utils.plots import BASELINE_HELD, OURS, tidy, titled_figure
from ..utils.tables import number


def plot_drift(report: dict) -> Figure:
    """Drift with its 95 % interval: a panel for each task, a row for each configuration, the noise floor first."""
    tasks, entries = report["prompts"]["of_task"], [*report["noise"], *report["configurations"]][::-1]
    rows = range(len(entries))
    title = "Share of tokens that differ from the dense model's text, with 95 % intervals"
    figure = titled_figure(title, 2.6 * len(tasks) + 3.4, 0.32 * len(entries) + 1.5)
    panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for row, entry in zip(rows, entries, strict=True):
            figures = entry["tasks"][task]
            colour = OURS if "options" in entry else BASELINE_HELD
            panel.plot(figures["drift_interval"], (row, row), color=colour, linewidth=2, solid_capstyle="butt")
            panel.plot(figures["drift"], row, "o", color=colour, markersize=5, clip_on=False)
            if "options" in entry:
                label = f"{number(figures['bypass_rate'], '.0%')} bypassed"
                panel.text(1.02, row, label, va="center", fontsize=7, color=BASELINE_HELD)
        panel.set_title(task, loc="left", fontsize=11)
        tidy(panel)
        panel.set(xlim=(0, 1), ylim=(-0.6, len(entries) - 0.4))
        panel.xaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_yticks(rows, [entry["name"] for entry in entries], fontsize=8.5)
    figure.supxlabel("drift: share of positions with another token", fontsize=9)
    return figure
