"""The `neuroflow` command. A module for each subcommand; they import libraries where they use them."""

from typing import Annotated

import typer

from .app import serve_app
from .calibrate import calibrate
from .chat import chat
from .convert import convert
from .distill import distill
from .drift import drift
from .embed import embed
from .evaluate import evaluate
from .generate import generate
from .run import run
from .search import search
from .tune import tune
from .watch import watch

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def show_version(wanted: bool):
    """Print the version and exit."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"neuroflow {version('neuroflow-hf')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    """SigLIP over video without computing again what did not change."""


COMMANDS = (
    *(run, embed, search, watch, serve_app, tune, distill, evaluate),
    *(generate, chat, calibrate, drift, convert),
)
NAMES = {serve_app: "app", evaluate: "eval"}
for command in COMMANDS:
    app.command(NAMES.get(command))(command)
