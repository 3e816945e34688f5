"""What the scripts of this folder share: where a figure comes from, and how reports, pictures and tables get out."""

import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

import neuroflow_hf
from neuroflow_hf.utils.files import fill_block, finite, report_text, write_whole

__all__ = [
    "RESULTS", "fill_block", "percentile", "provenance", "publish", "rounded", "tidy", "wide_console",
    "with_interval", "write_figure", "write_json", "write_whole",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def provenance() -> dict:
    """The command, the machine and the versions behind a result."""
    return {
        "command": shlex.join(["python", f"eval/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "neuroflow_hf": neuroflow_hf.__version__,
        },
    }


def rounded(report: Any, digits: int = 6) -> Any:
    """A report with its numbers to so many digits after the point, and None for what is no number."""
    if isinstance(report, dict):
        return {name: rounded(part, digits) for name, part in report.items()}
    if isinstance(report, list | tuple):
        return [rounded(part, digits) for part in report]
    return finite(round(report, digits)) if isinstance(report, float) else report


def write_json(path: Path, report: dict):
    """Write a report, whole or not at all."""
    write_whole(path, json.dumps(report, indent=2) + "\n")


def publish(output: Path, report: dict, table: str, pictures: Mapping[str, Figure] | None = None):
    """
    Write a report and its pictures, and print its table.

    Args:
        output: the JSON file. Pictures go to `docs/` if it is in `eval/results/`, else to the file's folder.
        table: in Markdown, as of `eval/docs/tables.py`.
        pictures: by file name.
    """
    write_whole(output, report_text(report))
    for name, figure in (pictures or {}).items():
        picture = io.BytesIO()
        figure.savefig(picture, dpi=130, format="png")
        folder = DOCS if output.resolve().parent == RESULTS else output.parent
        write_whole(folder / name, picture.getvalue())
    Console(width=max(Console().width, 140)).print(Markdown(table))  # a pipe has 80 columns, and tables need more


def tidy(panel):
    """Draw a light grid and no frame."""
    panel.grid(color="#e5e7eb", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def write_figure(path: Path, figure: Figure, dpi: int = 130):
    """Write a picture as PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    write_whole(path, picture.getvalue())


def wide_console(width: int = 140) -> Console:
    """A console with at least so many columns: a pipe has 80, and these tables need more."""
    return Console(width=max(Console().width, width))


def with_interval(
    value: float | None, interval: Sequence[float] | None, form: str = "{:.2f}", scale: float = 1
) -> str:
    """A scaled value with its interval in brackets; `-` for None."""
    if value is None:
        return "-"
    ends = "" if interval is None else f" [{', '.join(form.format(scale * end) for end in interval)}]"
    return form.format(scale * value) + ends
