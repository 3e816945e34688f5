"""
Composed clips with ground truth: which thing is where, in every frame.

Drawings of things move before photographs, in the kinds of motion of MOTIONS, for 16 to 10,000 frames. A clip is a
small specification, and a frame is a pure function of the specification and the frame's number. The same seed, motion
and number give the same clip on every machine with the same material and the same Pillow. Things are placed on whole
pixels.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

MOTIONS = {
    "still": "a thing that does not move",
    "local": "a thing that rocks a little where it is",
    "crossing": "a thing crosses the picture, from outside to outside, again and again",
    "arc": "a thing to and fro on an arc",
    "oscillating": "a thing to and fro, far",
    "entering": "an empty scene, into which a thing comes and stays",
    "leaving": "a thing goes, and the scene stays empty",
    "replaced": "a thing is another one from one frame to the next",
    "several": "three things, each with a motion of its own",
    "moving camera": "the camera swings, the thing stays in its place in the scene",
    "light drift": "a still thing, the light falls and comes back slowly",
    "flicker": "a still thing under lamps on 50 Hz mains",
    "noise": "a still thing filmed by a noisy sensor",
    "compression": "a thing to and fro, every frame compressed, every twelfth one less",
}
FEWEST, MOST = 16, 10_000
SIDE = 224
LEAST_VISIBLE = 0.5  # the share of a thing that is in the picture from which on it counts as seen
CAMERA_ROOM = 0.5  # how much larger than the picture the scene is where the camera moves
KEYFRAME_EVERY = 12


@dataclass(frozen=True, eq=False)
class Actor:
    """A thing and its path."""

    thing: str  # its name
    cut: np.ndarray  # uint8 RGBA [h, w, 4]
    path: str  # how it moves, a key of `path_offset`
    centre: tuple[float, float]  # row and column of its middle at rest, in pixels
    reach: tuple[float, float] = (0.0, 0.0)  # how far the path goes from there, down and across, in pixels
    period: int = 1  # frames of one round; of `entering` and `leaving`, frames on the way
    phase: float = 0.0  # where in the round it starts, 0 to 1; of `entering` and `leaving`, 0
    start: int = 0  # the frame at which `entering` and `leaving` set off
    present: tuple[int, int] = (0, MOST)  # first frame on which the thing is present, and the first without it again


@dataclass(frozen=True, eq=False)
class ClipSpec:
    """All of a clip, without its frames."""

    motion: str  # one of MOTIONS
    number: int  # number, seed: with the motion, what everything else was drawn by
    seed: int
    frames: int  # how many
    ground: np.ndarray  # uint8 RGB [C, C, 3], the picture's size; larger where the camera moves
    actors: tuple[Actor, ...]  # later ones are in front
    side: int = SIDE
    # how far the view swings from the middle, down and across, in pixels, and in how many frames
    camera: tuple[float, float, int] = (0.0, 0.0, 1)
    # drift, flicker, noise: strength of the light's fall (share), of the lamps (share), of the sensor (grey levels)
    drift: float = 0.0
    drift_period: int = 1  # frames until the light is back
    flicker: float = 0.0
    noise: float = 0.0
    quality: int = 0  # of JPEG, 0 for none


@dataclass(frozen=True, eq=False)
class Truth:
    """What is in a frame."""

    things: tuple[str, ...]  # names of the clip's actors, also of those that are not there
    # bool [actors, side, side], the pixels on which each is in front, by more than half of its opacity
    masks: np.ndarray
    visible: tuple[float, ...]  # of each, which share of its pixels that is

    @property
    def seen(self) -> tuple[str, ...]:
        """Names of the things of which at least LEAST_VISIBLE is visible, the one with most pixels first."""
        pixels = self.masks.sum((1, 2))
        places = sorted(range(len(self.things)), key=lambda place: -pixels[place])
        return tuple(self.things[place] for place in places if self.visible[place] >= LEAST_VISIBLE)

    @property
    def label(self) -> str | None:
        """The name of the thing that is seen with most pixels; None if none is."""
        return self.seen[0] if self.seen else None


# --- frames: pure functions of a specification and a number ----------------------------------------------------------


def frame(spec: ClipSpec, number: int) -> tuple[np.ndarray, Truth]:
    """A clip's frame, uint8 RGB [side, side, 3], and its truth."""
    return filmed(spec, number, scene(spec, number)), truth(spec, number)


def frames(spec: ClipSpec) -> Iterator[np.ndarray]:
    """All frames of a clip in order, uint8 RGB [side, side, 3] each."""
    return (filmed(spec, number, scene(spec, number)) for number in range(spec.frames))


def right_labels(spec: ClipSpec) -> tuple[str | None, ...]:
    """The right label of each frame, without drawing the frames."""
    return tuple(truth(spec, number).label for number in range(spec.frames))


