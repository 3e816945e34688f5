"""
Short clips of many kinds, on which `vision_policies.py` compares methods with baselines.

Recorded clips come from pinned wheels. Composed clips are rendered from photographs in the wheels that the tower is
built from; their frames are the same at every call. No clip is stored in the repository.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from neuroflow_hf.utils.wheels import fetch_wheel
from recipes.recordings import FRAMES, RECORDINGS, SIZE, Clip
from recipes.siglip_dinov2_small.wheels import SKIMAGE_WHEEL, SKLEARN_WHEEL, read_photos

FRAMES_PER_SECOND = 30.0


# --- pure functions from photographs to float pictures, 0 to 255 -----------------------------------------------------


def fit(photo: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The centre of a photograph uint8 [H, W, 3], cropped and resized: float32 [*size, 3]."""
    height, width = size
    scale = max(height / photo.shape[0], width / photo.shape[1])
    top = (photo.shape[0] - height / scale) / 2
    left = (photo.shape[1] - width / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    resized = Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized, dtype=np.float32)


def sample(picture: np.ndarray, rows: np.ndarray, columns: np.ndarray, outside: str = "reflection") -> np.ndarray:
    """A float32 picture [H, W, C] interpolated bicubically at float positions [h, w]: [h, w, C]."""
    height, width = picture.shape[:2]
    places = np.stack((2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1), axis=-1)
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(picture).permute(2, 0, 1)[None],
        torch.from_numpy(places.astype(np.float32))[None],
        mode="bicubic",
        padding_mode=outside,
        align_corners=True,
    )
    return sampled[0].permute(1, 2, 0).numpy()


def noisy(pictures: Iterable[np.ndarray], sigma: float, seed: int) -> Iterator[np.ndarray]:
    """
    Pictures with the noise of a sensor, rounded to uint8. `sigma` is the noise's standard deviation at mid grey, in
    grey levels. A fifth of its variance is read noise; the rest is shot noise, which grows with the light.
    """
    rng = np.random.default_rng(seed)
    for picture in pictures:
        deviation = sigma * np.sqrt(0.2 + 0.8 * np.clip(picture, 0, 255) / 128)
        noise = deviation * rng.standard_normal(picture.shape, dtype=np.float32)
        yield np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def lit(scene: np.ndarray, gains: Iterable[np.ndarray | float]) -> Iterator[np.ndarray]:
    """A scene [H, W, 3] under changing light: one picture for each gain, a number, [3] or [H, 1, 1]."""
    return ((scene * gain).astype(np.float32) for gain in gains)


def mains_flicker(amplitude: float, rows: int = 1, readout: float = 0.0) -> np.ndarray:
    """
    Gains [FRAMES, rows, 1, 1] of lamps on 50 Hz mains, which pulse 100 times a second, filmed at 29.97 frames. The
    gain differs from 1 by `amplitude` at most. `readout` is the time in seconds from the exposure of the first of the
    `rows` to that of the last: a rolling shutter gives moving bands.
    """
    seconds = np.arange(FRAMES)[:, None] / 29.97 + np.linspace(0, readout, rows)
    return (1 + amplitude * np.sin(2 * math.pi * 100 * seconds))[:, :, None, None]


def swaying(scene: np.ndarray, amplitude: float, seed: int) -> Iterator[np.ndarray]:
    """
    A scene [H, W, 3] that sways like leaves in the wind: waves of several lengths run through it, in gusts. A point is
    at most `amplitude` pixels from its position at rest; the seed chooses phases and directions.
    """
    rng = np.random.default_rng(seed)
    height, width = scene.shape[:2]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    # length relative to the width, period in frames, share of the amplitude: long waves are slow and large
    waves = [(0.9, 31, 0.4), (0.45, 19, 0.3), (0.22, 11, 0.2), (0.11, 7, 0.1)]
    angles = rng.uniform(-0.6, 0.6, len(waves))
    phases = rng.uniform(0, 2 * math.pi, len(waves))
    shapes = [
        2 * math.pi * (columns * math.cos(angle) + rows * math.sin(angle)) / (length * width) + phase
        for (length, _, _), angle, phase in zip(waves, angles, phases, strict=True)
    ]
    for frame in range(FRAMES):
        gust = 0.65 + 0.35 * np.sin(2 * math.pi * (columns / width - frame / 50))
        along = across = 0
        for (_, period, share), shape in zip(waves, shapes, strict=True):
            turn = shape - 2 * math.pi * frame / period
            along = along + share * np.sin(turn)
            across = across + share * np.cos(turn)
        yield sample(scene, rows + 0.5 * amplitude * gust * across, columns + amplitude * gust * along)


