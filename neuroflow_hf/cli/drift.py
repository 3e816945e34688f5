"""`neuroflow drift`: measure what a bypass changes in a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .language_model import language_model, with_own_threshold
from .option_groups import BYPASS_OPTIONS, given_bypass, with_groups
from .options import option
from .output import command_line, figure_table, print_wide, print_written
from .progress import CommandProgress


@with_groups(own=BYPASS_OPTIONS)
def drift(
    own: dict,
    prompts: Annotated[
        Path | None,
        option(
            'Texts to continue: .jsonl with lines such as {"prompt": "text", "task": "code"}, or .txt with one '
            "text a line.",
            default="those in the checkout",
        ),
    ] = None,
    model: options.LanguageModel = None,
    out: options.Out = Path("neuroflow-drift"),
    new_tokens: Annotated[int, option("Generate N tokens after each prompt.", metavar="N")] = 64,
    max_prompts: Annotated[
        int | None, option("Use the first N prompts of each task.", metavar="N", default="all")
    ] = None,
    batch_size: Annotated[int, option("Prompts in a batch; use fewer if memory runs out.")] = 64,
    quick: Annotated[bool, option("Use 10 prompts of each task and 32 tokens.", "--quick")] = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    seed: options.BootstrapSeed = 0,
    fresh: options.Fresh = False,
    debug: options.Debug = False,
):
    """
    Measure what a bypass changes in the text: token drift from the dense model, compared with the noise floor.

    With bypass options, measure that bypass. Without, measure a grid of them: the published layers, thresholds and
    targets, in the model's proportions. After an interruption, the same command continues.
    """
    with one_line_errors(debug, nothing_done=f"what was measured is in {out}; the same command continues."):
        from ..drift.report import drift_markdown, plot_drift
        from ..utils.files import write_whole
        from ..utils.plots import save_plot

        own = given_bypass(own)
        if quick:
            new_tokens, max_prompts = 32, 10 if max_prompts is None else max_prompts
        report = run_drift(
            model=model,
            prompts=prompts,
            path=out / "drift.json",
            settings={"new_tokens": new_tokens, "batch_size": batch_size, "seed": seed},
            own=[own] if own else None,
            max_prompts=max_prompts,
            fresh=fresh,
            dtype=dtype,
            device=device,
            command=command_line(),
        )
        write_whole(out / "drift.md", drift_markdown(report))
        save_plot(plot_drift(report), out / "drift.png")
    print_drift(report)
    print_written(out, ["drift.json", "drift.md", "drift.png"])


def run_drift(
    model: str | None,
    prompts: Path | None,
    path: Path,
    settings: dict,
    own: Sequence[dict] | None = None,
    max_prompts: int | None = None,
    tasks: Sequence[str] | None = None,
    fresh: bool = False,
    dtype: str = "float32",
    device: str = "auto",
    command: str = "",
) -> dict:
    """
    Load a model and prompts (default: those in the checkout), measure with a progress bar, and write a JSON file.
    `settings` are options of `DriftSettings`; `own` and `fresh` are as in `DriftEvaluation`; `max_prompts` of each
    task are used, and of `tasks` alone if given. Returns the report.
    """
    from ..drift.prompts import first_of_each, read_prompts
    from ..drift.run import DriftEvaluation, DriftSettings
    from ..loading import default_prompts, dtype_named, load_language_model
    from ..utils.files import prepare_folder

    # check what is quick to check before loading the model
    weights_dtype, chosen = dtype_named(dtype), DriftSettings(**settings)
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"--max-prompts is {max_prompts}; expected a whole number of at least 1.")
    file = prompts or default_prompts()
    texts = [prompt for prompt in read_prompts(file) if tasks is None or prompt.task in tasks]
    texts = [texts[index] for index in first_of_each([prompt.task for prompt in texts], max_prompts)]
    prepare_folder(path.parent)
    source = language_model(model)
    loaded, tokenizer = load_language_model(source, weights_dtype, device)
    if own is not None:
        own = [with_own_threshold(loaded, tokenizer, options) for options in own]
    names = {"model": Path(source).name, "prompts": file.name, "command": command}
    with CommandProgress("prompts") as progress:
        return DriftEvaluation(loaded, tokenizer, texts, path, chosen, own, fresh, progress.show, names).run()


def print_drift(report: dict):
    """Print a report as a table."""
    from ..drift.report import description, summary_table

    typer.echo(description(report))
    print_wide(figure_table(*summary_table(report)), width=150)