def scene(spec: ClipSpec, number: int) -> np.ndarray:
    """The scene before the camera: float32 [side, side, 3], 0 to 255."""
    top, left = view(spec, number)
    picture = spec.ground[top : top + spec.side, left : left + spec.side].astype(np.float32)
    for actor in spec.actors:
        inside = place(spec, actor, number)
        if inside is not None:
            at, of = inside
            cut = actor.cut[of].astype(np.float32)
            opacity = cut[..., 3:] / 255
            picture[at] = picture[at] * (1 - opacity) + cut[..., :3] * opacity
    return picture


def filmed(spec: ClipSpec, number: int, picture: np.ndarray) -> np.ndarray:
    """The scene [side, side, 3] as the camera gives it: light, noise, compression; uint8."""
    falls = spec.drift * (1 - math.cos(2 * math.pi * number / spec.drift_period)) / 2
    lamps = spec.flicker * math.sin(2 * math.pi * 100 * number / 29.97)  # 100 pulses a second, 29.97 frames
    picture = picture * ((1 - falls) * (1 + lamps))
    if spec.noise:
        rng = np.random.default_rng((*key_of(spec.seed, spec.motion, spec.number), number))
        picture = picture + spec.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    image = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    if spec.quality:
        buffer = io.BytesIO()
        quality = min(95, spec.quality + 25) if number % KEYFRAME_EVERY == 0 else spec.quality
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        image = np.asarray(Image.open(buffer).convert("RGB"))
    return image


def truth(spec: ClipSpec, number: int) -> Truth:
    """What is in a frame."""
    masks = np.zeros((len(spec.actors), spec.side, spec.side), dtype=bool)
    for index, actor in enumerate(spec.actors):
        inside = place(spec, actor, number)
        if inside is not None:
            at, of = inside
            solid = actor.cut[of][..., 3] > 127
            masks[:index, at[0], at[1]] &= ~solid
            masks[index][at] = solid
    visible = (
        float(mask.sum() / max(1, (actor.cut[..., 3] > 127).sum()))
        for actor, mask in zip(spec.actors, masks, strict=True)
    )
    return Truth(tuple(actor.thing for actor in spec.actors), masks, tuple(visible))


def view(spec: ClipSpec, number: int) -> tuple[int, int]:
    """First row and column of the ground that the camera sees."""
    room = (len(spec.ground) - spec.side) / 2
    down, across, period = spec.camera
    turn = 2 * math.pi * number / period
    return round(room + down * math.sin(2 * turn)), round(room + across * math.sin(turn))


def place(spec: ClipSpec, actor: Actor, number: int) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """The part of the picture that an actor covers, and that part of its cut; None if it is outside."""
    if not actor.present[0] <= number < actor.present[1]:
        return None
    offsets = path_offset(actor, number)
    start = view(spec, 0)  # things stand in the scene, and were placed as the first frame shows it
    at, of = [], []
    for centre, reach, offset, first, now, length in zip(
        actor.centre, actor.reach, offsets, start, view(spec, number), actor.cut.shape[:2], strict=True
    ):
        begin = round(centre + reach * offset - length / 2) + first - now
        at.append(slice(max(0, begin), min(spec.side, begin + length)))
        of.append(slice(at[-1].start - begin, at[-1].stop - begin))
    if any(part.start >= part.stop for part in at):
        return None
    return tuple(at), tuple(of)


def path_offset(actor: Actor, number: int) -> tuple[float, float]:
    """An actor's offset from its centre, down and across, in units of its reach: -1 to 1."""
    progress = (number - actor.start) / actor.period
    turns = progress + actor.phase
    if actor.path == "local":
        return math.sin(2 * math.pi * turns), math.cos(2 * math.pi * turns)
    if actor.path == "oscillating":
        return (math.sin(2 * math.pi * turns),) * 2
    if actor.path == "arc":
        angle = math.pi * (1 - math.cos(2 * math.pi * turns)) / 2
        return -math.sin(angle), -math.cos(angle)
    if actor.path == "crossing":
        return (2 * (turns % 1) - 1,) * 2
    if actor.path == "entering":
        return (1 - min(1.0, max(0.0, progress)),) * 2
    if actor.path == "leaving":
        return (min(1.0, max(0.0, progress)),) * 2
    return 0.0, 0.0


# --- specifications: what is drawn by seed, motion and number --------------------------------------------------------


def key_of(seed: int, motion: str, number: int) -> tuple[int, int, int]:
    """The seed of a clip's random numbers."""
    return seed, list(MOTIONS).index(motion), number


