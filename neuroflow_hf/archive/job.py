"""
The work on a dataset: decode videos, encode several, or segments of one, as streams of one call, and write a file for
each video.

It takes videos from a queue and tells what happened; `embed.py` keeps the queue and gives the files their names. The
same runs in this process and on the machines of a cluster.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..video.labels import Labels
from ..video.prefetch import prefetch
from ..video.preprocess import Preprocessor
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .dataset import VideoFile
from .decode import DecodedFrame, PartEnd, PartQueue, VideoPart, decode_parts


@dataclass(frozen=True, eq=False)
class EmbedJob:
    """What is done to all videos."""

    model: NeuroFlowSiglipVisionModel  # model, preprocess: from `load_model`
    preprocess: Preprocessor
    gate_options: dict  # options of [`NeuroFlowGateConfig`] that override the model's
    streams: int  # how many videos or segments to encode in one call, at most
    every: float | None  # as in `VideoReader`
    labels: Labels | None  # also store the best of these and its confidence
    out: Path  # the folder of the dataset, an absolute path
    metadata: dict  # of all files: `dataset_settings` and `model`


# --- what happened -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """A share of a video's frames, 0 to 1, is embedded."""

    video: Path
    share: float


@dataclass(frozen=True)
class Ended:
    """A video is done."""

    video: Path  # the file
    reason: str  # what is wrong with it, or empty
    partial: Path | None  # the closed file with its rows, which waits for its name; None if there are none to keep
    missing: bool = False  # whether there was no such file


@dataclass(frozen=True)
class Waiting:
    """Nothing happened for a while, and what is waited for."""

    reason: str


Event = Reached | Ended | Waiting
# Takes videos from the queue and embeds them. A `Reached` or `Ended` belongs to a video that was taken from the queue,
# and each that was taken ends once. Several threads may take from the queue.
Work = Callable[[deque[Path], EmbedJob], Iterator[Event]]


# --- the work ------------------------------------------------------------------------------------------------------


def embed_waiting(waiting: deque[Path], job: EmbedJob) -> Iterator[Event]:
    """Embed the videos in a queue, in this process; a [`Work`]. What is not finished when it is closed is deleted."""
    videos: dict[Path, VideoRows] = {}
    queue = PartQueue(waiting, job.every)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [rows.close(keep=False) for rows in videos.values()])
        decoded = [
            stack.enter_context(contextlib.closing(prefetch(decode_parts(queue, job.preprocess, job.model))))
            for _ in range(job.streams)
        ]
        for item in encode_streams(decoded, job):
            part = item.part if isinstance(item, PartEnd) else item[0]
            if part.video not in videos:
                videos[part.video] = VideoRows(job, part)
            rows = videos[part.video]
            if not isinstance(item, PartEnd):
                rows.add(*item)
                yield Reached(part.video, rows.share)
            elif rows.end(item):
                del videos[part.video]
                yield Ended(part.video, rows.reason, rows.close(rows.keep), missing=part.state is None)


class VideoRows:
    """
    Puts the rows of a video's segments, which are embedded side by side, in order and into its file. After a segment
    that cannot be read to its end come no more rows.
    """

    def __init__(self, job: EmbedJob, part: VideoPart):
        self.job, self.part = job, part
        self.file: VideoFile | None = None
        self.reason, self.keep = "", True  # what is wrong with the video, or empty; whether to keep its rows
        self.number, self.frames_before = 0, 0  # of the segment whose rows are written; of those before it
        self.rows: list[list[dict]] = [[] for _ in range(part.count)]  # that wait for those before
        self.ends: dict[int, PartEnd] = {}
        self.reached = [0] * part.count

    @property
    def share(self) -> float:
        """Of the video's frames, 0 to 1."""
        return sum(self.reached) / max(self.part.total, *self.reached)

    def add(self, part: VideoPart, row: dict):
        """Add a row of any segment."""
        self.reached[part.number] = row["frame"] + 1
        self.rows[part.number].append(row)
        self._write()

    def end(self, end: PartEnd) -> bool:
        """Take in the end of a segment; whether all ended."""
        number = end.part.number
        self.ends[number], self.reached[number] = end, end.part.segment.frames
        if not end.keep:
            self.reason, self.keep = end.reason, False
        self._write()
        return len(self.ends) == self.part.count

    def close(self, keep: bool) -> Path | None:
        """Finish the file, or delete it; its path if there is one."""
        if self.file is None:
            return None
        return self.file.close() if keep else self.file.discard()

    def _write(self):
        while not self.reason and self.number < self.part.count:
            for row in self.rows[self.number]:
                if self.file is None:
                    metadata = self.job.metadata | {"video": self.part.state}
                    self.file = VideoFile(
                        self.job.out, self.part.video, metadata, len(row["embedding"]), self.job.labels
                    )
                self.file.add(row | {"frame": self.frames_before + row["frame"]})
            self.rows[self.number] = []
            end = self.ends.get(self.number)
            if end is None:
                return
            self.reason = end.reason
            self.frames_before += end.frames
            self.number += 1


def encode_streams(
    decoded: Sequence[Iterator[DecodedFrame | PartEnd]], job: EmbedJob
) -> Iterator[tuple[VideoPart, dict] | PartEnd]:
    """
    Encode one frame of each source per call, until none has any. Each source, of `decode_parts`, has a stream, which
    restarts after a segment's end. Yields each frame's row, numbered as in its segment, and each segment's end.
    """
    interpolate = job.preprocess.resolution != job.model.config.image_size
    stream = job.model.new_stream(len(decoded), **job.gate_options)
    while True:
        frames: list[DecodedFrame] = []
        going = []
        for place, source in enumerate(decoded):
            item = next(source, None)
            while isinstance(item, PartEnd):
                yield item
                stream.reset(place)
                item = next(source, None)
            if item is not None:
                going.append(place)
                frames.append(item)
        if not going:
            return
        if len(going) < len(decoded):
            stream.keep(going)
            decoded = [decoded[place] for place in going]
        with torch.inference_mode():
            pixel_values = torch.cat([frame.pixel_values for frame in frames])
            output = job.model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate, stream=stream)
        columns = {
            "embedding": output.pooler_output.float().cpu(),
            "cost": output.cost.tolist(),
            "keyframe": output.active_mask.flatten(1).all(dim=1).tolist(),
        }
        for place, frame in enumerate(frames):
            row = {name: values[place] for name, values in columns.items()}
            yield frame.part, {"frame": frame.frame, "seconds": frame.seconds, **row}
