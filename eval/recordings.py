"""
Recordings: what methods give for scenes, stored once, so that many questions can be asked of them.

    recorder = Recorder(model, preprocess, folder, RecordSettings(dense_every=8))
    recorder.run(batches, specs)  # what is missing; with several processes, each does a part
    recording = recorder.load(batches[0], specs[0])

A batch of scenes is recorded as B videos in one call for each frame. There is one file for each batch and method,
under a key of all that it depends on: weights, code, libraries, preprocessing, scenes, settings, options. What is
there is not recorded again, and what was recorded with something else is not used.

Embeddings are kept of *sampled* frames, the same for all methods: one of every `dense_every` frames, drawn by chance
(at a fixed distance, methods with a period would be looked at in the same phase always), and all around the frames
where another label becomes right. Methods for which a frame stands for itself compute only these.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

TENSORS = ("sampled", "drawn", "embeddings", "cost", "labels", "nbytes")


@dataclass(frozen=True, eq=False)
class Scene:
    """
    A video and what is true of it.

    Attributes:
        name: unique among the scenes.
        count: how many frames.
        frames: gives them anew from the first on: uint8 RGB [H, W, 3], and the right label, None where none is.
        changes: the frames on which another label is right than on the frame before.
        identity: changes with what the scene shows.
        group: what scenes are summed up by, such as a kind of motion.
    """

    name: str
    count: int
    frames: Callable[[], Iterator[tuple[np.ndarray, str | None]]]
    changes: tuple[int, ...] = ()
    identity: str = ""
    group: str = ""


@dataclass(frozen=True)
class RecordSettings:
    """
    Which frames are sampled.

    Attributes:
        dense_every: one frame of every so many, drawn by chance; 1 for all.
        before, after: and all from so many frames before a change of the label to so many after it.
        most_changes: around so many changes of a scene at most, evenly chosen; None for all.
        seed: of the drawing.
    """

    dense_every: int = 8
    before: int = 4
    after: int = 40
    most_changes: int | None = None
    seed: int = 0

    def __post_init__(self):
        """ValueError for numbers out of range."""
        for name, least in (("dense_every", 1), ("before", 1), ("after", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected at least {least}.")
        if self.most_changes is not None and self.most_changes < 0:
            raise ValueError(f"`most_changes` is {self.most_changes}; expected at least 0, or None for all.")


def chosen_changes(changes: Sequence[int], most: int | None) -> list[int]:
    """At most so many of the changes, evenly chosen from the first to the last."""
    if most is None or len(changes) <= most:
        return list(changes)
    if most == 0:
        return []
    return [changes[round(place)] for place in np.linspace(0, len(changes) - 1, most)]


def drawn_frames(scene: Scene, settings: RecordSettings) -> np.ndarray:
    """
    One frame of every `dense_every`, bool [T], for figures over time; never the first frame, which all methods encode
    in full.
    """
    digest = hashlib.blake2b(scene.name.encode(), digest_size=8).digest()
    rng = np.random.default_rng((settings.seed, int.from_bytes(digest)))
    drawn = np.zeros(scene.count, dtype=bool)
    for first in range(0, scene.count, settings.dense_every):
        places = range(max(1, first), min(first + settings.dense_every, scene.count))
        if places:
            drawn[rng.integers(places.start, places.stop)] = True
    return drawn


def frames_around_changes(scene: Scene, settings: RecordSettings) -> np.ndarray:
    """The frames around changes of the label, bool [T], to see when a method follows."""
    around = np.zeros(scene.count, dtype=bool)
    for change in chosen_changes(scene.changes, settings.most_changes):
        around[max(0, change - settings.before) : change + settings.after + 1] = True
    return around


@dataclass(frozen=True, eq=False)
class Recording:
    """
    What a method gave for a batch of B scenes with T frames each, M of all frames sampled.

    Attributes:
        spec: the method.
        scenes: names.
        sampled: bool [T, B].
        drawn: bool [T, B], those of the sampled frames that were drawn by chance; figures over time are of these.
        embeddings: float16 [M, D], frame after frame, and scene after scene within a frame.
        cost: float32 [T, B], of every frame; the first is a keyframe of every method.
        labels: int64 [T, B], places in `label_names`, -1 where no label is right.
        label_names: of the labels that are right somewhere.
        nbytes: int64 [T], what the method remembered after each frame; 0 where it was not asked.
        about: seconds, versions, machine, commit, and the settings.
    """

    spec: MethodSpec
    scenes: tuple[str, ...]
    sampled: Tensor
    drawn: Tensor
    embeddings: Tensor
    cost: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    nbytes: Tensor
    about: dict

    def of(self, scene: str, drawn: bool = False) -> tuple[Tensor, Tensor]:
        """
        A scene's sampled frames, int64 [m] in order, and their embeddings, float32 [m, D]; with `drawn`, of those
        alone that were drawn by chance.
        """
        column = self.scenes.index(scene)
        places = torch.full(self.sampled.shape, -1)
        places[self.sampled] = torch.arange(int(self.sampled.sum()))
        frames = (self.drawn if drawn else self.sampled)[:, column].nonzero()[:, 0]
        return frames, self.embeddings[places[frames, column]].float()

    def labels_of(self, scene: str) -> list[str | None]:
        """The right label of each of a scene's frames, [T]."""
        names = (*self.label_names, None)  # -1 is the last place
        return [names[place] for place in self.labels[:, self.scenes.index(scene)].tolist()]

    def cost_of(self, scene: str) -> Tensor:
        """The cost of each of a scene's frames, float32 [T]."""
        return self.cost[:, self.scenes.index(scene)]


