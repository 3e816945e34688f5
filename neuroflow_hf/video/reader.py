"""Video input: frames out of a file.

With `Preprocessor` and `prefetch`::

    reader = VideoReader("street.mp4", stride=2)
    preprocess = Preprocessor.from_pretrained("path/to/siglip")
    for pixel_values in prefetch(preprocess(frame.image) for frame in reader):
        ...  # float32 [1, 3, R, R]

A damaged file gives every frame before the damage and then raises `DamagedVideoError`.
"""

import contextlib
import importlib.resources
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

__all__ = [
    "DamagedVideoError",
    "Frame",
    "VideoError",
    "VideoReader",
    "bundled_clip",
    "read_frames",
]

# Containers assume this rate themselves where a raw stream states none.
_DEFAULT_FPS = 25.0


def bundled_clip() -> Path:
    """Path of the clip that ships with the package: 100 frames, 768x576, 10 per second, people on a walkway."""
    return Path(str(importlib.resources.files("neuroflow_hf") / "assets" / "pedestrians.mp4"))


def labelled_clip() -> Path:
    """
    Path of the composed clip that ships with the package: 120 frames, 480x360, 12 per second. A dog, a bicycle and a
    cat come into an empty lawn; drawings, made by `recipes/siglip_small/demo_clip.py`.
    """
    return Path(str(importlib.resources.files("neuroflow_hf") / "assets" / "things.mp4"))


# --- errors --------------------------------------------------------------------------------------------------------


class VideoError(ValueError):
    """The file cannot be used as a video. The message names the file, what was expected and what to do."""


class DamagedVideoError(VideoError):
    """The file is cut short or broken inside. Raised after all frames before the damage were given out.

    Attributes:
        frames_read: how many frames the reader gave out before it stopped (after `start` and `stride`).
        frame_index: index in the file of the first frame that could not be read.
        seconds: time of the last good frame in the file, in seconds; None if there was none.
    """

    def __init__(self, message: str, frames_read: int, frame_index: int, seconds: float | None):
        """Store where reading stopped."""
        super().__init__(message)
        self.frames_read = frames_read
        self.frame_index = frame_index
        self.seconds = seconds


