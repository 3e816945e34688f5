"""Files that are written whole or not at all, and reports as text."""

import contextlib
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LIST_OF_NUMBERS = re.compile(r"\[\n\s+([^\[\]{}\"]*?)\s+\]")


def prepare_folder(path: str | Path) -> Path:
    """Make a folder to write to, with its parents. NotADirectoryError for a file, OSError if that fails."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; name a folder to write to.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"Cannot make the folder {path} ({reason}); name one that you may write to.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {path} may not be written to; name another one.")
    return path


@contextlib.contextmanager
def staging_folder(out: str | Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """
    A temporary folder whose files are moved to `out` at the end, each in one step. If the block raises, none is moved.
    Those in `names` are moved first, in this order; if they were not written, they are deleted from `out`. Errors are
    those of `prepare_folder`.
    """
    out = prepare_folder(out)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
        folder = Path(folder)
        yield folder
        for name in names:
            if (folder / name).exists():
                (folder / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)
        for path in sorted(folder.iterdir()):
            path.replace(out / path.name)


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """
    A temporary folder that becomes `out` at the end, in one step. If the block raises, there is no `out`.
    FileExistsError if `out` exists and is not empty; its parents are made, with errors as in `prepare_folder`.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; name a new one.")
    prepare_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name  # a folder inside, with the usual permissions
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        folder.replace(out)


def user_cache() -> Path:
    """The folder for what is downloaded once: `$NEUROFLOW_CACHE`, else `neuroflow` in the user's cache folder."""
    named = os.environ.get("NEUROFLOW_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuroflow"


def write_whole(path: Path, content: str | bytes):
    """Write a file whole or not at all, even if several processes write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value):
    """A report in which NaN and infinite numbers, which JSON lacks, are None."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def significant(value: Any, digits: int = 6) -> Any:
    """A float rounded to significant digits; anything else unchanged."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def one_line(error: BaseException, limit: float = math.inf) -> str:
    """An error's message in one line, of at most `limit` characters; the name of its class if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: int(limit) - 3] + "..."


def report_text(report: dict) -> str:
    """A report as indented JSON, with each list of numbers on one line."""
    text = json.dumps(finite(report), indent=2, allow_nan=False)
    return LIST_OF_NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def fill_block(text: str, name: str, content: str) -> str:
    """Replace what stands in `text` between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"Expected `{begin}` and `{end}` once each, in this order.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
