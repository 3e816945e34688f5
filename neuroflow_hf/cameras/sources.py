"""
Pictures out of cameras: webcams, RTSP and HTTP URLs, and files for trying, which play at their own speed.

A source is a function that opens it and gives its pictures, each as a function that converts it: of pictures that are
dropped, nothing but the decoding is paid for. It raises when the source is lost.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
    """
    The name of a source in all output. A URL loses what may be secret: user and password, and all values after `=` in
    its path and query.
    """
    protocol, separator, rest = place.partition("://")
    if not separator:
        return place
    host, slash, path = re.fullmatch(r"([^/?]*)([/?]?)(.*)", rest.rpartition("@")[2].partition("#")[0]).groups()
    path, question, query = (slash + path).partition("?")
    parts = [part.partition("=")[0] + "=..." if "=" in part else "..." for part in query.split("&")]
    return f"{protocol}://{host}{re.sub('=[^&/]*', '=...', path)}{question}{'&'.join(parts) if query else ''}"


def open_sources(places: Sequence[str]) -> dict[str, tuple[Source, bool]]:
    """
    Sources by name, each with whether it is live: those that are not end, and are not tried again.

    Args:
        places: `/dev/video0` or other video devices, RTSP or HTTP URLs, or files.

    Raises:
        ValueError: for a source that is given twice, and a URL of another protocol.
        VideoError, FileNotFoundError: for a file that is no video. Cameras may be away; they are tried again.
    """
    opened: dict[str, tuple[Source, bool]] = {}
    for number, place in enumerate(places, 1):
        name = source_name(place)
        if place in places[: number - 1]:
            raise ValueError(f"{name} is given twice; give each source once.")
        if name in opened:  # URLs that differ in what is left out of their names
            name = f"{name} (source {number})"
        opened[name] = open_source(place)
    return opened


def open_source(place: str) -> tuple[Source, bool]:
    """One of `open_sources`."""
    protocol = re.match(r"(\w+)://", place)
    if protocol is not None:
        if protocol[1].lower() not in PROTOCOLS:
            raise ValueError(f"{source_name(place)} is no camera; expected a URL of {', '.join(PROTOCOLS)}.")
        options = {"rtsp_transport": "tcp"} if protocol[1].lower().startswith("rtsp") else {}
        return partial(live_pictures, place, None, LIVE | options), True
    if place.startswith("/dev/"):
        return partial(live_pictures, place, "v4l2", LIVE), True
    VideoReader(place)  # raises if the file cannot be used
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
        # the message would show the whole URL
        raise SourceLostError(error.strerror or type(error).__name__) from error
    raise SourceLostError("it ended")


def decoded(stream: Any, packet: Any) -> list[av.VideoFrame]:
    """The frames of a packet; none if it is damaged, as after a lost one."""
    try:
        return [frame for frame in stream.codec_context.decode(packet) if not frame.is_corrupt]
    except av.FFmpegError:
        return []


def played_pictures(path: Path) -> Iterator[Picture]:
    """The pictures of a file, each at its time."""
    begun = time.monotonic()
    for frame in VideoReader(path):
        time.sleep(max(0.0, begun + frame.time - time.monotonic()))
        yield lambda image=frame.image: image
