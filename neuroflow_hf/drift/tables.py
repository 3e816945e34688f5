"""Tables of a drift report, for the terminal and for Markdown."""

from ..utils.tables import Table, markdown_table, number, with_interval
from .prompts import ALL, order_tasks


def tasks_of(report: dict) -> list[str]:
    """The tasks of a report's prompts, in order."""
    return order_tasks(report["prompts"]["of_task"])


def entries_of(report: dict) -> list[dict]:
    """The noise floor and the configurations, in the order shown."""
    return [*report["noise"], *report["configurations"]]


def total_of(entry: dict) -> dict:
    """An entry's figures over all tasks."""
    tasks = entry["tasks"]
    return tasks[ALL] if ALL in tasks else next(iter(tasks.values()))


def summary_table(report: dict) -> Table:
    """A row for each entry, with drift by task, and other figures over all prompts."""
    tasks = tasks_of(report)
    headers = ["configuration", "threshold", "steps bypassed", *(f"drift: {task}" for task in tasks)]
    headers += ["top-1 differs", "KL", "perplexity"]
    rows = []
    for entry in entries_of(report):
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
    parts = [
        "# Token drift",
        description(report),
        f"`{report['command']}`" if report["command"] else "",
        markdown_table(summary_table(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