def glide(waypoints: Sequence[tuple[float, ...]], eased: bool = True, frames: int = FRAMES) -> np.ndarray:
    """
    A path [frames, values] through waypoints (frame, value, value, ...). It stands still before the first and after
    the last; if `eased`, it starts and stops gently at each, rather than move at constant speed.
    """
    times, *values = np.array(waypoints, dtype=np.float64).T
    stations = np.arange(len(times))
    progress = np.interp(np.arange(frames), times, stations)
    part = progress % 1
    if eased:
        progress = progress - part + part * part * (3 - 2 * part)
    return np.stack([np.interp(progress, stations, value) for value in values], axis=1)


def hand_shake(row: float, column: float, sway: float, seed: int) -> np.ndarray:
    """
    Poses [FRAMES, 4] for `filmed` of a camera held by hand, with slow sway, quick tremor and a little roll. The view's
    centre is about `sway` pixels from (row, column) of the photograph; the seed chooses the phases.
    """
    rng = np.random.default_rng(seed)
    hertz = np.array([0.3, 0.7, 1.3, 2.9, 6.1])
    strength = 1 / hertz
    turns = 2 * math.pi * hertz * np.arange(FRAMES)[:, None, None] / FRAMES_PER_SECOND
    waves = np.sin(turns + rng.uniform(0, 2 * math.pi, (3, len(hertz)))) @ (strength / strength.sum())
    return np.column_stack(
        (row + sway * waves[:, 0], column + 1.4 * sway * waves[:, 1], 0.012 * waves[:, 2], np.ones(FRAMES))
    )


def filmed(photo: np.ndarray, poses: np.ndarray, size: tuple[int, int] = SIZE) -> Iterator[np.ndarray]:
    """
    Views float32 [*size, 3] of a larger photograph [H, W, 3] as a camera passes over it, interpolated bicubically.
    Poses [frames, 4] are row and column of the view's centre, roll in radians, and zoom; `size` is that at zoom 1.
    """
    photo = photo.astype(np.float32)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    rows -= (size[0] - 1) / 2
    columns -= (size[1] - 1) / 2
    for row, column, roll, zoom in poses:
        sine, cosine = math.sin(roll) / zoom, math.cos(roll) / zoom
        yield sample(photo, row + cosine * rows + sine * columns, column + cosine * columns - sine * rows)


def cut_out(
    photo: np.ndarray, centre: tuple[float, float], radii: tuple[float, float], height: int, feather: float = 3.0
) -> np.ndarray:
    """
    An ellipse of a photograph uint8 [H, W, 3], soft at its edge over `feather` pixels: float32 [height, w, 4], RGB
    times alpha, and alpha. Centre and radii are vertical and horizontal.
    """
    width = round(height * radii[1] / radii[0])
    box = (centre[1] - radii[1], centre[0] - radii[0], centre[1] + radii[1], centre[0] + radii[0])
    image = Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS, box=box)
    rows = np.linspace(-1, 1, height)[:, None]
    columns = np.linspace(-1, 1, width)
    inside = (1 - np.hypot(rows, columns)) * min(height, width) / 2
    alpha = np.clip(inside / feather, 0, 1)[..., None]
    return np.concatenate((np.asarray(image) * alpha, alpha), axis=-1).astype(np.float32)


def pasted(scenes: Iterable[np.ndarray], thing: np.ndarray, places: np.ndarray) -> Iterator[np.ndarray]:
    """Scenes [H, W, 3], each with a cut-out [h, w, 4] whose centre is at its row of `places`; NaN hides it."""
    middle = ((thing.shape[0] - 1) / 2, (thing.shape[1] - 1) / 2)
    for scene, (row, column) in zip(scenes, places, strict=False):
        if math.isnan(row):
            yield scene
            continue
        rows, columns = np.mgrid[: scene.shape[0], : scene.shape[1]].astype(np.float32)
        layer = sample(thing, rows - row + middle[0], columns - column + middle[1], outside="zeros")
        yield scene * (1 - np.clip(layer[..., 3:], 0, 1)) + layer[..., :3]


