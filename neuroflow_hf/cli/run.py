"""`neuroflow run`: stream a video through a vision tower and compare with dense."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from . import options
from .errors import EXIT_DAMAGED, EXIT_INTERRUPTED, one_line_errors
from .option_groups import GATE_OPTIONS, with_groups
from .options import option
from .output import command_line, figure_table, print_written
from .progress import CommandProgress
from .vision_model import VISION, check_vision

MOST_STRETCHES = 20  # printed of the labels' timeline


@with_groups(chosen=GATE_OPTIONS, how=VISION)
def run(
    chosen: dict,
    how: dict,
    video: Annotated[Path | None, typer.Argument(help="Video file.", show_default="the clip that ships here")] = None,
    out: options.Out = Path("neuroflow-run"),
    stride: options.Stride = 1,
    max_frames: options.MaxFrames = None,
    dense_every: Annotated[
        int | None,
        option(
            "Compare with dense on every Nth frame; 0: never.",
            metavar="N",
            default="about 25 samples in all",
            panel=options.OUTPUT,
        ),
    ] = None,
    overlay: Annotated[bool, option("Write a video that marks encoded patches.", panel=options.OUTPUT)] = True,
    objects: Annotated[
        bool,
        option(
            "Find moving objects, and draw and store their boxes; with --labels, also their labels.",
            "--objects",
            panel=options.OUTPUT,
        ),
    ] = False,
    debug: options.Debug = False,
):
    """
    Stream a video through SigLIP, DINOv2 or CLIP, compare with dense, and write embeddings, figures and pictures.

    Files of an earlier run in the output folder are replaced.
    """
    with one_line_errors(debug, nothing_done="nothing was written."):
        from ..loading import default_model
        from ..utils.files import prepare_folder
        from ..video.reader import VideoReader, bundled_clip
        from ..video.run import run_video

        # check what is quick to check before loading the model
        gate_options, load = check_vision(how, options.given(**chosen))
        reader = VideoReader(video or bundled_clip(), stride=stride, max_frames=max_frames)
        prepare_folder(out)
        loaded, preprocess, embedded = load()
        with CommandProgress("frames") as progress:

            def on_frame(record):
                what = f"skip {record.skip_rate:.1%}, cost {record.cost:.3f}"
                progress.show(what, record.index // stride + 1, reader.expected_frames)

            wanted = {"dense_every": dense_every, "overlay": overlay, "labels": embedded, "objects": objects}
            named = {"model_name": how["model"] or default_model().name, "command": command_line()}
            summary = run_video(reader, loaded, preprocess, out, gate_options, **wanted, **named, on_frame=on_frame)
    print_run(summary, out)
    if summary["status"] != "complete":
        typer.echo(f"Stopped early: {summary['message']}. The {summary['frames']} frames before are kept.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED if summary["status"] == "interrupted" else EXIT_DAMAGED)


def print_run(summary: dict, out: Path):
    """Print what a run gave."""
    from ..video import run_tables

    console = Console(highlight=False)
    console.print(f"[bold]{escape(summary['video']['name'])}[/]  {escape(run_tables.settings_in_words(summary))}")
    console.print(figure_table(*run_tables.per_frame_rows(summary)))
    if summary["compared_frames"]:
        console.print(figure_table(*run_tables.comparison_rows(summary), stress_first=True))
        if note := run_tables.baseline_note(summary):
            console.print(f"[yellow]{note}[/]")
    if "labels" in summary:
        headers, rows = run_tables.timeline_rows(summary["labels"])
        console.print(figure_table(headers, rows[:MOST_STRETCHES]))
        if (more := len(rows) - MOST_STRETCHES) > 0:
            typer.echo(f"and {more} more: all are under `labels`, `timeline` in {out / 'summary.json'}.")
    for line in run_tables.figures_in_words(summary):
        console.print(line, markup=False)
    print_written(out, summary["files"])
