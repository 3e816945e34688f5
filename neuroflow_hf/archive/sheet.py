"""A contact sheet of moments: the best frame of each, read from its video."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..video.overlay import contact_sheet, fitted
from ..video.reader import VideoError, frame_at
from .dataset import file_of, read_metadata, video_state

CELL = (270, 480)  # height and width of a picture in pixels


def clock(seconds: float) -> str:
    """A time as hours, minutes, seconds and tenths: `"1:02:03.4"`."""
    minutes, rest = divmod(round(seconds * 10), 600)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest // 10:02d}.{rest % 10}"


def moment_sheet(dataset: str | Path, moments: Sequence[dict], title: str) -> np.ndarray:
    """
    The contact sheet of at least one of `search_index`'s moments, uint8 RGB [H, W, 3]. FileNotFoundError if a video of
    the dataset is no longer there, VideoError if it changed since it was embedded, or cannot be read.
    """
    cells = []
    for moment in moments:
        lines = [f"video {Path(moment['video']).name}", f"time {span(moment)}, score {moment['score']:.3f}"]
        cells.append((moment_picture(dataset, moment), lines))
    return contact_sheet(cells, title)


def span(moment: dict) -> str:
    """A moment's begin and end."""
    return f"{clock(moment['start'])} to {clock(moment['end'])}"


def moment_picture(dataset: str | Path, moment: dict) -> np.ndarray:
    """The best frame of a moment, uint8 RGB [*CELL, 3]. Arguments and errors are those of `moment_sheet`."""
    video = Path(moment["video"])
    require_unchanged(Path(dataset), video)
    return fitted(frame_at(video, moment["frame"], moment["best"]).image, *CELL)


def require_unchanged(dataset: Path, video: Path):
    """FileNotFoundError or VideoError unless a video is as it was when it was embedded."""
    if not video.exists():
        raise FileNotFoundError(
            f"{video} was embedded and is no longer there, so its pictures cannot be shown. Put it back, or delete "
            f"{file_of(dataset, video)} from the dataset."
        )
    file = file_of(dataset, video)
    if file.exists() and read_metadata(file)["video"] != video_state(video):
        raise VideoError(
            f"{video} changed since it was embedded, so its frames may be others. Embed it again, with the command of "
            "the first time."
        )
