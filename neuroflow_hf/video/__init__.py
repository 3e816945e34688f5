"""Frames out of video files, labels, motion, overlays: a model run over a video."""

try:
    import av  # noqa: F401
    import PIL  # noqa: F401
except ImportError as error:
    raise ImportError('Video files need the extra `video`: pip install "neuroflow-hf[video]".') from error

from .preprocess import Preprocessor
from .reader import VideoReader, bundled_clip, labelled_clip, read_frames

__all__ = ["Preprocessor", "VideoReader", "bundled_clip", "labelled_clip", "read_frames"]
