"""`neuroflow embed`: the embeddings of many videos, as a Parquet dataset."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import EXIT_DAMAGED, EXIT_INTERRUPTED, one_line_errors
from .option_groups import with_groups
from .options import option
from .progress import CommandProgress
from .vision_model import VISION, check_vision


@with_groups(how=VISION)
def embed(
    how: dict,
    paths: Annotated[
        list[str], typer.Argument(help="Videos, folders, quoted patterns, or .txt files with one of these a line.")
    ],
    out: Annotated[Path, option("Folder of the dataset; what it holds already is kept.")],
    every: Annotated[
        float | None, option("Embed one frame every N seconds.", default="all frames", metavar="SECONDS")
    ] = None,
    fps: Annotated[float | None, option("Embed N frames a second.", default="all frames", metavar="N")] = None,
    streams: Annotated[
        int | None, option("Encode N videos in one call.", default="as many as there are, at most 16", metavar="N")
    ] = None,
    preset: options.Preset = None,
    debug: options.Debug = False,
):
    """
    Embed many videos, and write a Parquet file for each.

    After an interruption, the same command goes on with the videos that are not finished. Videos that cannot be read
    to their end are listed in failures.jsonl.
    """
    with one_line_errors(debug, nothing_done="finished videos are kept."):
        from ..archive.embed import FAILURES, embed_videos, video_paths
        from ..loading import default_model

        if fps is not None:
            if every is not None:
                raise ValueError("Give --every or --fps: both say how many frames to embed.")
            if not fps > 0:
                raise ValueError(f"--fps is {fps}; expected a number above 0.")
            every = 1 / fps
        gate_options, load = check_vision(how, options.given(preset=preset))
        videos, source = video_paths(paths), how["model"] or default_model()
        loaded, preprocess, embedded = load()
        with CommandProgress("MB") as progress:
            result = embed_videos(
                videos,
                loaded,
                preprocess,
                out,
                gate_options,
                streams=streams,
                every=every,
                labels=embedded,
                model_name=str(Path(source).resolve() if Path(source).exists() else source),
                on_step=lambda what, done, total: progress.show(what, done / 1e6, total / 1e6),
            )
    typer.echo(f"{result.videos} videos: {result.embedded} embedded, {result.kept} were there already. Dataset: {out}")
    if result.failures:
        typer.echo(f"{len(result.failures)} cannot be read to their end; {out / FAILURES} says why.", err=True)
    if result.interrupted:
        typer.echo("Stopped early; the same command goes on.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.failures:
        raise typer.Exit(EXIT_DAMAGED)
