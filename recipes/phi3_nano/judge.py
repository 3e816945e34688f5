"""Whether what was generated is Python, and whether it is made of words: pure functions."""

import ast
import codeop
import re
import warnings
from dataclasses import dataclass

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


@dataclass(frozen=True)
class Completion:
    """
    A judged completion of a function's beginning.

    Attributes:
        statements: how many the completion adds, in the longest stretch of it that ends with a statement and that
            `ast.parse` accepts after the prompt; 0 if there is none.
        kept: that stretch.
        is_valid_throughout: whether all that was generated, but for a last line that is not finished, is the valid
            beginning of a Python file, as Python's own incremental compiler judges.
    """

    statements: int
    kept: str
    is_valid_throughout: bool


def count_statements(text: str) -> int | None:
    """How many statements, nested ones too, are in a text; None if `ast.parse` does not accept it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes
        try:
            return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def starts_statement_in(text: str, first: int, last: int) -> bool:
    """Whether the last statement of a text that parses ends in line `last` and begins in line `first` or later."""
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    return any(node.lineno >= first and node.end_lineno == last for node in statements)


def judge(prompt: str, completion: str, is_ended: bool = False) -> Completion:
    """
    Judge a completion of a Python text.

    Args:
        prompt: lines that end with the header of a function and its docstring, or with a statement; without the last
            line's end, which is the model's to give.
        completion: what was generated after it.
        is_ended: whether the model itself ended the text, so that its last line is finished.

    Returns:
        The cut is made at line ends from the last on; the first that leaves a text which parses, and whose last
        statement begins in a line of the completion's own, counts. What the prompt itself has does not: a function of
        which only the docstring is kept has gained nothing.
    """
    if prompt.endswith("\n"):
        raise ValueError("The prompt must not end with a line's end: the model's tokens hold it with what follows.")
    lines = completion.split("\n")  # the first one goes on where the prompt stops
    if lines[-1] and not is_ended:
        lines = lines[:-1]
    before = prompt.count("\n") + 1
    base = count_statements(prompt + "\n") or 0
    kept, added = "", 0
    for end in range(len(lines), 1, -1):
        last = lines[end - 1].strip()
        if not last or last.startswith("#"):
            continue
        candidate = prompt + "\n".join(lines[:end]) + "\n"
        found = count_statements(candidate)
        if found is not None and found > base and starts_statement_in(candidate, before + 1, before + end - 1):
            kept, added = "\n".join(lines[1:end]) + "\n", found - base
            break
    return Completion(added, kept, added > 0 and is_valid_beginning(prompt + "\n".join(lines) + "\n"))


def is_valid_beginning(text: str) -> bool:
    """Whether whole lines can be the beginning of a Python file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            codeop.compile_command(text, symbol="exec")
        except (SyntaxError, ValueError, OverflowError):
            return False
    return True


def words_of(text: str, is_ended: bool = False) -> list[str]:
    """The words of a text in lower case, without the last if it may be broken off."""
    found = list(WORD.finditer(text))
    if found and not is_ended and found[-1].end() == len(text):
        found = found[:-1]
    return [word[0].lower() for word in found]


def share_of_words(words: list[str], known: frozenset[str]) -> float:
    """The share of words that are known, as they are or without a possessive ending."""
    return sum(word in known or word.removesuffix("'s") in known for word in words) / max(1, len(words))
