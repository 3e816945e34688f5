"""`neuroflow chat` on a tiny random model: piped in, typed in, interrupted."""

import builtins
import os
import signal

import pytest
from typer.testing import CliRunner

from neuroflow_hf import loading
from neuroflow_hf.cli.main import app
from neuroflow_hf.drift.continuation import Decoding
from neuroflow_hf.drift.conversation import Conversation
from tests.cli.test_run import assert_clean_error


def chat(folder, lines, *options):
    arguments = ["chat", "--model", folder, "--max-new-tokens", 9, *options]
    return CliRunner().invoke(app, list(map(str, arguments)), input="".join(line + "\n" for line in lines))


@pytest.fixture
def answers(chat_folder):
    """The answers to some messages, in one conversation."""
    model, tokenizer = loading.load_language_model(chat_folder)

    def ask(*texts, **how):
        conversation = Conversation(model, tokenizer, Decoding(max_new_tokens=9, **how))
        return [tokenizer.decode(conversation.ask(text)[1].tokens, skip_special_tokens=True) for text in texts]

    return ask


def test_piped_lines(chat_folder, answers):
    result = chat(chat_folder, ["hello", "", "what", "/reset", "what"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == answers("hello", "what") + answers("what")
    assert "starts over" in result.stderr and ">" not in result.output


def test_commands(chat_folder, answers):
    result = chat(chat_folder, ["/help", "/rest", "/a/b", "/exit", "hello"])
    assert result.stdout.splitlines() == answers("/a/b")
    assert "no command /rest" in result.stderr and result.stderr.count("Ctrl-D") == 2


def test_figures_of_a_bypass(chat_folder, answers):
    result = chat(chat_folder, ["hello", "what"], "--threshold", -1)
    assert result.stdout.splitlines() == answers("hello", "what", bypass={"threshold": -1})
    assert result.stderr.count("Bypassed 100.0% of") == 2
    assert "Bypassed" not in chat(chat_folder, ["hello"]).stderr


def test_what_cannot_be_answered(chat_folder, phi3_folder):
    assert_clean_error(chat(phi3_folder, ["hello"]), "no chat template", "neuroflow generate")
    result = chat(chat_folder, ["a" * 300])
    assert result.exit_code == 2 and "conversation is full" in result.stderr


@pytest.fixture
def typed(monkeypatch):
    """Make `input` return lines, or raise exceptions, as if they came from a terminal."""

    def type_in(*lines):
        script = iter(lines)

        def answer(prompt=""):
            line = next(script, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", answer)
        monkeypatch.setattr("neuroflow_hf.cli.chat.is_terminal", lambda: True)

    return type_in


def test_ctrl_c_stops_an_answer_and_not_the_program(chat_folder, answers, typed, monkeypatch):
    typed("hello", KeyboardInterrupt(), "a" * 300, "what")
    written = []

    def write(self, text, stream_end=False):
        written.append(text)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        print(text, end="\n" if stream_end else "", flush=True)

    monkeypatch.setattr("transformers.TextStreamer.on_finalized_text", write)
    before = signal.getsignal(signal.SIGINT)
    result = chat(chat_folder, [], "--max-new-tokens", 30)
    assert result.exit_code == 0, result.output
    stopped, after = result.stdout.splitlines()
    assert answers("hello")[0].startswith(stopped) and after
    assert "Ctrl-D ends" in result.stderr and "Error: The conversation is full" in result.stderr
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_twice_forgets_the_message(chat_folder, answers, typed, monkeypatch):
    typed("hello", "what")
    original, calls = Conversation.ask, []

    def ask(self, *arguments):
        calls.append(arguments)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(Conversation, "ask", ask)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        result = chat(chat_folder, [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 0 and "forgotten" in result.stderr
    assert result.stdout.splitlines() == answers("what")


def test_ctrl_c_ends_piped_input(chat_folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    result = chat(chat_folder, ["hello"])
    assert result.exit_code == 130 and "Stopped by Ctrl-C" in result.stderr
