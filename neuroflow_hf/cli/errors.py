"""What all commands do with errors: exit codes, and one line in a traceback's place."""

import contextlib
from collections.abc import Iterator

import typer

EXIT_DAMAGED, EXIT_UNUSABLE, EXIT_UNREACHED, EXIT_INTERRUPTED = 1, 2, 3, 130
DTYPE_NAMES = ("float32", "bfloat16", "float16")


@contextlib.contextmanager
def one_line_errors(debug: bool, nothing_done: str) -> Iterator[None]:
    """
    Errors in what the user gave become one line on stderr and exit code 2, Ctrl-C one line and 130.

    Args:
        debug: let errors through, with their traceback.
        nothing_done: what to say about the state of things after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped by Ctrl-C; {nothing_done}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(EXIT_UNUSABLE) from error


def require_dtype(dtype: str):
    """Raise a ValueError unless this is a type that models run in."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16.")