def write_recording(recording: Recording, path: Path):
    """Write a recording, whole or not at all."""
    tensors = {name: getattr(recording, name).contiguous() for name in TENSORS}
    known = {name: json.dumps(getattr(recording, name)) for name in ("scenes", "label_names", "about")}
    write_whole(path, save(tensors, known))


def read_recording(path: Path, spec: MethodSpec) -> Recording:
    """What `write_recording` wrote of a method."""
    with safe_open(path, "pt") as stored:
        known = {name: json.loads(text) for name, text in stored.metadata().items()}
        tensors = {name: stored.get_tensor(name) for name in TENSORS}
    return Recording(
        spec, tuple(known["scenes"]), label_names=tuple(known["label_names"]), about=known["about"], **tensors
    )


def frames_of(scenes: Sequence[Scene]) -> Iterator[list[tuple[np.ndarray, str | None]]]:
    """
    A frame of each scene, again and again.

    Raises:
        ValueError: if a scene has fewer or more frames than it says.
    """
    iterators = [scene.frames() for scene in scenes]
    for number in range(scenes[0].count):
        shown = [next(iterator, None) for iterator in iterators]
        for scene, found in zip(scenes, shown, strict=True):
            if found is None:
                raise ValueError(f"Scene {scene.name} ends after {number} frames; expected {scene.count}.")
        yield shown
    for scene, iterator in zip(scenes, iterators, strict=True):
        if next(iterator, None) is not None:
            raise ValueError(f"Scene {scene.name} goes on after {scene.count} frames, which should be all.")


@torch.inference_mode()
def record(
    model: nn.Module,
    preprocess: Preprocessor,
    scenes: Sequence[Scene],
    specs: Sequence[MethodSpec],
    settings: RecordSettings,
    title: str | None = None,
) -> list[Recording]:
    """
    Several methods over one batch of scenes, in one pass over its frames.

    Args:
        model: in evaluation mode, with or without a text tower.
        preprocess: the checkpoint's.
        scenes: with equally many frames.
        specs: what to record. Those that return dense frames compute them once for all.
        settings: which frames are sampled.
        title: of the progress bar on stderr; None for no bar.

    Returns:
        The recordings, in the methods' order.

    Raises:
        ValueError: for scenes that do not have equally many frames, or not those that they say; for embeddings that
            are not finite.
    """
    require_one_length(scenes)
    started = time.perf_counter()
    tower = tower_of(model)
    methods = make_methods(model, specs)
    for method in methods:
        method.start(len(scenes))
    drawn, around = (
        torch.from_numpy(np.stack([choose(scene, settings) for scene in scenes], axis=1))
        for choose in (drawn_frames, frames_around_changes)
    )
    sampled = drawn | around
    # Whole from the start: many small tensors that stay, made between large ones that go, leave no room for the next
    # large ones, and over a thousand frames memory is full.
    width = tower.config.hidden_size
    embeddings = torch.empty(len(specs), int(sampled.sum()), width, dtype=torch.float16)
    filled = [0] * len(specs)
    costs = torch.full((len(specs), *sampled.shape), math.nan)
    nbytes = torch.zeros(len(specs), len(sampled), dtype=torch.int64)
    label_names: dict[str, int] = {}
    labels = torch.full(sampled.shape, -1)
    spent = [0.0] * len(specs)
    bar = {"console": Console(stderr=True), "disable": title is None}
    for number, shown in enumerate(track(frames_of(scenes), title or "", scenes[0].count, **bar)):
        for column, (_, label) in enumerate(shown):
            if label is not None:
                labels[number, column] = label_names.setdefault(label, len(label_names))
        wanted = sampled[number]
        taking_part = [place for place, method in enumerate(methods) if method.follows or wanted.any()]
        if taking_part:
            pixels = torch.cat([preprocess(image, tower.dtype, tower.device) for image, _ in shown])
        for place in taking_part:
            before = time.perf_counter()
            step = methods[place].step(pixels, wanted)
            found = step.embeddings[wanted.to(step.embeddings.device)].cpu()
            require_finite(found, specs[place], number)
            embeddings[place, filled[place] : filled[place] + len(found)] = found.half()
            filled[place] += len(found)
            costs[place, number] = step.cost.cpu()
            nbytes[place, number] = methods[place].nbytes
            spent[place] += time.perf_counter() - before
    about = {
        **machine_and_versions(str(tower.device)),
        "commit": checkout_commit(),
        "dtype": str(tower.dtype).removeprefix("torch."),
        "settings": asdict(settings),
        "pass_seconds": round(time.perf_counter() - started, 3),
    }
    return [
        Recording(
            spec=spec,
            scenes=tuple(scene.name for scene in scenes),
            sampled=sampled,
            drawn=drawn,
            embeddings=embeddings[place],
            cost=costs[place] if methods[place].follows else of_every_frame(costs[place]),
            labels=labels,
            label_names=tuple(label_names),
            nbytes=nbytes[place],
            about={**about, "seconds": round(spent[place], 3)},
        )
        for place, spec in enumerate(specs)
    ]


