"""Video input: frames out of a file, pixel values out of frames, and a thread that works ahead.

The three parts are used together or apart::

    reader = VideoReader("street.mp4", stride=2)
    preprocess = Preprocessor.from_pretrained("path/to/siglip")
    for pixel_values in prefetch(preprocess(frame.image) for frame in reader):
        ...  # float32 [1, 3, R, R]

A damaged file gives every frame before the damage and then raises `DamagedVideoError`.
"""

import contextlib
import importlib.resources
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition

__all__ = [
    "DamagedVideoError",
    "Frame",
    "Preprocessor",
    "VideoError",
    "VideoReader",
    "bundled_clip",
    "prefetch",
    "read_frames",
]

T = TypeVar("T")

# Pillow's numbers for its filters, and the names torchvision gives the same filters.
_RESAMPLE_MODES = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}

# Containers assume this rate themselves where a raw stream states none.
_DEFAULT_FPS = 25.0


def bundled_clip() -> Path:
    """Path of the clip that ships with the package: 100 frames, 768x576, 10 per second, people on a walkway."""
    return Path(str(importlib.resources.files("neuroflow_hf") / "assets" / "pedestrians.mp4"))


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


# --- pixel values --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessor:
    """Turns RGB frames into SigLIP pixel values: resize, rescale, normalise.

    Gives what Hugging Face's image processor gives for the same settings, without passing through PIL. The resized
    image is rounded to whole grey levels as PIL rounds it; a few values in a thousand (2 in 100 for some bilinear
    ratios) round to the next level, because torch keeps its filter weights in fewer bits. All frames go through the
    same arithmetic, so unchanged input pixels give unchanged pixel values.

    The horizontal pass comes first, as in torchvision and Pillow up to 12. Pillow 13 starts with the vertical pass
    where the height shrinks more (tall frames), which rounds differently around hard edges.

    Attributes:
        resolution: R, side of the square output in pixels. The frame's aspect ratio is not kept, as in SigLIP.
        resample: "bicubic" or "bilinear", both antialiased.
        rescale_factor: what a grey level 0..255 is multiplied with first; 1.0 for no rescaling.
        image_mean, image_std: per channel, subtracted and divided by after that; zeros and ones for no normalisation.
    """

    resolution: int
    resample: str = "bicubic"
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        """Refuse settings that cannot be computed."""
        if isinstance(self.resolution, bool) or not isinstance(self.resolution, int) or self.resolution < 1:
            raise ValueError(f"resolution must be a whole number of pixels, 1 or more, got {self.resolution!r}")
        if self.resample not in ("bicubic", "bilinear"):
            raise ValueError(f"resample must be 'bicubic' or 'bilinear', got {self.resample!r}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                f"image_mean and image_std must have three values and image_std no zero, "
                f"got {self.image_mean} and {self.image_std}"
            )

    @classmethod
    def from_image_processor(cls, processor: Any, resolution: int | None = None) -> "Preprocessor":
        """Take over the settings of a Hugging Face image processor.

        Args:
            processor: a SigLIP image processor, or a processor that holds one as `.image_processor`.
            resolution: R; None takes the processor's size. Give it to run a model at another resolution than it was
                saved with.

        Raises:
            ValueError: the processor does something other than resize to a square, rescale and normalise.
        """
        processor = getattr(processor, "image_processor", processor)
        _refuse_other_steps(vars(processor))
        if not getattr(processor, "do_resize", True):
            raise ValueError("do_resize=False is not supported: frames are always resized to the model's resolution")
        side = _square_side(processor.size)
        # PIL and torchvision enums carry the number or the name; without a choice Hugging Face takes bilinear.
        chosen = processor.resample
        resample = "bilinear" if chosen is None else _RESAMPLE_MODES.get(getattr(chosen, "value", chosen))
        if resample is None:
            raise ValueError(f"resample={chosen!r} is not supported, only 2 (bilinear) and 3 (bicubic)")
        return cls(
            resolution=side if resolution is None else resolution,
            resample=resample,
            rescale_factor=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            image_mean=_per_channel(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            image_std=_per_channel(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, resolution: int | None = None) -> "Preprocessor":
        """Take over the settings saved next to a model.

        Args:
            folder: what an image processor's `from_pretrained` takes: a folder with `preprocessor_config.json`, or a
                name on the Hub.
            resolution: as in `from_image_processor`.

        Raises:
            OSError: no image processor is saved there.
            ValueError: as in `from_image_processor`.
        """
        # by its class: the auto class asks for torchvision in transformers 5.17
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        settings, _ = SiglipImageProcessorPil.get_image_processor_dict(folder)
        _refuse_other_steps(settings)
        return cls.from_image_processor(SiglipImageProcessorPil.from_dict(settings), resolution)

    def __call__(
        self,
        image: np.ndarray | torch.Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Pixel values of one frame.

        Args:
            image: uint8 RGB [H, W, 3].
            dtype: of the result; the arithmetic is float32 before.
            device: of the result; None is the CPU. The resize runs on the CPU and bytes are what is copied.

        Returns:
            `dtype` [1, 3, R, R], contiguous.

        Raises:
            ValueError: `image` has another shape or dtype.
        """
        resized = self.resize(image).to(device or "cpu")
        # (level * factor - mean) / std as one product and one sum
        scale = [self.rescale_factor / std for std in self.image_std]
        offset = [-mean / std for mean, std in zip(self.image_mean, self.image_std, strict=True)]
        pixels = resized.contiguous().float()
        scale = pixels.new_tensor(scale).view(1, 3, 1, 1)
        offset = pixels.new_tensor(offset).view(1, 3, 1, 1)
        return torch.addcmul(offset, pixels, scale, out=pixels).to(dtype)

    def resize(self, image: np.ndarray | torch.Tensor) -> torch.Tensor:
        """The first step alone: uint8 RGB [H, W, 3] to uint8 [1, 3, R, R] on the CPU, in any memory layout."""
        if isinstance(image, np.ndarray):
            # from_numpy takes neither negative strides nor read-only memory
            image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"expected a uint8 RGB frame [H, W, 3], got {image.dtype} {list(image.shape)}")
        # On uint8 input torch rounds after the horizontal and again after the vertical pass, as PIL does; a float
        # resize rounded once at the end differs in 5 to 20 % of the values, by up to 20 levels at overshoots.
        side = (self.resolution, self.resolution)
        return F.interpolate(image.cpu().permute(2, 0, 1)[None], size=side, mode=self.resample, antialias=True)


def _refuse_other_steps(settings: dict):
    """ValueError if an image processor's settings ask for steps that SigLIP does not have."""
    for step in ("do_center_crop", "do_pad"):
        if settings.get(step):
            raise ValueError(f"{step}=True is not supported, only resizing to a square, rescaling and normalising")


def _square_side(size: Any) -> int:
    """Side in pixels of a Hugging Face image size; ValueError unless it is a square given by height and width."""
    given = {key: value for key, value in dict(size).items() if value is not None}
    if set(given) != {"height", "width"} or given["height"] != given["width"]:
        raise ValueError(f"size={given} is not supported, only a square such as {{'height': 224, 'width': 224}}")
    return int(given["height"])


def _per_channel(value: Any) -> tuple[float, float, float]:
    """One number for all channels, or one for each, as three floats."""
    values = (value,) * 3 if isinstance(value, int | float) else value
    return tuple(float(v) for v in values)


# --- working ahead -------------------------------------------------------------------------------------------------


def prefetch(iterable: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Run `iterable` ahead of its consumer in one background thread.

    The thread starts with the first item asked for. An exception in `iterable` is raised in the consumer after all
    items that came before it. Closing the generator stops and joins the thread; a `for` loop left by `break` or an
    exception closes it when the generator is dropped, `with contextlib.closing(prefetch(...))` closes it at once.

    Args:
        iterable: what to run ahead, for example decoding and preprocessing. It is used by the thread only, and its
            `close()`, if it has one, is called there.
        depth: how many items may wait, at least 1. 4 smooths out key frames; more only costs memory.

    Raises:
        ValueError: `depth` below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be 1 or more, got {depth}")
    return _prefetch(iterable, depth)


def _prefetch(iterable: Iterable[T], depth: int) -> Iterator[T]:
    """The generator behind `prefetch`."""
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def produce():
        error = None
        try:
            iterator = iter(iterable)
            try:
                for item in iterator:
                    waiting.put((item, None))
                    if stop.is_set():
                        break
            finally:
                if hasattr(iterator, "close"):
                    iterator.close()
        except BaseException as raised:
            error = raised
        if not stop.is_set():
            waiting.put((end, error))

    thread = threading.Thread(target=produce, name="neuroflow-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        # The thread may be inside put(). It looks at `stop` before it puts again, so one free place lets it go.
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        thread.join()
