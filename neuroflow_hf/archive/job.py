"""
The work on a dataset: decode videos, encode several at a time as streams of one call, and write a file for each.

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
from ..video.reader import VideoReader
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from ..vision.stream import NeuroFlowStream
from .dataset import EmbeddedFrame, VideoFile, video_state


@dataclass(frozen=True, eq=False)
class EmbedJob:
    """
    What is done to all videos.

    Args:
        model, preprocess: from `load_model`.
        gate_options: options of [`NeuroFlowGateConfig`] that override the model's.
        streams: how many videos to encode in one call, at most.
        every: as in `VideoReader`.
        labels: also store the best of these and its confidence.
        out: the folder of the dataset, an absolute path.
        metadata: of all files: `dataset_settings` and `model`.
    """

    model: NeuroFlowSiglipVisionModel
    preprocess: Preprocessor
    gate_options: dict
    streams: int
    every: float | None
    labels: Labels | None
    out: Path
    metadata: dict


# --- what happened -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """A share of a video's frames, 0 to 1, is embedded."""

    video: Path
    share: float


@dataclass(frozen=True)
class Ended:
    """
    A video is done.

    Args:
        video: the file.
        reason: what is wrong with it, or empty.
        partial: the closed file with its rows, which waits for its name; None if there are none to keep.
        missing: whether there was no such file.
    """

    video: Path
    reason: str
    partial: Path | None
    missing: bool = False


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
    files: dict[Path, VideoFile] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [file.discard() for file in files.values()])
        rows = []
        for _ in range(min(len(waiting), job.streams)):
            decoded = decode_videos(waiting, job)
            rows.append(stack.enter_context(contextlib.closing(prefetch(decoded))))
        stream = job.model.new_stream(max(1, len(rows)), **job.gate_options)
        for item in encode_rows(rows, job, stream):
            if isinstance(item, VideoEnd):
                file, partial = files.pop(item.video, None), None
                if file is not None and item.keep:
                    partial = file.close()
                elif file is not None:
                    file.discard()
                yield Ended(item.video, item.reason, partial, item.missing)
            else:
                decoded, embedded = item
                if embedded.video not in files:
                    metadata = job.metadata | {"video": decoded.state}
                    files[embedded.video] = VideoFile(
                        job.out, embedded.video, metadata, len(embedded.embedding), job.labels
                    )
                files[embedded.video].add(embedded)
                yield Reached(embedded.video, decoded.share)


@dataclass(frozen=True, eq=False)
class DecodedFrame:
    """
    One frame of a video.

    Args:
        video: the file.
        state: its `video_state` before it was opened.
        frame, seconds: as in `EmbeddedFrame`.
        pixel_values: [1, C, R, R].
        share: of the video's frames that are decoded with this one.
    """

    video: Path
    state: dict
    frame: int
    seconds: float
    pixel_values: torch.Tensor
    share: float


@dataclass(frozen=True)
class VideoEnd:
    """The end of a video: what is wrong, or nothing; whether to keep its frames; whether there was no such file."""

    video: Path
    reason: str
    keep: bool
    missing: bool


def decode_videos(waiting: deque[Path], job: EmbedJob) -> Iterator[DecodedFrame | VideoEnd]:
    """Decode the videos in a queue, one after the other: the frames of each, and its end."""
    while True:
        try:
            video = waiting.popleft()
        except IndexError:
            return
        state, reason = None, ""
        try:
            state = video_state(video)
            reader = VideoReader(video, every=job.every)
            for frame in reader:
                share = (frame.index + 1) / max(reader.frame_count, frame.index + 1)
                pixel_values = job.preprocess(frame.image, job.model.dtype, job.model.device)
                yield DecodedFrame(video, state, frame.index, frame.time, pixel_values, share)
        except Exception as error:  # damaged files raise all kinds of errors
            reason = " ".join(str(error).split()) or type(error).__name__
        keep = True
        with contextlib.suppress(OSError):  # deleted just now
            if state is not None and not video.exists():
                reason = f"{video} was deleted while it was read; the frames before are kept"
            elif state is not None and video_state(video) != state:
                reason, keep = f"{video} changed while it was read; the next run reads it again", False
        yield VideoEnd(video, reason, keep, missing=state is None)


def encode_rows(
    rows: Sequence[Iterator[DecodedFrame | VideoEnd]], job: EmbedJob, stream: NeuroFlowStream
) -> Iterator[tuple[DecodedFrame, EmbeddedFrame] | VideoEnd]:
    """
    Encode one frame of each row per call, until no row has any. A row is a stream, which restarts after a video's end.

    Args:
        rows: of `decode_videos`.
        job: what is done to the videos.
        stream: new, of as many streams as there are rows.

    Yields:
        Each frame, and each video's end.
    """
    interpolate = job.preprocess.resolution != job.model.config.image_size
    while True:
        decoded: list[DecodedFrame | None] = []
        for place, row in enumerate(rows):
            item = next(row, None)
            while isinstance(item, VideoEnd):
                yield item
                stream.reset(place)
                item = next(row, None)
            decoded.append(item)
        going = [place for place, item in enumerate(decoded) if item is not None]
        if not going:
            return
        if len(going) < len(rows):
            stream.keep(going)
            rows = [rows[place] for place in going]
        frames = [item for item in decoded if item is not None]
        with torch.inference_mode():
            pixel_values = torch.cat([frame.pixel_values for frame in frames])
            output = job.model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate, stream=stream)
        embeddings = output.pooler_output.float().cpu()
        keyframes = output.active_mask.flatten(1).all(dim=1).tolist()
        for frame, embedding, cost, keyframe in zip(frames, embeddings, output.cost.tolist(), keyframes, strict=True):
            yield frame, EmbeddedFrame(frame.video, frame.frame, frame.seconds, embedding, cost, keyframe)
