"""`neuroflow chat`: talk with a language model."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import typer

from . import options
from .errors import one_line_errors
from .language_model import load_with_decoding
from .option_groups import BYPASS_OPTIONS, GENERATION, with_groups

HELP = "/reset starts over, /help shows this, Ctrl-C stops an answer, Ctrl-D or /exit ends."


@with_groups(how=GENERATION, own=BYPASS_OPTIONS)
def chat(how: dict, own: dict, debug: options.Debug = False):
    """
    Talk with a language model. Only what is new in a turn is computed.

    Type /reset to start over. Ctrl-C stops an answer, Ctrl-D ends.
    Lines may be piped in, too. Answers alone go to standard output.
    Nothing is bypassed unless you ask for it.
    """
    with one_line_errors(debug, nothing_done="the conversation has ended."):
        from ..drift.conversation import Conversation

        conversation = Conversation(*load_with_decoding(how, own), how["system"])
        if is_terminal():
            typer.echo(HELP, err=True)
        for text in read_messages():
            command = text.strip()
            if command in ("/exit", "/quit"):
                break
            if command == "/reset":
                conversation.reset()
                typer.echo("The conversation starts over.", err=True)
            elif command == "/help":
                typer.echo(HELP, err=True)
            elif command.startswith("/") and command[1:].isalpha():
                typer.echo(f"There is no command {command}. {HELP}", err=True)
            else:
                answer(conversation, text)


def is_terminal() -> bool:
    """Whether somebody types the messages."""
    return sys.stdin.isatty()


def read_messages() -> Iterator[str]:
    """The lines of standard input that are not blank, asked for one by one in a terminal."""
    if is_terminal():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit lines
    while True:
        try:
            if is_terminal() and not sys.stdout.isatty():
                typer.echo("> ", err=True, nl=False)  # standard output is for answers
            line = input("> " if is_terminal() and sys.stdout.isatty() else "")
        except EOFError:
            if is_terminal():
                typer.echo(err=True)
            return
        except KeyboardInterrupt:
            if not is_terminal():
                raise
            typer.echo("\nCtrl-D ends the conversation.", err=True)
            continue
        except UnicodeDecodeError as error:
            raise ValueError(f"Standard input is not UTF-8 ({error.reason} at byte {error.start}).") from error
        if line.strip():
            yield line


def answer(conversation: Any, text: str):
    """Print a [`Conversation`]'s answer to a message as it is generated; in a terminal, Ctrl-C stops it."""
    from transformers import TextStreamer

    from ..drift.continuation import notes_in_words
    from ..utils.jobs import stop_on_interrupt

    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        # a forward that ends half-way would leave the cache unusable
        with stop_on_interrupt(signal.SIGINT) if is_terminal() else contextlib.nullcontext(threading.Event()) as stop:
            _, found = conversation.ask(text, streamer, stop.is_set)
    except KeyboardInterrupt:  # the second one
        if not is_terminal():
            raise
        typer.echo("\nStopped at once; the message and its answer are forgotten.", err=True)
        return
    except ValueError as error:  # the conversation is as before
        if not is_terminal():
            raise
        typer.echo(f"Error: {error} /reset starts over.", err=True)
        return
    for line in notes_in_words(conversation.model, found, conversation.decoding):
        typer.echo(line, err=True)
