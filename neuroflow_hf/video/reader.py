"""
Frames out of video files.

    preprocess = Preprocessor.from_pretrained("path/to/siglip")
    for pixel_values in prefetch(preprocess(frame.image) for frame in VideoReader("street.mp4", stride=2)):
        ...  # float32 [1, 3, R, R]
"""

import contextlib
import functools
import importlib.resources
import itertools
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

# FFmpeg assumes this rate, too, where a raw stream states none.
_DEFAULT_RATE = Fraction(25)


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
    """The file cannot be used as a video."""


class DamagedVideoError(VideoError):
    """The file is cut short. Raised after all frames before the cut."""


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame."""

    index: int  # number of decoded frames before it, counted before `start` and `stride` are applied
    time: float  # seconds since the first frame; never less than the time of the frame before it
    # uint8 RGB [H, W, 3], turned and mirrored as the file asks for, C-contiguous. Alpha is dropped, and HDR is not
    # tone-mapped
    image: np.ndarray


@dataclass(frozen=True)
class Segment:
    """A part of a video that can be decoded without the parts before it."""

    frames: int  # number of its frames, failed ones included
    begin: int | None = None  # time stamp of its first frame, a keyframe of the file; None for the video's beginning
    end: int | None = None  # time stamp of the first frame after it; None for the video's end
    before: int | None = None  # time stamp of the last frame before it


class VideoReader:
    """
    Frames of a video file, in display order.

    The constructor decodes the first frame, so an unusable file fails here. Each iteration opens the file again: a
    reader holds no open file and can be used several times.

    A recording that begins between keyframes begins with its first keyframe. Packets that fail to decode, and pictures
    that the decoder had to patch up, are left out; a warning gives their number. Where time stamps are missing or go
    back, as in joined recordings, a frame follows the previous one by 1 / `fps`. A cut is noticed where a packet is
    incomplete, and where an MP4, Matroska, WebM or AVI file has fewer bytes than it says; in MPEG-TS, GIF and
    fragmented MP4, it can pass for the end. Changed bytes that still decode pass for a picture.

    Args:
        path: a local video file, in any format that PyAV (FFmpeg) decodes. A name with a colon is a file, too.
        start: index of the first frame to yield. Frames before it are decoded and dropped.
        stride: yield every `stride`-th frame.
        max_frames: stop after N frames; None reads to the end.
        every: yield only the first frame of each interval of this length, in seconds; None for all frames.

    Attributes:
        width, height: size of the frames in pixels.
        fps: frames a second on average, as the file states or its first frames suggest; None if unknown.
        failed_frames: number of frames left out of the last iteration.
        decoded_frames: number of frames decoded in the last iteration, whether it gave them or not.

    Raises:
        FileNotFoundError: if there is no such file.
        VideoError: for a file that is no video, or has no decoder or no frame that can be decoded, and for a rotation
            that is no multiple of 90 degrees; while iterating, if frames change size, or `start` is past the end.
        DamagedVideoError: while iterating, if the file is cut short.
        ValueError: for `start`, `stride`, `max_frames` or `every` out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        start: int = 0,
        stride: int = 1,
        max_frames: int | None = None,
        every: float | None = None,
    ):
        if start < 0:
            raise ValueError(f"`start` is {start}; expected a number of frames, 0 or more.")
        if stride < 1:
            raise ValueError(f"`stride` is {stride}; expected a number of frames, 1 or more.")
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"`max_frames` is {max_frames}; expected 1 or more, or None for all.")
        if every is not None and not 0 < every < math.inf:
            raise ValueError(f"`every` is {every}; expected a number of seconds above 0, or None for all frames.")
        self.path = Path(path)
        self.every = every
        self.start = start
        self.stride = stride
        self.max_frames = max_frames
        self.failed_frames = self.decoded_frames = 0
        with _open(self.path) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else None
            try:
                frame = next(frame for frame in _decode(container, stream, self.path) if frame is not None)
            except (StopIteration, EOFError) as error:
                raise VideoError(
                    f"{self.path}: no frame can be decoded. The file is damaged, or FFmpeg's decoder "
                    f"{stream.codec_context.name!r} does not support it, as with animated WebP. Re-encode it."
                ) from error
            self.first_stamp, self.unit = frame.pts, stream.time_base
            self.height, self.width = shown(frame, self.path).shape[:2]

    @functools.cached_property
    def frame_count(self) -> int:
        """Number of frames in the file, counted without decoding; failed frames are counted, too."""
        return len(self._stamps(None)[0])

    @functools.cached_property
    def expected_frames(self) -> int:
        """Number of frames that an iteration should yield with `start`, `stride` and `max_frames`, without `every`."""
        end = None if self.max_frames is None else self.start + (self.max_frames - 1) * self.stride + 1
        return len(range(self.start, len(self._stamps(end)[0]), self.stride))

    def _stamps(self, end: int | None) -> tuple[list[int | None], set[int | None], bool]:
        """Stamps of at most `end` frames in the order of decoding; those of keyframes; whether the file is whole."""
        # packets are counted, since headers state no number, or that of another track
        stamps: list[int | None] = []
        keyframes: set[int | None] = set()
        with contextlib.suppress(av.FFmpegError, EOFError, OSError), _open(self.path) as (container, stream):
            for packet in itertools.islice(_packets(container, stream, self.path), end):
                if not packet.is_discard:
                    stamps.append(packet.pts)
                    if packet.is_keyframe:
                        keyframes.add(packet.pts)
            return stamps, keyframes, True
        return stamps, keyframes, False

    def segments(self, least: int) -> list[Segment]:
        """
        Cut the file into segments of at least `least` frames (with `every`: intervals), for `read`. It is cut where a
        keyframe of the file is found by its time stamp. A file is one segment if it is cut short, if time stamps are
        missing or repeated, or if a keyframe is not found.
        """
        stamps, keyframes, whole = self._stamps(None)
        self.frame_count = len(stamps)
        if not whole or None in (*stamps, self.first_stamp) or len(set(stamps)) < len(stamps):
            return [Segment(len(stamps))]
        stamps.sort()
        cuts = [0]
        with _open(self.path) as (container, stream):
            for place in range(1, len(stamps)):
                last, stamp, rows = cuts[-1], stamps[place], place - cuts[-1]
                if self.every is not None:
                    rows = min(rows, float((stamp - stamps[last]) * self.unit) / self.every)
                if rows >= least and stamp in keyframes:
                    frame = _seek(container, stream, self.path, stamp)
                    if frame is None or frame.pts != stamp:
                        return [Segment(len(stamps))]
                    cuts.append(place)
        begins = [None, *(stamps[place] for place in cuts[1:])]
        befores = [None, *(stamps[place - 1] for place in cuts[1:])]
        lengths = np.diff([*cuts, len(stamps)]).tolist()
        return [Segment(*values) for values in zip(lengths, begins, [*begins[1:], None], befores, strict=True)]

    def __iter__(self) -> Iterator[Frame]:
        """Decode from the beginning and yield the selected frames."""
        return self.read(Segment(0))

    def read(self, segment: Segment) -> Iterator[Frame]:
        """Decode one of `segments` and yield its selected frames, which are numbered from the segment's beginning."""
        self.failed_frames = self.decoded_frames = given = 0
        time, interval = 0.0, -1
        try:
            with _open(self.path) as (container, stream):
                clock = _Clock(container, stream)
                if segment.begin is not None:
                    clock.offset = -self.first_stamp * self.unit
                    interval = self._interval(clock.time(segment.before))
                    container.seek(segment.begin, stream=stream)
                for frame in _decode(container, stream, self.path):
                    if frame is None:
                        self.failed_frames += segment.begin is None or self.decoded_frames > 0
                        continue
                    if segment.begin is not None and frame.pts < segment.begin:
                        continue  # shown before the keyframe: it belongs to the segment before
                    if segment.end is not None and frame.pts >= segment.end:
                        return
                    time, index = clock.time(frame.pts), self.decoded_frames
                    self.decoded_frames += 1
                    due = index if self.every is None else self._interval(time)
                    if index >= self.start and (index - self.start) % self.stride == 0 and due > interval:
                        interval = due
                        image = shown(frame, self.path)
                        height, width = image.shape[:2]
                        if (height, width) != (self.height, self.width):
                            raise VideoError(
                                f"{self.path}: the frame at {time:.2f} s is {width}x{height}, those before it are "
                                f"{self.width}x{self.height}; expected frames of one size. Re-encode the file."
                            )
                        yield Frame(index, time, image)
                        given += 1
                        if given == self.max_frames:
                            return
        except EOFError as cut:
            raise DamagedVideoError(
                f"{self.path}: the file is cut short after frame {self.decoded_frames - 1} ({time:.2f} s): {cut}."
            ) from cut
        finally:
            if self.failed_frames:
                message = f"{self.path}: {self.failed_frames} of its frames cannot be decoded and are left out."
                warnings.warn(message, stacklevel=2)
        if self.decoded_frames <= self.start and segment.begin is None:
            frames = self.decoded_frames
            raise VideoError(
                f"{self.path}: `start` is {self.start}; expected less than {frames}, its number of frames."
            )

    def _interval(self, time: float) -> int:
        """The number of the interval of `every` seconds that a time lies in."""
        return -1 if self.every is None else math.floor(time / self.every + 1e-6)  # times are rounded


