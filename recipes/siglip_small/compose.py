"""Compose pictures from drawings and photographs, with their facts; a picture depends on its random generator only."""

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from recipes.siglip_small.facts import Placed, facts_of
from recipes.siglip_small.sources import (
    HELD_OUT_STYLE,
    MONOCHROME,
    Drawing,
    Photo,
    drawings,
    footage,
    held_out_rendering,
    photos,
)

SIDE = 224
SPLITS = ("training", "held out", "unseen style")
MOST_COVERED = 0.4  # if drawings cover more than this, the facts leave out the photograph behind them


@dataclass(frozen=True)
class Picture:
    """A composed picture and what is in it."""

    image: Image.Image  # RGB, SIDE x SIDE
    placed: tuple[Placed, ...]  # the drawings in it, the largest first
    facts: frozenset[str]  # from `facts_of`
    covered: np.ndarray  # bool [SIDE, SIDE], the pixels that drawings cover


@dataclass(frozen=True)
class Material:
    """Drawings and photographs of one split."""

    drawings: dict[str, list[Drawing]]  # by thing
    photos: list[Photo]  # that are shown alone
    grounds: list[Photo]  # that drawings are placed on; in the held-out splits, none of them shows a thing


def split_drawings() -> dict[str, dict[str, list[Drawing]]]:
    """The drawings of each of SPLITS, by thing, split as in `load_material`."""
    chosen: dict[str, dict[str, list[Drawing]]] = {split: {} for split in SPLITS}
    for name, every in drawings().items():
        found = [drawing for drawing in every if drawing.style != HELD_OUT_STYLE]
        held_out = held_out_rendering(name, {drawing.style for drawing in found})
        chosen["training"][name] = [drawing for drawing in found if drawing.style != held_out]
        chosen["held out"][name] = [drawing for drawing in found if drawing.style == held_out]
        chosen["unseen style"][name] = [drawing for drawing in every if drawing.style == HELD_OUT_STYLE]
    return chosen


def load_material() -> dict[str, Material]:
    """
    The material of each of SPLITS. `held out`: one rendering of each thing of which training has another rendering of
    the same emoji. `unseen style`: drawings of a style that training does not have. Both have held-out photographs.
    """
    chosen = split_drawings()
    pictures = [*photos(), *footage()]
    training = [photo for photo in pictures if not photo.held_out]
    held_out = [photo for photo in pictures if photo.held_out]
    without_things = [photo for photo in held_out if not {"person", *chosen["training"]} & set(photo.shows)]
    behind = {"training": (training, training)}
    return {
        split: Material(
            {name: found for name, found in chosen[split].items() if found},
            *behind.get(split, (held_out, without_things)),
        )
        for split in SPLITS
    }


def compose(material: Material, rng: np.random.Generator) -> Picture:
    """
    One picture: in most cases one to three drawings before a photograph or a plain ground, sometimes several drawings
    of one thing, or a photograph alone.
    """
    draw = rng.random()
    if draw < 0.1:
        return photograph_alone(material, rng)
    photo = one_of(material.grounds, rng) if rng.random() < 0.75 else None
    ground = crop(photo.picture, rng, least=0.3) if photo else plain_ground(rng)
    names = list(material.drawings)
    kind = rng.random()
    if kind < 0.6:
        chosen = [names[rng.integers(len(names))]]
    elif kind < 0.9:
        chosen = [names[place] for place in rng.choice(len(names), size=2 if rng.random() < 0.7 else 3, replace=False)]
    else:
        chosen = [names[rng.integers(len(names))]] * int(rng.integers(2, 4))
    several = len(set(chosen)) < len(chosen)
    main_side = math.exp(rng.uniform(math.log(0.25), math.log(1.0 if len(chosen) == 1 else 0.75)))
    sides = [main_side * (rng.uniform(0.85, 1) if several else rng.uniform(0.35, 0.65)) for _ in chosen[1:]]
    return assemble(material, rng, ground, chosen, [main_side, *sides], photo.shows if photo else ())


def assemble(
    material: Material,
    rng: np.random.Generator,
    ground: Image.Image,
    names: list[str],
    sides: list[float],
    shows: tuple[str, ...],
) -> Picture:
    """Drawings of the things `names` on a ground; `sides` are their longer sides relative to the picture's."""
    taken: list[tuple[float, float, float, float]] = []
    placed, covered = [], Image.new("L", (SIDE, SIDE))
    one_drawing: dict[str, Drawing] = {}
    for name, side in zip(names, sides, strict=True):
        found = material.drawings[name]
        drawing = one_drawing.setdefault(name, found[rng.integers(len(found))])  # several of a thing look alike
        picture = tinted(drawing.picture, rng) if drawing.style in MONOCHROME else drawing.picture
        cut = turned(picture, rng, round(side * SIDE))
        box = free_place(cut.size, taken, rng)
        if box is None:
            continue
        taken.append(box)
        place = (round(box[0]), round(box[1]))
        ground.paste(cut, place, cut)
        covered.paste(255, place, cut.getchannel("A"))
        share = float((np.asarray(cut.getchannel("A")) > 127).sum()) / SIDE**2
        x, y = ((box[0] + box[2]) / 2 / SIDE, (box[1] + box[3]) / 2 / SIDE)
        placed.append(Placed(name, drawing.style, x, y, share))
    placed.sort(key=lambda item: -item.share)
    if sum(item.share for item in placed) > MOST_COVERED:
        shows = ()
    where = np.asarray(covered) > 127
    return Picture(spoiled(ground, rng), tuple(placed), facts_of(placed, shows, empty=False), where)