# --- composed clips --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """A clip rendered over photographs."""

    name: str  # name, kind, events: as in Clip
    kind: str
    note: str  # what is seen
    photos: tuple[str, ...]  # names of the photographs, as `read_photos` takes them
    noise: float  # standard deviation of the noise at mid grey, in grey levels; see `noisy`
    events: tuple[int, ...]
    # a function from the photographs, uint8 [H, W, 3] each, to float32 pictures [*SIZE, 3] without noise
    pictures: Callable[..., Iterable[np.ndarray]]

    def load(self, home: Path, console: Console) -> Clip:
        """The clip with the photographs of the wheels under `home`, which are downloaded if they are missing."""
        for wheel in (SKIMAGE_WHEEL, SKLEARN_WHEEL):
            fetch_wheel(wheel, home / "wheels", console.print)
        return self.compose([np.asarray(photo) for photo in read_photos(home / "wheels", self.photos)])

    def compose(self, photos: Sequence[np.ndarray]) -> Clip:
        """The clip with these photographs, uint8 [H, W, 3] each."""

        def frames() -> Iterator[np.ndarray]:
            return noisy(self.pictures(*photos), self.noise, seed=zlib.crc32(self.name.encode()))

        return Clip(self.name, self.kind, frames, self.events)


COMPOSITIONS: list[Composition] = []

ASTRONAUT = "skimage/data/astronaut.png"
CHELSEA = "skimage/data/chelsea.png"
COFFEE = "skimage/data/coffee.png"
GRASS = "skimage/data/grass.png"
GRAVEL = "skimage/data/gravel.png"
ROCKET = "skimage/data/rocket.jpg"
CHINA = "sklearn/datasets/images/china.jpg"
FLOWER = "sklearn/datasets/images/flower.jpg"


def composition(kind: str, note: str, *photos: str, noise: float, events: tuple[int, ...] = ()) -> Callable:
    """Decorator that adds a clip to the suite; the function has its name and makes its pictures from photographs."""

    def add(pictures: Callable) -> Callable:
        name = pictures.__name__.replace("_", "-")
        COMPOSITIONS.append(Composition(name, kind, note, photos, noise, events, pictures))
        return pictures

    return add


@composition("still", "a coffee cup, sensor noise of 2.5 grey levels", COFFEE, noise=2.5)
def still_noise(coffee):
    return repeat(fit(coffee), FRAMES)


@composition("still", "a pavilion at 0.4 of its light, noise of 6 grey levels, as at high ISO", CHINA, noise=6.0)
def still_low_light(china):
    return repeat(0.4 * fit(china), FRAMES)


@composition("flicker", "a pavilion, 5% brighter and darker at the beat of 50 Hz lamps", CHINA, noise=1.5)
def flicker(china):
    return lit(fit(china), mains_flicker(0.05))


@composition("flicker", "a coffee cup, 4% bands: the same lamps under a rolling shutter", COFFEE, noise=1.5)
def flicker_bands(coffee):
    return lit(fit(coffee), mains_flicker(0.04, rows=SIZE[0], readout=0.02))


@composition("light drift", "a cat; light falls by 25% and gets 25% warmer over the clip", CHELSEA, noise=1.0)
def light_drift(chelsea):
    part = (1 - np.cos(np.linspace(0, math.pi, FRAMES)))[:, None] / 2
    return lit(fit(chelsea), (1 - 0.25 * part) * (1 + np.array([0.125, 0, -0.125]) * part))


@composition("leaves", "a dahlia before leaves in the wind, up to 6 pixels to and fro", FLOWER, noise=1.0)
def swaying_flower(flower):
    return swaying(fit(flower), amplitude=6.0, seed=1)


@composition("leaves", "grass from edge to edge in the wind, up to 3 pixels to and fro", GRASS, noise=1.0)
def waving_grass(grass):
    return swaying(fit(grass), amplitude=3.0, seed=2)


@composition("moving camera", "a slow pan over a pavilion, 2.3 pixels a frame", CHINA, noise=1.0)
def pan(china):
    return filmed(china, glide([(0, 265, 205, 0, 1), (FRAMES - 1, 215, 425, 0, 1)], eased=False))


@composition("hand-held camera", "a coffee cup through a camera held by hand", COFFEE, noise=1.0)
def hand_held(coffee):
    return filmed(coffee, hand_shake(195, 290, sway=10, seed=3))


@composition("moving camera", "a rocket on its pad, slowly nearer", ROCKET, noise=1.0)
def zoom(rocket):
    return filmed(rocket, glide([(10, 213, 320, 0, 1), (90, 240, 322, 0, 1.35)]))


@composition("object", "a dahlia comes (15 to 40), stops, goes (60 to 85)", CHINA, FLOWER, noise=1.5, events=(40, 85))
def object_stops(china, flower):
    dahlia = cut_out(flower, centre=(221, 308), radii=(136, 137), height=140)
    return pasted(repeat(fit(china)), dahlia, glide([(15, 215, -72), (40, 190, 230), (60, 190, 230), (85, 215, 472)]))


