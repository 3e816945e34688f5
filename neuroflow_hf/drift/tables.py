"""Tables of a drift report: headers and rows of strings, for the terminal and for Markdown."""

from collections.abc import Sequence

from .prompts import ALL, order_tasks


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash for None."""
    return "-" if value is None else f"{value:.{digits}%}"


def plain(value: float | None, form: str) -> str:
    """A number in a format; a dash for None."""
    return "-" if value is None else format(value, form)


def tasks_of(report: dict) -> list[str]:
    """The tasks of a report's prompts, in order."""
    return order_tasks(report["prompts"]["of_task"])


def overall(entry: dict) -> dict:
    """The figures of all prompts together."""
    tasks = entry["tasks"]
    return tasks[ALL] if ALL in tasks else next(iter(tasks.values()))


def drift_cell(figures: dict) -> str:
    """Drift, and how many prompts diverge: `12.3%, 9/50`."""
    return f"{percent(figures['drift'])}, {figures['diverged_prompts']}/{figures['prompts']}"


def entries_of(report: dict) -> list[dict]:
    """The noise floor and the configurations, in the order shown."""
    return [*report["noise"], *report["configurations"]]


def summary_table(report: dict, entries: Sequence[dict] | None = None) -> tuple[list[str], list[list[str]]]:
    """A row for each entry: drift by task, the other figures over all prompts."""
    tasks = tasks_of(report)
    headers = [
        *("configuration", "bypassed"),
        *(f"drift: {task}" for task in tasks),
        *("first at", "other top-1", "KL mean", "KL p99", "perplexity"),
    ]
    rows = []
    for entry in entries_of(report) if entries is None else entries:
        figures = overall(entry)
        rows.append(
            [
                entry["name"],
                percent(figures["bypass_rate"]) if "options" in entry else "",
                *(drift_cell(entry["tasks"][task]) for task in tasks),
                plain(figures["first_divergence"]["median"], ".0f"),
                percent(figures["forced_divergent"], 2),
                plain(figures["kl"]["mean"], ".2g"),
                plain(figures["kl"]["p99"], ".2g"),
                plain(figures["perplexity"]["delta"], "+.3f"),
            ]
        )
    return headers, rows


def details_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """A row for each entry and task: intervals, margins, similarities and entropies."""
    headers = [
        "configuration",
        "task",
        "drift, 95%",
        "diverged by at most",
        "other top-1, 95%",
        "KL mean, 95%",
        "perplexity: dense",
        "difference, 95%",
        "margin: median, most",
        "similarity: P10, P50, P90",
        "entropy: bypassed, computed",
    ]
    rows = []
    for entry in entries_of(report):
        for task, figures in entry["tasks"].items():
            perplexity, similarity = figures["perplexity"], figures["similarity"]
            rows.append(
                [
                    entry["name"],
                    task,
                    interval(figures["drift_interval"], ".1%"),
                    percent(figures["diverged_bound"]),
                    interval(figures["forced_interval"], ".2%"),
                    interval(figures["kl"]["interval"], ".2g"),
                    plain(perplexity["dense"], ".3f"),
                    interval(perplexity["interval"], "+.3f"),
                    ", ".join(plain(figures["margin"][name], ".2g") for name in ("median", "max")),
                    ", ".join(plain(similarity[name], ".3f") for name in ("p10", "p50", "p90")),
                    ", ".join(plain(figures["entropy"][name], ".2f") for name in ("bypassed", "computed")),
                ]
            )
    return headers, rows


def interval(ends: Sequence[float] | None, form: str) -> str:
    """An interval in a format; a dash for None."""
    return "-" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def description(report: dict) -> str:
    """Describe the measurement in a paragraph."""
    model, settings, prompts = report["model"], report["settings"], report["prompts"]
    counts = ", ".join(f"{count} {task}" for task, count in prompts["of_task"].items())
    cut = f", {prompts['cut']} cut to {settings['max_prompt_tokens']} tokens" if prompts["cut"] else ""
    return (
        f"{model['name']}: {model['layers']} layers, {model['parameters'] / 1e6:.1f} million parameters, "
        f"{model['dtype']}. Prompts: {counts}{cut}; {settings['new_tokens']} new tokens each, greedy. Drift: share of "
        "positions with another token than dense, and how many prompts diverge; first at: the median position of the "
        "first other token. Under teacher forcing: the share of steps with another first choice than dense, and KL "
        "divergence in nats. Perplexity: the difference to dense on the second half of the prompts, fed token by "
        "token. Dense and bypass have caches of their own; rows without a bypass rate compare dense with dense, the "
        "noise floor. Intervals: 95 % of a paired bootstrap over prompts; no divergence in n prompts bounds its rate "
        "by 3/n."
    )


def drift_markdown(report: dict) -> str:
    """The whole report in Markdown."""
    parts = [
        "# Token drift",
        description(report),
        f"`{report['command']}`" if report["command"] else "",
        markdown(*summary_table(report)),
        "## By task",
        markdown(*details_table(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
