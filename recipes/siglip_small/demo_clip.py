"""
The composed clip that ships with the package, for zero-shot labels.

    python -m recipes.siglip_small.demo_clip     # writes neuroflow_hf/assets/things.mp4

A fixed camera films a lawn. A dog walks through, a bicycle rides by, a cat comes and stays; in between, the lawn is
empty. Sensor noise is added. Drawings: Noto Emoji (Google, Apache-2.0); the lawn: scikit-image's `grass.png` (CC0).
"""

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from recipes.siglip_small.sources import DRAWING_SIDE, drawings, read_member

OUTPUT = Path(__file__).parent.parent.parent / "neuroflow_hf" / "assets" / "things.mp4"
HEIGHT, WIDTH, FRAMES, FRAMES_PER_SECOND = 360, 480, 120, 12
# thing, from frame, to frame, places (x, y) of its centre at both, and its longer side; shares of the picture's height
SCRIPT = (
    ("dog", 8, 38, (-0.35, 0.62), (1.68, 0.62), 0.62),
    ("bicycle", 46, 70, (1.75, 0.6), (-0.4, 0.6), 0.7),
    ("cat", 78, 92, (-0.3, 0.58), (0.62, 0.58), 0.6),
    ("cat", 92, 120, (0.62, 0.58), (0.62, 0.58), 0.6),
)


def lawn() -> Image.Image:
    """The ground: a grey photograph, tinted green."""
    photo = Image.open(io.BytesIO(read_member("scikit-image", "skimage/data/grass.png"))).convert("L")
    photo = photo.resize((WIDTH, WIDTH), Image.Resampling.BICUBIC).crop((0, 0, WIDTH, HEIGHT))
    grey = np.asarray(photo, dtype=np.float32)
    return Image.fromarray((grey[..., None] * np.array([0.62, 0.85, 0.45])).clip(0, 255).astype(np.uint8))


def frames() -> Iterator[np.ndarray]:
    """The clip's frames, uint8 RGB [HEIGHT, WIDTH, 3]."""
    ground, rng = lawn(), np.random.default_rng(0)
    pictures = {name: first_noto(name) for name in {entry[0] for entry in SCRIPT}}
    for number in range(FRAMES):
        picture = ground.copy()
        for name, first, stop, start, end, side in SCRIPT:
            if first <= number < stop:
                share = (number - first) / (stop - first)
                x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
                moving = start != end
                y -= 0.015 * abs(math.sin(0.9 * number)) if moving else 0  # steps
                cut = pictures[name]
                scale = side * HEIGHT / DRAWING_SIDE
                cut = cut.resize([round(scale * length) for length in cut.size], Image.Resampling.LANCZOS)
                if end[0] >= start[0]:  # emoji look to the left
                    cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                picture.paste(cut, (round(x * HEIGHT - cut.width / 2), round(y * HEIGHT - cut.height / 2)), cut)
        noise = rng.normal(0, 1.2, (HEIGHT, WIDTH, 1))
        yield (np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8)


def first_noto(name: str) -> Image.Image:
    """A thing's first drawing of Noto Emoji."""
    return next(drawing.picture for drawing in drawings()[name] if drawing.style == "noto")


def write_video(path: Path, pictures: Iterable[np.ndarray], rate: int, **options: str) -> None:
    """
    Write pictures, uint8 RGB [H, W, 3], as H.264 with the encoder's `options`, whole or not at all. An odd last row or
    column is left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            stream.height, stream.width = height, width = [side - side % 2 for side in picture.shape[:2]]
            picture = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    partial.replace(path)


if __name__ == "__main__":
    write_video(OUTPUT, frames(), FRAMES_PER_SECOND, crf="26", preset="slow")
