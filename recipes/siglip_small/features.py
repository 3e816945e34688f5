"""Features of composed pictures by the frozen tower, kept on disk in half precision. Interrupted runs continue."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from transformers import SiglipVisionModel

from neuroflow_hf.utils.files import write_whole
from recipes.siglip_dinov2_small.head import to_pixels
from recipes.siglip_small.compose import Picture, compose, load_material
from recipes.siglip_small.facts import Placed
from recipes.siglip_small.sources import cache_folder

SHARD = 256
BATCH = 32


def open_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float16 array on disk, made if it is missing; ValueError if the file has another shape."""
    if not path.is_file():
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    found = np.load(path, mmap_mode="r+")
    if found.shape != shape:
        raise ValueError(f"{path} holds an array of shape {found.shape}; expected {shape}. Delete its folder.")
    return found


def patch_shares(where: np.ndarray, num_patches: int) -> np.ndarray:
    """The share of each patch that a mask bool [H, W] covers: float [N], row by row."""
    side = math.isqrt(num_patches)
    height, width = where.shape[0] // side, where.shape[1] // side
    return where.reshape(side, height, side, width).mean((1, 3)).reshape(num_patches)


class FeatureStore:
    """
    Patch features of `count` pictures and what is in them.

    Args:
        folder: folder of `features.npy`, float16 [count, N, D]; `covered.npy`, float16 [count, N], the share of each
            patch that drawings cover; and `facts.jsonl`, a line for every finished picture.
        count: number of pictures.
        shape: (N, D).
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, int]):
        folder.mkdir(parents=True, exist_ok=True)
        self.features = open_array(folder / "features.npy", (count, *shape))
        self.covered = open_array(folder / "covered.npy", (count, shape[0]))
        self.facts_path = folder / "facts.jsonl"
        lines = self.facts_path.read_text(encoding="utf-8").splitlines() if self.facts_path.is_file() else []
        self.lines = lines[: len(lines) // SHARD * SHARD] if len(lines) < count else lines

    @property
    def done(self) -> int:
        """Number of finished pictures."""
        return len(self.lines)

    def add(self, features: torch.Tensor, pictures: list[Picture]):
        """Append features [S, N, D] of S pictures."""
        self.features[self.done : self.done + len(pictures)] = features.half().numpy()
        self.covered[self.done : self.done + len(pictures)] = [
            patch_shares(picture.covered, self.covered.shape[1]) for picture in pictures
        ]
        self.features.flush()
        self.covered.flush()
        self.lines += [
            json.dumps({"placed": [asdict(item) for item in picture.placed], "facts": sorted(picture.facts)})
            for picture in pictures
        ]
        write_whole(self.facts_path, "\n".join(self.lines) + "\n")

    def facts(self) -> list[frozenset[str]]:
        """Every picture's facts."""
        return [frozenset(json.loads(line)["facts"]) for line in self.lines]

    def placed(self) -> list[tuple[Placed, ...]]:
        """Every picture's drawings, the largest first."""
        return [tuple(Placed(**item) for item in json.loads(line)["placed"]) for line in self.lines]


@torch.inference_mode()
def cached_features(tower: SiglipVisionModel, split: str, count: int, seed: int, key: str) -> FeatureStore:
    """
    Features of `count` pictures of a split, in bfloat16 on the CPU, computed as far as they are not there. `key`
    changes with the weights and the code that makes pictures, and is part of the folder's name.
    """
    config = tower.config
    shape = ((config.image_size // config.patch_size) ** 2, config.hidden_size)
    store = FeatureStore(cache_folder() / "features" / f"{split.replace(' ', '-')}-{count}-{key}", count, shape)
    if store.done == count:
        return store
    material, tower = load_material()[split], tower.to(torch.bfloat16)
    with Progress() as progress:
        task = progress.add_task(f"features, {split}", total=count, completed=store.done)
        for first in range(store.done, count, SHARD):
            numbers = range(first, min(first + SHARD, count))
            pictures = [compose(material, np.random.default_rng((seed, number))) for number in numbers]
            features = []
            for place in range(0, len(pictures), BATCH):
                pixels = to_pixels([picture.image for picture in pictures[place : place + BATCH]])
                features.append(tower(pixel_values=pixels.bfloat16()).last_hidden_state.half())
                progress.advance(task, len(pixels))
            store.add(torch.cat(features), pictures)
    return store
