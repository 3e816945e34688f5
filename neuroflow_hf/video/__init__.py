"""Frames out of video files, labels, motion, overlays: a model run over a video."""

from .preprocess import Preprocessor
from .reader import VideoReader, bundled_clip, labelled_clip, read_frames

__all__ = ["Preprocessor", "VideoReader", "bundled_clip", "labelled_clip", "read_frames"]
