"""`neuroflow tune-drafts`: search what a language model can draft without."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .language_model import language_model
from .options import option
from .output import command_line, figure_table, print_wide, print_written
from .progress import CommandProgress


def tune_drafts(
    prompts: Annotated[
        Path | None,
        option('Prompts: .jsonl with lines such as {"prompt": "text"}, or .txt.', default="those in the checkout"),
    ] = None,
    model: options.LanguageModel = None,
    out: options.Out = Path("neuroflow-drafts"),
    max_prompts: Annotated[int, option("Use the first N prompts of each task; half are held out.", metavar="N")] = 4,
    new_tokens: Annotated[int, option("Draft N tokens of each text.", metavar="N")] = 32,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    debug: options.Debug = False,
):
    """
    Search the attention and MLP parts that a language model can draft without, by their time and agreement measured
    here, and say whether any such drafter pays.

    Its figures are upper bounds: the first token of a draft.
    """
    with one_line_errors(debug, nothing_done="nothing was written."):
        from ..drift.draft_search import search_drafters
        from ..drift.prompts import encode_prompt, first_of_each, read_prompts
        from ..loading import default_prompts, dtype_named, load_language_model
        from ..utils.files import prepare_folder, report_text, write_whole
        from ..utils.provenance import machine_and_versions

        weights_dtype = dtype_named(dtype)
        read = read_prompts(prompts or default_prompts())
        chosen = [read[index] for index in first_of_each([prompt.task for prompt in read], max_prompts)]
        prepare_folder(out)
        source = language_model(model)
        loaded, tokenizer = load_language_model(source, weights_dtype, device)
        with CommandProgress("") as progress:
            rows = [encode_prompt(tokenizer, prompt) for prompt in chosen]
            found = search_drafters(loaded, rows, new_tokens, on_step=progress.show)
        settings = {"model": Path(source).name, "prompts": len(rows), "new_tokens": new_tokens, "dtype": dtype}
        report = {"command": command_line(), **machine_and_versions(), "settings": settings, **found}
        write_whole(out / "drafts.json", report_text(json.loads(json.dumps(report))))
    headers = ("without attention", "without MLP", "cost of a token", "agreement", "needed", "speed, at most")
    drafters = [*found["drafters"], found["held_out"]]
    print_wide(figure_table(headers, map(in_words, drafters), "last row: held-out prompts"), width=100)
    best = found["held_out"]
    if best["length"]:
        typer.echo(
            f"The last drafter may pay, with drafts of {best['length']}: up to {best['speed']:.2f} times dense speed."
        )
    else:
        typer.echo("No drafter pays on the held-out prompts. Draft by lookup, the default.")
    print_written(out, ["drafts.json"])


def in_words(drafter: dict) -> tuple[str, ...]:
    """A row of the table."""
    return (
        f"{len(drafter['attention'])}",
        f"{len(drafter['mlp'])}",
        f"{drafter['cost']:.2f}",
        f"{drafter['agreement']:.0%}",
        f"{drafter['needed']:.0%}",
        f"{drafter['speed']:.2f}",
    )
