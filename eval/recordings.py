"""
Recordings: the outputs of methods on scenes, stored once and used by several scripts.

    recorder = Recorder(model, preprocess, folder, RecordSettings(dense_every=8))
    recorder.run(batches, specs)  # records what is missing; several processes share the work
    recordings = recorder.load(batches[0], specs[0])  # one for each scene

A batch of B scenes is recorded with one call for each frame. Each batch and method has one file, whose name has a key
of everything that it depends on: weights, code, libraries, preprocessing, scenes, settings, options. What has a file
is not recorded again.

Embeddings are kept of *sampled* frames, which are the same for all methods: one random frame of every `dense_every`
(at fixed distances, a method with a period would always be seen in the same phase), and all frames around those where
the right label changes. Methods whose frames do not depend on earlier frames compute only these.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from neuroflow_hf.evaluation.methods import MethodSpec, make_methods, tower_of
from neuroflow_hf.evaluation.recordings import RecordingStore, passes_of
from neuroflow_hf.utils.files import write_whole
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, machine_and_versions
from neuroflow_hf.video.preprocess import Preprocessor


@dataclass(frozen=True, eq=False)
class Scene:
    """A video and its right labels."""

    name: str  # unique among the scenes
    # a function that returns an iterator over all frames, uint8 RGB [H, W, 3]
    frames: Callable[[], Iterator[np.ndarray]]
    labels: tuple[str | None, ...]  # the right label of each of the T frames; None for a frame without one
    identity: str = ""  # a key that changes with what the scene shows
    group: str = ""  # the group in which results are reported, such as a kind of motion

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.labels)

    @property
    def changes(self) -> list[int]:
        """The frames whose right label differs from that of the frame before."""
        return [number for number in range(1, self.count) if self.labels[number] != self.labels[number - 1]]


@dataclass(frozen=True)
class RecordSettings:
    """Which frames are sampled."""

    dense_every: int = 8  # one random frame of every `dense_every` is sampled; 1 for all frames
    # before, after: around a change of the label, all frames from `before` frames before to `after` frames after it
    # are sampled as well
    before: int = 4
    after: int = 40
    most_changes: int = 8  # of a scene's changes, so many are used, evenly chosen


def chosen_changes(scene: Scene, settings: RecordSettings) -> list[int]:
    """The changes of the label around which all frames are sampled, evenly chosen from the first to the last."""
    changes, most = scene.changes, settings.most_changes
    return [changes[round(place)] for place in np.linspace(0, len(changes) - 1, min(most, len(changes)))]


def drawn_frames(scene: Scene, settings: RecordSettings) -> np.ndarray:
    """
    One random frame of every `dense_every`, bool [T], for figures over time. The first frame is never drawn, because
    all methods encode it in full.
    """
    digest = hashlib.blake2b(scene.name.encode(), digest_size=8).digest()
    rng = np.random.default_rng((0, int.from_bytes(digest)))
    drawn = np.zeros(scene.count, dtype=bool)
    for first in range(0, scene.count, settings.dense_every):
        places = range(max(1, first), min(first + settings.dense_every, scene.count))
        if places:
            drawn[rng.integers(places.start, places.stop)] = True
    return drawn


def sampled_frames(scene: Scene, settings: RecordSettings) -> np.ndarray:
    """The drawn frames, and those around changes of the label, which show when a method follows: bool [T]."""
    sampled = drawn_frames(scene, settings)
    for change in chosen_changes(scene, settings):
        sampled[max(0, change - settings.before) : change + settings.after + 1] = True
    return sampled


@dataclass(frozen=True, eq=False)
class Recording:
    """What a method returned for a scene of T frames, of which m are sampled."""

    frames: Tensor  # int64 [m], numbers of the sampled frames
    drawn: Tensor  # bool [m], which of these were drawn at random; figures over time use only these
    embeddings: Tensor  # float32 [m, D], stored in half precision
    cost: Tensor  # float32 [T], cost of every frame; every method encodes the first one in full
    # int64 [T], bytes in the method's memory after each frame; 0 where the method did not see the frame
    nbytes: Tensor
    about: dict  # seconds, versions, machine, commit and settings of the whole batch


@torch.inference_mode()
def record(
    model: nn.Module,
    preprocess: Preprocessor,
    scenes: Sequence[Scene],
    specs: Sequence[MethodSpec],
    settings: RecordSettings,
    title: str | None = None,
) -> list[tuple[dict[str, Tensor], dict]]:
    """
    Run several methods over one batch of B scenes with T frames each, in one pass over the frames. Methods that return
    dense frames share the computation of these. `title` is that of the progress bar on stderr; None for no bar.

    Returns:
        For each method `embeddings` float16 [M, D] of the M sampled frames, ordered by frame and then by scene; `cost`
        float32 [T, B]; `nbytes` int64 [T], the sum over scenes; and the recording's `about`.

    Raises:
        ValueError: if a scene does not have `count` frames, or if embeddings are not finite.
    """
    tower, methods = tower_of(model), make_methods(model, specs)
    for method in methods:
        method.start(len(scenes))
    sampled = torch.from_numpy(np.stack([sampled_frames(scene, settings) for scene in scenes], axis=1))
    # Allocated at once: many small tensors that stay, allocated between large ones that are freed, would fragment the
    # memory until it is full after a thousand frames.
    embeddings = torch.empty(len(specs), int(sampled.sum()), tower.config.hidden_size, dtype=torch.float16)
    filled, spent = [0] * len(specs), [0.0] * len(specs)
    costs = torch.full((len(specs), *sampled.shape), math.nan)
    nbytes = torch.zeros(len(specs), len(sampled), dtype=torch.int64)
    bar = {"console": Console(stderr=True), "disable": title is None}
    shown_frames = zip(*(scene.frames() for scene in scenes), range(len(sampled)), strict=True)
    for *shown, number in track(shown_frames, title or "", len(sampled), **bar):
        wanted = sampled[number]
        taking_part = [place for place, method in enumerate(methods) if method.follows or wanted.any()]
        if taking_part:
            pixels = torch.cat([preprocess(image, tower.dtype, tower.device) for image in shown])
        for place in taking_part:
            before = time.perf_counter()
            step = methods[place].step(pixels, wanted)
            found = step.embeddings[wanted.to(step.embeddings.device)].cpu().half()
            if not torch.isfinite(found).all():
                name = specs[place].name
                raise ValueError(f"{name} gave an embedding at frame {number} that is not finite, or beyond float16.")
            embeddings[place, filled[place] : filled[place] + len(found)] = found
            filled[place] += len(found)
            costs[place, number] = step.cost.cpu()
            nbytes[place, number] = methods[place].nbytes
            spent[place] += time.perf_counter() - before
    for cost, method in zip(costs, methods, strict=True):
        if not method.follows:  # each frame costs the same, also those that were not computed
            cost[:] = cost[~cost[:, 0].isnan()][0]
    about = {
        **machine_and_versions(str(tower.device)),
        "commit": checkout_commit(),
        "dtype": str(tower.dtype).removeprefix("torch."),
        "settings": asdict(settings),
    }
    names, parts = ("embeddings", "cost", "nbytes"), zip(embeddings, costs, nbytes, strict=True)
    tensors = [dict(zip(names, one, strict=True)) for one in parts]
    return [(one, {**about, "seconds": round(seconds, 3)}) for one, seconds in zip(tensors, spent, strict=True)]


class Recorder:
    """
    Recordings of one model in one folder.

    Args:
        model: in evaluation mode, with or without a text tower; recordings are made in its dtype and on its device.
        preprocess: the checkpoint's preprocessing.
        folder: folder of the recordings.
        settings: which frames are sampled.
        processes: the processes that share the work; by default those that torchrun started, or this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocessor,
        folder: Path,
        settings: RecordSettings,
        processes: Processes | None = None,
    ):
        self.model, self.preprocess, self.settings = model, preprocess, settings
        self.store = RecordingStore(
            folder, model, preprocess, code=["../eval/recordings.py", "../eval/vision/token_merging.py"]
        )
        self.processes = processes or Processes()

    def path(self, scenes: Sequence[Scene], spec: MethodSpec) -> Path:
        """Path of the file of a batch and a method, whether it exists or not."""
        readable = "".join(sign if sign.isalnum() or sign == "." else " " for sign in spec.name.lower())
        known = [(scene.name, scene.count, scene.changes, scene.identity) for scene in scenes]
        return self.store.path("-".join(readable.split()), spec, settings=asdict(self.settings), scenes=known)

    def jobs(self, batches: Sequence[Sequence[Scene]], specs: Sequence[MethodSpec]) -> list[tuple[int, list]]:
        """The passes that are missing: batch and methods. Passes of the same methods follow each other."""
        passes = [passes_of([spec for spec in specs if not self.path(scenes, spec).is_file()]) for scenes in batches]
        return [(batch, some) for row in zip_longest(*passes) for batch, some in enumerate(row) if some is not None]

    def run(self, batches: Sequence[Sequence[Scene]], specs: Sequence[MethodSpec]) -> int:
        """
        Record what is missing, and write each pass as soon as it is done. The scenes of a batch have as many frames.
        Several processes share the passes, and each returns when all are done. Returns the number of passes that this
        process made.
        """
        jobs = self.processes.broadcast(self.jobs(batches, specs))  # files that appear meanwhile would change the list
        mine = self.processes.share(len(jobs))
        for number, place in enumerate(mine, start=1):
            batch, together = jobs[place]
            more = f" and {len(together) - 1} more" if len(together) > 1 else ""
            title = f"pass {number} of {len(mine)}: {together[0].name}{more}, batch {batch + 1} of {len(batches)}"
            shown = title if self.processes.is_main else None
            found = record(self.model, self.preprocess, batches[batch], together, self.settings, shown)
            for spec, (tensors, about) in zip(together, found, strict=True):
                content = save({name: one.contiguous() for name, one in tensors.items()}, {"about": json.dumps(about)})
                write_whole(self.path(batches[batch], spec), content)
        self.processes.gather([None])  # waits for the others
        return len(mine)

    def load(self, scenes: Sequence[Scene], spec: MethodSpec) -> list[Recording]:
        """A method's recordings of the scenes of a batch."""
        with safe_open(self.path(scenes, spec), "pt") as stored:
            about = json.loads(stored.metadata()["about"])
            embeddings, cost, nbytes = (stored.get_tensor(name) for name in ("embeddings", "cost", "nbytes"))
        sampled = torch.from_numpy(np.stack([sampled_frames(scene, self.settings) for scene in scenes], axis=1))
        rows = (sampled.flatten().cumsum(0) - 1).view(sampled.shape)
        recordings = []
        for column, scene in enumerate(scenes):
            frames = sampled[:, column].nonzero()[:, 0]
            drawn = torch.from_numpy(drawn_frames(scene, self.settings))[frames]
            own = embeddings[rows[frames, column]].float()
            recordings.append(Recording(frames, drawn, own, cost[:, column], nbytes // len(scenes), about))
        return recordings
