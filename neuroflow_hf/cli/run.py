"""`neuroflow run`: stream a video through a vision tower and compare with dense."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
        from ..video.run import require_comparison, run_video

        # check what is quick to check before loading the model
        gate_options, load = check_vision(how, options.given(**chosen))
        reader = VideoReader(video or bundled_clip(), stride=stride, max_frames=max_frames)
        require_comparison(dense_every)
        prepare_folder(out)
        loaded, preprocess, embedded = load()
        with CommandProgress("frames") as progress:

            def on_frame(record):
                what = f"skip {record.skip_rate:.1%}, cost {record.cost:.3f}"
                progress.show(what, record.index // stride + 1, reader.expected_frames)

            result = run_video(
                reader,
                loaded,
                preprocess,
                out,
                gate_options,
                dense_every=dense_every,
                overlay=overlay,
                labels=embedded,
                objects=objects,
                model_name=how["model"] or default_model().name,
                command=command_line(),
                on_frame=on_frame,
            )
    print_run(result.summary, out)
    if result.status != "complete":
        frames = result.summary["frames"]
        typer.echo(f"Stopped early: {result.message}. The {frames} frames before are kept.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED if result.status == "interrupted" else EXIT_DAMAGED)


# --- what is printed -----------------------------------------------------------------------------------------------


def print_run(summary: dict, out: Path):
    """Print what a run gave."""
    from ..video.records import gate_rule
    from ..vision.gate_config import NeuroFlowGateConfig

    console = Console(highlight=False)
    video, gate, grid = summary["video"], summary["gate"], summary["grid"]
    console.print(
        f"[bold]{escape(video['name'])}[/]  {video['width']}x{video['height']}, {summary['frames']} frames"
        f"  |  {escape(str(summary['model']))}, {summary['resolution']} px, {grid[0]}x{grid[1]} patches"
        f"  |  {gate['mode']}, {gate['reference']}, {gate_rule(NeuroFlowGateConfig(**gate))}"
        f"  |  {summary['dtype']} on {summary['device']}, {summary['torch_threads']} threads"
    )
    console.print(per_frame_table(summary))
    if summary["compared_frames"]:
        console.print(comparison_table(summary))
        note = baseline_note(summary)
        if note:
            console.print(f"[yellow]{note}[/]")
    if "labels" in summary:
        labels = summary["labels"]
        console.print(timeline_table(labels))
        more = len(labels["timeline"]) - MOST_STRETCHES
        if more > 0:
            typer.echo(f"and {more} more: all are under `labels`, `timeline` in {out / 'summary.json'}.")
    if "objects" in summary:
        counts = summary["objects"]["per_frame"]
        console.print(
            f"Moving objects: on {summary['objects']['frames']} of {summary['frames']} frames, {counts['mean']:.1f} "
            f"per frame on average, at most {counts['max']:.0f}."
        )
    if summary["speed_up"]:
        speed_up = summary["speed_up"]
        console.print(
            f"Speed-up over dense: [bold]{speed_up['median']:.2f}x[/] (median of the sampled frames, each against its "
            f"own dense forward), {speed_up['mean']:.2f}x by the means of all frames, keyframes included."
        )
    console.print(
        f"Keyframes (all patches encoded): {summary['keyframes']} of {summary['frames']} frames, with the first; "
        f"{summary['compared_keyframes']} of the {summary['compared_frames']} compared.  "
        f"Stream memory: {summary['stream_bytes'] / 2**20:.1f} MiB."
    )
    console.print(
        "Milliseconds are of the forward alone; decoding and preprocessing wait meanwhile.  "
        f"Wall clock with everything: {summary['wall_clock_seconds']:.1f} s."
    )
    print_written(out, summary["files"])


def per_frame_table(summary: dict) -> Table:
    """Skip rate, cost and milliseconds per frame."""
    times = summary["milliseconds_per_frame"]
    measured = [
        ("skip rate", summary["frames"], summary["skip_rate"], "{:.1%}"),
        ("cost (dense = 1)", summary["frames"], summary["cost"], "{:.3f}"),
        ("milliseconds, streamed", summary["frames"], times["streamed"], "{:.1f}"),
        ("milliseconds, dense", summary["sampled_frames"], times["dense"], "{:.1f}"),
    ]
    columns = ("mean", "median", "p5", "p95")
    rows = [
        (label, str(frames), *(form.format(values[name]) for name in columns))
        for label, frames, values, form in measured
        if values
    ]
    return figure_table(("per frame", "frames", *columns), rows)


def comparison_table(summary: dict) -> Table:
    """
    The stream and its baselines beside dense, on the sampled frames after the first: cosines and, with labels, how
    often the best label is the same. Held outputs are compared at their oldest.
    """
    cosines, held = dict(summary["cosine_to_dense"]), summary["held_at_cost"]
    rows = {
        "streamed": ("streamed", summary["cost"]["mean"]),
        "first_frame": ("baseline: first frame repeated", 0.0),
    }
    if held:
        rows["held_at_cost"] = f"baseline: dense every {held['every']} frames, held between", held["cost"]
        cosines["held_at_cost"] = held["cosine"]
    found = summary["labels"]["agreement"] if "labels" in summary else {}
    cells = []
    for name, (title, cost) in rows.items():
        row = [title, f"{cost:.3f}", *(f"{cosines[name][column]:.4f}" for column in ("mean", "p5", "min"))]
        if name == "held_at_cost" and found:
            row.append(f"{found[name]['agreed']} of {found[name]['compared_frames']}")
        elif found:
            row.append(f"{found[name]} of {found['compared_frames']}")
        cells.append(row)
    headers = (f"to dense, {summary['compared_frames']} frames", "cost", "mean cosine", "p5", "min")
    return figure_table((*headers, *(["same label"] if found else [])), cells, stress_first=True)


def baseline_note(summary: dict) -> str:
    """A warning if a baseline of at most the stream's cost is about as close to dense by the mean; else empty."""
    cosines, held = summary["cosine_to_dense"], summary["held_at_cost"]
    # a stream that removes less than a tenth of a baseline's error is not worth its cost
    allowed = (1 - cosines["streamed"]["mean"]) / 0.9
    if 1 - cosines["first_frame"]["mean"] <= allowed:
        return "Here, repeating the first frame's embedding is about as close to dense: these settings gain little."
    if held and 1 - held["cosine"]["mean"] <= allowed:
        return f"Here, dense every {held['every']} frames, held between, is about as close or closer, at no more cost."
    return ""


def timeline_table(labels: dict) -> Table:
    """The best label over time, at most `MOST_STRETCHES` rows."""
    from ..video.label_records import percent

    headers = ("best label", "seconds", "frames", "confidence", f"share among {len(labels['names'])}")
    rows = []
    for stretch in labels["timeline"][:MOST_STRETCHES]:
        seconds = f"{stretch['start']:.1f} to {stretch['end']:.1f}"
        figures = percent(stretch["confidence"]), percent(stretch["share"])
        rows.append((stretch["label"], seconds, str(stretch["frames"]), *figures))
    return figure_table(headers, rows)
