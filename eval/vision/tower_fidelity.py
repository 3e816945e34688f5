"""Measure how close the built tower is to the DINOv2 it was made from, on images its pooling head never saw.

Writes eval/results/tower_fidelity.json and, from it, the figures block of the tower's model card.

Command: ``python -m eval.vision.tower_fidelity``
"""

import json
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, SiglipVisionModel

from eval.report import RESULTS, fill_block, provenance, write_json, write_whole
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir, load_original_from_wheels, wheel_dir
from recipes.siglip_dinov2_small.head import BATCH, paired_features, random_view
from recipes.siglip_dinov2_small.wheels import read_photos

ROOT = Path(__file__).resolve().parents[2]
CLIP = ROOT / "neuroflow_hf" / "assets" / "pedestrians.mp4"
RESULT = RESULTS / "tower_fidelity.json"
CARD = ROOT / "models" / "neuroflow-siglip-dinov2-small" / "README.md"


def summary(values: Tensor) -> dict[str, float]:
    """Mean and 5th percentile of a tensor of any shape, rounded to 4 digits."""
    flat = values.flatten().double().numpy()
    return {"mean": round(float(flat.mean()), 4), "p5": round(float(np.percentile(flat, 5)), 4)}


def photo_views(photo: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """The whole photograph, squeezed to the tower's square, and `count` - 1 random views of it."""
    rng = np.random.default_rng(seed)
    return [photo] + [random_view(photo, rng) for _ in range(count - 1)]


def clip_frames(path: Path, count: int) -> list[Image.Image]:
    """`count` RGB frames of a clip, evenly spaced from first to last."""
    with av.open(path) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    return [frames[index] for index in np.linspace(0, len(frames) - 1, count).round().astype(int)]


def features(images, processor, tower, original, label: str) -> dict[str, Tensor]:
    """Both models' outputs on `images`: patch (M, N, D), pooled (M, D), original_patch (M, N, D), cls (M, D)."""
    parts = []
    for start in track(range(0, len(images), BATCH), description=label, transient=True):
        pixels = processor(images=images[start : start + BATCH], return_tensors="pt")["pixel_values"]
        parts.append(paired_features(tower, original, pixels))
    return dict(
        zip(("patch", "pooled", "original_patch", "cls"), map(torch.cat, zip(*parts, strict=True)), strict=True)
    )


def compare(found: dict[str, Tensor], mean_training_cls: Tensor, *, one_scene: bool) -> dict:
    """Cosines between tower and original, with what cosine means nothing beside them.

    Args:
        found: see :func:`features`.
        mean_training_cls: (D,) mean CLS output over the views the pooling head was trained on.
        one_scene: True when all images show one scene, so that no pairs of different scenes exist.

    Returns:
        Summaries by name; baselines under "controls".
    """
    cosine = functional.cosine_similarity
    cls, pooled = found["cls"], found["pooled"]
    count, patches, _ = found["patch"].shape
    elsewhere = torch.randperm(patches, generator=torch.Generator().manual_seed(0))
    pairs = cosine(cls[:, None], cls[None], dim=-1)[~torch.eye(count, dtype=torch.bool)]
    matches = cosine(pooled[:, None], cls[None], dim=-1).argmax(dim=1) == torch.arange(count)
    return {
        "images": count,
        "patch_cosine": summary(cosine(found["patch"], found["original_patch"], dim=-1)),
        "pooled_cosine": summary(cosine(pooled, cls, dim=-1)),
        "pooled_cosine_after_subtracting_mean_training_cls": summary(
            cosine(pooled - mean_training_cls, cls - mean_training_cls, dim=-1)
        ),
        "pooled_nearest_cls_is_own": round(matches.float().mean().item(), 4),
        "controls": {
            "patch_at_another_place_cosine": summary(
                cosine(found["patch"], found["original_patch"][:, elsewhere], dim=-1)
            ),
            "mean_patch_cosine": summary(cosine(found["patch"].mean(dim=1), cls, dim=-1)),
            "mean_training_cls_cosine": summary(cosine(mean_training_cls.expand_as(cls), cls, dim=-1)),
            "cls_of_different_frames_cosine" if one_scene else "cls_of_different_views_cosine": summary(pairs),
            "nearest_by_chance": round(1 / count, 4),
        },
    }


def different_photos(by_photo: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Cosine between CLS outputs of views of different photographs."""
    names = sorted(by_photo)
    pairs = [
        functional.cosine_similarity(by_photo[a]["cls"][:, None], by_photo[b]["cls"][None], dim=-1).flatten()
        for index, a in enumerate(names)
        for b in names[index + 1 :]
    ]
    return summary(torch.cat(pairs))


def figures_block(result: dict) -> str:
    """The model card's figures as Markdown, from the contents of tower_fidelity.json."""
    sets = (("held-out photographs", result["held_out_photos"]), ("the clip's frames", result["clip"]))
    rows = [
        ("Patch features, tower against original", lambda part: part["patch_cosine"]),
        (
            "*control:* the same, patch at another place",
            lambda part: part["controls"]["patch_at_another_place_cosine"],
        ),
        ("Pooled output against CLS output", lambda part: part["pooled_cosine"]),
        (
            "the same, mean training CLS output subtracted from both",
            lambda part: part["pooled_cosine_after_subtracting_mean_training_cls"],
        ),
        ("*control:* mean patch feature against CLS output", lambda part: part["controls"]["mean_patch_cosine"]),
        (
            "*control:* mean training CLS output against CLS output",
            lambda part: part["controls"]["mean_training_cls_cosine"],
        ),
        (
            "*control:* CLS outputs of different photographs / of different frames",
            lambda part: (
                part["controls"].get("cls_of_different_photos_cosine")
                or part["controls"]["cls_of_different_frames_cosine"]
            ),
        ),
    ]
    heads = [f"{name} ({part['images']} images)" for name, part in sets]
    lines = [
        f"| cosine: mean (5th percentile) | {' | '.join(heads)} |",
        "| --- | --- | --- |",
        *(
            f"| {title} | "
            + " | ".join(f"{pick(part)['mean']:.3f} ({pick(part)['p5']:.3f})" for _, part in sets)
            + " |"
            for title, pick in rows
        ),
        "| Share of images whose pooled output is nearest to their own CLS output (by chance) | "
        + " | ".join(
            f"{part['pooled_nearest_cls_is_own']:.2f} ({part['controls']['nearest_by_chance']:.2f})"
            for _, part in sets
        )
        + " |",
        "",
        f"Written by `{result['command']}` from eval/results/tower_fidelity.json: seed {result['seed']}, torch "
        f"{result['versions']['torch']}, transformers {result['versions']['transformers']}.",
    ]
    return "\n".join(lines)


def main(
    tower_dir: Annotated[Path | None, typer.Option(help="Built tower; default: built if need be.")] = None,
    clip: Annotated[Path, typer.Option(help="Video clip of one scene.")] = CLIP,
    views: Annotated[int, typer.Option(help="Images per held-out photograph.")] = 32,
    frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 40,
    seed: Annotated[int, typer.Option(help="Random seed of the views.")] = 1,
) -> None:
    folder = build_tower(tower_dir or default_tower_dir())
    built = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    tower = SiglipVisionModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    original = load_original_from_wheels(wheel_dir(folder))

    photos = read_photos(wheel_dir(folder), built["held_out_photos"])
    by_photo = {
        name: features(photo_views(photo, views, seed), processor, tower, original, Path(name).stem)
        for name, photo in zip(built["held_out_photos"], photos, strict=True)
    }
    together = {
        key: torch.cat([found[key] for found in by_photo.values()])
        for key in ("patch", "pooled", "original_patch", "cls")
    }
    mean_training_cls = torch.tensor(built["mean_training_cls"])
    held_out = compare(together, mean_training_cls, one_scene=False)
    held_out["controls"]["cls_of_different_photos_cosine"] = different_photos(by_photo)
    result = {
        **provenance(),
        "seed": seed,
        "tower_seed": built["seed"],
        "held_out_photos": held_out,
        "by_photo": {
            Path(name).stem: {
                key: compare(found, mean_training_cls, one_scene=False)[key]
                for key in ("images", "patch_cosine", "pooled_cosine")
            }
            for name, found in by_photo.items()
        },
        "clip": compare(
            features(clip_frames(clip, frames), processor, tower, original, "clip"), mean_training_cls, one_scene=True
        ),
        "recipe_seconds_without_download": built["seconds_without_download"],
        "recipe_torch_threads": built["torch_threads"],
    }
    write_json(RESULT, result)
    write_whole(CARD, fill_block(CARD.read_text(encoding="utf-8"), "figures", figures_block(result)))
    print(figures_block(result))


if __name__ == "__main__":
    typer.run(main)
