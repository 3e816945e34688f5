"""
Composed clips through the embedded SigLIP: loaded once, measured clip by clip, each clip's figures kept in the cache
folder, so that a run goes on where it was left; over several processes if it was started so.
"""

import functools
import inspect
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import neuroflow_hf
from eval.report import provenance
from eval.vision import composed_clips
from eval.vision.composed_clips import MOTIONS, SIDE, ClipSpec, Truth, frame, specify
from neuroflow_hf.loading import load_text_model
from neuroflow_hf.utils.files import write_whole
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, code_version, fingerprint, key_of, model_version
from neuroflow_hf.video.labels import Labels, embed_labels
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_small.captions import prompts
from recipes.siglip_small.compose import load_material
from recipes.siglip_small.sources import things

ROOT = Path(__file__).parents[2]

CHECKPOINT = ROOT / "models" / "neuroflow-siglip-small"
SPLIT = "held out"
DENSE_AT_ONCE = 8

Figures = dict[str, np.ndarray]


@dataclass(frozen=True)
class ClipName:
    """What a clip is found by; as the arguments of `composed_clips.specify`."""

    motion: str
    number: int
    seed: int
    frames: int

    def __str__(self) -> str:
        return f"{self.motion.replace(' ', '-')}-{self.number}-seed{self.seed}-{self.frames}"


Measured = Sequence[tuple[ClipName, Figures]]


@dataclass(frozen=True, eq=False)
class Clip:
    """
    A clip with its frames.

    Attributes:
        name, spec: which one.
        images: uint8 [T, side, side, 3].
        truths: of each frame.
        pixels: float32 [T, 3, R, R], on the model's device.
    """

    name: ClipName
    spec: ClipSpec
    images: np.ndarray
    truths: tuple[Truth, ...]
    pixels: Tensor


class Bench:
    """
    The embedded model with its labels, and the clips.

    Attributes:
        model, preprocess: the checkpoint's.
        labels: all things that the checkpoint knows, by their phrases ("a dog").
        things: their names ("dog"), in the labels' order.
        weights: the model's fingerprint.
        side: of the frames in pixels.
    """

    side = SIDE

    def __init__(self, checkpoint: Path = CHECKPOINT, device: str = "cpu"):
        self.model, self.preprocess, tokenizer = load_text_model(checkpoint, device=device)
        self.labels: Labels = embed_labels(self.model, tokenizer, prompts("{}"))
        self.things = [thing.name for thing in things()]
        self.weights = fingerprint(self.model)
        self.device = self.model.device

    @functools.cached_property
    def material(self):
        """Drawings and photographs; loaded when the first clip is composed."""
        return load_material()[SPLIT]

    def clip(self, name: ClipName) -> Clip:
        """A clip with all its frames."""
        spec = specify(self.material, name.motion, name.number, frames=name.frames, seed=name.seed, side=self.side)
        images, truths = zip(*(frame(spec, number) for number in range(spec.frames)), strict=True)
        pixels = torch.cat([self.preprocess(image) for image in images]).to(self.device)
        return Clip(name, spec, np.stack(images), truths, pixels)


def clip_names(
    clips: int, frames: int, seed: int, motions: Sequence[str] = tuple(MOTIONS), first: int = 0
) -> list[ClipName]:
    """So many clips of each motion; number by number, so that a few processes get alike shares."""
    return [ClipName(motion, number, seed, frames) for number in range(first, first + clips) for motion in motions]


