"""What the scripts of this folder share: the provenance of figures, and writing reports, pictures and tables."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from neuroflow_hf.utils.files import fill_block, finite, report_text, write_whole
from neuroflow_hf.utils.plots import save_plot, tidy
from neuroflow_hf.utils.provenance import machine_and_versions

__all__ = ["RESULTS", "fill_block", "provenance", "publish", "rounded", "show", "tidy", "write_json", "write_whole"]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told here"


def provenance(device: str = "cpu") -> dict:
    """The command, the machine with the device that was measured on, and the versions behind a result."""
    script = Path(sys.argv[0]).resolve()
    named = [script.name]
    if script.is_relative_to(ROOT):
        named = ["-m", ".".join(script.relative_to(ROOT).with_suffix("").parts)]
    return {"command": shlex.join(["python", *named, *sys.argv[1:]]), **machine_and_versions(device)}


def rounded(report: Any, digits: int = 6) -> Any:
    """A report with its numbers rounded to `digits` decimal places, and None in place of NaN and infinity."""
    if isinstance(report, dict):
        return {name: rounded(part, digits) for name, part in report.items()}
    if isinstance(report, list | tuple):
        return [rounded(part, digits) for part in report]
    return finite(round(report, digits)) if isinstance(report, float) else report


def write_json(path: Path, report: dict):
    """Write a report; if the process is interrupted, the old file stays."""
    write_whole(path, report_text(report))


def publish(output: Path, report: dict, table: str, pictures: Mapping[str, Figure] | None = None):
    """
    Write a report as JSON and its pictures, and print its table in Markdown. Pictures go to `docs/` if the report is
    in `eval/results/`, else to its folder.
    """
    write_json(output, report)
    folder = ROOT / "docs" if output.resolve().parent == RESULTS else output.parent
    for name, figure in (pictures or {}).items():
        save_plot(figure, folder / name)
    show(table)


def show(table: str):
    """Print a table in Markdown."""
    Console(width=max(Console().width, 140)).print(Markdown(table))  # a pipe has 80 columns, and tables need more


def finding(claim: str, rule: str, measured: str, holds: bool, fails: bool) -> dict:
    """A published claim, what was measured, and the verdict by a rule."""
    verdict = HOLDS if holds else FAILS if fails else UNKNOWN
    return {"claim": claim, "measured": measured, "rule": rule, "verdict": verdict}
