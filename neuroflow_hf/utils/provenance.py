"""Where a figure comes from: machine, versions, commit, weights, code; and keys that change with these."""

import ast
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("neuroflow-hf", "torch", "transformers", "accelerate")


def machine_and_versions(device: str = "cpu") -> dict:
    """What figures were measured on: processor, cores, threads, device, and the versions of what computed them."""
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"machine": machine, "versions": versions}


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that differ between checkpoints: the figures of two runs compare only if these agree."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def checkout_commit() -> str | None:
    """The commit of the checkout that this package lies in, with `+` if files were changed since; None elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + "+" * bool(changes.strip())


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
    The version of the code that a method's figures depend on, with `more` files of this package. A method's options
    are a part of the key of their own.
    """
    package = Path(__file__).parents[1]
    names = (package / name for name in more)
    return code_version([*(package / "vision").glob("*.py"), *(package / "language").glob("*.py"), *names])
