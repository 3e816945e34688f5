"""
Does a preset ever lose to holding a dense frame, at the same cost?

    nice -n 5 python -m eval.vision.against_holding
    python -m eval.vision.against_holding --clips carphone,webcam --methods balanced,thrifty

Development clips of many kinds, 120 frames each; a clip with fewer frames is played forward and back. Dense outputs
and what the baselines compare are computed once for each clip and kept in the cache, so that a run encodes what the
method encodes and nothing else. The baselines are those of `vision_policies.py`: dense every k frames, or when the
mean surprise or the share of changed patches exceeds a level. The best one is chosen for each clip and figure after
the fact. The first frame, dense in every method, is left out. Writes `eval/results/against_holding.json`, shown in
`docs/results/holding.md`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from eval.docs.tables import holding_table
from eval.report import RESULTS, provenance, publish, rounded
from eval.vision.clips import SOURCES
from eval.vision.vision_policies import (
    EVERY,
    FRACTION_LEVELS,
    LONGEST_INTERVAL,
    SHARE,
    STATISTICS,
    SURPRISE,
    SURPRISE_LEVELS,
    Outcome,
    held_every,
    outcome,
    statistic,
)
from neuroflow_hf import PRESETS, NeuroFlowSiglipVisionModel
from neuroflow_hf.evaluation.equal_cost import shares_at
from neuroflow_hf.evaluation.methods import PatchSurprise, dense_cost, patches_of
from neuroflow_hf.utils.files import write_whole
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.vision.patches import project_patches
from recipes.recordings import Clip, Footage
from recipes.siglip_dinov2_small.build import default_tower_dir

CHECKPOINT = Path(__file__).parents[2] / "models" / "neuroflow-siglip-small"
FRAMES = 120
CHANGED = 0.01  # the presets' threshold: above it, a patch counts as changed for the baselines
CLIPS = (
    *("walker", "street-cuts", "carphone", "webcam", "big-buck-bunny", "city-by-night"),
    *("waving-grass", "hand-held"),
)


def there_and_back(frames: Callable[[], Iterator[np.ndarray]], count: int) -> Iterator[np.ndarray]:
    """`count` frames of a clip that has fewer: forward, back, and so on."""
    shown = list(itertools.islice(frames(), count))
    return itertools.islice(itertools.cycle([*shown, *shown[-2:0:-1]]), count)


@dataclass(frozen=True, eq=False)
class Prepared:
    """
    A clip of T frames, and what needs no run of a method.

    Attributes:
        name, kind: of the clip.
        pixels: float16 [T, 3, H, W].
        dense: unit dense embeddings, float32 [T, D].
        mean_surprise, changed: mean surprise, and share of changed patches, of frame t against frame k at [k, t],
            float32 [T, T].
    """

    name: str
    kind: str
    pixels: Tensor
    dense: Tensor
    mean_surprise: Tensor
    changed: Tensor


@torch.inference_mode()
def prepare(source, folder: Path, model: NeuroFlowSiglipVisionModel, preprocess: Preprocessor) -> Prepared:
    """A clip from the cache `folder`; what is missing is computed first."""
    path = folder / "against-holding" / f"{source.name}.safetensors"
    if not path.is_file():
        longer = replace(source, count=FRAMES) if isinstance(source, Footage) else source
        clip: Clip = longer.load(folder, Console(stderr=True))
        images = there_and_back(clip.frames, FRAMES)
        pixels = torch.cat([preprocess(image, model.dtype, model.device).half() for image in images])
        dense = [model(frame[None].to(model.dtype)) for frame in track(pixels, source.name)]
        signal = torch.cat([project_patches(model, frame[None].float(), as_product=True) for frame in pixels])
        by_patch = functional.normalize(signal, dim=-1).transpose(0, 1)
        surprise = 1 - by_patch @ by_patch.mT  # [N, T, T], of each patch
        stored = {
            "pixels": pixels,
            "dense": functional.normalize(torch.cat([one.pooler_output for one in dense]).float(), dim=-1),
            "mean_surprise": surprise.mean(0),
            "changed": (surprise > CHANGED).float().mean(0),
        }
        write_whole(path, save(stored))
    return Prepared(source.name, source.kind, **load_file(path))


# --- baselines -------------------------------------------------------------------------------------------------------


def held_when(distance: Tensor, level: float) -> list[int]:
    """For each of T frames, the frame whose embedding is held: a new one when the distance [T, T] to it is more."""
    held = [0]
    for number in range(1, len(distance)):
        held.append(number if distance[held[-1], number] > level else held[-1])
    return held


def baselines(clip: Prepared, keyframe: float, looking: float) -> dict[str, list[dict]]:
    """Figures by family; a triggered baseline's frame costs `keyframe` or `looking`, relative to dense."""
    dense = clip.dense
    first = outcome(0.0, held_every(len(dense), dense)[:1], dense, ())
    families = {
        EVERY: [
            first,
            *(outcome(1 / k, held_every(k, dense), dense, ()) for k in range(1, LONGEST_INTERVAL + 1)),
        ]
    }
    for family, distance, levels in (
        (SURPRISE, clip.mean_surprise, SURPRISE_LEVELS),
        (SHARE, clip.changed, FRACTION_LEVELS),
    ):
        families[family] = [first, outcome(1.0, dense[None], dense, ())]
        for level in levels:
            held = held_when(distance, level)
            fresh = np.mean([number == kept for number, kept in enumerate(held)][1:])
            cost = float(fresh * keyframe + (1 - fresh) * looking)
            families[family].append(outcome(cost, dense[held][None], dense, ()))
    return {family: [figures_of(one) for one in settings] for family, settings in families.items()}


