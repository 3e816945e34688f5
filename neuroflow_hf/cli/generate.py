"""`neuroflow generate`: continue a text with a language model that bypasses layers."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .language_model import language_model
from .options import option


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input.", show_default="standard input")
    ] = None,
    prompt_file: Annotated[
        Path | None, option("File with the text to continue; a final line break is left out.", default="none")
    ] = None,
    model: options.LanguageModel = None,
    max_new_tokens: Annotated[int, option("Generate at most N tokens.", metavar="N")] = 128,
    temperature: Annotated[
        float, option("0: take the most probable token. Above 0: sample at this temperature.")
    ] = 0.0,
    seed: Annotated[int, option("Random seed for sampling.")] = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    gate_layer: options.GateLayer = None,
    cache_layers: options.CacheLayers = None,
    threshold: options.BypassThreshold = None,
    target: options.Target = None,
    max_consecutive: options.MaxConsecutive = None,
    guard_entropy: options.GuardEntropy = None,
    dense: Annotated[bool, option("Bypass nothing.", "--dense", panel=options.BYPASS)] = False,
    lossless: Annotated[
        bool,
        option(
            "Generate the dense model's text: use the bypassed model, or earlier text, for drafts only.",
            "--lossless",
            panel=options.BYPASS,
        ),
    ] = False,
    compare: Annotated[bool, option("Also generate with the dense model, and print the drift.", "--compare")] = False,
    debug: options.Debug = False,
):
    """Continue a text with a Phi-3 model that reuses layers' outputs where little changed, and print how often."""
    with one_line_errors(debug, nothing_done="the text is not complete."):
        own = options.given(
            gate_layer=gate_layer,
            cache_layers=options.parse_layers(cache_layers),
            threshold=threshold,
            target=target,
            max_consecutive=max_consecutive,
            guard_entropy=guard_entropy,
        )
        if dense and (own or lossless):
            raise ValueError("--dense bypasses nothing; leave out either it, or --lossless and the bypass options.")
        if compare and temperature > 0:
            raise ValueError("--compare compares the most probable texts; leave out --temperature.")
        text = read_prompt(prompt, prompt_file)

        from transformers import TextStreamer

        from ..drift.continuation import comparison_in_words, continue_text, figures_in_words
        from ..loading import dtype_named, load_language_model

        weights_dtype = dtype_named(dtype)
        loaded, tokenizer = load_language_model(language_model(model), weights_dtype, device)
        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        bypass, drafts = False if dense else own, None
        if lossless:
            bypass, drafts = None, {"bypass": own} if own else True
        loaded.bypass_options(bypass)  # refuse wrong options before anything is printed
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        found = continue_text(loaded, tokenizer, text, bypass=bypass, lossless=drafts, streamer=streamer, **how)
        for line in figures_in_words(loaded, found, bypass):
            typer.echo(line, err=True)
        if compare:
            expected = continue_text(loaded, tokenizer, text, bypass=False, **how)
            typer.echo(comparison_in_words(expected, found), err=True)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """
    The text to continue: as given, from the file, or from standard input; a file's final line break is left out.

    Raises:
        ValueError: if there is no prompt, an empty one, or two.
        OSError: if the file cannot be read.
    """
    if prompt_file is not None:
        if prompt is not None:
            raise ValueError("Give a PROMPT or --prompt-file, not both.")
        try:
            text = prompt_file.read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompt_file} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    elif prompt in (None, "-"):
        if sys.stdin.isatty():
            raise ValueError("There is no prompt; give one, name a --prompt-file, or pipe it in.")
        text = sys.stdin.read().removesuffix("\n")
    else:
        text = prompt
    if not text.strip():
        raise ValueError("The prompt is empty; expected some text.")
    return text
