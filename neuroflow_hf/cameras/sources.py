"""
Pictures out of cameras: webcams, RTSP and HTTP URLs, and files for trying, which play at their own speed.

A source is a function that opens it and gives its pictures, each as a function that converts it: of pictures that are
dropped, nothing but the decoding is paid for. It raises when the source is lost.
"""

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import av
import numpy as np

from ..video.reader import VideoReader, shown

Picture = Callable[[], np.ndarray]  # gives uint8 RGB [H, W, 3]
Source = Callable[[], Iterator[Picture]]

PROTOCOLS = ("rtsp", "rtsps", "http", "https")
OPEN_SECONDS, READ_SECONDS = 10, 10  # without an answer, a source counts as lost
# the first pictures at once instead of after some seconds of analysis, and none kept back
LIVE = {"fflags": "nobuffer", "flags": "low_delay"}


class SourceLostError(OSError):
    """A camera cannot be reached, or gives no more pictures."""


def source_name(place: str) -> str:
    """The name of a source for output: a URL without user and password."""
    if "://" not in place:
        return place
    parts = urlsplit(place)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def open_source(place: str) -> tuple[Source, bool]:
    """
    A source, and whether it is live: those that are not end, and are not tried again.

    Args:
        place: `/dev/video0` or another video device, an RTSP or HTTP URL, or a file.

    Raises:
        ValueError: for a URL of another protocol.
        VideoError, FileNotFoundError: for a file that is no video; cameras may be away, and are tried again.
    """
    protocol = re.match(r"(\w+)://", place)
    if protocol is not None:
        if protocol[1].lower() not in PROTOCOLS:
            raise ValueError(f"{source_name(place)} is no camera; expected a URL of {', '.join(PROTOCOLS)}.")
        options = {"rtsp_transport": "tcp"} if protocol[1].lower().startswith("rtsp") else {}
        return partial(live_pictures, place, None, LIVE | options), True
    if place.startswith("/dev/"):
        return partial(live_pictures, place, "v4l2", LIVE), True
    VideoReader(place)  # a file: what is wrong with it is said at once
    return partial(played_pictures, Path(place)), False


def live_pictures(place: str, container_format: str | None, options: dict[str, str]) -> Iterator[Picture]:
    """The pictures of a camera; SourceLostError when there are no more."""
    try:
        with av.open(
            place, format=container_format, options=options, timeout=(OPEN_SECONDS, READ_SECONDS)
        ) as container:
            if not container.streams.video:
                raise SourceLostError("it sends no video")
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # threads that decode whole frames keep some back
            for packet in container.demux(stream):
                yield from (partial(shown, frame, Path(place)) for frame in decoded(stream, packet))
    except av.ExitError as error:
        raise SourceLostError(f"it sent nothing for {READ_SECONDS} seconds") from error
    except (av.FFmpegError, OSError) as error:
        raise SourceLostError(reason_of(error).replace(place, source_name(place))) from error
    raise SourceLostError("it ended")


def decoded(stream: Any, packet: Any) -> list[av.VideoFrame]:
    """The frames of a packet; none if it is damaged, as after a lost one."""
    try:
        return [frame for frame in stream.codec_context.decode(packet) if not frame.is_corrupt]
    except av.FFmpegError:
        return []


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def played_pictures(path: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[Picture]:
    """The pictures of a file, each at its time."""
    begun = clock()
    for frame in VideoReader(path):
        time.sleep(max(0.0, begun + frame.time - clock()))
        yield lambda image=frame.image: image
