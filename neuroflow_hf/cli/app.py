"""`neuroflow app`: the page in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .options import option
from .progress import CommandProgress


def serve_app(
    model: options.VisionModel = None,
    language_model: options.LanguageModel = None,
    dataset: Annotated[
        Path | None,
        option("Folder that `neuroflow embed` wrote, to search in.", default="the clips that ship here"),
    ] = None,
    device: options.Device = "auto",
    host: Annotated[str, option("Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on.")] = 7860,
    debug: options.Debug = False,
):
    """
    Serve a page in the browser: a video with its overlay, search in embedded videos, and text with a bypass.

    Models are loaded when they are first used. Nothing is sent to other machines.
    """
    with one_line_errors(debug, nothing_done="the page is closed."):
        from ..app.page import serve
        from ..archive.index import open_index
        from ..conversion.smollm2 import NAME
        from ..loading import usable_device

        usable_device(device)
        if dataset is not None:
            with CommandProgress("files") as progress:
                open_index(dataset, on_step=progress.show)
        serve(model, language_model or NAME, dataset, device, host, port, typer.echo)
