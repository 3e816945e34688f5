"""What the tables of the documentation are made of: columns as format strings or functions of a row."""

import json
from collections.abc import Callable, Iterable

from eval.report import RESULTS
from neuroflow_hf import PRESETS
from neuroflow_hf.utils.tables import markdown_table


def load(result: str) -> dict:
    """A report in `eval/results/`."""
    return json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))


def table(rows: Iterable[dict | tuple], columns: dict[str, str | Callable], *notes: str) -> str:
    """A table in Markdown: each column's cells are a format string filled from the row, or a function of the row."""

    def cell(row, column):
        if callable(column):
            return str(column(row))
        return column.format(**row) if isinstance(row, dict) else column.format(*row)

    cells = [[cell(row, column) for column in columns.values()] for row in rows]
    return "\n".join([markdown_table((list(columns), cells)), *(["", *notes] if notes else [])])


def spread(value: float | None, interval: list[float] | None = None, scale: float = 1, form: str = "+.1f") -> str:
    """A value and its interval, both multiplied by `scale`."""
    if value is None:
        return ""
    between = f" ({' to '.join(format(scale * end, form) for end in interval)})" if interval else ""
    return f"{scale * value:{form}}{between}"


def method_and_cost(head: str = "method") -> dict:
    """The first columns of most tables. Names of presets are set as code, and baselines are marked."""

    def name_of(row):
        name = row.get("name", row.get("method"))
        return f"*baseline:* {name}" if row.get("control") else f"`{name}`" if name in PRESETS else name

    return {head: name_of, "cost": "{cost:.3f}"}


def at(row: dict, path: str):
    """The value in a row at a path such as `top1.difference`; None if the row has none."""
    for key in path.split("."):
        row = row.get(key) if row else None
    return row


def estimate(value: str, interval: str = "", scale: float = 1, form: str = "+.1f") -> Callable:
    """A column of values and intervals, given by two paths. It is empty for dense, the reference."""
    return lambda row: "" if row.get("name") == "dense" else spread(at(row, value), at(row, interval), scale, form)


def beside(form: str, scale: float = 1, signed: str = "+.1f", part: str = "", head: str = "", unit: str = "") -> dict:
    """Two columns: the best baseline at a method's cost, and the difference to it, from `part` of a row."""
    best = f"{part}best control"

    def baseline(row):
        return "{control:{form}} ({family})".format(form=form, **at(row, best)) if at(row, best) else ""

    return {
        f"{head}best baseline at its cost": baseline,
        f"{head}difference to it{unit}": estimate(f"{best}.difference", f"{best}.interval", scale, signed),
    }


def rows_shown(rows: list[dict], default: str = "balanced") -> list[dict]:
    """Dense, the presets, the first setting of each mode, and each baseline's setting that is nearest in cost."""
    cost = next((row["cost"] for row in rows if row["name"] == default), 0)
    families: dict[str, list[dict]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    kept = []
    for family, settings in families.items():
        nearest = min(settings, key=lambda row: abs(row["cost"] - cost))
        kept += settings if family == "presets" else [nearest if settings[0]["control"] else settings[0]]
    return kept


def thousandths(key: str) -> Callable:
    """A column of the interval of a difference, in thousandths."""
    return lambda row: " to ".join(f"{1e3 * end:+.2f}" for end in row[key]["interval"])


def device_of(report: dict) -> str:
    """What a benchmark ran on, for a note below its table."""
    on_cpu = report["device"] == "cpu"
    return f"{report['machine']['threads']} threads on the CPU" if on_cpu else report["machine"]["device"]
