"""The `neuroflow` command: parses options, calls the library, prints. Libraries are imported where they are used."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import EXIT_DAMAGED, EXIT_INTERRUPTED, EXIT_UNREACHED, one_line_errors, require_dtype
from .evaluate import evaluate
from .language import drift, generate
from .progress import CommandProgress

app = typer.Typer(
    help="SigLIP over video without computing again what did not change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

GATE = "Gate (defaults: the model's own, else those named here)"
COMPARISON = "Comparison and output"
LABELS = "Labels"
MOST_STRETCHES = 20  # printed of the labels' timeline


def show_version(wanted: bool):
    """Print the version and leave."""
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


def parse_gate(settings: list[str]) -> dict[str, Any]:
    """`["dilate=1", "max_age=none"]` to `{"dilate": 1, "max_age": None}`; ValueError without a `=`."""
    options = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--gate {setting!r} has no value; expected NAME=VALUE, such as dilate=1.")
        try:
            value = None if text.lower() == "none" else json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            value = text
        options[name.strip().replace("-", "_")] = value
    return options


# --- run -----------------------------------------------------------------------------------------------------------


@app.command()
def run(
    video: Annotated[Path | None, typer.Argument(help="Video file.", show_default="the clip that ships here")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of a SigLIP or SigLIP 2 checkpoint with its image processor.",
            show_default="in a checkout the one under models/, else a real vision tower, built on first use",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to; files of an earlier run are replaced.")] = Path(
        "neuroflow-run"
    ),
    resolution: Annotated[
        int | None, typer.Option(help="Side of the frames in pixels.", show_default="the model's")
    ] = None,
    stride: Annotated[int, typer.Option(help="Take every so many frames of the video.")] = 1,
    max_frames: Annotated[int | None, typer.Option(help="Stop after so many frames.", show_default="all")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes CUDA if there is one.")] = "auto",
    labels: Annotated[
        str | None,
        typer.Option(
            help="What the frames may show, separated by commas, such as 'a dog, a cat'; the model must read text.",
            show_default="none",
            rich_help_panel=LABELS,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="The text that is compared with frames, with {} for the label.",
            show_default="This is a photo of {}.",
            rich_help_panel=LABELS,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Configuration with gate options, such as `neuroflow tune` writes, or its folder; options named here "
            "are laid over it.",
            show_default="none",
            rich_help_panel=GATE,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="faithful, balanced or thrifty; other options are laid over it.",
            show_default="balanced",
            rich_help_panel=GATE,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="extrapolate, context, reconstruct, eliminate, mlp, hold or dense; without --preset, with "
            "plain defaults.",
            show_default="extrapolate",
            rich_help_panel=GATE,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Encode patches whose surprise is above this; -1: all.", show_default="0.01", rich_help_panel=GATE
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Compare with last_update, ema or both.", show_default="last_update", rich_help_panel=GATE),
    ] = None,
    signal: Annotated[
        str | None,
        typer.Option(help="patch, or token (with position embeddings).", show_default="patch", rich_help_panel=GATE),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Encode exactly so many patches, whatever the threshold.", show_default="none", rich_help_panel=GATE
        ),
    ] = None,
    dilate: Annotated[
        int | None,
        typer.Option(help="Also encode neighbours this far away.", show_default="0", rich_help_panel=GATE),
    ] = None,
    max_age: Annotated[
        int | None,
        typer.Option(help="Encode every patch within so many frames.", show_default="none", rich_help_panel=GATE),
    ] = None,
    keyframe_interval: Annotated[
        int | None,
        typer.Option(help="Encode all every so many frames.", show_default="the preset's", rich_help_panel=GATE),
    ] = None,
    keyframe_fraction: Annotated[
        float | None,
        typer.Option(
            help="Encode everything when more than this share changed.", show_default="never", rich_help_panel=GATE
        ),
    ] = None,
    cost_budget: Annotated[
        float | None,
        typer.Option(
            help="Spend no more than this share of dense in the long run.",
            show_default="the preset's",
            rich_help_panel=GATE,
        ),
    ] = None,
    global_motion_norm: Annotated[
        bool | None,
        typer.Option(
            "--global-motion-norm",
            help="Subtract the mean surprise first.",
            show_default="no",
            rich_help_panel=GATE,
        ),
    ] = None,
    ema_rate: Annotated[
        float | None,
        typer.Option(help="Rate of the running mean (ema, both).", show_default="0.01", rich_help_panel=GATE),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other gate option; can be repeated.", rich_help_panel=GATE),
    ] = None,
    dense_every: Annotated[
        int | None,
        typer.Option(
            help="Compare with dense on every so many frames; 0: never.",
            show_default="about 25 samples in all",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    overlay: Annotated[
        bool, typer.Option(help="Write a video of what was encoded.", rich_help_panel=COMPARISON)
    ] = True,
    objects: Annotated[
        bool,
        typer.Option(
            "--objects",
            help="Also find what moves: boxes in the pictures and in frames.jsonl; with --labels, named.",
            rich_help_panel=COMPARISON,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show errors with their traceback.", rich_help_panel=COMPARISON)
    ] = False,
):
    """Stream a video through SigLIP, compare with dense, and write what was seen, saved and lost."""
    named = {
        "preset": preset,
        "mode": mode,
        "threshold": threshold,
        "reference": reference,
        "signal": signal,
        "token_budget": token_budget,
        "dilate": dilate,
        "max_age": max_age,
        "keyframe_interval": keyframe_interval,
        "keyframe_fraction": keyframe_fraction,
        "cost_budget": cost_budget,
        "global_motion_norm": global_motion_norm,
        "ema_rate": ema_rate,
    }
    with one_line_errors(debug, nothing_done="nothing was written."):
        options = {name: value for name, value in named.items() if value is not None} | parse_gate(gate or [])
        require_dtype(dtype)

        from ..loading import DTYPES, default_model, load_gate, load_model, load_model_with_labels, usable_device
        from ..utils.files import prepare_folder
        from ..video.labels import TEMPLATE, check_labels, parse_labels
        from ..video.reader import VideoReader, bundled_clip
        from ..video.run import run_video
        from ..vision.gate_config import NeuroFlowGateConfig

        # what fails quickly goes first
        names = None if labels is None else parse_labels(labels)
        if names is None and template is not None:
            raise ValueError("--template goes with --labels; name some.")
        if names is not None:
            template = TEMPLATE if template is None else template
            check_labels(names, template)
        reader = VideoReader(video or bundled_clip(), stride=stride, max_frames=max_frames)
        usable_device(device)
        if dense_every is not None and dense_every < 0:
            raise ValueError(f"`dense_every` is {dense_every}; expected a number of frames, or 0 for no comparison.")
        if config is not None:
            if "preset" in options:
                raise ValueError("Give --config or --preset: each is a whole set of gate options.")
            options = load_gate(config) | options
        if model is None:  # the default has no gate options of its own, and its making may take minutes
            NeuroFlowGateConfig.from_options(**options)
        prepare_folder(out)
        source = model or default_model()
        how = (DTYPES[dtype], device, resolution)
        if names is None:
            (loaded, preprocess), embedded = load_model(source, *how), None
        else:
            loaded, preprocess, embedded = load_model_with_labels(source, names, template, *how)
        with frame_progress(reader.expected_frames) as on_frame:
            result = run_video(
                reader,
                loaded,
                preprocess,
                out,
                options,
                dense_every=dense_every,
                overlay=overlay,
                labels=embedded,
                objects=objects,
                model_name=model or source.name,
                command=shlex.join(["neuroflow", *sys.argv[1:]]),
                on_frame=on_frame,
            )
    print_run(result, out)
    if result.status != "complete":
        typer.echo(
            f"Stopped early: {result.message}. The {result.summary['frames']} frames before are kept.", err=True
        )
        raise typer.Exit(EXIT_INTERRUPTED if result.status == "interrupted" else EXIT_DAMAGED)


@contextlib.contextmanager
def frame_progress(expected_frames: int | None) -> Iterator[Any]:
    """A progress bar on stderr; yields what to call with each frame's record."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("frames"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("skip {task.fields[skip]}  cost {task.fields[cost]}"),
        TimeRemainingColumn(),
    )
    progress = CommandProgress(*columns, console=Console(stderr=True))
    task = progress.add_task("frames", total=expected_frames, skip="-", cost="-")

    def on_frame(record):
        progress.update(task, advance=1, skip=f"{record.skip_rate:.1%}", cost=f"{record.cost:.3f}")

    try:
        yield on_frame
    finally:
        progress.close()


