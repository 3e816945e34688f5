"""`neuroflow search`: the moments of a dataset that fit a text or a picture best."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .options import option
from .output import figure_table, print_wide
from .progress import CommandProgress


def search(
    dataset: Annotated[Path, typer.Argument(help="Folder that `neuroflow embed` wrote.")],
    text: Annotated[
        str | None, typer.Argument(help="What to look for, such as 'a dog'.", show_default="give --image")
    ] = None,
    image: Annotated[Path | None, option("Look for what resembles this picture file.", default="none")] = None,
    count: Annotated[int, option("Show at most N moments.", metavar="N")] = 10,
    gap: Annotated[
        float, option("Merge frames that are less than this apart into one moment.", metavar="SECONDS")
    ] = 2.0,
    template: Annotated[
        str | None,
        option("Text to compare with the frames; {} is replaced by the given one.", default="This is a photo of {}."),
    ] = None,
    model: Annotated[
        str | None,
        option("Folder or Hub name of the dataset's checkpoint.", default="the one that the dataset names"),
    ] = None,
    device: options.Device = "auto",
    out: Annotated[
        Path | None,
        option("Write a contact sheet to this picture file, such as moments.jpg.", default="none", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, option("Print JSON instead of a table.", "--json")] = False,
    debug: options.Debug = False,
):
    """
    Find the moments of embedded videos that fit a text or a picture best.

    Every frame is compared. Neighbouring frames that fit are merged into one moment.
    """
    with one_line_errors(debug, nothing_done="nothing was written."):
        from PIL import Image

        from ..archive.index import open_index
        from ..archive.query import image_query, text_query
        from ..archive.search import search_index
        from ..archive.sheet import moment_sheet
        from ..loading import usable_device
        from ..utils.files import significant
        from ..video.labels import TEMPLATE

        if (text is None) == (image is None):
            raise ValueError("Give a text to look for, or a picture with --image: one of them.")
        if template is not None and text is None:
            raise ValueError("--template needs a text to search for; give one.")
        if out is not None and out.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"--out {out} is no name of a picture file; expected one such as moments.jpg.")
        usable_device(device)
        with CommandProgress("files") as progress:
            index = open_index(dataset, on_step=progress.show)
        if image is not None:
            query = image_query(index.metadata, image, model, device)
        else:
            query = text_query(index.metadata, text, TEMPLATE if template is None else template, model, device)
        moments = search_index(index, query.embedding, count, gap)
        if query.confidence is not None:
            moments = [moment | {"confidence": significant(query.confidence(moment["score"]))} for moment in moments]
        if as_json:
            found = {"dataset": str(dataset), "text": text, "image": image and str(image), "moments": moments}
            typer.echo(json.dumps(found, indent=2))
        else:
            print_moments(moments, sum(index.lengths), len(index.files))
        if out is not None:
            Image.fromarray(moment_sheet(dataset, moments, f"{text or image}")).save(out, quality=90)
            typer.echo(f"Written to {out}", err=True)


def print_moments(moments: list[dict], frames: int, videos: int):
    """Print a row for each moment."""
    from ..archive.sheet import clock
    from ..video.records import percent

    headers = ["moment", "begin", "end", "best at", "frames", "score"]
    rows = [
        [
            Path(moment["video"]).name,
            *(clock(moment[name]) for name in ("start", "end", "best")),
            str(moment["frames"]),
            f"{moment['score']:.3f}",
            *([percent(moment["confidence"])] if "confidence" in moment else []),
        ]
        for moment in moments
    ]
    if moments and "confidence" in moments[0]:
        headers.append("confidence")
    print_wide(figure_table(headers, rows, title=f"{frames} frames of {videos} videos"), width=100)