def of_every_frame(costs: Tensor) -> Tensor:
    """Costs [T, B], NaN on frames that were not computed, where each frame costs the same: [T, B] without NaN."""
    computed = costs[~costs[:, 0].isnan()]
    return computed[:1].expand(costs.shape).clone()


def require_one_length(scenes: Sequence[Scene]):
    """ValueError if there are no scenes, if they do not have equally many frames, or if two have one name."""
    counts = sorted({scene.count for scene in scenes})
    if len(counts) != 1:
        raise ValueError(f"The scenes of a batch have {counts} frames; expected scenes with equally many.")
    if len({scene.name for scene in scenes}) != len(scenes):
        raise ValueError(f"Two scenes of a batch have one name: {sorted(scene.name for scene in scenes)}.")


def require_finite(embeddings: Tensor, spec: MethodSpec, number: int):
    """ValueError if embeddings [m, D] are not finite in half precision."""
    if not torch.isfinite(embeddings.half()).all():
        raise ValueError(f"{spec.name} gave an embedding at frame {number} that is not finite, or beyond float16.")


class Recorder:
    """
    Recordings of one model in one folder.

    Args:
        model: in evaluation mode, with or without a text tower; its dtype and device are what is recorded with.
        preprocess: the checkpoint's.
        folder: where recordings lie.
        settings: which frames are sampled.
        processes: those that share the work; None for this one alone, or as they were started.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocessor,
        folder: Path,
        settings: RecordSettings | None = None,
        processes: Processes | None = None,
    ):
        self.model, self.preprocess = model, preprocess
        self.store = RecordingStore(folder, model, preprocess, code=["../eval/recordings.py"])
        self.settings = settings or RecordSettings()
        self.processes = processes or Processes()

    def path(self, scenes: Sequence[Scene], spec: MethodSpec) -> Path:
        """Where a recording lies, or will."""
        return self.store.path(
            slug(spec.name),
            spec,
            settings=asdict(self.settings),
            scenes=[(scene.name, scene.count, scene.changes, scene.identity) for scene in scenes],
        )

    def missing(self, scenes: Sequence[Scene], specs: Iterable[MethodSpec]) -> list[MethodSpec]:
        """Which methods are not recorded yet."""
        return [spec for spec in specs if not self.path(scenes, spec).is_file()]

    def jobs(self, batches: Sequence[Sequence[Scene]], specs: Sequence[MethodSpec]) -> list[tuple[int, list]]:
        """The passes that are missing: which batch, and which methods. Alike passes follow each other."""
        passes = [passes_of(self.missing(scenes, specs)) for scenes in batches]
        together = zip_longest(*passes)
        return [(batch, some) for row in together for batch, some in enumerate(row) if some is not None]

    def run(self, batches: Sequence[Sequence[Scene]], specs: Sequence[MethodSpec]) -> int:
        """
        Record what is missing, each batch as one, each pass written as soon as it is done. With several processes,
        each takes a share, and all return when all are done. Returns how many passes were this process's.
        """
        for scenes in batches:
            require_one_length(scenes)
        jobs = self.processes.broadcast(self.jobs(batches, specs))  # files that appear meanwhile would change the list
        mine = self.processes.share(len(jobs))
        for number, place in enumerate(mine, start=1):
            batch, together = jobs[place]
            more = f" and {len(together) - 1} more" if len(together) > 1 else ""
            title = f"pass {number} of {len(mine)}: {together[0].name}{more}, batch {batch + 1} of {len(batches)}"
            shown = title if self.processes.is_main else None
            for recording in record(self.model, self.preprocess, batches[batch], together, self.settings, shown):
                write_recording(recording, self.path(batches[batch], recording.spec))
        self.processes.gather([None])  # waits for the others
        return len(mine)

    def load(self, scenes: Sequence[Scene], spec: MethodSpec) -> Recording:
        """
        A recording.

        Raises:
            FileNotFoundError: if it is not there.
        """
        path = self.path(scenes, spec)
        if not path.is_file():
            raise FileNotFoundError(
                f"{spec.name} is not recorded for these scenes; expected {path}. Run the recorder."
            )
        return read_recording(path, spec)


def slug(name: str) -> str:
    """A name for a file."""
    return "-".join("".join(sign if sign.isalnum() or sign == "." else " " for sign in name.lower()).split())
