"""Tables of drift and of lossless generation."""

from eval.docs.cells import estimate, table
from eval.language import json_drift
from neuroflow_hf.drift.report import description, summary_table
from neuroflow_hf.utils.tables import markdown_table


def lossless_table(report: dict) -> str:
    """Tokens per second with each drafter and with none."""
    settings, last = report["settings"], list(report["summary"].values())[-1]
    columns = {"task": "{task}", "drafts": "{name}", "tokens/s": "{processor[tokens_per_second]:.0f}"}
    columns |= {
        "speed (dense = 1)": estimate("processor.times_dense.median", "processor.times_dense.interval", form=".2f"),
        "slowest text": "{processor[times_dense][least]:.2f}",
        "speed by wall clock": estimate("wall.times_dense.median", "wall.times_dense.interval", form=".2f"),
        "acceptance rate": estimate("acceptance", form=".0%"),
        "draft length, tokens": estimate("draft_length", form=".1f"),
        "tokens per verification": estimate("tokens_per_check", form=".1f"),
    }
    rows = ({"task": task, "name": name, **row} for task, of in report["summary"].items() for name, row in of.items())
    differ = [sum(row["divergences"][key] for row in last.values()) for key in ("within_rounding", "others")]
    measured = sum(case["tokens"] >= settings["least_tokens"] for case in report["cases"])
    note = (
        "`{0}`: {model}, {1} prompts with texts of {least_tokens} to {new_tokens} tokens, {dtype}, {turns} turn(s), "
        "{machine[threads]} thread(s). Speed in processor time, and by wall clock. Texts that differ from the "
        "stock model's: {2} where its two highest logits are within rounding, {3} elsewhere."
    )
    return table(rows, columns, note.format(report["command"], measured, *differ, **settings))


def drift_table(report: dict) -> str:
    """Drift by task, a bypass in each row."""
    return f"{markdown_table(summary_table(report))}\n\n`{report['command']}`: {description(report)}"


def findings_table(report: dict) -> str:
    """The published findings on language, each with its verdict and rule."""
    rows = [[found[name] for name in ("claim", "measured", "verdict", "rule")] for found in report["findings"]]
    return markdown_table((["published", "measured here", "verdict", "rule"], rows))


def json_table(report: dict) -> str:
    """Drift of JSON under a schema, a bypass in each row."""
    return f"{markdown_table(json_drift.json_table(report))}\n\n`{report['command']}`: {json_drift.describe(report)}"


def check_table(report: dict) -> str:
    """What a verification costs, by its number of tokens."""
    names = {"turned": "weights times tokens", "usual": "tokens times weights, the usual product"}
    counts = [count for count in report["costs"]["turned"] if count != "1"]
    columns = {"products": "{name}"} | {f"{count} tokens, in dense steps": f"{{t{count}:.2f}}" for count in counts}
    rows = [
        {"name": words, **{f"t{count}": report["costs"][name][count] for count in counts}}
        for name, words in names.items()
    ]
    note = f"`{report['command']}`: {report['model']}, one thread, processor time, the least of seven."
    return table(rows, columns, note)
