"""What all commands print: tables, the files written, their own command line."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def command_line() -> str:
    """The command as it was called, for reports."""
    return shlex.join(["neuroflow", *sys.argv[1:]])


def figure_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, stress_first: bool = False
) -> Table:
    """A table with columns after the first aligned to the right; with `stress_first`, a bold row above dim ones."""
    table = Table(*map(escape, headers), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for place, row in enumerate(rows):
        style = None if not stress_first else "dim" if place else "bold"
        table.add_row(*map(escape, row), style=style)
    return table


def print_wide(*tables: Table, width: int):
    """Print tables on stdout, at least `width` columns wide: narrower, figures would break."""
    console = Console(highlight=False)
    console.width = max(console.width, width)
    console.print(*tables, sep="\n")


def print_written(out: Path, files: Iterable[str]):
    """Print the names of the files that were written to a folder."""
    typer.echo(f"Written to {out}: {', '.join(files)}")
