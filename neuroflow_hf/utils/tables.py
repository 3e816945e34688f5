"""Tables of texts: what their cells hold, and Markdown."""

from collections.abc import Sequence

Table = tuple[list[str], list[list[str]]]  # headers and rows


def number(value: float | None, form: str = ".4f") -> str:
    """A figure in a format; a dash for None."""
    return "-" if value is None else format(value, form)


def interval(ends: Sequence[float | None] | None, form: str) -> str:
    """An interval in a format; a dash for None, `...` for an end without a bound."""
    if ends is None:
        return "-"
    return " to ".join("..." if end is None else format(end, form) for end in ends)


def with_interval(value: float | None, ends: Sequence[float | None] | None, form: str) -> str:
    """A figure with its interval in brackets, if there is one; a dash for None."""
    return number(value, form) if value is None or ends is None else f"{value:{form}} ({interval(ends, form)})"


def escaped(cell: str) -> str:
    """A cell's text with its `|` and line breaks escaped."""
    return cell.replace("|", "\\|").replace("\n", " ")


def markdown_table(table: Table) -> str:
    """A table in Markdown."""
    headers, rows = table
    lines = [headers, ["---"] * len(headers), *(map(escaped, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
