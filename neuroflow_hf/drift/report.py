"""A drift report as a table, for the terminal and in Markdown, and as a plot."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..utils.plots import BASELINE_HELD, OURS, tidy, titled_figure
from ..utils.tables import Table, markdown_table, number, with_interval
from .prompts import ALL


def total_of(entry: dict) -> dict:
    """An entry's figures over all tasks; a single one has no sum."""
    return entry["tasks"].get(ALL) or next(iter(entry["tasks"].values()))


def summary_table(report: dict) -> Table:
    """A row for each entry, with drift by task, and other figures over all prompts."""
    tasks = report["prompts"]["of_task"]
    headers = ["configuration", "threshold", "steps bypassed", *(f"drift: {task}" for task in tasks)]
    headers += ["top-1 differs", "KL", "perplexity"]
    rows = []
    for entry in [*report["noise"], *report["configurations"]]:
        total, of_task = total_of(entry), entry["tasks"]
        options = entry.get("options")
        rows.append(
            [
                entry["name"],
                number(options and options["threshold"], ".3f"),
                number(total["bypass_rate"] if options else None, ".1%"),
                *(with_interval(of_task[task]["drift"], of_task[task]["drift_interval"], ".0%") for task in tasks),
                number(total["forced_divergent"], ".1%"),
                number(total["kl"]["mean"], ".2g"),
                number(total["perplexity"]["delta"], "+.2f"),
            ]
        )
    return headers, rows


def description(report: dict) -> str:
    """Describe the measurement in a paragraph."""
    model, settings, prompts = report["model"], report["settings"], report["prompts"]
    counts = ", ".join(f"{count} {task}" for task, count in prompts["of_task"].items())
    cut = f", {prompts['cut']} cut to {settings['max_prompt_tokens']} tokens" if prompts["cut"] else ""
    return (
        f"{model['name']}: {model['layers']} layers, {model['parameters'] / 1e6:.1f} million parameters, "
        f"{model['dtype']}. Prompts: {counts}{cut}; {settings['new_tokens']} new tokens each, greedy. Drift: share of "
        "positions with another token than dense, with its 95 % interval from a bootstrap over prompts. `1->22`: "
        "layer 1 decides, layer 22 reuses its output. `for 20%`: at the threshold that this share of the steps "
        f"reaches, on {settings['few']} prompts of each task. Top-1 differs, KL (in nats) and increase of perplexity: "
        f"over the last {settings['forced_tokens']} tokens of each prompt, fed one by one. Rows without a threshold "
        "compare dense with dense, the noise floor, on the same few prompts."
        + "".join(
            f" Similarity at layer {layer}: P10 {gate['p10']:.2f}, P50 {gate['p50']:.2f}, P90 {gate['p90']:.2f}."
            for layer, gate in report["gates"].items()
        )
    )


def drift_markdown(report: dict) -> str:
    """The whole report in Markdown."""
    command = f"`{report['command']}`\n\n" if report["command"] else ""
    return f"# Token drift\n\n{description(report)}\n\n{command}{markdown_table(summary_table(report))}\n"


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
