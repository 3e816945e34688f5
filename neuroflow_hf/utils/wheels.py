"""Wheels as sources of files: pinned, downloaded with a message, checked, read, never installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OnStep = Callable[[str, float, float | None], object]  # takes what is done, how much of it, and the total


@dataclass(frozen=True)
class WheelPin:
    """One wheel: its project, version, file name, SHA-256, size in MB and extra pip arguments."""

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: int
    pip_arguments: tuple[str, ...] = ()


def check_wheel(path: Path, pin: WheelPin) -> None:
    """Raise ValueError unless the file at `path` has the SHA-256 that `pin` names."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise ValueError(
            f"{path.name} is not the {pin.project} {pin.version} that is expected here: its SHA-256 is {found}, "
            f"expected {pin.sha256}. Delete the file {path}, if it is still there, and try again; if the download "
            "gives the same file twice, your package index serves a different one."
        )


def fetch_wheel(pin: WheelPin, folder: Path, say: Callable[[str], object], on_step: OnStep = lambda *_: None) -> Path:
    """
    The path of a checked wheel in `folder`; if it is not there, pip downloads it.

    Args:
        pin: which wheel.
        folder: where wheels are kept; made if missing.
        say: called with a sentence before a download.
        on_step: called during a download with the MB that are here.

    Raises:
        ValueError: the wheel in `folder`, or the one downloaded, has another SHA-256 than `pin`.
        RuntimeError: pip could not download it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / pin.filename
    if kept.is_file():
        check_wheel(kept, pin)
        return kept
    say(
        f"Downloading the wheel of {pin.project} {pin.version} ({pin.megabytes} MB) from your package index, "
        f"into {folder}"
    )
    requirement = f"{pin.project}=={pin.version}"
    # The file gets its final name only once its hash is right, so a broken download is never taken for a wheel.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as partial:
        arguments = ["download", "--quiet", "--no-deps", "--dest", partial, *pin.pip_arguments, requirement]

        def show_size():
            sizes = [path.stat().st_size for path in Path(partial).rglob("*") if path.is_file()]
            on_step(f"Downloading {pin.project} (MB)", min(sum(sizes) // 10**6, pin.megabytes), pin.megabytes)

        returncode, said = run_pip(arguments, Path(partial), show_size)
        downloaded = Path(partial) / pin.filename
        if returncode != 0 or not downloaded.is_file():
            last_words = "\n".join(said.strip().splitlines()[-3:])
            raise RuntimeError(
                f"pip could not download {pin.filename}. Expected: `pip download --no-deps {requirement}` works here, "
                f"which takes a network and pip in this Python. Without them, download that file on another machine "
                f"and put it at {kept}, then try again. pip said:\n{last_words}"
            )
        check_wheel(downloaded, pin)
        downloaded.replace(kept)
    return kept


def run_pip(arguments: list[str], temporary: Path, on_wait: Callable[[], object]) -> tuple[int, str]:
    """
    This Python's pip: its exit code and what it said on stderr.

    Args:
        temporary: a folder for its unfinished downloads.
        on_wait: called every now and then until it ends.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", *arguments],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while True:
            try:
                said = process.communicate(timeout=0.5)[1]
                return process.returncode, said
            except subprocess.TimeoutExpired:
                on_wait()
    finally:
        process.kill()  # after Ctrl-C; nothing if it ended
