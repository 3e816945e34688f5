"""The `neuroflow` commands for language models: they parse options, call the library, and print."""

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import one_line_errors, require_dtype
from .progress import CommandProgress

BYPASS = "Bypass (defaults: the model's own, else those named here)"
OUTPUT = "Comparison and output"
MODEL_HELP = "Folder or Hub name of a Phi-3 checkpoint with its tokenizer."
NANO_DEFAULT = "the small Phi-3 in the checkout"

ModelOption = Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=NANO_DEFAULT)]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes CUDA if there is one.")]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show errors with their traceback.", rich_help_panel=OUTPUT)
]
GateOption = Annotated[
    int | None,
    typer.Option(
        help="The layer, from 0, whose attention output is compared.", show_default="1", rich_help_panel=BYPASS
    ),
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        help="Layers that reuse their outputs: 24, or 20,24, or 20-24.",
        show_default="the one at three quarters of the depth",
        rich_help_panel=BYPASS,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        help="Bypass from this similarity on; -1: always, above 1: never.",
        show_default="0.65",
        rich_help_panel=BYPASS,
    ),
]
TargetOption = Annotated[
    str | None, typer.Option(help="attention, mlp or block.", show_default="attention", rich_help_panel=BYPASS)
]
ConsecutiveOption = Annotated[
    int | None,
    typer.Option(help="Bypass at most so many steps in a row.", show_default="no cap", rich_help_panel=BYPASS),
]
EntropyOption = Annotated[
    float | None,
    typer.Option(
        help="Bypass only where the model's entropy is at most this, in nats, such as 1.",
        show_default="no guard",
        rich_help_panel=BYPASS,
    ),
]


def parse_layers(text: str) -> list[int]:
    """`"20,24-26"` to `[20, 24, 25, 26]`; a ValueError that names what is none."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            begin = int(first)
            end = int(last) if dash else begin
        except ValueError:
            raise ValueError(f"--cache-layers {text!r} has no layers; expected 24, or 20,24, or 20-24.") from None
        if end < begin:
            raise ValueError(f"--cache-layers {text!r} counts down from {begin} to {end}; write {end}-{begin}.")
        layers += range(begin, end + 1)
    return layers


def bypass_options(gate_layer, cache_layers, threshold, target, max_consecutive, guard_entropy) -> dict[str, Any]:
    """The options that were given, by their names."""
    named = {
        "gate_layer": gate_layer,
        "cache_layers": None if cache_layers is None else parse_layers(cache_layers),
        "threshold": threshold,
        "target": target,
        "max_consecutive": max_consecutive,
        "guard_entropy": guard_entropy,
    }
    return {name: value for name, value in named.items() if value is not None}


# --- generate ------------------------------------------------------------------------------------------------------


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input.", show_default="standard input")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="File with the text to continue; a line break at its end is left out.", show_default="none"),
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Generate at most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most probable token; above: tokens are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    gate_layer: GateOption = None,
    cache_layers: LayersOption = None,
    threshold: ThresholdOption = None,
    target: TargetOption = None,
    max_consecutive: ConsecutiveOption = None,
    guard_entropy: EntropyOption = None,
    dense: Annotated[bool, typer.Option("--dense", help="Bypass nothing.", rich_help_panel=BYPASS)] = False,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless",
            help="Write dense's text: the bypassed model, or what the text says before, only guesses ahead.",
            rich_help_panel=BYPASS,
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Generate densely too, and say how far it drifted.", rich_help_panel=OUTPUT),
    ] = False,
    debug: DebugOption = False,
):
    """Continue a text with a Phi-3 model that reuses layers' outputs where little changed; say how often it did."""
    with one_line_errors(debug, nothing_done="the text is not complete."):
        require_dtype(dtype)
        options = bypass_options(gate_layer, cache_layers, threshold, target, max_consecutive, guard_entropy)
        if dense and (options or lossless):
            raise ValueError("--dense bypasses nothing; leave it, or the options for the bypass and --lossless, out.")
        if compare and temperature > 0:
            raise ValueError("--compare compares the most probable texts; leave --temperature out.")
        text = read_prompt(prompt, prompt_file)

        from transformers import TextStreamer

        from ..drift.continuation import comparison_in_words, continue_text, figures_in_words
        from ..loading import DTYPES, default_language_model, load_language_model

        loaded, tokenizer = load_language_model(model or default_language_model(), DTYPES[dtype], device)
        bypass = False if dense else options
        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if lossless:
            bypass, how["lossless"] = None, {"bypass": options} if options else True
        else:
            loaded.bypass_options(bypass)  # what is wrong is said before anything is printed
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        found = continue_text(loaded, tokenizer, text, bypass=bypass, streamer=streamer, **how)
        for line in figures_in_words(loaded, found, bypass):
            typer.echo(line, err=True)
        if compare:
            how["lossless"] = None
            typer.echo(
                comparison_in_words(continue_text(loaded, tokenizer, text, bypass=False, **how), found), err=True
            )


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """
    The text to continue: as given, else from the file, else from standard input, these without a line break at their
    end.

    Raises:
        ValueError: if there is none, two, or an empty one.
        OSError: if the file cannot be read.
    """
    if prompt_file is not None:
        if prompt is not None:
            raise ValueError("Give a PROMPT or --prompt-file, not both.")
        try:
            text = prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompt_file} is not UTF-8 ({error.reason} at byte {error.start}).") from error
        text = text.removesuffix("\n")
    elif prompt in (None, "-"):
        if sys.stdin.isatty():
            raise ValueError("There is no prompt; give one, name a --prompt-file, or pipe it in.")
        text = sys.stdin.read().removesuffix("\n")
    else:
        text = prompt
    if not text.strip():
        raise ValueError("The prompt is empty; expected some text.")
    return text


