"""`neuroflow embed`: the embeddings of many videos, as a Parquet dataset."""

import contextlib
import os
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
    streams: Annotated[int, option("Encode at most N videos in one call.", metavar="N")] = 16,
    ray: Annotated[
        str | None,
        option(
            "Embed on a Ray cluster whose machines share the folders: auto, ray://HOST:10001, or local to start one.",
            default="this machine alone",
            metavar="ADDRESS",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        option("With --ray: embed by N workers.", default="one for each GPU, else for each machine", metavar="N"),
    ] = None,
    debug: options.Debug = False,
):
    """
    Embed many videos, and write a Parquet file for each.

    After an interruption, the same command goes on with the videos that are not finished. Videos that cannot be read
    to their end are listed in failures.jsonl.
    """
    with one_line_errors(debug, nothing_done="finished videos are kept."), contextlib.ExitStack() as stack:
        from ..archive.embed import FAILURES, embed_videos, embed_waiting, video_paths
        from ..loading import default_model

        if fps is not None:
            if every is not None:
                raise ValueError("Give --every or --fps: both say how many frames to embed.")
            if not fps > 0:
                raise ValueError(f"--fps is {fps}; expected a number above 0.")
            every = 1 / fps
        device, work = how["device"], embed_waiting
        if ray is not None:
            how = how | {"device": "cpu"}  # from where the workers get the model
        elif workers is not None:
            raise ValueError("--workers needs --ray: it says how many workers of a cluster embed.")
        gate_options, load = check_vision(how)
        videos, source = video_paths(paths), how["model"] or default_model()
        if ray is not None:
            # else Ray prints a page about each worker that dies, and reports to its makers that it was started
            os.environ |= {"RAY_DEDUP_LOGS_SKIP_REGEX": ".", "RAY_USAGE_STATS_ENABLED": "0"} | os.environ
            from ..archive.cluster import cluster_work

            work = stack.enter_context(cluster_work(ray, workers, device))
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
                work=work,
            )
    typer.echo(f"{result.videos} videos: {result.embedded} embedded, {result.kept} were there already. Dataset: {out}")
    if result.failures:
        typer.echo(f"{len(result.failures)} cannot be read to their end; {out / FAILURES} says why.", err=True)
    if result.interrupted:
        typer.echo("Stopped early; the same command goes on.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.failures:
        raise typer.Exit(EXIT_DAMAGED)