@composition("object", "a head flies by at 12.5 pixels a frame (20 to 60)", ROCKET, ASTRONAUT, noise=1.5, events=(60,))
def object_passes(rocket, astronaut):
    head = cut_out(astronaut, centre=(110, 225), radii=(98, 74), height=130)
    return pasted(repeat(fit(rocket)), head, glide([(20, 130, 450), (60, 110, -51)], eased=False))


@composition("object", "a cup moves over gravel by 0.4 pixels a frame", GRAVEL, COFFEE, noise=1.0)
def object_creeps(gravel, coffee):
    cup = cut_out(coffee, centre=(201, 279), radii=(186, 205), height=130)
    return pasted(repeat(fit(gravel)), cup, glide([(0, 150, 180), (FRAMES, 156, 220)], eased=False))


@composition("object", "a cat is there at once (30), gone at once (65)", CHINA, CHELSEA, noise=1.5, events=(30, 65))
def object_appears(china, chelsea):
    cat = cut_out(chelsea, centre=(150, 205), radii=(146, 162), height=150)
    places = [(180, 250) if 30 <= number < 65 else (math.nan, math.nan) for number in range(FRAMES)]
    return pasted(repeat(fit(china)), cat, np.array(places))


@composition("lights", "a coffee cup; lights go off to 0.35 (30), and on (70)", COFFEE, noise=1.5, events=(30, 70))
def lights_switched(coffee):
    index = np.arange(FRAMES)
    return lit(fit(coffee), np.where((index >= 30) & (index < 70), 0.35, 1.0))


@composition("cuts", "a pavilion, a coffee cup (33), a cat (66)", CHINA, COFFEE, CHELSEA, noise=1.5, events=(33, 66))
def scene_cuts(*photos):
    return chain(*(repeat(fit(photo), count) for photo, count in zip(photos, (33, 33, 34), strict=True)))


@composition("snow", "a pavilion in falling snow, 150 flakes of 1 to 3 pixels", CHINA, noise=1.0)
def snow(china):
    rng = np.random.default_rng(4)
    scene, (height, width) = fit(china), SIZE
    places, radii = rng.uniform((0, 0), (height, width), (150, 2)), rng.uniform(0.8, 3.0, 150)
    sway = rng.uniform(0, 2 * math.pi, 150)
    rows, columns = np.mgrid[-4:5, -4:5]
    for frame in range(FRAMES):
        snow = np.zeros((height + 8, width + 8, 1), dtype=np.float32)
        for (row, column), radius, phase in zip(places, radii, sway, strict=True):
            row = (row + 2.5 * radius * frame) % height
            column = (column + 4 * math.sin(phase + frame / 9)) % width
            distance = np.hypot(rows - row % 1, columns - column % 1)
            patch = snow[int(row) : int(row) + 9, int(column) : int(column) + 9, 0]
            np.maximum(patch, np.clip(radius + 0.5 - distance, 0, 0.9), out=patch)
        snow = snow[4:-4, 4:-4]
        yield scene * (1 - snow) + 250 * snow


@composition("hand-held camera", "towards a rocket, on foot: steps, sway and roll", ROCKET, noise=1.0)
def walking(rocket):
    poses = hand_shake(213, 320, sway=5, seed=5)
    frames = np.arange(FRAMES)
    poses[:, 0] += 4 * np.abs(np.sin(math.pi * frames / 15))  # two steps a second
    poses[:, 3] = 1 + 0.4 * frames / FRAMES
    return filmed(rocket, poses)


@composition("moving camera", "a pan over a pavilion, a dahlia crosses it the other way", CHINA, FLOWER, noise=1.0)
def pan_with_object(china, flower):
    views = filmed(china, glide([(0, 225, 205, 0, 1), (FRAMES - 1, 225, 425, 0, 1)], eased=False))
    dahlia = cut_out(flower, centre=(221, 308), radii=(136, 137), height=90)
    return pasted(views, dahlia, glide([(0, 200, 440), (FRAMES - 1, 170, -40)], eased=False))


@composition("screen", "a page of text that scrolls, stands (30 to 50, 70 to 80), and scrolls on", noise=0.0)
def scrolling():
    page = Image.new("RGB", (SIZE[1] + 40, 1200), (250, 250, 248))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for number in range(60):
        line = " ".join(f"{word}{7 + 3 * (number % 18)}" for word in ("token", "patch", "frame", "layer"))
        draw.text((30, 20 * number), line, (30, 30, 40), font)
    rows = ((0, 200), (30, 320), (50, 320), (70, 800), (80, 800), (99, 900))
    return filmed(np.asarray(page), glide([(frame, row, 220, 0, 1) for frame, row in rows]))


SOURCES = (*RECORDINGS, *COMPOSITIONS)
NAMES = tuple(source.name for source in SOURCES)