# --- drift ---------------------------------------------------------------------------------------------------------


def drift(
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Texts to continue: .jsonl with lines such as {"prompt": "text", "task": "code"}, or .txt with one '
            "in each line.",
            show_default="those in the checkout",
        ),
    ] = None,
    model: ModelOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder to write to; what an interrupted run measured there is continued.")
    ] = Path("neuroflow-drift"),
    new_tokens: Annotated[int, typer.Option(help="Generate so many tokens after each prompt.")] = 64,
    max_prompts: Annotated[
        int | None, typer.Option(help="Take the first so many prompts of each task.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once; fewer if memory runs out.")] = 64,
    quick: Annotated[
        bool, typer.Option("--quick", help="10 prompts of each task, 32 tokens, one pair of layers.")
    ] = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    gate_layer: GateOption = None,
    cache_layers: LayersOption = None,
    threshold: ThresholdOption = None,
    target: TargetOption = None,
    max_consecutive: ConsecutiveOption = None,
    guard_entropy: EntropyOption = None,
    seed: Annotated[int, typer.Option(help="Of the intervals' bootstrap.", rich_help_panel=OUTPUT)] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do not continue what is in the folder.", rich_help_panel=OUTPUT)
    ] = False,
    debug: DebugOption = False,
):
    """
    Measure what a bypass changes in the text: token drift against dense, beside the noise floor.

    Without options for the bypass, a grid of them: the published layers, thresholds and targets, in the model's
    proportions. With some, that bypass alone.
    """
    nothing_done = f"what was measured is in {out}; the same command continues."
    with one_line_errors(debug, nothing_done):
        require_dtype(dtype)
        options = bypass_options(gate_layer, cache_layers, threshold, target, max_consecutive, guard_entropy)
        report = run_drift(
            model=model,
            prompts=prompts,
            path=out / "drift.json",
            settings={"new_tokens": 32 if quick else new_tokens, "batch_size": batch_size, "seed": seed},
            own=options or None,
            max_prompts=10 if quick and max_prompts is None else max_prompts,
            quick=quick,
            fresh=fresh,
            dtype=dtype,
            device=device,
            command=shlex.join(["neuroflow", *sys.argv[1:]]),
        )
        if report is None:
            return
        files = write_drift(
            report,
            {"table": out / "drift.md", "plot": out / "drift.png"}
            | ({} if options else {"reachable": out / "reachable.png"}),
        )
    print_drift(report)
    names = ", ".join(path.name for path in [out / "drift.json", *files])
    Console(highlight=False).print(f"Written to {escape(str(out))}: {names}", soft_wrap=True)


def run_drift(
    model: str | None,
    prompts: Path | None,
    path: Path,
    settings: dict,
    own: dict | None,
    max_prompts: int | None,
    quick: bool,
    fresh: bool,
    dtype: str,
    device: str,
    command: str,
) -> dict | None:
    """
    Load what was named and measure, with a progress bar; the report, or None on all processes but the first.

    Args:
        model, prompts: None for those in the checkout.
        path: the JSON file.
        settings: of `DriftSettings`.
        own, quick, fresh: as of `DriftEvaluation`.
        max_prompts: of each task.
        dtype, device: of the model.
        command: for the report.
    """
    from ..drift.prompts import first_of_each, read_prompts
    from ..drift.run import DriftEvaluation, DriftSettings
    from ..loading import DTYPES, default_language_model, default_prompts, load_language_model
    from ..utils.files import prepare_folder
    from ..utils.processes import Processes

    # what fails quickly goes first
    chosen = DriftSettings(**settings)
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"--max-prompts is {max_prompts}; expected a whole number of at least 1.")
    source, file = model or default_language_model(), prompts or default_prompts()
    texts = first_of_each(read_prompts(file), max_prompts)
    prepare_folder(path.parent)
    processes = Processes()
    if device == "auto" and processes.device is not None:
        device = str(processes.device)
    loaded, tokenizer = load_language_model(source, DTYPES[dtype], device)
    names = {"model": Path(source).name, "prompts": file.name, "command": command}
    with drift_progress() as on_step:
        evaluation = DriftEvaluation(loaded, tokenizer, texts, path, chosen, own, quick, fresh, on_step, names)
        report = evaluation.run()
    return report if processes.is_main else None


@contextlib.contextmanager
def drift_progress() -> Iterator[Any]:
    """A progress bar on stderr; yields what `DriftEvaluation` calls."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = CommandProgress(*columns, console=Console(stderr=True, highlight=False), transient=True)
    task = progress.add_task("dense", total=None)

    def on_step(what, done, total):
        progress.update(task, description=what, completed=done, total=total)

    try:
        yield on_step
    finally:
        progress.close()


def write_drift(report: dict, paths: dict[str, Path], published: Sequence[dict] = ()) -> list[Path]:
    """
    Write a report's `table` (Markdown) and pictures (`plot`, `reachable`), each whole; the paths written. `published`
    is as for `plot_drift`.
    """
    from ..drift.plots import plot_drift, plot_reachable
    from ..drift.tables import drift_markdown
    from ..utils.files import write_whole
    from ..video.plots import save_plot

    write_whole(paths["table"], drift_markdown(report))
    for name, draw in (("plot", lambda report: plot_drift(report, published)), ("reachable", plot_reachable)):
        if name in paths:
            save_plot(draw(report), paths[name])
    return list(paths.values())


def print_drift(report: dict):
    """A report as tables on stdout."""
    from ..drift.tables import description, summary_table

    console = Console(highlight=False)
    console.print(escape(description(report)), soft_wrap=True)
    console = Console(highlight=False, width=max(console.width, 150))  # narrower, figures would break
    headers, rows = summary_table(report)
    table = Table(*headers)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
