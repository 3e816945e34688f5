"""Decode videos in threads: each takes one segment of a video after the other."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from ..utils.files import one_line
from ..video.preprocess import Preprocessor
from ..video.reader import Segment, VideoReader
from . import dataset
from .dataset import video_state


@dataclass(frozen=True, eq=False)
class VideoPart:
    """A segment of a video."""

    video: Path  # the file
    state: dict | None  # its `video_state` before it was opened; None if there is no such file
    reader: VideoReader | None  # None for a video that cannot be read
    segment: Segment  # to decode
    number: int = 0  # number, count: of this segment, from 0, and of all segments of the video
    count: int = 1
    reason: str = ""  # why it cannot be read


@dataclass(frozen=True, eq=False)
class PartEnd:
    """The end of a segment: its number of decoded frames, what is wrong or nothing, and whether to keep its video."""

    part: VideoPart
    frames: int
    reason: str
    keep: bool


# A frame: where it belongs; its `frame`, from 0 in the segment, and `seconds` in the video; pixel values [1, C, R, R]
Decoded = tuple[VideoPart, dict, torch.Tensor]


class PartQueue:
    """Gives several threads the segments of waiting videos, in order; others may take and add videos, too."""

    def __init__(self, waiting: deque[Path], every: float | None):
        self.waiting, self.every = waiting, every
        self.parts: deque[VideoPart] = deque()
        self.opening = 0  # threads that open a video, which may have segments for all
        self.changed = threading.Condition()

    def take(self) -> VideoPart | None:
        """The next segment; None if there is none."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.parts or self.waiting or not self.opening)
                if self.parts:
                    return self.parts.popleft()
                try:
                    video = self.waiting.popleft()
                except IndexError:
                    if not self.opening:
                        return None
                    continue
                self.opening += 1
            parts = cut_video(video, self.every)
            with self.changed:
                self.parts.extend(parts)
                self.opening -= 1
                self.changed.notify_all()


def cut_video(video: Path, every: float | None) -> list[VideoPart]:
    """The segments of a video, at least one. One that cannot be read is one part, with the reason."""
    state = None
    try:
        state = video_state(video)
        reader = VideoReader(video, every=every)
        segments = reader.segments(dataset.SEGMENT_ROWS)
    except Exception as error:  # damaged files raise all kinds of errors
        return [VideoPart(video, state, None, Segment(0), reason=one_line(error))]
    return [
        VideoPart(video, state, copy(reader), segment, number, len(segments))
        for number, segment in enumerate(segments)
    ]


def decode_parts(queue: PartQueue, preprocess: Preprocessor, model: torch.nn.Module) -> Iterator[Decoded | PartEnd]:
    """Decode segments, one after the other: the frames of each, and its end."""
    while (part := queue.take()) is not None:
        reason, keep, frames = part.reason, True, 0
        if part.reader is not None:
            try:
                for frame in part.reader.read(part.segment):
                    pixel_values = preprocess(frame.image, model.dtype, model.device)
                    yield part, {"frame": frame.index, "seconds": frame.time}, pixel_values
            except Exception as error:
                reason = one_line(error)
            frames = part.reader.decoded_frames
        with contextlib.suppress(OSError):  # deleted just now
            if part.state is not None and not part.video.exists():
                reason = f"{part.video} was deleted while it was read; the frames before are kept."
            elif part.state is not None and video_state(part.video) != part.state:
                reason, keep = f"{part.video} changed while it was read; the next run reads it again.", False
        yield PartEnd(part, frames, reason, keep)