def photograph_alone(material: Material, rng: np.random.Generator) -> Picture:
    """A photograph, or a plain ground with nothing on it."""
    nowhere = np.zeros((SIDE, SIDE), dtype=bool)
    if rng.random() < 0.15:
        return Picture(spoiled(plain_ground(rng), rng), (), facts_of((), (), empty=True), nowhere)
    photo = one_of(material.photos, rng)
    view = crop(photo.picture, rng, least=0.45 if photo.shows else 0.15)
    return Picture(spoiled(view, rng), (), facts_of((), photo.shows, photo.empty), nowhere)


def one_of(photos: list[Photo], rng: np.random.Generator) -> Photo:
    """A random photograph. All scenes are equally likely, because footage has many frames of few scenes."""
    scenes = sorted({photo.shows for photo in photos if photo.shows})
    place = rng.integers(len(scenes) + sum(not photo.shows for photo in photos))
    shows = scenes[place] if place < len(scenes) else ()
    those = [photo for photo in photos if photo.shows == shows]
    return those[rng.integers(len(those))]


def crop(photo: Image.Image, rng: np.random.Generator, least: float) -> Image.Image:
    """A crop of at least the share `least` of a photograph's area, sometimes mirrored, SIDE x SIDE."""
    area = photo.width * photo.height * rng.uniform(least, 1.0)
    aspect = math.exp(rng.uniform(-0.3, 0.3)) * photo.width / photo.height
    width = min(photo.width, round(math.sqrt(area * aspect)))
    height = min(photo.height, round(math.sqrt(area / aspect)))
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    view = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view


def plain_ground(rng: np.random.Generator) -> Image.Image:
    """A ground of one colour, or of a gradient between two."""
    first, second = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    if rng.random() < 0.4:
        first = second = np.full(3, 255) if rng.random() < 0.5 else first
    fade = np.linspace(0, 1, SIDE)[:, None, None] * np.ones((1, SIDE, 1))
    ground = first * (1 - fade) + second * fade
    if rng.random() < 0.5:
        ground = ground.transpose(1, 0, 2)
    return Image.fromarray(ground.astype(np.uint8))


def tinted(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A drawing of one colour, in a random colour."""
    tint = Image.new("RGBA", drawing.size, (*(int(value) for value in rng.integers(0, 256, 3)), 255))
    tint.putalpha(drawing.getchannel("A"))
    return tint


def turned(drawing: Image.Image, rng: np.random.Generator, side: int) -> Image.Image:
    """
    A drawing scaled to `side`, rotated by up to 25 degrees, sometimes mirrored, with changed brightness, contrast and
    saturation, sometimes with another hue or without colours.
    """
    scale = side / max(drawing.size)
    cut = drawing.resize([max(2, round(scale * length)) for length in drawing.size], Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        cut = cut.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
    alpha = cut.getchannel("A")
    colours = ImageEnhance.Brightness(cut.convert("RGB")).enhance(rng.uniform(0.7, 1.2))
    colours = ImageEnhance.Color(colours).enhance(0.0 if rng.random() < 0.05 else rng.uniform(0.4, 1.5))
    colours = ImageEnhance.Contrast(colours).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.1:
        colours = other_hue(colours, int(rng.integers(20, 236)))
    colours.putalpha(alpha)
    return colours


def other_hue(picture: Image.Image, by: int) -> Image.Image:
    """The picture with its hue shifted, in steps of 1/256 of the circle."""
    hue, saturation, value = picture.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda old: (old + by) % 256), saturation, value)).convert("RGB")


def free_place(
    size: tuple[int, int], taken: list[tuple[float, float, float, float]], rng: np.random.Generator
) -> tuple[float, float, float, float] | None:
    """A random box of a size that covers less than a tenth of any taken box; None if none is found."""
    width, height = size
    if max(size) > SIDE * 1.15:
        left, top = (SIDE - width) / 2, (SIDE - height) / 2
        return None if taken else (left, top, left + width, top + height)
    for _ in range(30):
        left = rng.uniform(min(0, SIDE - width), max(0, SIDE - width))
        top = rng.uniform(min(0, SIDE - height), max(0, SIDE - height))
        box = (left, top, left + width, top + height)
        if all(overlap(box, other) < 0.1 for other in taken):
            return box
    return None


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The common area of two boxes, as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def spoiled(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with random degradations of a camera: brightness, grey, blur, noise, compression."""
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.75, 1.25))
    if rng.random() < 0.05:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6)))
    if rng.random() < 0.25:
        noise = rng.normal(0, rng.uniform(2, 14), (SIDE, SIDE, 3))
        picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(25, 90)))
        picture = Image.open(buffer).convert("RGB")
    return picture
