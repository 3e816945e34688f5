"""
Embed many videos: several at a time, as streams of one call, while threads decode ahead.

    model, preprocess = load_model("path/to/siglip")
    result = embed_videos(video_paths(["recordings/"]), model, preprocess, "dataset", {"preset": "balanced"})
    result.embedded, result.failures
"""

import contextlib
import glob
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..evaluation.datasets import find_videos
from ..utils.files import prepare_folder, write_whole
from ..utils.jobs import stop_on_interrupt
from ..video.labels import Labels
from ..video.prefetch import prefetch
from ..video.preprocess import Preprocessor
from ..video.reader import VideoReader
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from ..vision.stream import NeuroFlowStream
from .dataset import EmbeddedFrame, VideoFile, dataset_settings, finished_videos, video_state

FAILURES = "failures.jsonl"
MOST_STREAMS = 16  # more gained nothing on CPUs, and each takes memory and a thread


@dataclass(frozen=True, eq=False)
class DecodedFrame:
    """A frame's pixel values, [1, C, R, R], and the share of its video's frames that are decoded with it."""

    video: Path
    frame: int
    seconds: float
    pixel_values: torch.Tensor
    share: float


@dataclass(frozen=True)
class VideoBegin:
    """The beginning of a video, and its `video_state` before it was opened."""

    video: Path
    state: dict


@dataclass(frozen=True)
class VideoEnd:
    """The end of a video; `reason` says what is wrong, or is empty; without `keep`, its frames cannot be used."""

    video: Path
    reason: str = ""
    keep: bool = True


@dataclass(frozen=True)
class EmbedResult:
    """
    The result of embedding.

    Args:
        videos: how many were asked for.
        kept: how many of them an earlier run had finished.
        embedded: how many of them this run finished, those that are cut short included.
        failures: reason by video, of all in `failures.jsonl`.
        interrupted: whether Ctrl-C or SIGTERM ended the run.
    """

    videos: int
    kept: int
    embedded: int
    failures: dict[str, str]
    interrupted: bool


def video_paths(places: Sequence[str | Path]) -> list[Path]:
    """
    Absolute paths of videos, each once.

    Args:
        places: videos, folders of any depth, patterns such as `"cam*/*.mp4"`, and `.txt` files with one a line.

    Raises:
        FileNotFoundError: for something that does not exist, and a pattern that nothing fits.
        ValueError: for a folder without videos.
    """
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if place.suffix == ".txt" and place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            paths = video_paths([line.strip() for line in lines if line.strip()])
        else:
            matches = [str(place)] if place.exists() else sorted(glob.glob(str(place), recursive=True))
            paths = [video.path for match in matches or [place] for video in find_videos(match, truth=False).videos]
        found |= dict.fromkeys(path.resolve() for path in paths)
    return list(found)


# --- decoding and encoding -----------------------------------------------------------------------------------------


def decode_videos(
    waiting: deque[Path], prepare: Callable[..., torch.Tensor], every: float | None
) -> Iterator[VideoBegin | DecodedFrame | VideoEnd]:
    """
    Decode videos, one after the other: the beginning of each, its frames, and its end.

    Args:
        waiting: the videos; several threads may take from it.
        prepare: gives the pixel values of an image.
        every: as in `VideoReader`.
    """
    while True:
        try:
            video = waiting.popleft()
        except IndexError:
            return
        state, reason = None, ""
        try:
            state = video_state(video)
            yield VideoBegin(video, state)
            reader = VideoReader(video, every=every)
            for frame in reader:
                share = (frame.index + 1) / max(reader.frame_count, frame.index + 1)
                yield DecodedFrame(video, frame.index, frame.time, prepare(frame.image), share)
        except Exception as error:  # damaged files raise all kinds of errors
            reason = " ".join(str(error).split()) or type(error).__name__
        keep = True
        with contextlib.suppress(OSError):  # deleted just now
            if state is not None and not video.exists():
                reason = f"{video} was deleted while it was read; the frames before are kept"
            elif state is not None and video_state(video) != state:
                reason, keep = f"{video} changed while it was read; the next run reads it again", False
        yield VideoEnd(video, reason, keep)


def encode_rows(
    rows: Sequence[Iterator[VideoBegin | DecodedFrame | VideoEnd]],
    model: NeuroFlowSiglipVisionModel,
    stream: NeuroFlowStream,
    interpolate: bool,
) -> Iterator[VideoBegin | tuple[EmbeddedFrame, float] | VideoEnd]:
    """
    Encode one frame of each row per call, until no row has any. A row is a stream, which restarts after a video's end.

    Args:
        rows: of `decode_videos`.
        stream: new, of as many streams as there are rows.
        interpolate: whether the frames have another resolution than the model.

    Yields:
        Each frame with the share of its video that is done, and each video's beginning and end.
    """
    while True:
        decoded: list[DecodedFrame | None] = []
        for place, row in enumerate(rows):
            item = next(row, None)
            while isinstance(item, VideoBegin | VideoEnd):
                yield item
                if isinstance(item, VideoEnd):
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
            output = model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate, stream=stream)
        embeddings = output.pooler_output.float().cpu()
        keyframes = output.active_mask.flatten(1).all(dim=1).tolist()
        for frame, embedding, cost, keyframe in zip(frames, embeddings, output.cost.tolist(), keyframes, strict=True):
            yield EmbeddedFrame(frame.video, frame.frame, frame.seconds, embedding, cost, keyframe), frame.share


# --- the job -------------------------------------------------------------------------------------------------------


