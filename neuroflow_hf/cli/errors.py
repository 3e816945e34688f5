"""What all commands do with errors: exit codes, and one line instead of a traceback."""

import contextlib
from collections.abc import Iterator

import typer

from ..utils.files import one_line

EXIT_DAMAGED, EXIT_UNUSABLE, EXIT_UNREACHED, EXIT_INTERRUPTED = 1, 2, 3, 130


@contextlib.contextmanager
def one_line_errors(debug: bool, nothing_done: str) -> Iterator[None]:
    """
    Print an error in what the user gave as one line on stderr and exit with code 2, unless `debug` lets it through;
    after Ctrl-C, say what `nothing_done` says and exit with 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped by Ctrl-C; {nothing_done}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # such as `| head -1`; typer ends quietly
        raise
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:  # ImportError: a missing extra
        if debug:
            raise
        typer.echo(f"Error: {one_line(error)}", err=True)
        raise typer.Exit(EXIT_UNUSABLE) from error