@torch.inference_mode()
def dense_outputs(model, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Frames [T, 3, R, R] by themselves: embeddings float32 [T, D] and patches' features float32 [T, N, D]."""
    outputs = [model.get_image_features(part) for part in pixels.split(DENSE_AT_ONCE)]
    pooled = torch.cat([output.pooler_output for output in outputs])
    return pooled.float(), torch.cat([output.last_hidden_state for output in outputs]).float()


def label_places(clip: Clip, known: Sequence[str]) -> np.ndarray:
    """The right label's place among `known` on each frame, int [T]; -1 where nothing is seen."""
    return np.array([known.index(truth.label) if truth.label is not None else -1 for truth in clip.truths])


def measure_clips(
    bench: Bench,
    names: Sequence[ClipName],
    measure: Callable[[Bench, Clip], Figures],
    options: dict,
    processes: Processes,
    *,
    fresh: bool = False,
    on_clip: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> list[Figures]:
    """
    `measure` of every clip, in the clips' order, on all processes. Each process measures its share and writes every
    clip's figures as soon as it has them; what is there already, of the same code, weights and options, is read.

    Args:
        measure: a function of a module in this folder, from the bench and a clip to arrays.
        options: whatever else the figures depend on; what JSON can hold.
        fresh: measure again what is there.
        on_clip: told how many clips of this process are done, of how many.
        cache: folder of the figures; by default beside the towers.
    """
    folder = (cache or default_tower_dir().parent / "eval") / measure.__name__
    version = measuring_version(measure)
    places = processes.share(len(names))
    found: list[tuple[int, Figures]] = []
    for done, place in enumerate(places):
        if on_clip is not None:
            on_clip(done, len(places))
        name = names[place]
        key = key_of(clip=asdict(name), weights=bench.weights, code=version, options=options)
        path = folder / f"{name}-{key}.npz"
        if fresh or not path.is_file():
            buffer = io.BytesIO()
            with torch.inference_mode():
                np.savez(buffer, **measure(bench, bench.clip(name)))
            write_whole(path, buffer.getvalue())
        with np.load(path, allow_pickle=False) as stored:
            found.append((place, {part: stored[part] for part in stored.files}))
    if on_clip is not None:
        on_clip(len(places), len(places))
    by_place = dict(processes.gather(found))
    return [by_place[place] for place in range(len(names))]


def measure_suite(
    checkpoint: Path,
    clips: int,
    frames: int,
    seed: int,
    measure: Callable[[Bench, Clip], Figures],
    options: dict,
    fresh: bool,
) -> tuple[Bench, Measured, dict] | None:
    """
    `measure_clips` of so many clips of each motion, with progress on stderr.

    Returns:
        The bench, each clip's name and figures, and what was measured with what, for JSON; None on all processes but
        the main one.
    """
    processes, console, start = Processes(), Console(stderr=True), time.perf_counter()
    bench = Bench(checkpoint, str(processes.device or "cpu"))
    names = clip_names(clips, frames, seed)

    def say(done, total):
        if processes.is_main:
            console.print(f"clips: {done} of {total} of this process")

    found = measure_clips(bench, names, measure, options, processes, fresh=fresh, on_clip=say)
    if not processes.is_main:
        return None
    about = {
        **provenance(),
        "commit": checkout_commit(),
        "checkpoint": {"name": checkpoint.name, "weights": bench.weights},
        "clips": {"of_each_motion": clips, "frames": frames, "seed": seed, "drawings": SPLIT, "in_all": len(names)},
        "processes": processes.count,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return bench, list(zip(names, found, strict=True)), about


def measuring_version(measure: Callable) -> str:
    """What a clip's figures depend on of the code: what measures, what composes, what is drawn, the models."""
    package, recipe = Path(neuroflow_hf.__file__).parent, ROOT / "recipes" / "siglip_small"
    files = [
        Path(inspect.getfile(measure)),
        Path(__file__),
        Path(composed_clips.__file__),
        *(
            package / name
            for name in ("video/preprocess.py", "video/labels.py", "video/motion.py", "video/objects.py")
        ),
        *(recipe / name for name in ("sources.py", "captions.py", "compose.py")),
    ]
    tables = "".join(path.read_text(encoding="utf-8") for path in sorted(recipe.glob("*.csv")))
    return key_of(code=code_version(files), model=model_version(), tables=re.sub(r"\r", "", tables))
