"""
What `published_laws.py` and `motion_masks.py` share: composed clips through the embedded SigLIP, one by one.

Each clip's figures are kept in the cache folder (`NEUROFLOW_CACHE`), so that a run goes on where it was left; over
several processes if it was started so.
"""

import functools
import inspect
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

import neuroflow_hf
from eval.report import RESULTS, provenance, publish
from eval.vision import composed_clips, masks
from eval.vision.composed_clips import FEWEST, MOTIONS, SIDE, ClipSpec, Truth, frame, specify
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
SEED = 0

Figures = dict[str, np.ndarray]


@dataclass(frozen=True)
class ClipName:
    """What a clip is found by; as the arguments of `composed_clips.specify`."""

    motion: str
    number: int
    frames: int
    seed: int = SEED

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

    def __init__(self, device: str = "cpu"):
        self.model, self.preprocess, tokenizer = load_text_model(CHECKPOINT, device=device)
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


def clip_names(clips: int, frames: int, motions: Sequence[str] = tuple(MOTIONS)) -> list[ClipName]:
    """So many clips of each motion; number by number, so that a few processes get alike shares."""
    return [ClipName(motion, number, frames) for number in range(clips) for motion in motions]


def measure_clips(
    bench: Bench,
    names: Sequence[ClipName],
    measure: Callable[[Bench, Clip], Figures],
    options: dict,
    processes: Processes,
    cache: Path | None = None,
) -> list[Figures]:
    """
    `measure` of every clip, in the clips' order, on all processes. Each process measures its share and writes every
    clip's figures as soon as it has them; what is there already, of the same code, weights and options, is read.

    Args:
        measure: a function of a module in this folder, from the bench and a clip to arrays.
        options: whatever else the figures depend on; what JSON can hold.
        cache: folder of the figures; by default beside the towers.
    """
    folder = (cache or default_tower_dir().parent / "eval") / measure.__name__
    version = measuring_version(measure)
    found: list[tuple[int, Figures]] = []
    bar = {"console": Console(stderr=True), "disable": not processes.is_main}
    for place in track(processes.share(len(names)), "clips", **bar):
        name = names[place]
        key = key_of(clip=asdict(name), weights=bench.weights, code=version, options=options)
        path = folder / f"{name}-{key}.npz"
        if not path.is_file():
            buffer = io.BytesIO()
            with torch.inference_mode():
                np.savez(buffer, **measure(bench, bench.clip(name)))
            write_whole(path, buffer.getvalue())
        with np.load(path, allow_pickle=False) as stored:
            found.append((place, dict(stored)))
    by_place = dict(processes.gather(found))
    return [by_place[place] for place in range(len(names))]


def measuring_version(measure: Callable) -> str:
    """What a clip's figures depend on of the code: what measures, what composes, what is drawn, the models."""
    package, recipe = Path(neuroflow_hf.__file__).parent, ROOT / "recipes" / "siglip_small"
    files = [
        *map(Path, (inspect.getfile(measure), __file__, composed_clips.__file__, masks.__file__)),
        *(package / "video" / name for name in ("preprocess.py", "labels.py", "motion.py", "objects.py")),
        *(recipe / name for name in ("sources.py", "captions.py", "compose.py")),
    ]
    tables = "".join(path.read_text(encoding="utf-8") for path in sorted(recipe.glob("*.csv")))
    return key_of(code=code_version(files), model=model_version(), tables=re.sub(r"\r", "", tables))


def command(
    measure: Callable[[Bench, Clip], Figures],
    options: dict,
    report_of: Callable[[Bench, Measured], dict],
    table_of: Callable[[dict], str],
    name: str,
    default_clips: int,
    quick_frames: int,
    draw: Callable | None = None,
) -> Callable:
    """
    The command line of a script.

    Args:
        measure, options: as of `measure_clips`.
        report_of: from all clips' figures to the report.
        table_of: from the report to its table in Markdown.
        name: of the JSON file.
        default_clips, quick_frames: clips of each motion, and frames of each clip with `--quick`.
        draw: from the report and all clips' figures to pictures by file name.
    """

    def main(
        quick: Annotated[
            bool, typer.Option("--quick", help=f"Use one clip of {quick_frames} frames of each motion.")
        ] = False,
        clips: Annotated[int, typer.Option(help="Clips of each motion.", min=1)] = default_clips,
        frames: Annotated[int, typer.Option(help="Frames of each clip.", min=FEWEST)] = 48,
        output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / f"{name}.json",
    ):
        """Measure what is missing, and write and show the report."""
        if quick:
            clips, frames = 1, quick_frames
        processes, start = Processes(), time.perf_counter()
        bench, names = Bench(str(processes.device or "cpu")), clip_names(clips, frames)
        found = measure_clips(bench, names, measure, options, processes)
        if not processes.is_main:
            return
        measured = list(zip(names, found, strict=True))
        of_clips = {"of_each_motion": clips, "frames": frames, "seed": SEED, "drawings": SPLIT, "in_all": len(names)}
        report = {
            **provenance(),
            "commit": checkout_commit(),
            "checkpoint": {"name": CHECKPOINT.name, "weights": bench.weights},
            "clips": of_clips,
            "processes": processes.count,
            "seconds": round(time.perf_counter() - start, 1),
            **report_of(bench, measured),
        }
        publish(output, report, table_of(report), {} if draw is None else draw(report, measured))

    return main
