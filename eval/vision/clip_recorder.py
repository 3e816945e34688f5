"""Outputs of dense and of methods on the clips of `vision_policies.py`, encoded once and kept in the cache."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from eval.vision import clips as clips_module
from eval.vision.clips import SOURCES, Clip
from eval.vision.codec_motion import codec_motion
from neuroflow_hf.evaluation.methods import PatchSurprise, dense_cost, patches_of
from neuroflow_hf.utils.files import write_whole
from neuroflow_hf.utils.provenance import code_version, fingerprint, key_of, model_version
from neuroflow_hf.video import reader
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.vision.patches import project_patches
from recipes import recordings as footage

FRAMES = 120
CHANGED = 0.01  # the presets' threshold: above it, a patch counts as changed for the baselines
PATCH_FIGURES = ("mean", "p5", "p1", "worst")


def there_and_back(frames: Callable[[], Iterator[np.ndarray]], count: int) -> Iterator[np.ndarray]:
    """`count` frames of a clip that has fewer: forward, back, and so on."""
    shown = list(itertools.islice(frames(), count))
    return itertools.islice(itertools.cycle([*shown, *shown[-2:0:-1]]), count)


def load_clip(name: str, home: Path) -> Clip:
    """The clip of the suite with this name, recorded ones with as many of FRAMES frames as the video has."""
    source = next(source for source in SOURCES if source.name == name)
    if isinstance(source, footage.Footage):
        source = replace(source, count=FRAMES)
    return source.load(home, Console(stderr=True))


class ClipRecorder:
    """
    Outputs of dense and of methods on clips, stored once.

    Args:
        model: a tower that gives one embedding of a frame.
        preprocess: of the model.
        folder: of the files; a file's name holds a key of all that it depends on.
        frames: of each clip.
    """

    def __init__(self, model: Any, preprocess: Preprocessor, folder: Path, frames: int):
        self.model, self.preprocess, self.folder, self.frames = model, preprocess, folder, frames
        code = code_version(map(Path, (__file__, clips_module.__file__, footage.__file__, reader.__file__)))
        table = footage.TABLE.read_text(encoding="utf-8")
        self.key = {"code": code, "table": table, "model": fingerprint(model), "engine": model_version()}

    def path(self, clip: str, options: dict | None) -> Path:
        """The file of a method on a clip; of dense without options."""
        return self.folder / f"{clip}-{key_of(**self.key, frames=self.frames, options=options)}.safetensors"

    def record(self, clip: Clip, methods: dict[str, dict]):
        """Encode a clip by dense and by the methods whose files are missing."""
        missing = {name: options for name, options in methods.items() if not self.path(clip.name, options).is_file()}
        if not missing and self.path(clip.name, None).is_file():
            return
        model, others = self.model, self.model.num_prefix_tokens
        pictures = list(there_and_back(clip.frames, self.frames))
        pixels = [self.preprocess(image, model.dtype) for image in pictures]
        begun = time.process_time()
        encoded = [model(frame) for frame in pixels]
        seconds = time.process_time() - begun
        patches = torch.cat([one.last_hidden_state[:, others:] for one in encoded])
        signal = torch.cat([project_patches(model, frame, as_product=True) for frame in pixels])
        surprise, between = 1 - between_frames(signal), between_frames(patches)
        whole = dense_cost(model, patches_of(model, pixels[0]))
        displacement, size = map(torch.from_numpy, codec_motion(pictures))
        dense = {
            "outputs": torch.cat([one.pooler_output for one in encoded]).half(),
            "mean_surprise": surprise.mean(0),
            "changed": (surprise > CHANGED).float().mean(0),
            "displacement": displacement,
            "packet_size": size,
            # what a frame costs on which a triggered baseline encodes, and on which it holds
            "costs": torch.tensor([part / whole for part in PatchSurprise(model, 0).costs(pixels[0], whole)]),
        }
        write_whole(self.path(clip.name, None), save(dense))
        list(model.stream_frames(pixels[:2]))  # the first call in a process takes longer
        for options in missing.values():
            begun = time.process_time()
            outputs = list(model.stream_frames(pixels, **options))
            share = (time.process_time() - begun) / seconds
            found = {
                "time": torch.tensor(share),  # processor time of all frames, the first included, over dense's
                "outputs": torch.cat([one.pooler_output for one in outputs]).half(),
                "cost": torch.cat([one.cost for one in outputs]),
            }
            if outputs[0].token_mask is None:
                own = torch.cat([one.last_hidden_state[:, others:] for one in outputs[1:]])
                every = int(1 / found["cost"][1:].mean().clamp(min=1 / self.frames, max=1))
                held = cosines_of_held_patches(between, every)
                cosines = functional.cosine_similarity(own, patches[1:], dim=-1)
                found["patches"] = torch.tensor([patch_figures(cosines), patch_figures(held)])
            write_whole(self.path(clip.name, options), save(found))

    def load(self, clip: str, options: dict | None) -> dict[str, Tensor]:
        """What `record` stored; outputs as unit vectors, float32 [T, D]."""
        found = load_file(self.path(clip, options))
        return found | {"outputs": functional.normalize(found["outputs"].float(), dim=-1)}


def patch_figures(cosines: Tensor) -> list[float]:
    """PATCH_FIGURES of cosines [M, N] of N patches on M frames; the last is the mean worst patch of a frame."""
    p5, p1 = np.percentile(cosines.double().numpy(), (5, 1))
    return [cosines.mean().item(), p5, p1, cosines.min(dim=1).values.mean().item()]


def between_frames(patches: Tensor) -> Tensor:
    """Cosines [N, T, T] of each patch between all frames, from [T, N, D]."""
    by_patch = functional.normalize(patches.float(), dim=-1).transpose(0, 1)
    return by_patch @ by_patch.mT


def cosines_of_held_patches(between: Tensor, every: int) -> Tensor:
    """Cosines [M, N] of dense patches to those of the last of every k-th frame, over all phases; [N, T, T] between."""
    phases = []
    for phase in range(every):
        frames = torch.arange(max(phase, 1), between.shape[1])
        phases.append(between[:, frames, frames - (frames - phase) % every])
    return torch.cat(phases, dim=1).T
