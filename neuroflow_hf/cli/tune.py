"""`neuroflow tune`: find gate settings for a checkpoint and a camera."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import EXIT_INTERRUPTED, EXIT_UNREACHED, one_line_errors
from .options import option
from .output import command_line, figure_table, print_wide, print_written
from .progress import CommandProgress


def tune(
    video: Annotated[
        Path | None,
        typer.Argument(help="Video like those the settings are for.", show_default="the clip that ships here"),
    ] = None,
    min_cosine: Annotated[
        float | None, option("Find the cheapest settings at least this close to dense, such as 0.99.", default="none")
    ] = None,
    max_cost: Annotated[
        float | None, option("Find the settings closest to dense at this cost or less, such as 0.1.", default="none")
    ] = None,
    statistic: Annotated[str, option("Statistic of the frames' cosines: p5 (5th percentile), mean or min.")] = "p5",
    model: options.VisionModel = None,
    out: options.Out = Path("neuroflow-tuned"),
    frames: Annotated[int, option("Measure on N frames.", metavar="N")] = 120,
    resolution: options.Resolution = None,
    stride: options.Stride = 1,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    debug: options.Debug = False,
):
    """
    Find gate settings for a checkpoint and a camera, compare them with baselines, and write a configuration.

    Files of an earlier tuning in the output folder are replaced.
    """
    with one_line_errors(debug, nothing_done="nothing was written."):
        from ..evaluation.tuning import Requirement, tune_video
        from ..evaluation.tuning_report import checkpoint_config, tuning_sentences, tuning_table, write_tuning
        from ..loading import default_model, dtype_named, load_model, usable_device
        from ..utils.files import prepare_folder
        from ..video.reader import VideoReader, bundled_clip

        # check what is quick to check before loading the model
        weights_dtype = dtype_named(dtype)
        required = {"min_cosine": min_cosine, "max_cost": max_cost, "statistic": statistic}
        Requirement(**required)
        reader = VideoReader(video or bundled_clip(), stride=stride)
        usable_device(device)
        prepare_folder(out)
        source = model or default_model()
        loaded, preprocess = load_model(source, weights_dtype, device, resolution)
        with CommandProgress("frames") as progress:
            result = tune_video(reader, loaded, preprocess, **required, frames=frames, on_step=progress.show)
        files = write_tuning(result, out, checkpoint_config(source), model or source.name, command_line())
    title = f"required: {result.requirement}"
    print_wide(figure_table(*tuning_table(result), title, stress_first=True), width=100)
    typer.echo("\n".join(tuning_sentences(result)))
    print_written(out, files)
    if result.interrupted:
        typer.echo(f"Stopped by Ctrl-C; {len(result.points)} settings were measured before.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.chosen is None:
        raise typer.Exit(EXIT_UNREACHED)
