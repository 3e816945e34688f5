"""Pictures, uint8 RGB [H, W, 3], of the gate at work: encoded patches in full colour, reused ones in dark grey."""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import matplotlib
import numpy as np
from av.codec.context import Flags
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage

from .reader import ffmpeg_name

ACCENT = (255, 176, 0)
BACKGROUND = (17, 20, 24)
TEXT = (240, 246, 252)
MOVING = (64, 156, 255)
REUSED_BRIGHTNESS = 0.42
LEGEND = "full colour, outlined: encoded on this frame; dark grey: reused from memory"
OBJECTS_LEGEND = LEGEND + "; blue box: moving object"

# Time unit of overlay videos in seconds: at all common rates, frames last a multiple; MPEG-4 takes no shorter one.
TICK = Fraction(1, 60000)
# Sides of an overlay frame in pixels: small clips are enlarged so that captions fit, large ones are reduced.
MIN_WIDTH, MAX_SIDE = 480, 960
SHEET_SIDE = 480  # the longer side of a picture on a contact sheet, in pixels


def patch_pixels(mask: np.ndarray, height: int, width: int, covered: float = 1.0) -> np.ndarray:
    """
    A patch mask, bool [grid_h, grid_w], at the size of its picture: bool [height, width]. The patches cover the share
    `covered` of each side, from the top left; below 1 if the model's resolution is no multiple of its patch size.
    """
    rows, columns = (
        np.diff(np.round(np.linspace(0, covered * length, count + 1)).astype(int))
        for length, count in zip((height, width), mask.shape, strict=True)
    )
    inside = np.repeat(np.repeat(mask, rows, axis=0), columns, axis=1)
    return np.pad(inside, ((0, height - inside.shape[0]), (0, width - inside.shape[1])))


def mark_encoded(image: np.ndarray, mask: np.ndarray, covered: float = 1.0) -> np.ndarray:
    """A copy of a frame in which the encoded patches of a mask are outlined and reused ones turn dark grey."""
    height, width = image.shape[:2]
    marked = patch_pixels(mask, height, width, covered)
    grey = image @ np.array([0.299, 0.587, 0.114], dtype=np.float32) * REUSED_BRIGHTNESS
    drawn = np.where(marked[..., None], image, grey[..., None].astype(np.uint8))
    drawn[marked & ~ndimage.binary_erosion(marked, iterations=max(1, round(min(height, width) / 300)))] = ACCENT
    return drawn


def outline_objects(picture: np.ndarray, objects: Sequence[tuple[Sequence[int], str]], scale: float) -> np.ndarray:
    """
    A copy of a picture with boxes (left, top, right, bottom) and captions of moving objects. `scale` is the size of
    the picture relative to the frame that the boxes are of.
    """
    drawn = Image.fromarray(picture)
    draw = ImageDraw.Draw(drawn)
    thickness = max(2, round(min(drawn.size) / 200))
    typeface = font(max(10, round(drawn.width / 48)))
    for box, text in objects:
        left, top, right, bottom = (round(scale * value) for value in box)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=MOVING, width=thickness)
        if text:
            _, _, width, height = typeface.getbbox(text, anchor="lt")
            width, height = width + 4, height + 4
            # above the box if there is room, and inside the picture
            x = max(0, min(left, drawn.width - width))
            y = top - height if top >= height else min(top, drawn.height - height)
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=MOVING)
            draw.text((x + 2, y + 2), text, fill=BACKGROUND, font=typeface, anchor="lt")
    return np.asarray(drawn)