def read_frames(
    path: str | Path, *, start: int = 0, stride: int = 1, max_frames: int | None = None
) -> Iterator[Frame]:
    """Iterate once over the frames of a video file; arguments and errors are those of `VideoReader`."""
    return iter(VideoReader(path, start=start, stride=stride, max_frames=max_frames))


def frame_at(path: str | Path, index: int, seconds: float) -> Frame:
    """
    One frame of a file, as a reader gave it. It is sought by its time, and if no frame has this time, as in joined
    recordings and AVI, all frames before it are decoded. Errors are those of `VideoReader`.

    Args:
        path: the file.
        index: the frame's `index`.
        seconds: the frame's `time`.
    """
    path = Path(path)
    first_stamp = VideoReader(path).first_stamp
    with _open(path) as (container, stream):
        if first_stamp is not None:
            sought = first_stamp + round(seconds / stream.time_base)
            frame = _seek(container, stream, path, sought)
            if frame is not None and frame.pts == sought:
                return Frame(index, seconds, shown(frame, path))
    return next(iter(VideoReader(path, start=index, max_frames=1)))


def _seek(container: Any, stream: Any, path: Path, stamp: int) -> av.VideoFrame | None:
    """The first frame at or after a time stamp, by a seek; None if there is none, and in AVI, which has no times."""
    if container.format.name == "avi":
        return None
    with contextlib.suppress(EOFError, av.FFmpegError):
        container.seek(stamp, stream=stream)
        for frame in _decode(container, stream, path):
            if frame is not None and frame.pts is not None and frame.pts >= stamp:
                return frame
    return None


