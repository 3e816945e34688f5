"""
Sparse adapters for `models/neuroflow-siglip-small`, and the paper's recipe, each in less than an hour on two cores:

    python -m recipes.siglip_small.sparse_adapter reconstruct    # run again to continue

Training clips are recorded footage (`footage.csv`) and composed clips of every motion, from the training drawings and
photographs. The best weights are chosen on held-out clips, from other drawings, photographs and footage. Clips, states
and results lie in the recipes' cache, figures in `eval/results`; `eval/vision/headline.py` compares the variants.
"""

import csv
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from neuroflow_hf.cli.progress import CommandProgress
from neuroflow_hf.distill import DistillSettings, distill
from neuroflow_hf.distill.measure import HeldOut
from neuroflow_hf.distill.report import held_out_words, write_report
from neuroflow_hf.loading import load_model
from recipes.composed_clips import MOTIONS, frames, specify
from recipes.recordings import RECORDINGS
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_small.compose import load_material
from recipes.siglip_small.demo_clip import write_video

CHECKPOINT = Path(__file__).parents[2] / "models" / "neuroflow-siglip-small"
FOOTAGE = Path(__file__).with_name("footage.csv")
SIDE, COMPOSED_FRAMES, FRAMES_PER_SECOND = 448, 96, 30
SPLITS = {"training": (8, 101), "held out": (2, 102)}  # clips of each motion, seed

COMMON = {"clip_frames": 12, "keyframe_ages": (12, 12), "evaluate_every": 40}
RESULTS = Path(__file__).parents[2] / "eval" / "results"
VARIANTS = {
    "reconstruct": DistillSettings(**COMMON, mode="reconstruct", summary_tokens=64, steps=240),
    "eliminate-summary": DistillSettings(**COMMON, mode="eliminate", summary_tokens=64, steps=150),
    "eliminate": DistillSettings(**COMMON, mode="eliminate", summary_tokens=0, steps=150),
    "extrapolate": DistillSettings(**COMMON, mode="extrapolate", summary_tokens=0, steps=200, learning_rate=5e-5),
    "published": DistillSettings.published(clip_frames=12, evaluate_every=30, steps=90),
}


def write_clips(folder: Path, console: Console) -> dict[str, list[Path]]:
    """Write the missing videos of each of SPLITS to `folder`; return the paths of all."""
    with FOOTAGE.open(newline="", encoding="utf-8") as file:
        split_of = {row["clip"]: row["split"] for row in csv.DictReader(file)}
    paths: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for footage in RECORDINGS:
        split = split_of.get(footage.name)
        if split in SPLITS:
            path = folder / split.replace(" ", "-") / f"{footage.name}.mp4"
            if not path.is_file():
                pictures = footage.load(default_tower_dir().parent, console).frames()
                write_video(path, pictures, FRAMES_PER_SECOND, crf="18")
            paths[split].append(path)
    material = None
    for split, (count, seed) in SPLITS.items():
        for motion in MOTIONS:
            for number in range(count):
                path = folder / split.replace(" ", "-") / f"{motion.replace(' ', '-')}-{number}.mp4"
                if not path.is_file():
                    material = material or load_material()
                    spec = specify(material[split], motion, number, frames=COMPOSED_FRAMES, seed=seed, side=SIDE)
                    write_video(path, frames(spec), FRAMES_PER_SECOND, crf="18")
                paths[split].append(path)
    return paths


def variant_folder(name: str) -> Path:
    """The folder in which a variant is trained, and of its result."""
    return default_tower_dir().parent / "distilled" / name


def main(variant: Annotated[str, typer.Argument(help=f"One of {', '.join(VARIANTS)}.")]):
    """Train a variant, or continue an interrupted training."""
    if variant not in VARIANTS:
        raise typer.BadParameter(f"{variant!r} is none of {', '.join(VARIANTS)}.")
    console = Console(stderr=True)
    paths = write_clips(default_tower_dir().parent / "sparse-clips", console)
    model, preprocess = load_model(CHECKPOINT)
    folder = variant_folder(variant)
    with CommandProgress("steps", console) as progress:

        def on_step(what: str, done: int, total: int, figures: dict[str, HeldOut] | None) -> None:
            progress.show(what, done, total)
            if figures is not None:
                console.print(held_out_words(done, figures))

        result = distill(
            paths["training"],
            model,
            preprocess,
            folder,
            VARIANTS[variant],
            paths["held out"],
            CHECKPOINT.name,
            on_step,
            cache=default_tower_dir().parent / "distilled" / "cache",
        )
    if not result.finished:
        raise typer.Exit(130)
    write_report(result, folder, CHECKPOINT.name, f"python -m recipes.siglip_small.sparse_adapter {variant}")
    shutil.copy(folder / "distill.json", RESULTS / f"distill_{variant.replace('-', '_')}.json")


if __name__ == "__main__":
    typer.run(main)
