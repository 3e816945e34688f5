"""Where a figure comes from: machine, versions, commit; reports written whole or not at all, and filled into texts."""

import hashlib
import json
import math
import os
import platform
import re
import secrets
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("neuroflow-hf", "torch", "transformers", "accelerate")
LIST_OF_NUMBERS = re.compile(r"\[\n\s+([^\[\]{}\"]*?)\s+\]")


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


def write_whole(path: Path, text: str):
    """Write a text file, whole or not at all."""
    write_whole_bytes(path, text.encode())


def write_whole_bytes(path: Path, content: bytes):
    """Write a file, whole or not at all, also where several processes write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value):
    """A report with None in the place of numbers that JSON has none for: infinite ones, and NaN."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_text(report: dict) -> str:
    """A report as JSON, indented, with lists of numbers in one line each."""
    text = json.dumps(finite(report), indent=2, allow_nan=False)
    return LIST_OF_NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def fill_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` replaced by `content`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"Expected `{begin}` and `{end}` once each.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
