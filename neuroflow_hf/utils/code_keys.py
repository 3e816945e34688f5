"""Keys of stored results: they change with whatever the results depend on, code and weights included."""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def key_of(**parts) -> str:
    """16 hex digits that change with any of the parts (what JSON can hold)."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def code_version(paths: Iterable[Path]) -> str:
    """16 hex digits that change with what the code in these files does, not with comments, docstrings or layout."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(paths):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


@functools.cache
def model_version(*more: str) -> str:
    """
    The version of the code that a method's figures depend on; its options are a part of the key of their own.

    Args:
        more: names of further files of this package, such as `"token_merging.py"`.
    """
    package = Path(__file__).parents[1]
    names = (package / name for name in more)
    return code_version([*(package / "vision").glob("*.py"), *(package / "language").glob("*.py"), *names])
