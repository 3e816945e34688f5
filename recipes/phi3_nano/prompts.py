"""
Short held-out prompts of every domain, for whoever measures text generation.

    python -m recipes.phi3_nano.prompts

writes `eval/prompts/phi3_nano.jsonl`; a line is `{"task": "code" | "structured" | "prose", "prompt": text,
"source": where it is from}`. They are from files that the embedded Phi-3 never saw. None ends with a line's end: to
the tokenizer that is one token with the next line's indentation, so that alone it would mean that none follows.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from neuroflow_hf.utils.files import write_whole
from recipes.phi3_nano.corpus import load_corpus, read_texts
from recipes.phi3_nano.sources import DOMAINS, Document

OUTPUT = Path("eval/prompts/phi3_nano.jsonl")
EACH = 60
LENGTH = (50, 120)  # tokens


def function_prefixes(text: str) -> Iterator[str]:
    """
    Of every function at the top of a Python file: its decorators and signature with its docstring, or else with its
    first statement. Only functions that have at least two statements more.
    """
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 3 or node.col_offset:
            continue
        first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
        yield "\n".join(lines[first - 1 : node.body[0].end_lineno])


def structured_prefixes(text: str, rng: np.random.Generator) -> Iterator[str]:
    """The beginning of a structured text, and some stretches of whole lines out of its middle."""
    lines = text.split("\n")
    for first in (0, *rng.integers(max(1, len(lines) - 20), size=5)):
        yield "\n".join(lines[first : first + int(rng.integers(6, 20))]).rstrip()


def prose_prefixes(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Some sentences out of the middle of a text, the last broken off between two words."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z\"])", text)
    for _ in range(6):
        first = int(rng.integers(max(1, len(sentences) - 4)))
        words = " ".join(sentences[first : first + 4]).split(" ")
        yield " ".join(words[: int(rng.integers(40, 70))])


def prefixes(document: Document, rng: np.random.Generator) -> list[str]:
    """All prompts that a held-out text gives."""
    if document.domain == "code":
        return list(function_prefixes(document.text))
    make = structured_prefixes if document.domain == "structured" else prose_prefixes
    return list(make(document.text, rng))


def draw_prompts(
    held_out: list[Document], tokenizer: PreTrainedTokenizerFast, domain: str, count: int, seed: int = 0
) -> list[dict[str, str]]:
    """
    Prompts of one domain.

    Args:
        held_out: texts.
        tokenizer: by which LENGTH counts.
        domain: one of DOMAINS.
        count: how many, at most; taken from all files in turn.
        seed: of the choice.

    Returns:
        Dicts of `task`, `prompt` and `source`, no two prompts alike.
    """
    rng = np.random.default_rng((seed, DOMAINS.index(domain)))
    files = [document for document in held_out if document.domain == domain]
    queues = []
    for place in rng.permutation(len(files)):
        found = [
            text for text in prefixes(files[place], rng) if LENGTH[0] <= len(tokenizer(text).input_ids) <= LENGTH[1]
        ]
        queues.append((files[place].source, [found[item] for item in rng.permutation(len(found))]))
    chosen: dict[str, dict[str, str]] = {}
    while any(queue for _, queue in queues) and len(chosen) < count:
        for source, queue in queues:
            if queue and len(chosen) < count:
                text = queue.pop()
                chosen.setdefault(text, {"task": domain, "prompt": text, "source": source})
    return list(chosen.values())


def main() -> None:
    """Write the prompts."""
    console = Console()
    tokenizer = load_corpus(console).tokenizer
    held_out = list(read_texts("held_out"))
    lines = [item for domain in DOMAINS for item in draw_prompts(held_out, tokenizer, domain, EACH)]
    write_whole(OUTPUT, "".join(json.dumps(item) + "\n" for item in lines))
    console.print(f"{len(lines)} prompts in {OUTPUT}")


if __name__ == "__main__":
    main()