def specify(material: Any, motion: str, number: int, *, frames: int = 64, seed: int = 0, side: int = SIDE) -> ClipSpec:
    """
    The clip of a motion with a number, 0 or more, of 16 to 10,000 frames.
    `material`, such as of `load_material`, has `drawings`, by thing a list of objects with a `picture` in RGBA, and
    `grounds`, a list of objects with a `picture` in RGB, at least 16 pixels wide and high. `side` is a frame's side in
    pixels.
    """
    names = sorted(name for name, drawings in material.drawings.items() if drawings)
    needed = {"several": 3, "replaced": 2}.get(motion, 1)
    rng = np.random.default_rng(key_of(seed, motion, number))
    things = [names[index] for index in rng.choice(len(names), needed, replace=False)]
    cuts = [cut_of(material.drawings[thing], rng, side, small=needed > 2) for thing in things]
    room = CAMERA_ROOM if motion == "moving camera" else 0.0
    options: dict[str, Any] = {}
    if motion == "moving camera":
        swing = room * side / 2
        options["camera"] = (0.4 * swing, swing * rng.uniform(0.7, 1), int(rng.integers(40, 90)))
    elif motion == "light drift":
        options |= {"drift": rng.uniform(0.3, 0.6), "drift_period": int(rng.integers(240, 600))}
    elif motion == "flicker":
        options["flicker"] = rng.uniform(0.03, 0.12)
    elif motion == "noise":
        options["noise"] = rng.uniform(3, 10)
    elif motion == "compression":
        options["quality"] = int(rng.integers(15, 45))
    ground = ground_of(material.grounds[rng.integers(len(material.grounds))].picture, rng, round(side * (1 + room)))
    actors = actors_of(motion, things, cuts, rng, frames, side)
    return ClipSpec(motion, number, seed, frames, ground, tuple(actors), side, **options)


def cut_of(drawings: list, rng: np.random.Generator, side: int, small: bool) -> np.ndarray:
    """One of a thing's drawings at its size, uint8 RGBA [h, w, 4]."""
    picture = drawings[rng.integers(len(drawings))].picture
    longer = side * (rng.uniform(0.3, 0.4) if small else rng.uniform(0.45, 0.7))
    scale = longer / max(picture.size)
    size = [max(1, round(scale * length)) for length in picture.size]
    return np.asarray(picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS))


def ground_of(photo: Image.Image, rng: np.random.Generator, side: int) -> np.ndarray:
    """A square of a photograph, uint8 RGB [side, side, 3]."""
    length = rng.uniform(0.6, 1.0) * min(photo.size)
    left, top = (rng.uniform(0, whole - length) for whole in photo.size)
    box = (left, top, left + length, top + length)
    return np.asarray(photo.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box))


def actors_of(
    motion: str, things: list[str], cuts: list[np.ndarray], rng: np.random.Generator, frames: int, side: int
) -> list[Actor]:
    """The things on their paths."""
    middle = (side / 2 + rng.uniform(-0.05, 0.05) * side, side / 2 + rng.uniform(-0.05, 0.05) * side)
    if motion == "replaced":
        event = int(rng.integers(frames // 3, 2 * frames // 3))
        spans = ((0, event), (event, MOST))
        return [
            Actor(thing, cut, "still", middle, present=span)
            for thing, cut, span in zip(things, cuts, spans, strict=True)
        ]
    if motion == "several":
        rows = (0.22 * side, 0.5 * side, 0.78 * side)
        paths = [("crossing", "oscillating", "local")[index] for index in rng.permutation(3)]
        return [
            moving(path, thing, cut, (row, side / 2), rng, frames, side)
            for path, thing, cut, row in zip(paths, things, cuts, rows, strict=True)
        ]
    path = {
        "compression": "oscillating",
        **dict.fromkeys(("moving camera", "light drift", "flicker", "noise"), "still"),
    }.get(motion, motion)
    return [moving(path, things[0], cuts[0], middle, rng, frames, side)]


def moving(
    path: str,
    thing: str,
    cut: np.ndarray,
    centre: tuple[float, float],
    rng: np.random.Generator,
    frames: int,
    side: int,
) -> Actor:
    """A thing on a path around `centre`, with speeds that do not depend on the clip's length."""
    height, width = cut.shape[:2]
    direction = 1 if rng.random() < 0.5 else -1
    period, phase = int(rng.integers(32, 64)), rng.uniform(0, 1)
    if path == "local":
        swing = rng.uniform(0.02, 0.05) * side
        return Actor(thing, cut, path, centre, (0.4 * swing, direction * swing), int(rng.integers(12, 24)), phase)
    if path == "oscillating":
        return Actor(thing, cut, path, centre, (0.0, direction * 0.25 * side), period, phase)
    if path == "arc":
        low = (centre[0] + 0.15 * side, centre[1])
        return Actor(thing, cut, path, low, (0.3 * side, direction * 0.25 * side), 2 * period, phase)
    if path == "crossing":
        # from just outside to just outside, so that it is not there for one frame in a round
        outside = (side + width) / 2 + 1
        return Actor(thing, cut, path, (centre[0], side / 2), (0.0, direction * outside), period, phase)
    if path in ("entering", "leaving"):
        # on its way for a third of a short clip at most, and a while of each before and after
        on_the_way = max(2, min(int(rng.integers(8, 24)), frames // 3))
        start = int(rng.integers(frames // 4, frames // 2))
        away = side / 2 + max(height, width) + abs(centre[1] - side / 2)
        return Actor(thing, cut, path, centre, (0.0, direction * away), on_the_way, start=start)
    return Actor(thing, cut, path, centre)