def embed_videos(
    videos: Sequence[Path],
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    out: str | Path,
    gate_options: dict | None = None,
    *,
    streams: int | None = None,
    every: float | None = None,
    labels: Labels | None = None,
    model_name: str = "",
    on_step: Callable[[str, float, float], None] | None = None,
) -> EmbedResult:
    """
    Embed videos and write a Parquet file for each to a folder, together a dataset.

    Videos that the folder holds, and that did not change since, are kept. A video that cannot be read to its end, or
    is deleted or changed meanwhile, is listed with the reason in `failures.jsonl`; the frames before are kept, but
    none of a changed one. After Ctrl-C, or a kill at any point, the same call goes on with the videos that are not
    finished.

    Args:
        videos: of `video_paths`.
        model, preprocess: from `load_model`.
        out: the folder; made if missing. One process may write to it at a time.
        gate_options: options of [`NeuroFlowGateConfig`] that override the model's.
        streams: how many videos to encode in one call; default: all, at most 16.
        every: seconds; embed the first frame of each interval of this length. None: all frames.
        labels: also store the best of these and its confidence, from `load_model_with_labels`.
        model_name: for the metadata.
        on_step: called with what is done in words, the bytes of video that are done, and those of all.

    Raises:
        ValueError: for options out of range, a dataset of other settings, and embeddings that are not finite.
        NotADirectoryError, OSError: if `out` is a file or cannot be written to.
    """
    if every is not None and not 0 < every < float("inf"):
        raise ValueError(f"`every` is {every}; expected a number of seconds above 0, or None for all frames.")
    if streams is not None and streams < 1:
        raise ValueError(f"`streams` is {streams}; expected a number of videos, at least 1.")
    options = gate_options or {}
    settings = dataset_settings(model, preprocess, model.new_stream(**options).gate, every, labels)
    out = prepare_folder(out)
    kept = finished_videos(out, settings) & set(videos)
    for partial in out.glob(".*.parquet.*.part"):  # of a run that was killed
        partial.unlink()
    progress = EmbedProgress({video: size_of(video) for video in videos}, kept)
    # the largest first: at the end, few streams are left for a long one
    waiting = deque(sorted(set(videos) - kept, key=lambda video: (-progress.sizes[video], video)))
    failures = {video: reason for video, reason in read_failures(out).items() if Path(video) not in waiting}
    files: dict[Path, VideoFile] = {}
    states: dict[Path, dict] = {}
    embedded, count = 0, min(len(waiting), streams or MOST_STREAMS)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_interrupt())
        stack.callback(lambda: [file.discard() for file in files.values()])
        rows = []
        for _ in range(count):
            decoded = decode_videos(waiting, lambda image: preprocess(image, model.dtype, model.device), every)
            rows.append(stack.enter_context(contextlib.closing(prefetch(decoded))))
        stream = model.new_stream(max(1, count), **options)
        for item in encode_rows(rows, model, stream, preprocess.resolution != model.config.image_size):
            if isinstance(item, VideoBegin):
                states[item.video] = item.state
                continue
            if isinstance(item, VideoEnd):
                if item.reason:  # first, so that a kill after it leaves the video to be tried again
                    failures[str(item.video)] = item.reason
                    write_failures(out, failures)
                if item.video in files and item.keep:
                    files.pop(item.video).finish()
                    embedded += 1
                elif item.video in files:
                    files.pop(item.video).discard()
                step = progress.ended(item.video)
            else:
                frame, share = item
                if frame.video not in files:
                    metadata = {**settings, "model": model_name, "video": states[frame.video]}
                    files[frame.video] = VideoFile(out, frame.video, metadata, len(frame.embedding), labels)
                files[frame.video].add(frame)
                step = progress.reached(frame.video, share)
            if on_step is not None:
                on_step(*step)
            if stop.is_set():
                break
        interrupted = stop.is_set()
    write_failures(out, failures)
    return EmbedResult(len(progress.sizes), len(kept), embedded, failures, interrupted)


def size_of(video: Path) -> int:
    """Bytes of a video; 0 if it is gone."""
    try:
        return video.stat().st_size
    except FileNotFoundError:
        return 0


class EmbedProgress:
    """
    How much is done, in bytes of video.

    Args:
        sizes: of all videos, in bytes.
        kept: those that are done.
    """

    def __init__(self, sizes: dict[Path, int], kept: set[Path]):
        self.sizes, self.total = sizes, sum(sizes.values())
        self.done, self.videos_done = sum(sizes[video] for video in kept), len(kept)
        self.shares: dict[Path, float] = {}  # of the videos that are being embedded

    def reached(self, video: Path, share: float) -> tuple[str, float, float]:
        """A share of a video is done: what is done in words, and in bytes, and the bytes of all videos."""
        self.shares[video] = share
        return self._step(f"{video.name} {share:.0%}")

    def ended(self, video: Path) -> tuple[str, float, float]:
        """A video is done; returns the same."""
        self.shares.pop(video, None)
        self.done += self.sizes[video]
        self.videos_done += 1
        return self._step(f"{video.name} done")

    def _step(self, what: str) -> tuple[str, float, float]:
        running = sum(share * self.sizes[video] for video, share in self.shares.items())
        return f"{self.videos_done} of {len(self.sizes)} videos, {what}", self.done + running, self.total


def read_failures(out: Path) -> dict[str, str]:
    """Reason by video, from `failures.jsonl`."""
    file = out / FAILURES
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line["video"]: line["reason"] for line in map(json.loads, lines)}


def write_failures(out: Path, failures: dict[str, str]):
    """Write `failures.jsonl`; without failures, there is none."""
    if failures:
        lines = [json.dumps({"video": video, "reason": reason}) + "\n" for video, reason in failures.items()]
        write_whole(out / FAILURES, "".join(lines))
    else:
        (out / FAILURES).unlink(missing_ok=True)
