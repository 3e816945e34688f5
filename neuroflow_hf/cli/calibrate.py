"""`neuroflow calibrate`: measure what a bypass's gate sees on a checkpoint, and keep it in the checkpoint."""

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .language_model import language_model
from .option_groups import BYPASS_OPTIONS, given_bypass, with_groups
from .options import option
from .progress import CommandProgress


@with_groups(own={name: declared for name, declared in BYPASS_OPTIONS.items() if name != "threshold"})
def calibrate(
    own: dict,
    out: Annotated[
        Path,
        option(
            "Folder to write a calibrated copy of the checkpoint to; of the checkpoint's own folder, only the "
            "config.json is changed.",
            default=False,
        ),
    ],
    model: options.LanguageModel = None,
    prompts: Annotated[
        Path | None,
        option(
            'Texts to answer: .jsonl with lines such as {"prompt": "text"}, or .txt with one text a line.',
            default="a few built-in ones",
        ),
    ] = None,
    new_tokens: Annotated[int, option("Generate N tokens after each prompt.", metavar="N")] = 64,
    raw: Annotated[bool, option("Continue the prompts, without the checkpoint's chat template.", "--raw")] = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    debug: options.Debug = False,
):
    """
    Measure the similarities that a bypass's gate sees on a checkpoint.

    They are written into its configuration, where --rate, and in Python
    bypass={"rate": ...}, find their threshold from then on. With --rate,
    a bypass with the threshold for this rate is written, too:
    Python uses it by default, the commands with --bypass.
    """
    with one_line_errors(debug, nothing_done="nothing was written."):
        own = given_bypass(own)
        if set(own) - {"gate_layer"} and "rate" not in own:
            raise ValueError("These bypass options are written with a threshold; give the --rate that it is for.")

        from ..drift.calibrate import PROMPTS, calibrate, with_threshold, write_calibration
        from ..drift.prompts import read_prompts
        from ..language.bypass_config import NeuroFlowBypassConfig
        from ..loading import dtype_named, load_language_model
        from ..utils.files import new_folder

        weights_dtype = dtype_named(dtype)
        texts = [prompt.text for prompt in read_prompts(prompts)] if prompts else PROMPTS
        source = language_model(model)
        in_place = out.exists() and Path(source).exists() and out.samefile(source)
        with nullcontext(Path(source)) if in_place else new_folder(out) as folder:
            loaded, tokenizer = load_language_model(source, weights_dtype, device)
            checked = NeuroFlowBypassConfig.from_options(loaded.config.bypass, **own)
            checked.resolve_layers(loaded.config.num_hidden_layers)
            with CommandProgress("prompts") as progress:
                show = functools.partial(progress.show, "calibrate", total=len(texts))
                calibrate(loaded, tokenizer, texts, own.get("gate_layer"), new_tokens, raw, on_prompts=show)
            if "rate" in own:
                loaded.config.bypass = {**(loaded.config.bypass or {}), **with_threshold(loaded, tokenizer, own)}
            write_calibration(source, folder, loaded.config)
        found = loaded.config.bypass_similarities[str(checked.gate_layer)]
        low, middle, high = (found[percent] for percent in (10, 50, 90))
        typer.echo(
            f"Similarity at gate layer {checked.gate_layer}: P10 {low:.3f}, P50 {middle:.3f}, P90 {high:.3f}, on "
            f"{len(texts)} prompts."
        )
        if "rate" in own:
            typer.echo(f"Threshold for a rate of {own['rate']:g}: {loaded.config.bypass['threshold']:g}.")
        typer.echo(f"Written to {out / 'config.json'}.")