def overlay_size(height: int, width: int) -> tuple[int, int]:
    """Height and width, both even, of the picture in an overlay frame for a video of this height and width."""
    scale = min(MAX_SIDE / max(height, width), max(1.0, MIN_WIDTH / width))
    return tuple(max(2, 2 * round(length * scale / 2)) for length in (height, width))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture in another size."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture scaled to fit into [height, width, 3], on black."""
    return np.asarray(ImageOps.pad(Image.fromarray(picture), (width, height), Image.Resampling.BILINEAR))


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the plots, which comes with matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def captioned(picture: np.ndarray, lines: Sequence[str], size: int) -> np.ndarray:
    """
    A picture above a dark strip with lines of text. `size` is the font size in pixels; lines that do not fit are set
    smaller. The strip's height is even and depends only on the number of lines.
    """
    width, height = picture.shape[1], 2 * round(0.9 * size)
    strip = Image.new("RGB", (width, height * len(lines)), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for place, line in enumerate(lines):
        line = "".join(letter if letter.isprintable() else " " for letter in line)  # a name may have a line break
        fitting = int(size * min(1.0, (width - size) / max(1.0, font(size).getlength(line))))
        draw.text((size / 2, (place + 0.5) * height), line, fill=TEXT, font=font(max(6, fitting)), anchor="lm")
    return np.concatenate([picture, np.asarray(strip)])


def marked_picture(image: np.ndarray, mask: np.ndarray, covered: float = 1.0) -> np.ndarray:
    """A frame at its `overlay_size`, with encoded patches marked as in `mark_encoded`."""
    return mark_encoded(resize(image, *overlay_size(*image.shape[:2])), mask, covered)


def overlay_frame(picture: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """
    A frame of the overlay video: a `marked_picture` above its caption. Its sides are even, and the same for all frames
    of a video with equally many lines.
    """
    missing = max(0, MIN_WIDTH - picture.shape[1])  # narrow videos get margins, so that captions stay legible
    picture = np.pad(picture, ((0, 0), (missing // 2, missing - missing // 2), (0, 0)))
    return captioned(picture, lines, size=round(picture.shape[1] / 50))


def tiled(cells: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Cells of one size side by side in rows of `columns`; dark where none is left."""
    empty = np.broadcast_to(np.array(BACKGROUND, np.uint8), cells[0].shape)
    cells = [*cells, *[empty] * (-len(cells) % columns)]
    rows = [np.concatenate(cells[place : place + columns], axis=1) for place in range(0, len(cells), columns)]
    return np.concatenate(rows)


def contact_sheet(cells: Sequence[tuple[np.ndarray, Sequence[str]]], title: str, legend: str = "") -> np.ndarray:
    """A grid of pictures of one size, four in a row, each above the lines of its caption."""
    height, width = (round(side * SHEET_SIDE / max(cells[0][0].shape[:2])) for side in cells[0][0].shape[:2])
    pictures = [captioned(resize(picture, height, width), lines, size=width // 26) for picture, lines in cells]
    grid = tiled(pictures, columns=4)
    header = captioned(grid[:0], [title], size=width // 20)
    return captioned(np.concatenate([header, grid]), [legend] if legend else [], size=width // 26)


class OverlayWriter:
    """Writes pictures to an mp4 file, complete only after `close`: H.264 if FFmpeg has it, else MPEG-4."""

    def __init__(self, path: Path):
        self.path = path
        self.container = None

    def write(self, picture: np.ndarray, seconds: float):
        """Append a picture with even sides, the same for all pictures, to show at `seconds`."""
        if self.container is None:
            self._open(*picture.shape[:2])
            self.begin, self.last = seconds, -TICK.denominator // 10  # a single frame lasts a tenth of a second
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        # no two frames at the same time; the last one lasts as long as the one before it
        frame.pts = max(round((seconds - self.begin) / TICK), self.last + 1)
        frame.duration = frame.pts - self.last
        frame.time_base, self.last = TICK, frame.pts
        self.container.mux(self.stream.encode(frame))

    def close(self):
        """Finish the file. If no frame was written, no file is."""
        if self.container is not None:
            self.container.mux(self.stream.encode(None))
            self.container.close()
            self.container = None

    def _open(self, height: int, width: int):
        self.container = av.open(ffmpeg_name(self.path), "w", format="mp4", options={"movflags": "faststart"})
        # one thread: others would encode while the next frame's forward is timed;
        # no B-frames: with uneven times, mp4 would state too short a length
        codec, options = "libx264", {"crf": "21", "preset": "veryfast", "threads": "1", "bf": "0"}
        if codec not in av.codecs_available:
            codec, options = "mpeg4", {"qscale": "3"}
        self.stream = self.container.add_stream(codec, options=options)
        self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "yuv420p"
        self.stream.codec_context.time_base = TICK
        self.stream.codec_context.flags |= Flags.frame_duration