class _Damage(Exception):
    """The reason why decoding stopped; `VideoReader` adds where."""


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame.

    Attributes:
        index: position in the file, from 0, counted before `start` and `stride` are applied.
        time: seconds since the first frame of the file.
        image: uint8 RGB [H, W, 3], upright (the file's rotation is applied), C-contiguous.
    """

    index: int
    time: float
    image: np.ndarray


class VideoReader:
    """Frames of a video file, in display order.

    Building a reader opens the file and decodes its first frame, so an unusable file fails here and the properties
    below are known up front. Each iteration opens the file anew: a reader holds no open file and can be used again.

    Args:
        path: a local video file, in any format that PyAV (FFmpeg) decodes.
        start: index of the first frame to give out. Frames before it are decoded and dropped, never sought over, so
            that an index always means the same frame.
        stride: give out every `stride`-th frame. 1 (the default) is right for a fixed camera: neighbouring frames are
            the most alike.
        max_frames: stop after this many frames; None reads to the end.

    Attributes:
        path: the file.
        width, height: size of the frames given out, in pixels, after rotation.
        fps: frames a second on average; None when the file does not say.
        frame_count: frames in the file as its header states them, or duration times fps; an estimate, good enough
            for a progress bar. None when unknown.

    Damage is noticed where the decoder reports it or where the file ends before its header says (mp4, Matroska, WebM,
    AVI). MPEG-TS, GIF and fragmented mp4 state no length: a cut can pass for the end, and the last frame be a broken
    one. Changed bytes that still decode cannot be told from a picture.

    Raises:
        FileNotFoundError: no such file.
        VideoError: a directory, an empty file, not a video, no decoder for it, a rotation that is not a multiple of 90
            degrees; while iterating also: frames change size, `start` is past the end.
        DamagedVideoError: no frame can be decoded; while iterating: the file is cut short or broken (see the class).
        ValueError: `start`, `stride` or `max_frames` out of range.
    """

    def __init__(self, path: str | Path, *, start: int = 0, stride: int = 1, max_frames: int | None = None):
        """Check the arguments, open the file once and read its properties."""
        if start < 0:
            raise ValueError(f"start must be 0 or more, got {start}")
        if stride < 1:
            raise ValueError(f"stride must be 1 or more, got {stride}")
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"max_frames must be 1 or more, or None for all, got {max_frames}")
        self.path = Path(path)
        self.start = start
        self.stride = stride
        self.max_frames = max_frames
        with _open(self.path) as (container, stream):
            self.fps = _frames_per_second(stream)
            self.frame_count = _frame_count(container, stream, self.fps)
            try:
                first = next(_decode(container, stream), None)
            except _Damage as damage:
                raise DamagedVideoError(f"{self.path}: no frame can be decoded: {damage}", 0, 0, None) from damage
            if first is None:
                message = f"{self.path}: no frame can be decoded: the file ends after its header"
                raise DamagedVideoError(message, 0, 0, None)
            quarter_turns = _quarter_turns(first, self.path)
            self.height, self.width = _turned_size(first, quarter_turns)

    @property
    def expected_frames(self) -> int | None:
        """How many frames an iteration should give out after `start`, `stride` and `max_frames`; None when unknown."""
        if self.frame_count is None:
            return self.max_frames
        selected = len(range(self.start, self.frame_count, self.stride))
        return selected if self.max_frames is None else min(selected, self.max_frames)

    def __iter__(self) -> Iterator[Frame]:
        """Decode from the beginning and give out the selected frames."""
        frames_read = 0
        decoded = 0
        seconds = None
        with _open(self.path) as (container, stream):
            try:
                for frame in _decode(container, stream):
                    if frame.pts is None or not _has_stamps(container, stream):
                        stamp = decoded / (self.fps or _DEFAULT_FPS)
                    else:  # not frame.time, which is lost when the decoder is emptied
                        stamp = frame.pts * stream.time_base
                    if decoded == 0:
                        first_stamp = stamp
                    time = float(stamp - first_stamp)
                    quarter_turns = _quarter_turns(frame, self.path)
                    size = _turned_size(frame, quarter_turns)
                    if size != (self.height, self.width):
                        raise VideoError(
                            f"{self.path}: frame {decoded} ({time:.2f} s) is {size[1]}x{size[0]}, those "
                            f"before it are {self.width}x{self.height}; all must have one size: re-encode the file"
                        )
                    if decoded >= self.start and (decoded - self.start) % self.stride == 0:
                        yield Frame(decoded, time, _rgb(frame, quarter_turns))
                        frames_read += 1
                        if frames_read == self.max_frames:
                            return
                    decoded += 1
                    seconds = time
            except _Damage as damage:
                where = "before its first frame" if seconds is None else f"after frame {decoded - 1} ({seconds:.2f} s)"
                message = f"{self.path}: the file is damaged or cut short {where}: {damage}"
                raise DamagedVideoError(message, frames_read, decoded, seconds) from damage
        if decoded <= self.start:
            raise VideoError(f"{self.path}: start={self.start} is past the end: the file has {decoded} frames")


def read_frames(
    path: str | Path, *, start: int = 0, stride: int = 1, max_frames: int | None = None
) -> Iterator[Frame]:
    """Iterate once over the frames of a video file; arguments and errors are those of `VideoReader`."""
    return iter(VideoReader(path, start=start, stride=stride, max_frames=max_frames))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open `path` and close it at the end: (container, its video stream set to decode on several threads)."""
    if not path.exists():
        raise FileNotFoundError(f"no such video file: {path}")
    advice = "expected a video file that FFmpeg decodes, such as .mp4, .mkv, .webm or .avi"
    if path.is_dir():
        raise VideoError(f"{path} is a directory; {advice}")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty; {advice}")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, UnicodeDecodeError) as error:
        message = f"{path} is not a video, or its beginning or index is missing ({error.__class__.__name__}); {advice}"
        raise VideoError(message) from error
    with container:
        # An album cover in an audio file is a video stream of one picture, and FFmpeg draws text files as terminals.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or container.format.name == "tty":
            raise VideoError(f"{path} has no video in it (read as {container.format.long_name}); {advice}")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(f"{path}: there is no decoder for its video; re-encode it, for example as H.264")
        stream.thread_type = "AUTO"
        yield container, stream


def _decode(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Frames in display order without a gap; raises `_Damage` after the last good one if the file is damaged."""
    packets = 0
    last_dts = None
    longest_gap = 0
    end = 0
    reason = None
    try:
        for packet in container.demux(stream):
            if packet.size == 0:  # the end-of-stream marker; the decoder is emptied below
                continue
            if packets == 0 and not packet.is_keyframe:  # a recording cut out of a broadcast starts anywhere
                continue
            if packet.is_corrupt:
                reason = "a packet is incomplete"
                break
            packets += 1
            stamps = [stamp for stamp in (packet.pts, packet.dts) if stamp is not None]
            end = max([end, *(stamp + (packet.duration or 0) for stamp in stamps)])
            if packet.dts is not None:
                if last_dts is not None:
                    longest_gap = max(longest_gap, packet.dts - last_dts)
                last_dts = packet.dts
            yield from _checked(_decode_packet(stream, packet))
    except av.FFmpegError as error:
        reason = str(error)
    reason = reason or _ends_early(container, stream, packets, end, longest_gap)
    rest = _decode_packet(stream, None)
    if reason is None:
        yield from _checked(rest)
        return
    # Frames arrive out of display order. A packet that is missing shows no earlier than the last decode time, so
    # only frames up to there are known to have all their predecessors.
    if last_dts is not None and _has_stamps(container, stream):
        yield from _checked(frame for frame in rest if frame.pts is not None and frame.pts <= last_dts)
    raise _Damage(reason)


def _decode_packet(stream: Any, packet: Any) -> list[av.VideoFrame]:
    """Frames that become ready with `packet`; None empties the decoder."""
    try:
        return stream.codec_context.decode(packet)
    except av.FFmpegError as error:
        # Frames that still wait in the decoder may be predicted from the broken one: they are given up.
        raise _Damage(f"a frame cannot be decoded ({error.strerror})") from error


def _checked(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Give out `frames` up to the first that the decoder had to patch up."""
    for frame in frames:
        if frame.is_corrupt:
            raise _Damage("a frame is broken inside")
        yield frame


def _ends_early(container: Any, stream: Any, packets: int, end: int, longest_gap: int) -> str | None:
    """Say how far a stream that came to its end falls short of what the file promised; None if it does not.

    Args:
        container: the open file.
        stream: its video stream.
        packets: packets read.
        end: where the last one ended, in units of the stream's time base.
        longest_gap: longest step between two packets, in the same unit: as long as a frame lasted here.

    Only formats whose header states a length are judged, and two frames are allowed to be missing: muxers count the
    last frames differently, and in a stream of variable rate frames differ in length.
    """
    formats = container.format.name.split(",")
    if "mp4" in formats:
        promised = len(stream.index_entries)
        return f"its index lists {promised} frames, {packets} are there" if packets < promised - 2 else None
    if "avi" in formats:
        promised_seconds = float(stream.frames * stream.time_base)
    elif "matroska" in formats:
        promised_seconds = _matroska_seconds(container, stream)
    else:
        return None
    seconds = float(end * stream.time_base)
    one_frame = max(float(longest_gap * stream.time_base), 1 / (_frames_per_second(stream) or _DEFAULT_FPS))
    if seconds >= promised_seconds - 2 * one_frame:
        return None
    return f"its header states {promised_seconds:.2f} s, {seconds:.2f} s are there"


def _has_stamps(container: Any, stream: Any) -> bool:
    """Whether the file says when to show each frame.

    AVI stores no such times. For codecs that reorder frames FFmpeg guesses them, out of order.
    """
    return "avi" not in container.format.name.split(",") or not stream.codec_context.has_b_frames


def _matroska_seconds(container: Any, stream: Any) -> float:
    """Length of the video in seconds as a Matroska or WebM header states it; 0.0 if it does not."""
    clock = stream.metadata.get("DURATION", "").split(":")
    if len(clock) == 3:
        hours, minutes, seconds = (float(part) for part in clock)
        return 3600 * hours + 60 * minutes + seconds
    # The file's own length is that of its longest stream, which need not be the video.
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else 0.0


def _frames_per_second(stream: Any) -> float | None:
    """Average frames a second of `stream`, else its guessed rate, else None."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _frame_count(container: Any, stream: Any, fps: float | None) -> int | None:
    """Frames that the header states, else duration times rate, else None."""
    if stream.frames > 0:
        return stream.frames
    if fps is None or not container.duration or container.duration < 0:
        return None
    return max(1, round(container.duration / av.time_base * fps))


def _quarter_turns(frame: av.VideoFrame, path: Path) -> int:
    """Quarter turns counterclockwise that set `frame` upright, 0 to 3."""
    if frame.rotation % 90:
        raise VideoError(
            f"{path}: the file asks for a rotation by {frame.rotation} degrees; only multiples of 90 are supported: "
            f"re-encode it upright"
        )
    return frame.rotation // 90 % 4


def _turned_size(frame: av.VideoFrame, quarter_turns: int) -> tuple[int, int]:
    """(height, width) of `frame` after `quarter_turns`."""
    return (frame.width, frame.height) if quarter_turns % 2 else (frame.height, frame.width)


def _rgb(frame: av.VideoFrame, quarter_turns: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a decoded frame of any pixel format, upright."""
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, quarter_turns))
