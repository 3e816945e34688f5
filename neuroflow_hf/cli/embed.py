"""`neuroflow embed`: the embeddings of many videos, as a Parquet dataset."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import EXIT_DAMAGED, EXIT_INTERRUPTED, one_line_errors
from .options import option
from .progress import CommandProgress
from .vision_model import given_labels, parse_gate, with_config


def embed(
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
    model: options.VisionModel = None,
    resolution: options.Resolution = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    labels: options.Labels = None,
    template: options.Template = None,
    config: options.GateFile = None,
    preset: options.Preset = None,
    gate: options.GateOptions = None,
    debug: options.Debug = False,
):
    """
    Embed many videos, and write a Parquet file for each.

    After an interruption, the same command goes on with the videos that are not finished. Videos that cannot be read
    to their end are listed in failures.jsonl.
    """
    with one_line_errors(debug, nothing_done="finished videos are kept."):
        from ..archive.embed import FAILURES, embed_videos, video_paths
        from ..loading import default_model, dtype_named, load_model_with_labels, usable_device
        from ..video.labels import TEMPLATE

        if fps is not None:
            if every is not None:
                raise ValueError("Give --every or --fps: both say how many frames to embed.")
            if not fps > 0:
                raise ValueError(f"--fps is {fps}; expected a number above 0.")
            every = 1 / fps
        weights_dtype = dtype_named(dtype)
        names = given_labels(labels, template)
        usable_device(device)
        gate_options = with_config(config, options.given(preset=preset) | parse_gate(gate or []), model)
        videos = video_paths(paths)
        source = model or default_model()
        how = (template or TEMPLATE, weights_dtype, device, resolution)
        loaded, preprocess, embedded = load_model_with_labels(source, names, *how)
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