def print_run(result: Any, out: Path):
    """What a run gave, as tables on stdout."""
    from ..video.records import gate_rule
    from ..vision.gate_config import NeuroFlowGateConfig

    console, summary = Console(highlight=False), result.summary
    video, gate = summary["video"], summary["gate"]
    rule = gate_rule(NeuroFlowGateConfig(**gate))
    grid = summary["grid"]
    console.print(
        f"[bold]{escape(video['name'])}[/]  {video['width']}x{video['height']}, {summary['frames']} frames"
        f"  |  {escape(str(summary['model']))}, {summary['resolution']} px, {grid[0]}x{grid[1]} patches"
        f"  |  {gate['mode']}, {gate['reference']}, {rule}"
        f"  |  {summary['dtype']} on {summary['device']}, {summary['torch_threads']} threads"
    )
    console.print(per_frame_table(summary))
    if summary["compared_frames"]:
        console.print(fidelity_table(summary))
        note = control_note(summary)
        if note:
            console.print(f"[yellow]{note}[/]")
    if "labels" in summary:
        print_labels(console, summary, out)
    if "objects" in summary:
        moving, counts = summary["objects"]["frames"], summary["objects"]["per_frame"]
        console.print(
            f"Moving objects: on {moving} of {summary['frames']} frames, {counts['mean']:.1f} a frame by mean, "
            f"{counts['max']:.0f} at most."
        )
    if summary["speed_up"]:
        speed_up = summary["speed_up"]
        console.print(
            f"Speed-up over dense: [bold]{speed_up['median']:.2f}x[/] (median; each sampled frame against its own "
            f"dense run), {speed_up['mean']:.2f}x by mean of all frames, keyframes and disturbances included."
        )
    console.print(
        f"Keyframes (everything encoded): {summary['keyframes']} of {summary['frames']} frames, the first among them; "
        f"{summary['compared_keyframes']} of the {summary['compared_frames']} compared.  "
        f"Stream memory: {summary['stream_bytes'] / 2**20:.1f} MiB."
    )
    console.print(
        "Milliseconds are those of the forward alone; decoding and preprocessing, in a thread of their own, wait "
        f"meanwhile.  Wall clock with everything: {summary['wall_clock_seconds']:.1f} s."
    )
    console.print(f"Written to {escape(str(out))}: {', '.join(summary['files'])}")


