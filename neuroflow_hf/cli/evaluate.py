"""The command that measures a checkpoint on videos: `neuroflow eval`."""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import one_line_errors, require_dtype
from .progress import CommandProgress

LABELS = "Labels"
OUTPUT = "Output"
FRAMES, QUICK_FRAMES = 96, 24


def evaluate(
    videos: Annotated[
        Path | None,
        typer.Argument(
            help="Video file, or folder of videos; subfolders' names say what their videos show, as in UCF-101.",
            show_default="the two clips that ship here",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of a SigLIP or SigLIP 2 checkpoint with its image processor.",
            show_default="in a checkout the one under models/, else a real vision tower, built on first use",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="What the videos may show, separated by commas, such as 'a dog, a cat'; the model must read text.",
            show_default="the subfolders' names, if there are any",
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
    truth: Annotated[
        bool,
        typer.Option(help="Take subfolders' names for what their videos show.", rich_help_panel=LABELS),
    ] = True,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Presets, modes or single settings, separated by commas, such as 'balanced, context'; the controls "
            "always come along.",
            show_default="the presets",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Also measure the gate options of this configuration, such as `neuroflow tune` writes, or of its "
            "folder's.",
            show_default="none",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Take the first so many frames of each video; 0: all.", show_default=f"{FRAMES}"),
    ] = None,
    stride: Annotated[int, typer.Option(help="Take every so many frames.")] = 1,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the frames in pixels.", show_default="the model's")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes CUDA if there is one.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_FRAMES} frames of each video, fewer settings of dear controls.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the intervals' bootstrap.")] = 0,
    out: Annotated[
        Path,
        typer.Option(help="Folder to write to; what was measured there before is used.", rich_help_panel=OUTPUT),
    ] = Path("neuroflow-eval"),
    card: Annotated[
        bool,
        typer.Option(
            help="Write a model card with the figures: the checkpoint's own, or a new one.", rich_help_panel=OUTPUT
        ),
    ] = True,
    write_card: Annotated[
        bool,
        typer.Option("--write-card", help="Also write the card into the checkpoint's folder.", rich_help_panel=OUTPUT),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all anew.", rich_help_panel=OUTPUT)] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show errors with their traceback.", rich_help_panel=OUTPUT)
    ] = False,
):
    """
    Measure a checkpoint on videos: dense, the presets and the controls, with a report, plots and a model card.

    Interrupted, the same command continues. Several processes (`torchrun`, `accelerate launch`) share the videos.
    """
    nothing_done = f"what was measured is in {out}; the same command continues."
    with one_line_errors(debug, nothing_done):
        require_dtype(dtype)

        from ..evaluation.card import existing_card
        from ..evaluation.datasets import chosen_labels, find_videos
        from ..evaluation.run import EvalSettings, evaluate_checkpoint, load_checkpoint
        from ..loading import DTYPES, default_model, load_gate
        from ..utils.files import prepare_folder
        from ..utils.processes import Processes
        from ..video.labels import TEMPLATE, check_labels, parse_labels

        # what fails quickly goes first
        if write_card and (model is None or not Path(model).is_dir()):
            raise ValueError("--write-card writes into the checkpoint's folder; name one with --model.")
        if write_card and not card:
            raise ValueError("Give --write-card or --no-card, not both.")
        gate = None if config is None else load_gate(config)
        settings = EvalSettings(frames=wanted_frames(frames, quick), stride=stride, seed=seed)
        found = find_videos(videos, truth)
        names = chosen_labels(found, None if labels is None else parse_labels(labels))
        if names:
            check_labels(names, template or TEMPLATE)
        elif template is not None:
            raise ValueError("--template goes with labels; name some, or put videos into subfolders named after them.")
        prepare_folder(out)
        source = model or default_model()
        before = existing_card(source) if card else None
        processes = Processes()
        if device == "auto" and processes.device is not None:
            device = str(processes.device)
        checkpoint = load_checkpoint(
            source, names, template or TEMPLATE, DTYPES[dtype], device, resolution, must_read_text=labels is not None
        )
        wanted = None if methods is None else [name.strip() for name in methods.split(",")]
        with eval_progress() as on_step:
            report = evaluate_checkpoint(checkpoint, found, out, settings, wanted, quick, fresh, on_step, gate)
        if not processes.is_main:
            return
        report = {"command": shlex.join(["neuroflow", *sys.argv[1:]]), **report}
        files = write_evaluation(report, out, before if card else None, card)
        if write_card:
            from ..evaluation.card import CARD
            from ..utils.files import write_whole

            write_whole(Path(model) / CARD, (out / "model_card.md").read_bytes())
    print_evaluation(report)
    console = Console(highlight=False)
    console.print(f"Written to {escape(str(out))}: {', '.join(files)}", soft_wrap=True)
    if write_card:
        console.print(f"The card is in {escape(str(model))}, too.", soft_wrap=True)


def wanted_frames(frames: int | None, quick: bool) -> int | None:
    """How many frames of each video; None for all."""
    if frames is None:
        return QUICK_FRAMES if quick else FRAMES
    return frames or None


@contextlib.contextmanager
def eval_progress() -> Iterator[Any]:
    """A progress bar on stderr; yields what `evaluate_checkpoint` calls."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("videos"))
    console = Console(stderr=True, highlight=False)
    progress = CommandProgress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    task = progress.add_task("reading", total=None)

    def on_step(video, what, done, total):
        progress.update(task, description=escape(f"{video[-40:]}: {what}"), completed=done, total=total)

    try:
        yield on_step
    finally:
        progress.close()


def write_evaluation(report: dict, out: Path, existing_card: str | None, card: bool) -> list[str]:
    """Write a report as JSON, Markdown and pictures, and the card, each whole; the files' names."""
    from ..evaluation.card import evaluation_card
    from ..evaluation.plots import plot_accuracy, plot_fidelity
    from ..evaluation.report import card_markdown, report_markdown
    from ..utils.files import report_text, write_whole
    from ..video.plots import save_plot

    plots = {"fidelity_over_cost.png": plot_fidelity}
    if report["labels"]["names"]:
        plots["accuracy_over_cost.png"] = plot_accuracy
    else:
        (out / "accuracy_over_cost.png").unlink(missing_ok=True)  # of an earlier run with labels
    for name, draw in plots.items():
        save_plot(draw(report), out / name)
    write_whole(out / "report.md", report_markdown(report, list(plots)))
    files = ["report.json", "report.md", *plots]
    if card:
        text = evaluation_card(report, card_markdown(report), existing_card)
        write_whole(out / "model_card.md", text)
        files.append("model_card.md")
    write_whole(out / "report.json", report_text(report))
    return files


def print_evaluation(report: dict):
    """A report as tables on stdout; skipped videos on stderr."""
    from ..evaluation.report import description, label_words, main_tables

    console = Console(highlight=False)
    console.print(escape(description(report)), soft_wrap=True)
    console.print(escape(label_words(report)), soft_wrap=True)
    console = Console(highlight=False, width=max(console.width, 180))  # narrower, figures would break
    for title, (headers, rows) in main_tables(report):
        table = Table(*headers, title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    skipped = report["videos"]["skipped"]
    if skipped:
        typer.echo(f"Skipped {len(skipped)} of {report['videos']['count']} videos, which cannot be read:", err=True)
        for one in skipped[:10]:
            typer.echo(f"  {one['reason']}", err=True)
