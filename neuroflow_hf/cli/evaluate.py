"""`neuroflow eval`: measure a checkpoint on videos."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .options import option
from .output import command_line, figure_table, print_wide, print_written
from .progress import CommandProgress

FRAMES, QUICK_FRAMES = 96, 24


def evaluate(
    videos: Annotated[
        Path | None,
        typer.Argument(
            help="Video file, or folder of videos whose subfolders are named after what their videos show, as in "
            "UCF-101.",
            show_default="the two clips that ship here",
        ),
    ] = None,
    model: options.VisionModel = None,
    labels: options.Labels = None,
    template: options.Template = None,
    truth: Annotated[bool, option("Use subfolders' names as the videos' true labels.", panel=options.LABELS)] = True,
    methods: Annotated[
        str | None,
        option(
            "Presets or modes to compare with the baselines, separated by commas, such as 'balanced, context'.",
            default="the presets",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        option(
            "Also measure the gate options of this configuration (file or folder), such as `neuroflow tune` writes.",
            default="none",
        ),
    ] = None,
    frames: Annotated[
        int | None, option("Use the first N frames of each video; 0: all.", metavar="N", default=f"{FRAMES}")
    ] = None,
    stride: options.Stride = 1,
    resolution: options.Resolution = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    quick: Annotated[
        bool, option(f"Use {QUICK_FRAMES} frames of each video, and fewer settings of expensive baselines.", "--quick")
    ] = False,
    out: options.Out = Path("neuroflow-eval"),
    card: Annotated[
        bool, option("Write a model card with the figures, based on the checkpoint's card.", panel=options.OUTPUT)
    ] = True,
    write_card: Annotated[
        bool, option("Also write the card to the checkpoint's folder.", "--write-card", panel=options.OUTPUT)
    ] = False,
    fresh: options.Fresh = False,
    debug: options.Debug = False,
):
    """
    Measure a checkpoint on videos: dense, presets and baselines, with a report, plots and a model card.

    Without --labels, the names of the subfolders are the labels, if there are any. After an interruption, the same
    command continues. Several processes (`torchrun`, `accelerate launch`) share the videos.
    """
    with one_line_errors(debug, nothing_done=f"what was measured is in {out}; the same command continues."):
        from ..evaluation.card import CARD, existing_card
        from ..evaluation.datasets import chosen_labels, find_videos
        from ..evaluation.report import description, main_tables
        from ..evaluation.run import Evaluation, load_checkpoint
        from ..evaluation.settings import chosen_methods
        from ..loading import default_model, dtype_named, load_gate
        from ..utils.files import prepare_folder, write_whole
        from ..utils.processes import Processes
        from ..video.labels import TEMPLATE, check_labels, parse_labels

        # check what is quick to check before loading the model
        weights_dtype = dtype_named(dtype)
        if write_card and (model is None or not Path(model).is_dir()):
            raise ValueError("--write-card writes to the checkpoint's folder; name one with --model.")
        if write_card and not card:
            raise ValueError("Give --write-card or --no-card, not both.")
        gate = None if config is None else load_gate(config)
        if frames is None:
            frames = QUICK_FRAMES if quick else FRAMES
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
        how = {"dtype": weights_dtype, "device": processes.device_for(device), "resolution": resolution}
        checkpoint = load_checkpoint(source, names, template or TEMPLATE, must_read_text=labels is not None, **how)
        chosen = None if methods is None else [name.strip() for name in methods.split(",")]
        sides = checkpoint.model.config.patch_size, checkpoint.preprocess.resolution
        specs = chosen_methods(*sides, chosen, quick, gate)
        with CommandProgress("videos") as progress:

            def on_step(video, what, done, total):
                progress.show(f"{video[-40:]}: {what}", done, total)

            report = Evaluation(checkpoint, found, out, specs, frames or None, stride, fresh, on_step).run()
        if not processes.is_main:
            return
        report = {"command": command_line(), **report}
        files = write_evaluation(report, out, before, card)
        if write_card:
            write_whole(Path(model) / CARD, (out / "model_card.md").read_bytes())
    typer.echo("\n".join(description(report)))
    print_wide(*(figure_table(*table, title) for title, table in main_tables(report)), width=180)
    skipped = report["videos"]["skipped"]
    if skipped:
        typer.echo(f"Skipped {len(skipped)} of {report['videos']['count']} videos, which cannot be read:", err=True)
        for one in skipped[:10]:
            typer.echo(f"  {one['reason']}", err=True)
    print_written(out, files)
    if write_card:
        print_written(Path(model), [CARD])


def write_evaluation(report: dict, out: Path, existing_card: str | None, card: bool) -> list[str]:
    """Write a report as JSON, Markdown and plots, and a model card if `card`; the files' names."""
    from ..evaluation.card import evaluation_card
    from ..evaluation.plots import plot_accuracy, plot_fidelity
    from ..evaluation.report import card_markdown, report_markdown
    from ..utils.files import report_text, write_whole
    from ..utils.plots import save_plot

    plots = {"fidelity_over_cost.png": plot_fidelity}
    if report["labels"]["names"]:
        plots["accuracy_over_cost.png"] = plot_accuracy
    else:
        (out / "accuracy_over_cost.png").unlink(missing_ok=True)  # of an earlier run with labels
    for name, draw in plots.items():
        save_plot(draw(report), out / name)
    texts = {"report.md": report_markdown(report, list(plots))}
    if card:
        texts["model_card.md"] = evaluation_card(report, card_markdown(report), existing_card)
    texts["report.json"] = report_text(report)
    for name, text in texts.items():
        write_whole(out / name, text)
    return [*texts, *plots]