def figures_of(one: Outcome) -> dict[str, float]:
    """The figures of an outcome, and its cost."""
    return {"cost": one.cost, **{name: statistic(name, one.cosines).item() for name in STATISTICS}}


def best_hold(families: dict[str, list[dict]], cost: float) -> dict[str, tuple[float, str]]:
    """By figure, the best baseline's value at a cost, between the two settings nearest in cost, and its family."""
    best: dict[str, tuple[float, str]] = {}
    for family, settings in families.items():
        shares = shares_at([setting["cost"] for setting in settings], cost)
        for name in STATISTICS:
            value = sum(share * settings[place][name] for share, place in shares)
            best[name] = max(best.get(name, (-1.0, "")), (value, family))
    return best


# --- methods ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run(model: NeuroFlowSiglipVisionModel, clip: Prepared, options: dict) -> tuple[Tensor, Tensor]:
    """A stream over a clip: unit embeddings [T, D], and the cost of each frame [T]."""
    stream = model.new_stream(**options)
    outputs = [model(frame[None].to(model.dtype), stream=stream) for frame in clip.pixels]
    embeddings = torch.cat([output.pooler_output for output in outputs])
    return functional.normalize(embeddings.float(), dim=-1), torch.cat([output.cost for output in outputs])


def row_of(name: str, clip: Prepared, embeddings: Tensor, costs: Tensor, families: dict[str, list[dict]]) -> dict:
    """One method on one clip beside the best hold."""
    own = figures_of(outcome(costs[1:].mean().item(), embeddings[None], clip.dense, ()))
    row: dict = {"method": name, "clip": clip.name, "kind": clip.kind, "cost": own["cost"]}
    for figure, (value, family) in best_hold(families, own["cost"]).items():
        row[figure] = {"value": own[figure], "hold": value, "family": family}
    return row


def main(
    methods: Annotated[str, typer.Option(help="Measure these presets, separated by commas.")] = ",".join(PRESETS),
    clips: Annotated[str, typer.Option(help="Measure these clips, separated by commas.")] = ",".join(CLIPS),
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "against_holding.json",
):
    """Run presets over clips, compare each with the best hold at its cost, and write the report."""
    model = NeuroFlowSiglipVisionModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    preprocess = Preprocessor.from_pretrained(CHECKPOINT)
    folder, rows = default_tower_dir().parent, []
    for source in SOURCES:
        if source.name not in clips.split(","):
            continue
        clip = prepare(source, folder, model, preprocess)
        whole = dense_cost(model, patches_of(model, clip.pixels))
        keyframe, looking = (part / whole for part in PatchSurprise(model, 0).costs(clip.pixels[:1], whole))
        families = baselines(clip, keyframe, looking)
        for name in methods.split(","):
            rows.append(row_of(name, clip, *run(model, clip, {"preset": name}), families))
    report = {
        **provenance(),
        "checkpoint": "models/neuroflow-siglip-small, 224 px, float32",
        "frames": FRAMES,
        "rows": rows,
    }
    publish(output, rounded(report), holding_table(report))


if __name__ == "__main__":
    typer.run(main)
