"""Frames out of video files, labels, motion, overlays: a model run over a video."""

from typing import TYPE_CHECKING, Any

from .preprocess import Preprocessor

if TYPE_CHECKING:
    from .reader import DamagedVideoError, Frame, VideoError, VideoReader, bundled_clip, labelled_clip, read_frames

__all__ = [
    "DamagedVideoError",
    "Frame",
    "Preprocessor",
    "VideoError",
    "VideoReader",
    "bundled_clip",
    "labelled_clip",
    "read_frames",
]


def __getattr__(name: str) -> Any:
    """Import what reads videos when it is first used: models load without PyAV."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import reader
    except ImportError as error:
        raise ImportError('Video files need the extra `video`: pip install "neuroflow-hf[video]".') from error
    return getattr(reader, name)
