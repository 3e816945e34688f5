"""`neuroflow distill`: train a sparse adapter for a checkpoint."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .errors import EXIT_INTERRUPTED, one_line_errors
from .option_groups import Group, unset, with_groups
from .options import option
from .output import command_line, figure_table, print_wide, print_written
from .progress import CommandProgress

QUICK = {"steps": 40, "clip_frames": 8, "keyframe_ages": (8, 8), "batch": 2, "evaluate_every": 10}

training = functools.partial(unset, panel="Training")
TRAINING: Group = {
    "steps": training(int, "Optimizer steps.", "600"),
    "learning_rate": training(float, "Largest learning rate.", "0.0002; full: 3e-05"),
    "batch": training(int, "Clips encoded together.", "4; full: 1", metavar="N"),
    "accumulate": training(int, "Batches of a step.", "1", metavar="N"),
    "clip_frames": training(int, "Frames of a clip.", "24", metavar="N"),
    "frame_stride": training(int, "Use every Nth frame of the videos.", "3", metavar="N"),
    "resolutions": training(
        str, "Sides of the frames in pixels, separated by commas; one is drawn for each batch.", "the model's"
    ),
    "summary_tokens": training(
        int, "Summary tokens of the stream, a square number.", "64, in context and extrapolate 0"
    ),
    "rank": training(int, "Rank of the adapter.", "16"),
    "targets": training(
        str, "What the adapter changes in every layer, separated by commas.", "q_proj,k_proj,v_proj,out_proj,fc1,fc2"
    ),
}


@with_groups(own=TRAINING)
def distill(
    own: dict,
    videos: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Videos to learn from: files, or folders of them.", show_default="the clips that ship here"
        ),
    ] = None,
    model: options.VisionModel = None,
    mode: Annotated[str, option("Mode to distill: eliminate, reconstruct, context or extrapolate.")] = "reconstruct",
    out: options.Out = Path("neuroflow-distilled"),
    method: Annotated[
        str,
        option("lora: an adapter that changes sparse frames only; full: all weights, as the paper, which forgets."),
    ] = "lora",
    held_out: Annotated[
        Path | None,
        option("Video or folder to measure on.", default="every fifth video, or the last quarter of each"),
    ] = None,
    quick: Annotated[bool, option("Train for a few minutes, to see it work.", "--quick")] = False,
    device: options.Device = "auto",
    debug: options.Debug = False,
):
    """
    Train a sparse adapter: sparse frames come closer to dense, keyframes and the model stay as they are.

    The weights that are best on held-out clips are written to the output folder. An interrupted command goes on when
    it is started again.
    """
    with one_line_errors(debug, nothing_done="the same command goes on from the last checkpoint."):
        import torch

        from ..distill import DistillSettings
        from ..distill import distill as train
        from ..distill.report import HEADERS, held_out_rows, held_out_words, write_report
        from ..evaluation.datasets import find_videos
        from ..loading import default_model, load_model
        from ..utils.files import prepare_folder
        from ..utils.processes import Processes

        # check what is quick to check before loading the model
        own = options.given(**own)
        if "resolutions" in own:
            own["resolutions"] = parse_sides(own["resolutions"])
        if "targets" in own:
            own["targets"] = tuple(name.strip() for name in own["targets"].split(","))
        chosen = {"mode": mode, **(QUICK if quick else {}), **own}
        settings = (
            DistillSettings.published(**chosen) if method == "full" else DistillSettings(method=method, **chosen)
        )
        training = [video.path for place in videos or [None] for video in find_videos(place, truth=False).videos]
        measured = None if held_out is None else [item.path for item in find_videos(held_out, truth=False).videos]
        prepare_folder(out)
        processes = Processes()
        source = model or default_model()
        loaded, preprocess = load_model(source, torch.float32, processes.device_for(device))
        base = str(source) if model else source.name
        with CommandProgress("steps") as progress:

            def on_step(what: str, done: int, total: int, figures: Any):
                if processes.is_main:
                    progress.show(what, done, total)
                    if figures is not None:
                        progress.console.print(held_out_words(done, figures), soft_wrap=True)

            result = train(training, loaded, preprocess, out, settings, measured, base, on_step)
        if not processes.is_main:
            return
        for name in result.short_videos:
            typer.echo(f"{name} is too short for a clip and was left out.", err=True)
        if not result.finished:
            typer.echo(
                f"Stopped after {len(result.losses)} of {settings.steps} steps; the same command goes on.", err=True
            )
            raise typer.Exit(EXIT_INTERRUPTED)
        files = write_report(result, out, base, command_line())
    print_wide(figure_table(HEADERS, held_out_rows(result)), width=100)
    if method == "lora":
        print_written(out, ["adapter_model.safetensors", "adapter_config.json", "sparse_adapter.json", *files])
        typer.echo(f'Use it: NeuroFlowSiglipModel.from_pretrained("{source}", sparse_adapter="{out}")')
    else:
        print_written(out, ["model.safetensors", "config.json", *files])


def parse_sides(text: str) -> tuple[int, ...]:
    """`"224,448"` to `(224, 448)`; ValueError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--resolutions {text!r} are no sides in pixels; expected such as 224,448.") from None
