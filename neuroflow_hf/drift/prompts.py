"""
Read prompts from a file. Prompts of most tasks are texts to continue. One of the task `chat` is a user's message: a
model reads it in its chat template, and answers.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat_template import encode_text

CHAT = "chat"
TASKS = ("code", "structured", "prose", CHAT)  # shown in this order, before other tasks
OWN = "own"  # the task of prompts without one
ALL = "all"  # all tasks together
LINE = '{"prompt": "text", "task": "code"}'


@dataclass(frozen=True)
class Prompt:
    """A text to continue (for the task `chat`: to answer), and the task to whose figures it counts."""

    text: str
    task: str = OWN


def read_prompts(path: str | Path) -> list[Prompt]:
    """
    Read the prompts of a file: `.jsonl` with objects that have `prompt` and, optionally, `task` (other keys are
    ignored), or `.txt` with a prompt in each line. Blank lines are skipped.

    Raises:
        OSError: if the file does not exist.
        ValueError: for another type of file, no prompts, or a bad line, which the message names.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'!r}; expected .jsonl with lines such as {LINE}, or .txt with a "
            "prompt in each line."
        )
    if path.suffix == ".txt":
        prompts = [Prompt(text) for _, text in read_lines(path)]
    else:
        prompts = [make_prompt(found, where) for where, found in read_json_lines(path, ("prompt",), LINE)]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected at least one line.")
    return prompts


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place, for errors, and text of each line that is not blank; ValueError for one that is not UTF-8."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}).") from error
        if text.strip():
            yield where, text


def read_json_lines(path: Path, names: Sequence[str], example: str) -> Iterator[tuple[str, dict]]:
    """
    Place, for errors, and object of each line of a file of JSON lines. ValueError, with `example`, for a line that is
    not an object with all of `names`.
    """
    expected = f"expected an object such as {example}."
    for where, text in read_lines(path):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); {expected}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{where}: a {type(found).__name__}; {expected}")
        for name in names:
            if name not in found:
                raise ValueError(f"{where}: `{name}` is missing; {expected}")
        yield where, found


def make_prompt(found: dict, where: str) -> Prompt:
    """The prompt in a JSON object. ValueError, beginning with `where`, if its text or task is not a text."""
    prompt, task = found["prompt"], found.get("task", OWN)
    for name, value in (("prompt", prompt), ("task", task)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: `{name}` is {value!r}; expected a text that is not empty, as in {LINE}.")
    if task == ALL:
        raise ValueError(f"{where}: `task` is {ALL!r}, which stands for all tasks; choose another name.")
    return Prompt(prompt, task)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt's token ids: of a `chat` prompt in the tokenizer's chat template, if it has one, else of its text."""
    return encode_text(tokenizer, prompt.text, raw=prompt.task != CHAT)


def order_tasks(tasks: Iterable[str]) -> list[str]:
    """Each task once: those of `TASKS` first, then the others in order of appearance."""
    return sorted(dict.fromkeys(tasks), key=lambda task: TASKS.index(task) if task in TASKS else len(TASKS))


def first_of_each(tasks: Sequence[str], count: int | None) -> list[int]:
    """The indices of the first `count` prompts of each task; all for None."""
    return [index for index, task in enumerate(tasks) if count is None or tasks[:index].count(task) < count]
