"""
What `published_laws.py` and `motion_masks.py` share: running composed clips through the embedded SigLIP one by one, in
one process or several, and the command line.
"""

import functools
import inspect
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eval.report import RESULTS, provenance, publish
from neuroflow_hf.loading import load_text_model
from neuroflow_hf.utils.files import write_whole
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, code_version, fingerprint, key_of, model_version
from neuroflow_hf.video.labels import Labels, embed_labels
from recipes import composed_clips
from recipes.composed_clips import FEWEST, MOTIONS, SIDE, ClipSpec, Truth, frame, specify
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_small.captions import prompts
from recipes.siglip_small.compose import load_material
from recipes.siglip_small.sources import things

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "models" / "neuroflow-siglip-small"
SPLIT = "held out"
SEED = 0

Figures = dict[str, np.ndarray]
Measured = Sequence[tuple[str, Figures]]  # of each clip, its motion and its figures


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip with its frames."""

    spec: ClipSpec  # what the clip shows
    images: np.ndarray  # uint8 [T, side, side, 3]
    truths: tuple[Truth, ...]  # what is in each frame
    pixels: Tensor  # float32 [T, 3, R, R], on the model's device


class Bench:
    """The embedded model with its labels, and the clips."""

    side = SIDE  # height and width of the frames in pixels

    def __init__(self, device: str = "cpu"):
        self.model, self.preprocess, tokenizer = load_text_model(CHECKPOINT, device=device)
        # all things that the checkpoint knows, as phrases ("a dog"), and their names ("dog") in the same order
        self.labels: Labels = embed_labels(self.model, tokenizer, prompts("{}"))
        self.things = [thing.name for thing in things()]
        self.weights = fingerprint(self.model)
        self.device = self.model.device

    @functools.cached_property
    def material(self):
        """Drawings and photographs; loaded when the first clip is composed."""
        return load_material()[SPLIT]

    def clip(self, motion: str, number: int, frames: int) -> Clip:
        """A clip with all its frames."""
        spec = specify(self.material, motion, number, frames=frames, seed=SEED, side=self.side)
        images, truths = zip(*(frame(spec, at) for at in range(frames)), strict=True)
        pixels = torch.cat([self.preprocess(image) for image in images]).to(self.device)
        return Clip(spec, np.stack(images), truths, pixels)


def measure_clips(
    bench: Bench,
    measure: Callable[[Bench, Clip], Figures],
    clips: int,
    frames: int,
    processes: Processes,
    folder: Path,
    motions: Sequence[str] = tuple(MOTIONS),
) -> Measured:
    """
    Call `measure`, a function from the bench and a clip to arrays, for `clips` clips of each motion. Each process
    measures its share and stores each clip's figures in `folder`. Stored figures of the same code, weights and clip
    are read instead.
    """
    names = [(motion, number) for number in range(clips) for motion in motions]
    found, version = [], measuring_version(measure)
    bar = {"console": Console(stderr=True), "disable": not processes.is_main}
    for place in track(processes.share(len(names)), "clips", **bar):
        clip = (*names[place], frames)
        path = folder / f"{key_of(clip=clip, seed=SEED, side=bench.side, weights=bench.weights, code=version)}.npz"
        found.append((place, stored_figures(path, lambda clip=clip: measure(bench, bench.clip(*clip)))))
    by_place = dict(processes.gather(found))
    return [(motion, by_place[place]) for place, (motion, _) in enumerate(names)]


def stored_figures(path: Path, measure: Callable[[], Figures]) -> Figures:
    """The arrays in a file; if it is missing, they are measured and stored first."""
    if not path.is_file():
        buffer = io.BytesIO()
        with torch.inference_mode():
            np.savez(buffer, **measure())
        write_whole(path, buffer.getvalue())
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def measuring_version(measure: Callable) -> str:
    """A key of everything that figures depend on: the code that measures and composes, the models, the drawings."""
    recipe = ROOT / "recipes" / "siglip_small"
    files = [Path(inspect.getfile(measure)), Path(__file__), Path(composed_clips.__file__), *recipe.glob("*.py")]
    video = [f"video/{name}.py" for name in ("preprocess", "labels", "motion", "objects")]
    tables = [path.read_text(encoding="utf-8") for path in sorted(recipe.glob("*.csv"))]
    return key_of(code=code_version(files), models=model_version(*video), tables=tables)


def command(
    measure: Callable[[Bench, Clip], Figures],
    report_of: Callable[[Bench, Measured], dict],
    table_of: Callable[[dict], str],
    name: str,
    default_clips: int,
    quick_frames: int,
) -> Callable:
    """
    The command line of a script: `measure` as in `measure_clips`, `report_of` from all clips' figures to the report,
    `table_of` from the report to its table in Markdown. `name` is that of the JSON file; `--quick` has one clip of
    each motion.
    """

    def main(
        quick: Annotated[
            bool, typer.Option("--quick", help=f"Use one clip of {quick_frames} frames of each motion.")
        ] = False,
        clips: Annotated[int, typer.Option(help="Clips of each motion.", min=1)] = default_clips,
        frames: Annotated[int, typer.Option(help="Frames of each clip.", min=FEWEST)] = 48,
        output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / f"{name}.json",
    ):
        """Measure, and write and show the report."""
        if quick:
            clips, frames = 1, quick_frames
        processes, start = Processes(), time.perf_counter()
        bench = Bench(str(processes.device or "cpu"))
        measured = measure_clips(bench, measure, clips, frames, processes, default_tower_dir().parent / "eval" / name)
        if not processes.is_main:
            return
        report = {
            **provenance(),
            "commit": checkout_commit(),
            "checkpoint": {"name": CHECKPOINT.name, "weights": bench.weights},
            "clips": {"frames": frames, "seed": SEED, "drawings": SPLIT, "in_all": len(measured)},
            "processes": processes.count,
            "seconds": round(time.perf_counter() - start, 1),
            **report_of(bench, measured),
        }
        publish(output, report, table_of(report))

    return main