# --- files ---------------------------------------------------------------------------------------------------------


def ffmpeg_name(path: str | Path) -> str:
    """The name by which FFmpeg opens a local file; without the prefix, it takes `cam-12:30.mp4` for a URL."""
    return f"file:{path}"


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open `path` and close it at the end: (container, its video stream)."""
    if not path.exists():
        if re.match(r"\w{2,}:/", str(path)):
            raise FileNotFoundError(
                f"{path} is a URL, and URLs are not opened; expected a file. Record to a file, or pass frames to the "
                "model's `stream_frames`."
            )
        raise FileNotFoundError(f"There is no video file {path}.")
    advice = "expected a video file that FFmpeg decodes, such as .mp4, .mkv, .webm or .avi."
    if not path.is_file():
        raise VideoError(f"{path} is a {'directory' if path.is_dir() else 'device or pipe'}; {advice}")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty; {advice}")
    try:
        container = av.open(ffmpeg_name(path))
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
            raise VideoError(f"{path}: FFmpeg has no decoder for its video. Re-encode it, for example as H.264.")
        # Threads that decode whole frames would go on while a forward is timed, and report failures late or never.
        stream.thread_type = "SLICE"
        yield container, stream


def _packets(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """The video's packets from the first keyframe on; raises `EOFError` where a file is cut short."""
    begun = False
    for packet in container.demux(stream):
        # In transport streams, packets before a joint are flagged, too; the decoder tells whether they are whole.
        if packet.is_corrupt and container.format.name != "mpegts":
            raise EOFError("it ends inside a packet")
        begun = begun or packet.is_keyframe
        if begun and packet.size:  # an empty packet marks the end
            yield packet
    size, stated = path.stat().st_size, _stated_size(container, stream, path)
    if size < stated:
        raise EOFError(f"it has {size} of {stated} bytes")


