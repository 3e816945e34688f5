"""Clips of videos, with the teacher's embedding of every frame: computed once, and kept in a folder."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..evaluation.datasets import file_digest
from ..utils.files import write_whole
from ..utils.provenance import fingerprint, key_of
from ..video.preprocess import Preprocessor
from ..video.reader import read_frames
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .settings import DistillSettings

HELD_OUT_EVERY = 5  # one video of so many is held out; of fewer videos, the last quarter of each
TEACHER_BATCH = 8


# One video at one resolution, read from the disk as it is used: `frames` uint8 [T, 3, R, R], `teacher` float16 [T, D].
FrameStore = dict[str, np.ndarray]


@dataclass(frozen=True)
class Clip:
    """Frames `start` to `start + count` of video number `video`."""

    video: int
    start: int
    count: int


@dataclass(frozen=True)
class Batch:
    """B clips of T frames at one resolution."""

    frames: Tensor  # uint8 [T, B, 3, R, R]
    teacher: Tensor  # float32 [T, B, D]


class ClipSet:
    """
    The clips of some videos.

    Args:
        videos: paths of the training videos.
        held_out: paths of videos to measure on; None holds out every fifth of `videos`, or of fewer than five the last
            quarter of each.
        model: the teacher, in evaluation mode.
        preprocess: its preprocessing.
        settings: of the distillation; the attribute `settings` has them resolved.
        cache: folder for frames and embeddings.
        on_video: called with the number of videos done and of all videos.

    Raises:
        ValueError: if no video is long enough for a clip.
    """

    def __init__(
        self,
        videos: Sequence[Path],
        held_out: Sequence[Path] | None,
        model: NeuroFlowSiglipVisionModel,
        preprocess: Preprocessor,
        settings: DistillSettings,
        cache: Path,
        on_video: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.preprocess = preprocess
        self.patch_size = cast(int, model.config.patch_size)  # transformers' annotation allows more than SigLIP has
        self.settings = settings = settings.resolved(self.patch_size, preprocess)
        self.resolutions = settings.resolutions
        paths = [*videos, *(held_out or ())]
        self.stores: dict[int, list[FrameStore]] = {side: [] for side in self.resolutions}
        self.digests = [file_digest(path) for path in paths]
        weights, done = fingerprint(model), 0
        for side in self.resolutions:
            for path, digest in zip(paths, self.digests, strict=True):
                at_side = self.preprocess_at(side)
                self.stores[side].append(store_video(path, digest, weights, model, at_side, settings, cache))
                done += 1
                on_video(done, len(paths) * len(self.resolutions))
        lengths = [len(store["frames"]) for store in self.stores[self.resolutions[0]]]
        self.training, self.held_out, too_short = split_clips(lengths, len(videos), held_out, settings)
        self.short_videos = [paths[place].name for place in too_short]
        if not self.training or not self.held_out:
            needed = settings.clip_frames * settings.frame_stride
            kind = "training" if not self.training else "held-out"
            raise ValueError(
                f"No {kind} video has a clip of {settings.clip_frames} frames, every {settings.frame_stride} frames "
                f"one ({needed} frames of the video). Give longer videos, or lower --clip-frames or --frame-stride."
            )

    def preprocess_at(self, side: int) -> Preprocessor:
        """The preprocessing at a resolution."""
        return replace(self.preprocess, resolution=side)

    def grid_at(self, side: int) -> int:
        """How many patches a row of a frame has at a resolution."""
        return self.preprocess_at(side).patches_per_side(self.patch_size)

    def batch(self, clips: Sequence[Clip], side: int) -> Batch:
        """The frames and the teacher's embeddings of clips of the same length."""
        stores = self.stores[side]

        def stacked(name: str) -> Tensor:
            parts = [stores[clip.video][name][clip.start : clip.start + clip.count] for clip in clips]
            return torch.from_numpy(np.stack(parts, axis=1))

        return Batch(stacked("frames"), stacked("teacher").float())

    def draw(self, rng: np.random.Generator) -> Batch:
        """A training batch at one of the resolutions."""
        side = self.resolutions[rng.integers(len(self.resolutions))]
        places = rng.choice(len(self.training), self.settings.batch, replace=len(self.training) < self.settings.batch)
        return self.batch([self.training[place] for place in places], side)


def split_clips(
    lengths: Sequence[int], training: int, held_out: Sequence[Path] | None, settings: DistillSettings
) -> tuple[list[Clip], list[Clip], list[int]]:
    """
    Training clips, which overlap by half; held-out clips, which do not; and the numbers of videos that are too short.
    `lengths` are of all videos in sampled frames, the `training` training videos first; if `held_out` is None, some of
    these are held out.
    """
    count, clips, measured, too_short = settings.clip_frames, [], [], []
    for place, length in enumerate(lengths):
        border = length  # the first frame that is held out
        if place >= training:
            border = 0
        elif held_out is None and training >= HELD_OUT_EVERY:
            border = 0 if place % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else length
        elif held_out is None:
            border = min(length - length // 4, max(0, length - count))
        before = [Clip(place, start, count) for start in range(0, border - count + 1, max(1, count // 2))]
        after = [Clip(place, start, count) for start in range(border, length - count + 1, count)]
        clips += before
        measured += after
        if not before and not after:
            too_short.append(place)
    return clips, measured, too_short


def store_video(
    path: Path,
    digest: str,
    weights: str,
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    settings: DistillSettings,
    cache: Path,
) -> FrameStore:
    """Every Nth frame of a video, and the teacher's outputs of them; computed if they are not in the cache."""
    key = key_of(video=digest, weights=weights, preprocess=asdict(preprocess), stride=settings.frame_stride)
    folder, done = cache / key, cache / key / "done"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        frames = [preprocess.resize(frame.image) for frame in read_frames(path, stride=settings.frame_stride)]
        if not frames:
            raise ValueError(f"{path} has no frame that can be read.")
        pictures = torch.cat(frames)
        for name, values in {"frames": pictures, "teacher": teach(model, preprocess, pictures)}.items():
            np.save(folder / f"{name}.npy", values.numpy())
        write_whole(done, path.name)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("frames", "teacher")}


@torch.inference_mode()
def teach(model: NeuroFlowSiglipVisionModel, preprocess: Preprocessor, frames: Tensor) -> Tensor:
    """The dense model's embeddings float16 [T, D] of frames uint8 [T, 3, R, R]."""
    found = []
    for part in frames.split(TEACHER_BATCH):
        pixels = preprocess.normalise(part, model.dtype, model.device)
        found.append(model(pixels, interpolate_pos_encoding=True).pooler_output.to(torch.float16).cpu())
    return torch.cat(found)
