"""
The work on a dataset: decode videos, encode several, or segments of one, as streams of one call, and write a file for
each video.

It takes videos from a queue and tells what happened; `embed.py` keeps the queue and gives the files their names. The
same runs in this process and on the machines of a cluster.
"""

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pyarrow.parquet import ParquetWriter

from ..video.labels import Labels
from ..video.prefetch import prefetch
from ..video.preprocess import Preprocessor
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .dataset import file_of, frame_table, open_writer
from .decode import Decoded, PartEnd, PartQueue, VideoPart, decode_parts

ROWS = 4096  # held in memory for each video that is being embedded


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
    that cannot be read to its end come no more rows. The file is written under another name; whoever keeps the dataset
    renames it to `file_of`.
    """

    def __init__(self, job: EmbedJob, part: VideoPart):
        self.job, self.part = job, part
        self.partial = job.out / f".{file_of(job.out, part.video).name}.{secrets.token_hex(4)}.part"
        self.writer: ParquetWriter | None = None  # opened with the first row
        self.reason, self.keep = "", True  # what is wrong with the video, or empty; whether to keep its rows
        self.number, self.frames_before = 0, 0  # of the segment whose rows are in order; of those before it
        self.ready: list[dict] = []  # rows in order, to be written
        self.rows: list[list[dict]] = [[] for _ in range(part.count)]  # that wait for those before
        self.ends: dict[int, PartEnd] = {}
        self.reached = [0] * part.count

    @property
    def share(self) -> float:
        """Of the video's frames, 0 to 1."""
        return sum(self.reached) / max(self.part.reader.frame_count, *self.reached)

    def add(self, part: VideoPart, row: dict):
        """Add a row of any segment."""
        self.reached[part.number] = row["frame"] + 1
        self.rows[part.number].append(row)
        self._put_in_order()

    def end(self, end: PartEnd) -> bool:
        """Take in the end of a segment; whether all ended."""
        number = end.part.number
        self.ends[number], self.reached[number] = end, end.part.segment.frames
        if not end.keep:
            self.reason, self.keep = end.reason, False
        self._put_in_order()
        return len(self.ends) == self.part.count

    def close(self, keep: bool) -> Path | None:
        """Finish the file, or delete it; its path if there is one."""
        if self.writer is None:
            return None
        if keep:
            self._write()
        self.writer.close()
        if keep:
            return self.partial
        self.partial.unlink(missing_ok=True)
        return None

    def _put_in_order(self):
        while not self.reason and self.number < self.part.count:
            for row in self.rows[self.number]:
                if self.writer is None:
                    metadata = self.job.metadata | {"video": self.part.state}
                    dim, labelled = len(row["embedding"]), self.job.labels is not None
                    self.writer = open_writer(self.partial, dim, labelled, metadata)
                self.ready.append(row | {"frame": self.frames_before + row["frame"]})
                if len(self.ready) == ROWS:
                    self._write()
            self.rows[self.number] = []
            end = self.ends.get(self.number)
            if end is None:
                return
            self.reason = end.reason
            self.frames_before += end.frames
            self.number += 1

    def _write(self):
        if self.ready:
            self.writer.write_table(frame_table(self.ready, self.part.video, self.job.labels, self.writer.schema))
            self.ready = []


def encode_streams(
    decoded: Sequence[Iterator[Decoded | PartEnd]], job: EmbedJob
) -> Iterator[tuple[VideoPart, dict] | PartEnd]:
    """
    Encode one frame of each source per call, until none has any. Each source, of `decode_parts`, has a stream, which
    restarts after a segment's end. Yields each frame's row, numbered as in its segment, and each segment's end.
    """
    stream = job.model.new_stream(len(decoded), **job.gate_options)
    while True:
        frames: list[Decoded] = []
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
            pixel_values = torch.cat([pixel_values for _, _, pixel_values in frames])
            output = job.model(pixel_values=pixel_values, interpolate_pos_encoding=True, stream=stream)
        embeddings, costs = output.pooler_output.float().cpu(), output.cost.tolist()
        keyframes = output.active_mask.flatten(1).all(dim=1).tolist()
        for (part, row, _), *values in zip(frames, embeddings, costs, keyframes, strict=True):
            yield part, row | dict(zip(("embedding", "cost", "keyframe"), values, strict=True))