def per_frame_table(summary: dict) -> Table:
    """Skip rate, cost and milliseconds, each over the run's frames."""
    table = Table("per frame", "frames", "mean", "median", "p5", "p95", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    times = summary["milliseconds_per_frame"]
    rows = [
        ("skip rate", summary["frames"], summary["skip_rate"], "{:.1%}"),
        ("cost (dense = 1)", summary["frames"], summary["cost"], "{:.3f}"),
        ("milliseconds, streamed", summary["frames"], times["streamed"], "{:.1f}"),
        ("milliseconds, dense", summary["sampled_frames"], times["dense"], "{:.1f}"),
    ]
    for label, frames, values, form in rows:
        if values:
            table.add_row(label, str(frames), *(form.format(values[name]) for name in ("mean", "median", "p5", "p95")))
    return table


def fidelity_table(summary: dict) -> Table:
    """
    Cosine to dense of the stream and of the controls, on the sampled frames after the first. A held embedding is
    compared at its oldest, just before the next dense frame.
    """
    table = Table(f"cosine to dense, {summary['compared_frames']} frames", "cost", "mean", "p5", "min")
    for column in table.columns[1:]:
        column.justify = "right"
    cosines, every = summary["cosine_to_dense"], summary["dense_every"]
    rows = [
        ("streamed", f"{summary['cost']['mean']:.3f}", cosines["streamed"], "bold"),
        ("control: first frame repeated", "0", cosines["first_frame"], "dim"),
        (f"control: dense every {every}, held {every} frames", f"{1 / every:.3f}", cosines["held"], "dim"),
    ]
    control = summary["held_at_cost"]
    if control and control["every"] != every:
        label = f"control: dense every {control['every']}, held {control['every']} frames"
        rows.append((label, f"{control['cost']:.3f}", control["cosine"], "dim"))
    for label, cost, values, style in rows:
        figures = (f"{values[name]:.4f}" for name in ("mean", "p5", "min"))
        table.add_row(label, cost, *figures, style=style)
    return table


def control_note(summary: dict) -> str:
    """A warning if a control that costs no more is about as close to dense as the stream, by mean; else nothing."""
    cosines, every = summary["cosine_to_dense"], summary["dense_every"]
    error = {name: 1 - values["mean"] for name, values in cosines.items()}
    # less than a tenth of a control's error removed is not worth a network
    if error["streamed"] >= 0.9 * error["first_frame"]:
        return "Here, repeating the first frame's embedding is about as close to dense: these settings gain little."
    control = summary["held_at_cost"]
    as_good = [every] if 1 / every <= summary["cost"]["mean"] and error["streamed"] >= 0.9 * error["held"] else []
    if control and error["streamed"] >= 0.9 * (1 - control["cosine"]["mean"]):
        as_good.append(control["every"])
    if as_good:
        return f"Here, dense every {as_good[0]} frames, held between, is about as close or closer and costs no more."
    return ""


def print_labels(console: Console, summary: dict, out: Path):
    """The labels' timeline, and how often the best label is that of dense."""
    console.print(timeline_table(summary["labels"]))
    more = len(summary["labels"]["timeline"]) - MOST_STRETCHES
    if more > 0:
        console.print(f"and {more} more: all are under `labels`, `timeline` in {escape(str(out / 'summary.json'))}.")
    if summary["labels"]["agreement"]["compared_frames"]:
        console.print(agreement_table(summary))


def timeline_table(labels: dict) -> Table:
    """Which label fits best from when to when: every change of it, in order, as far as `MOST_STRETCHES` lines go."""
    from ..video.label_records import percent

    table = Table("best label", "seconds", "frames", "confidence", f"share among {len(labels['names'])}")
    for column in table.columns[1:]:
        column.justify = "right"
    for stretch in labels["timeline"][:MOST_STRETCHES]:
        seconds = f"{stretch['start']:.1f} to {stretch['end']:.1f}"
        figures = percent(stretch["confidence"]), percent(stretch["share"])
        table.add_row(escape(stretch["label"]), seconds, str(stretch["frames"]), *figures)
    return table


def agreement_table(summary: dict) -> Table:
    """
    On how many sampled frames after the first the stream's best label, and the controls', is the one that dense gives.
    A held label is compared at its oldest, as the cosine is.
    """
    found, every = summary["labels"]["agreement"], summary["dense_every"]
    table = Table("best label as in dense", "cost", "frames")
    for column in table.columns[1:]:
        column.justify = "right"
    compared = found["compared_frames"]
    rows = [
        ("streamed", f"{summary['cost']['mean']:.3f}", found["streamed"], compared, "bold"),
        ("control: first frame's label repeated", "0", found["first_frame"], compared, "dim"),
        (f"control: dense every {every}, held {every} frames", f"{1 / every:.3f}", found["held"], compared, "dim"),
    ]
    control = found["held_at_cost"]
    if control and control["every"] != every:
        label = f"control: dense every {control['every']}, held {control['every']} frames"
        rows.append((label, f"{control['cost']:.3f}", control["agreed"], control["compared_frames"], "dim"))
    for label, cost, agreed, of, style in rows:
        table.add_row(label, cost, f"{agreed} of {of}", style=style)
    return table


# --- tune ----------------------------------------------------------------------------------------------------------


@app.command()
def tune(
    video: Annotated[
        Path | None, typer.Argument(help="Video like those to come.", show_default="the clip that ships here")
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(help="Find the cheapest settings this close to dense, such as 0.99.", show_default="none"),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(help="Find the settings closest to dense that cost no more, such as 0.1.", show_default="none"),
    ] = None,
    statistic: Annotated[
        str, typer.Option(help="What of the frames' cosines counts: p5 (5th percentile), mean or min.")
    ] = "p5",
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of a SigLIP or SigLIP 2 checkpoint with its image processor.",
            show_default="in a checkout the one under models/, else a real vision tower, built on first use",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to; files of an earlier tuning are replaced.")] = Path(
        "neuroflow-tuned"
    ),
    frames: Annotated[int, typer.Option(help="Measure on so many frames.")] = 120,
    stretches: Annotated[
        int, typer.Option(help="In so many stretches, spread over the video; keyframes are at least once in each.")
    ] = 3,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the frames in pixels.", show_default="the model's")
    ] = None,
    stride: Annotated[int, typer.Option(help="Take every so many frames of the video.")] = 1,
    max_frames: Annotated[
        int | None, typer.Option(help="Look at no more than so many frames of the video.", show_default="all")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes CUDA if there is one.")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")] = False,
):
    """Find gate settings for a checkpoint and a camera, beside the controls, and write a configuration with them."""
    with one_line_errors(debug, nothing_done="nothing was written."):
        require_dtype(dtype)

        from ..evaluation.equal_cost import Requirement
        from ..evaluation.tuning import checkpoint_config, tune_video, write_tuning
        from ..evaluation.tuning_report import next_steps
        from ..loading import DTYPES, default_model, load_model, usable_device
        from ..utils.files import prepare_folder
        from ..video.reader import VideoReader, bundled_clip

        # what fails quickly goes first
        Requirement(min_cosine, max_cost, statistic)
        reader = VideoReader(video or bundled_clip(), stride=stride, max_frames=max_frames)
        usable_device(device)
        prepare_folder(out)
        source = model or default_model()
        loaded, preprocess = load_model(source, DTYPES[dtype], device, resolution)
        with tune_progress(statistic) as on_step:
            result = tune_video(
                reader,
                loaded,
                preprocess,
                min_cosine=min_cosine,
                max_cost=max_cost,
                statistic=statistic,
                frames=frames,
                stretches=stretches,
                on_step=on_step,
            )
        config = checkpoint_config(source)
        command = shlex.join(["neuroflow", *sys.argv[1:]])
        files = write_tuning(result, out, config, model_name=model or source.name, command=command)
    print_tuning(result)
    if result.chosen is not None:
        given = {"model": model, "resolution": resolution, "stride": stride if stride > 1 else None, "config": out}
        for line in next_steps(video, given, type(config).__name__, source):
            typer.echo(line)  # without markup and line breaks: to be pasted
    Console(highlight=False).print(f"Written to {escape(str(out))}: {', '.join(file.name for file in files)}")
    if result.note:
        typer.echo(f"The video broke off: {result.note}. What was read before counts.", err=True)
    if result.status == "interrupted":
        typer.echo(f"Stopped by Ctrl-C; {len(result.points)} settings were measured before.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.chosen is None:
        raise typer.Exit(EXIT_UNREACHED)


@contextlib.contextmanager
def tune_progress(statistic: str) -> Iterator[Any]:
    """A progress bar on stderr, with a line above it for each setting measured; yields what `tune_video` calls."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    from ..evaluation.tuning_report import figure_words

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"))
    progress = CommandProgress(*columns, console=Console(stderr=True, highlight=False), transient=True)
    task = progress.add_task("reading", total=None)

    def on_step(what, done, total, point):
        progress.update(task, description=what, completed=done, total=total)
        if point is not None:
            progress.console.print(figure_words(point, statistic), soft_wrap=True)

    try:
        yield on_step
    finally:
        progress.close()


def print_tuning(result: Any):
    """What a tuning found, as a table and a few sentences on stdout."""
    from ..evaluation.tuning_report import tuning_rows, tuning_sentences

    console = Console(highlight=False)
    table = Table("", "cost", "mean", "p5", "min", "worst stretch", "ms", title=f"required: {result.requirement}")
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for place, row in enumerate(tuning_rows(result)):
        table.add_row(*row, style="bold" if place == 0 else "dim")
    console.print(table)
    for sentence in tuning_sentences(result):
        console.print(escape(sentence), soft_wrap=True)


# --- eval ----------------------------------------------------------------------------------------------------------

app.command("eval")(evaluate)

# --- language ------------------------------------------------------------------------------------------------------

app.command()(generate)
app.command()(drift)
