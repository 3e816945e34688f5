"""
The sparse adapter that ships for `models/neuroflow-siglip-small`, in one command of at most two hours on two cores:

    python -m recipes.siglip_small.sparse_adapter    # run again to continue

Clips to learn from are recorded footage (`footage.csv`) and composed clips of every motion, of the drawings and
photographs of training; the held-out clips, on which the best weights are chosen, have other drawings, photographs and
footage. They lie in the recipe's cache.
"""

import csv
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from rich.console import Console

from neuroflow_hf.distill import DistillSettings
from recipes.composed_clips import MOTIONS, frames, specify
from recipes.recordings import RECORDINGS
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_small.compose import load_material

FOOTAGE = Path(__file__).with_name("footage.csv")
SIDE, COMPOSED_FRAMES, FRAMES_PER_SECOND = 448, 96, 30
SPLITS = {"training": (8, 101), "held out": (2, 102)}  # clips of each motion, seed

SETTINGS = DistillSettings(clip_frames=12, keyframe_ages=(4, 12))


def write_clips(folder: Path, console: Console) -> dict[str, list[Path]]:
    """Write the videos of each of SPLITS to `folder`, as far as they are missing; their paths."""
    with FOOTAGE.open(newline="", encoding="utf-8") as file:
        split_of = {row["clip"]: row["split"] for row in csv.DictReader(file)}
    paths: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for footage in RECORDINGS:
        split = split_of.get(footage.name)
        if split in SPLITS:
            path = folder / split.replace(" ", "-") / f"{footage.name}.mp4"
            if not path.is_file():
                write_video(path, footage.load(default_tower_dir().parent, console).frames())
            paths[split].append(path)
    material = None
    for split, (count, seed) in SPLITS.items():
        for motion in MOTIONS:
            for number in range(count):
                path = folder / split.replace(" ", "-") / f"{motion.replace(' ', '-')}-{number}.mp4"
                if not path.is_file():
                    material = material or load_material()
                    spec = specify(material[split], motion, number, frames=COMPOSED_FRAMES, seed=seed, side=SIDE)
                    write_video(path, frames(spec))
                paths[split].append(path)
    return paths


def write_video(path: Path, pictures: Iterable[np.ndarray]) -> None:
    """Write frames, uint8 RGB [H, W, 3], as H.264, whole or not at all. An odd last row or column is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = None
        for picture in pictures:
            height, width = (side - side % 2 for side in picture.shape[:2])
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options={"crf": "18"})
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            picture = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    partial.replace(path)
