"""
Read prompts from a file.

Each line of a `.jsonl` file is an object with `prompt` and, optionally, `task`. Prompts of most tasks are texts to
continue. One of the task `chat` is a user's message: a model reads it in its chat template, and answers.
"""

import json
from collections import Counter
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
    Read the prompts of a file.

    Args:
        path: a `.jsonl` file whose lines are objects with `prompt` and, optionally, `task` (other keys are ignored);
            or a `.txt` file with a prompt in each line. Blank lines are skipped.

    Raises:
        OSError: if the file does not exist or is a folder.
        ValueError: for another type of file, no prompts, or a bad line, which the message names.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file of prompts, .jsonl or .txt.")
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'!r}; expected .jsonl with lines such as {LINE}, or .txt with a "
            "prompt in each line."
        )
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}).") from error
        if text.strip():
            prompts.append(Prompt(text) if path.suffix == ".txt" else parse_line(text, f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected at least one line.")
    return prompts


def parse_line(text: str, where: str) -> Prompt:
    """The prompt in a line of JSON; a ValueError that begins with `where` if the line is bad."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); expected an object such as {LINE}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a {type(found).__name__}; expected an object such as {LINE}.")
    prompt, task = found.get("prompt"), found.get("task", OWN)
    for name, value in (("prompt", prompt), ("task", task)):
        if not isinstance(value, str) or not value.strip():
            said = "is missing" if name not in found else f"is {value!r}"
            raise ValueError(f"{where}: `{name}` {said}; expected a text that is not empty, as in {LINE}.")
    if task == ALL:
        raise ValueError(f"{where}: `task` is {ALL!r}, which stands for all tasks; choose another name.")
    return Prompt(prompt, task)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt's token ids: of a `chat` prompt in the tokenizer's chat template, if it has one, else of its text."""
    return encode_text(tokenizer, prompt.text, raw=prompt.task != CHAT)


def order_tasks(tasks) -> list[str]:
    """Each task once: those of `TASKS` first, then the others in order of appearance."""
    found = list(dict.fromkeys(tasks))
    return [task for task in TASKS if task in found] + [task for task in found if task not in TASKS]


def first_of_each(prompts: list[Prompt], count: int | None) -> list[Prompt]:
    """The first `count` prompts of each task, in order; all for None."""
    if count is None:
        return prompts
    seen, kept = Counter(), []
    for prompt in prompts:
        seen[prompt.task] += 1
        if seen[prompt.task] <= count:
            kept.append(prompt)
    return kept