def _stated_size(container: Any, stream: Any, path: Path) -> int:
    """The bytes that an MP4, Matroska, WebM or AVI file says it has, where FFmpeg takes a cut for the end; or 0."""
    if "mp4" in container.format.name:
        return max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    start = head.find(b"\x18\x53\x80\x67") + 4  # the segment's size, in which leading zero bits state its length
    if head[:4] != b"\x1a\x45\xdf\xa3" or start < 4:
        return 0
    length = 9 - head[start].bit_length()
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(head[start : start + length]) & unknown
    return 0 if size == unknown else start + length + size


def _decode(container: Any, stream: Any, path: Path) -> Iterator[av.VideoFrame | None]:
    """Frames in display order, None for each that fails to decode; then `EOFError` if the file is cut short."""
    packets, cut, packet = _packets(container, stream, path), None, True
    while packet is not None:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, EOFError) as error:
            cut, packet = error, None
        try:
            frames = stream.codec_context.decode(packet)  # None empties the decoder
        except av.FFmpegError:
            frames = [None]
        yield from (None if frame is None or frame.is_corrupt else frame for frame in frames)
    if cut is not None:
        raise EOFError(str(cut)) from cut


class _Clock:
    """Seconds since the first frame, which never go back."""

    def __init__(self, container: Any, stream: Any):
        # AVI stores no times. Where frames are reordered, FFmpeg guesses them, out of order.
        self.unit = None if container.format.name == "avi" and stream.codec_context.has_b_frames else stream.time_base
        self.step = 1 / (stream.average_rate or stream.guessed_rate or _DEFAULT_RATE)
        self.next, self.offset = Fraction(0), None

    def time(self, pts: int | None) -> float:
        """Time of the next frame, whose time stamp is `pts`."""
        time = self.next
        if pts is not None and self.unit is not None:
            stamp = pts * self.unit
            if self.offset is None or stamp + self.offset < self.next - self.step:
                self.offset = self.next - stamp  # the first time stamp, or a clock that was set back
            time = stamp + self.offset
        self.next = time + self.step
        return float(time)


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """a, b, c and d of a frame: the pixel at (x, y) is shown at (a x + c y, b x + d y), up to scale and shift."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know all kinds of side data, such as EXIF, but finds a rotation beside them
        cosine, sine = math.cos(math.radians(frame.rotation)), math.sin(math.radians(frame.rotation))
        return cosine, -sine, sine, cosine
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    return a, b, c, d


def shown(frame: av.VideoFrame, path: Path) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a decoded frame of any pixel format, turned and mirrored by its display matrix."""
    a, b, c, d = _display_matrix(frame)
    swapped = abs(b) > abs(a)
    (x, y), rest = ((c, b), (a, d)) if swapped else ((a, d), (b, c))
    if max(map(abs, rest)) > 0.02 * max(abs(x), abs(y)):  # about a degree
        raise VideoError(
            f"{path}: the file asks for a rotation by {frame.rotation} degrees; expected a multiple of 90. Re-encode "
            "it upright."
        )
    image = frame.to_ndarray(format="rgb24")
    if swapped:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1])
