"""`neuroflow generate`: answer a prompt, or continue a text, with a language model."""

import sys
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .language_model import load_with_decoding
from .option_groups import BYPASS_OPTIONS, GENERATION, with_groups
from .options import option


@with_groups(how=GENERATION, own=BYPASS_OPTIONS)
def generate(
    how: dict,
    own: dict,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to answer; - reads standard input.", show_default="standard input")
    ] = None,
    raw: Annotated[
        bool, option("Continue the text as it is, without the checkpoint's chat template.", "--raw")
    ] = False,
    compare: Annotated[bool, option("Also generate with the dense model, and print the drift.", "--compare")] = False,
    debug: options.Debug = False,
):
    """
    Answer a prompt; continue it, where the checkpoint has no chat template.

    The text alone goes to standard output.
    Nothing is bypassed unless you ask for it.
    """
    with one_line_errors(debug, nothing_done="the text is not complete."):
        if compare and how["temperature"] > 0:
            raise ValueError("--compare compares the most probable texts; leave out --temperature.")
        text = read_prompt(prompt)

        from transformers import TextStreamer

        from ..drift.chat_template import encode_text
        from ..drift.continuation import Decoding, comparison_in_words, continue_tokens, figures_in_words

        model, tokenizer, decoding = load_with_decoding(how, own, raw)
        ids = encode_text(tokenizer, text, how["system"], raw)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        found = continue_tokens(model, tokenizer, ids, decoding, streamer=streamer)
        for line in figures_in_words(model, found, decoding):
            typer.echo(line, err=True)
        if compare:
            dense = continue_tokens(model, tokenizer, ids, Decoding(decoding.max_new_tokens))
            typer.echo(comparison_in_words(dense, found), err=True)


def read_prompt(prompt: str | None) -> str:
    """The text to answer; from standard input, a final line break is left out. ValueError if there is none."""
    if prompt is None and sys.stdin.isatty():
        raise ValueError("There is no prompt; give one, or pipe it in.")
    if prompt in (None, "-"):
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"Standard input is not UTF-8 ({error.reason} at byte {error.start}).") from error
    if not prompt.strip():
        raise ValueError("The prompt is empty; expected some text.")
    return prompt
