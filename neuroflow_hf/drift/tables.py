"""Tables of a drift report, for the terminal and for Markdown."""

from collections.abc import Sequence

from ..utils.tables import Table, interval, markdown_table, number
from .prompts import ALL, order_tasks


def tasks_of(report: dict) -> list[str]:
    """The tasks of a report's prompts, in order."""
    return order_tasks(report["prompts"]["of_task"])


def entries_of(report: dict) -> list[dict]:
    """The noise floor and the configurations, in the order shown."""
    return [*report["noise"], *report["configurations"]]


def summary_table(report: dict, entries: Sequence[dict] | None = None) -> Table:
    """A row for each entry (default: all), with drift and diverged prompts by task, other figures over all prompts."""
    tasks = tasks_of(report)
    headers = [
        *("configuration", "bypassed"),
        *(f"drift: {task}" for task in tasks),
        *("first divergence", "top-1 differs", "KL mean", "KL p99", "perplexity"),
    ]
    rows = []
    for entry in entries_of(report) if entries is None else entries:
        of_task = entry["tasks"]
        figures = of_task[ALL] if ALL in of_task else of_task[tasks[0]]
        drifts = [
            f"{of_task[task]['drift']:.1%}, {of_task[task]['diverged_prompts']}/{of_task[task]['prompts']}"
            for task in tasks
        ]
        rows.append(
            [
                entry["name"],
                number(figures["bypass_rate"], ".1%") if "options" in entry else "",
                *drifts,
                number(figures["first_divergence"]["median"], ".0f"),
                number(figures["forced_divergent"], ".2%"),
                number(figures["kl"]["mean"], ".2g"),
                number(figures["kl"]["p99"], ".2g"),
                number(figures["perplexity"]["delta"], "+.3f"),
            ]
        )
    return headers, rows


def details_table(report: dict) -> Table:
    """A row for each entry and task, with intervals, margins, similarities and entropies."""
    headers = [
        "configuration",
        "task",
        "drift, 95%",
        "bound of divergence",
        "top-1 differs, 95%",
        "KL mean, 95%",
        "perplexity: dense",
        "difference, 95%",
        "margin: median, maximum",
        "similarity: P10, P50, P90",
        "entropy: bypassed, computed",
    ]

    def numbers(figures: dict, form: str) -> str:
        return ", ".join(number(value, form) for value in figures.values())

    rows = [
        [
            entry["name"],
            task,
            interval(figures["drift_interval"], ".1%"),
            number(figures["diverged_bound"], ".1%"),
            interval(figures["forced_interval"], ".2%"),
            interval(figures["kl"]["interval"], ".2g"),
            number(figures["perplexity"]["dense"], ".3f"),
            interval(figures["perplexity"]["interval"], "+.3f"),
            numbers(figures["margin"], ".2g"),
            numbers(figures["similarity"], ".3f"),
            numbers(figures["entropy"], ".2f"),
        ]
        for entry in entries_of(report)
        for task, figures in entry["tasks"].items()
    ]
    return headers, rows


def description(report: dict) -> str:
    """Describe the measurement in a paragraph."""
    model, settings, prompts = report["model"], report["settings"], report["prompts"]
    counts = ", ".join(f"{count} {task}" for task, count in prompts["of_task"].items())
    cut = f", {prompts['cut']} cut to {settings['max_prompt_tokens']} tokens" if prompts["cut"] else ""
    return (
        f"{model['name']}: {model['layers']} layers, {model['parameters'] / 1e6:.1f} million parameters, "
        f"{model['dtype']}. Prompts: {counts}{cut}; {settings['new_tokens']} new tokens each, greedy. Drift: share of "
        "positions with another token than dense, and how many prompts diverge. First divergence: the median of its "
        "positions. Top-1 differs: the share of steps under teacher forcing with another most probable token than "
        "dense; KL: divergence from dense at these steps, in nats. Perplexity: the difference to dense on the second "
        "half of the prompts, fed token by token. Dense and bypass have separate caches. Rows without a bypass rate "
        "compare dense with dense: the noise floor. Intervals: 95 % of a paired bootstrap over prompts; no divergence "
        "in n prompts bounds its probability by 3/n."
    )


def drift_markdown(report: dict) -> str:
    """The whole report in Markdown."""
    parts = [
        "# Token drift",
        description(report),
        f"`{report['command']}`" if report["command"] else "",
        markdown_table(summary_table(report)),
        "## By task",
        markdown_table(details_table(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
