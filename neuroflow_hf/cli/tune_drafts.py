"""`neuroflow tune-drafts`: train a drafter for a language model."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import EXIT_INTERRUPTED, one_line_errors
from .language_model import language_model
from .options import option
from .output import command_line, figure_table, print_wide, print_written
from .progress import CommandProgress

HEADERS = ("task", "first token agrees", "first two", "first three", "draft length", "expected speed")


def tune_drafts(
    prompts: Annotated[
        Path, option('Prompts to learn from: .jsonl with lines such as {"prompt": "text"}, or .txt.', default=False)
    ],
    model: options.LanguageModel = None,
    out: options.Out = Path("neuroflow-drafter"),
    new_tokens: Annotated[int, option("Generate N tokens after each prompt.", metavar="N")] = 64,
    epochs: Annotated[int, option("Passes over the texts.", metavar="N")] = 8,
    head_size: Annotated[int, option("Draft the N most frequent tokens.", metavar="N")] = 4096,
    device: options.Device = "auto",
    debug: options.Debug = False,
):
    """
    Train a drafter for a language model on the model's own texts: a layer that drafts tokens for lossless generation.

    Every tenth prompt of a task is held out: the best epoch on these is kept, and they show whether the drafter pays.
    The model is not changed. An interrupted command goes on when it is started again.
    """
    with one_line_errors(debug, nothing_done="the same command goes on from the last checkpoint."):
        import torch

        from ..drift.prompts import encode_prompt, read_prompts
        from ..drift.train_drafter import DrafterSettings, tune_drafter
        from ..loading import load_language_model
        from ..utils.files import prepare_folder, report_text, write_whole
        from ..utils.provenance import machine_and_versions

        settings = DrafterSettings(head_size=head_size, epochs=epochs)
        read = read_prompts(prompts)
        prepare_folder(out)
        source = language_model(model)
        loaded, tokenizer = load_language_model(source, torch.float32, device)
        with CommandProgress("") as progress:
            rows = [encode_prompt(tokenizer, prompt) for prompt in read]
            tasks, name = [prompt.task for prompt in read], Path(source).name
            found = tune_drafter(loaded, rows, tasks, out, name, new_tokens, settings, progress.show)
        if found is None:
            typer.echo("Stopped; the same command goes on.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED)
        about = {"model": name, "prompts": len(rows), "new_tokens": new_tokens, **vars(settings)}
        report = {"command": command_line(), **machine_and_versions(), "settings": about, **found}
        write_whole(out / "drafter.json", report_text(report))
    rows = [
        (task, *(f"{share:.0%}" for share in row["agreement"]), str(row["length"]), f"{row['speed']:.2f}")
        for task, row in found["held_out"].items()
    ]
    print_wide(figure_table(HEADERS, rows, "held-out prompts"), width=100)
    print_written(out, ["model.safetensors", "config.json", "drafter.json"])
    if all(row["length"] == 0 for row in found["held_out"].values()):
        typer.echo("The drafter does not pay on any task. Draft by lookup, the default.")
    else:
        typer.echo(f'Use it: model.generate(..., lossless={{"drafter": "{out}"}})')
