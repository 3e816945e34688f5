"""
Speed and fidelity in one row: how fast is a sparse frame, and how close to dense, from 224 to 1792 pixels?

    python -m eval.vision.headline                   # an hour on two idle cores; run again to continue
    python -m eval.vision.headline --sides 224,448

The small SigLIP on held-out clips: composed clips over photographs of enough pixels, and recorded clips at sides up to
their own. Every third frame is used; the first is a keyframe. Two activities: 3% of the patches are encoded on every
sparse frame, or the patches above the threshold. All methods encode the same frames in one run, dense frames first.
The adapter of `reconstruct` is the one that ships; the others are made by `python -m
recipes.siglip_small.sparse_adapter VARIANT`, and are left out if they were not trained. Fidelity is the cosine to the
original dense model, also for the tower that was trained as a whole.

Writes `eval/results/headline.json`, shown in `docs/results/distillation.md`.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from eval.docs.distillation import headline_table
from eval.report import RESULTS, provenance, publish, rounded
from eval.vision import composed_bench
from neuroflow_hf.evaluation.statistics import mean_interval
from neuroflow_hf.utils.jobs import timed
from neuroflow_hf.utils.provenance import checkout_commit, fingerprint, key_of, model_version
from neuroflow_hf.vision.adapter_files import read_adapter
from neuroflow_hf.vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from recipes.composed_clips import frame, specify
from recipes.recordings import RECORDINGS
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_small.compose import Material, split_drawings
from recipes.siglip_small.sources import photos
from recipes.siglip_small.sparse_adapter import CHECKPOINT, VARIANTS, variant_folder

STRIDE, KEYFRAME_EVERY, SKIPPED, THRESHOLD, SEED = 3, 30, 0.97, 0.02, 7
# by side: motions of composed clips, names of recorded ones, frames of each
PLAN: dict[int, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    224: (("local", "crossing", "several", "entering", "moving camera"), ("pedestrians", "pavement", "carphone"), 30),
    448: (("local", "several"), ("pedestrians",), 20),
    896: (("local", "crossing"), (), 6),
    1792: (("local",), (), 3),
}
MOST_FOR_OTHERS = 896  # the largest side at which architecture D and pruning are measured
TRAINED_SIDE = 224  # the side at which the whole tower was trained, and the only one at which it is measured
ACTIVITIES = {"97% skipped": "budget", "own activity": "threshold"}
ORACLE = "dense outputs of the active patches (bound)"
SHIPPED = CHECKPOINT.with_name(f"{CHECKPOINT.name}-reconstruct")
FULL = "published"  # the variant that is a whole tower


@dataclass(frozen=True)
class Method:
    """A way to encode sparse frames."""

    options: dict = field(default_factory=dict)  # of the gate
    variant: str | None = None  # of the recipe, whose adapter or tower is used; None for the checkpoint as it is
    activities: tuple[str, ...] = tuple(ACTIVITIES)  # in which of ACTIVITIES it is measured


def summary(mode: str) -> dict:
    """Options of a mode with summary tokens."""
    return {"mode": mode, "summary_tokens": 64}


METHODS = {
    "eliminate": Method({"mode": "eliminate"}),
    "eliminate, distilled as published": Method({"mode": "eliminate"}, FULL),
    "eliminate, distilled by LoRA": Method({"mode": "eliminate"}, "eliminate"),
    "eliminate with summary": Method(summary("eliminate")),
    "eliminate with summary, distilled": Method(summary("eliminate"), "eliminate-summary"),
    "reconstruct": Method({"mode": "reconstruct"}),
    "reconstruct with summary": Method(summary("reconstruct")),
    "reconstruct with summary, distilled": Method(summary("reconstruct"), "reconstruct"),
    "context": Method({"mode": "context"}),
    "extrapolate": Method({"mode": "extrapolate"}),
    "balanced": Method({"preset": "balanced"}, None, ("own activity",)),
}


@dataclass(frozen=True)
class Clip:
    """Pixel values [T, 1, 3, R, R], and the index of each frame's right label, -1 for a frame without one."""

    pixels: list[Tensor]
    truth: np.ndarray


class Bench(composed_bench.Bench):
    """The checkpoint with its labels, the variants that were trained, and clips at any side."""

    def __init__(self, console: Console):
        super().__init__()
        self.tower: NeuroFlowSiglipVisionModel = self.model.vision_model
        self.adapters, self.full, self.console = {}, None, console
        for name in VARIANTS:
            folder = SHIPPED if name == "reconstruct" else variant_folder(name)
            if name == FULL and (folder / "model.safetensors").is_file():
                self.full = NeuroFlowSiglipVisionModel.from_pretrained(folder).eval()
            elif (folder / "sparse_adapter.json").is_file():
                self.adapters[name] = read_adapter(folder, self.tower)

    @functools.cached_property
    def material(self):
        """Held-out drawings, and held-out photographs that show no thing and are large enough for every side."""

        def is_ground(row: dict[str, str]) -> bool:
            return row["split"] == "held out" and row["empty"] == "yes"

        grounds = [photo for photo in photos(4096, is_ground) if min(photo.picture.size) >= 1800]
        return Material(split_drawings()["held out"], grounds, grounds)

    def clip_at(self, side: int, name: str, count: int) -> Clip:
        """A composed or recorded clip at a side."""
        preprocess = dataclasses.replace(self.preprocess, resolution=side)
        recorded = {footage.name: footage for footage in RECORDINGS}
        if name in recorded:
            images = list(recorded[name].load(default_tower_dir().parent, self.console).frames())[: count * STRIDE]
            pixels = [preprocess(image) for image in images[::STRIDE]]
            return Clip(pixels, np.full(len(pixels), -1))
        spec = specify(self.material, name, 0, frames=max(16, count * STRIDE), seed=SEED, side=side)
        shown = [frame(spec, number * STRIDE) for number in range(count)]
        truth = [-1 if what.label is None else self.things.index(what.label) for _, what in shown]
        return Clip([preprocess(image) for image, _ in shown], np.array(truth))

    def measure(self, side: int, name: str, count: int) -> dict[str, np.ndarray]:
        """The arrays of `measure_clip` for a clip of `clip_at`."""
        return measure_clip(self, self.clip_at(side, name, count), side)

    def tower_of(self, method: Method) -> NeuroFlowSiglipVisionModel | None:
        """The tower of a method, with its adapter; None if it was not trained."""
        if method.variant == FULL:
            return self.full
        if method.variant is not None and method.variant not in self.adapters:
            return None
        self.tower.sparse_adapter = self.adapters.get(method.variant)
        return self.tower


# --- one clip --------------------------------------------------------------------------------------------------------


def measure_clip(bench: Bench, clip: Clip, side: int) -> dict[str, np.ndarray]:
    """
    Arrays by `METHOD|ACTIVITY|WHAT`: `embeddings` [T, D], `ms` [T], `cost` [T]. ORACLE bounds all modes that pool
    stored patches: its active patches come from the dense model's output.
    """
    interpolate = {"interpolate_pos_encoding": side != bench.tower.config.image_size}
    found: dict[str, np.ndarray] = {"truth": clip.truth}

    def keep(name: str, activity: str, rows: list[tuple[Tensor, float, float]]):
        embeddings, milliseconds, costs = zip(*rows, strict=True)
        found[f"{name}|{activity}|embeddings"] = torch.stack(embeddings).squeeze(1).numpy()
        found[f"{name}|{activity}|ms"], found[f"{name}|{activity}|cost"] = np.array(milliseconds), np.array(costs)

    def dense(tower: nn.Module) -> list[tuple[Any, float]]:
        return [timed(lambda: tower(pixels, **interpolate), pixels.device) for pixels in clip.pixels]  # noqa: B023

    bench.tower.sparse_adapter = None
    outputs = dense(bench.tower)
    keep("dense", "", [(output.pooler_output, ms, 1.0) for output, ms in outputs])
    if bench.full is not None and side == TRAINED_SIDE:
        keep(f"dense of {FULL}", "", [(output.pooler_output, ms, 1.0) for output, ms in dense(bench.full)])
    num_patches, states, masks = (side // bench.tower.config.patch_size) ** 2, {}, []
    for activity, rule in ACTIVITIES.items():
        limit = {"token_budget": math.ceil((1 - SKIPPED) * num_patches)} if rule == "budget" else {}
        for name, method in METHODS.items():
            tower = bench.tower_of(method)
            elsewhere = method.variant == FULL and side != TRAINED_SIDE
            if tower is None or elsewhere or activity not in method.activities:
                continue
            options = (
                method.options if "preset" in method.options else {"threshold": THRESHOLD, **limit, **method.options}
            )
            stream, rows = tower.new_stream(**options), []
            kept = (tower is bench.full, stream.gate.mode, stream.gate.summary_tokens, "preset" in method.options)
            for number, pixels in enumerate(clip.pixels):
                if number == 0 and kept in states:  # a keyframe is the same with an adapter and without
                    state, output = states[kept]
                    stream.load_state_dict(state)
                    rows.append((output, math.nan, 1.0))
                    continue
                output, milliseconds = timed(lambda: tower(pixels, **interpolate, stream=stream), pixels.device)  # noqa: B023
                rows.append((output.pooler_output, milliseconds, output.cost.item()))
                if number == 0:
                    states[kept] = stream.state_dict(), output.pooler_output
                elif name == "context" and rule == "budget":
                    masks.append(output.active_mask.flatten())
            keep(name, activity, rows)
    bench.tower.sparse_adapter = None
    stored, rows = outputs[0][0].last_hidden_state.clone(), [(outputs[0][0].pooler_output, math.nan, math.nan)]
    for (output, _), mask in zip(outputs[1:], masks, strict=True):
        stored[:, mask] = output.last_hidden_state[:, mask]
        rows.append((bench.tower.head(stored), math.nan, math.nan))
    keep(ORACLE, "97% skipped", rows)
    others = (("first half dense (D)", half_dense), ("pruned by attention", pruned))
    for name, encode in others if side <= MOST_FOR_OTHERS else ():
        masks_of = [torch.ones(num_patches, dtype=torch.bool), *masks]
        rows = []
        for pixels, mask in zip(clip.pixels, masks_of, strict=True):
            call: Callable[[], Tensor] = functools.partial(encode, bench.tower, pixels, mask, side)
            output, milliseconds = timed(call, pixels.device)
            rows.append((output, milliseconds, math.nan))
        keep(name, "97% skipped", rows)
    return found


def embed(tower: NeuroFlowSiglipVisionModel, pixels: Tensor, side: int) -> Tensor:
    """Patch embeddings with positions [1, N, D]."""
    return tower.embeddings(pixels, interpolate_pos_encoding=side != tower.config.image_size)


def half_dense(tower: NeuroFlowSiglipVisionModel, pixels: Tensor, active: Tensor, side: int) -> Tensor:
    """Architecture D of the paper: half of the layers over all patches, the others over active ones alone: [1, D]."""
    hidden, layers = embed(tower, pixels, side), list(tower.encoder.layers)
    for number, layer in enumerate(layers):
        if number == len(layers) // 2:
            hidden = hidden[:, active]
        hidden = layer(hidden)
    return tower.head(tower.post_layernorm(hidden))


def pruned(tower: NeuroFlowSiglipVisionModel, pixels: Tensor, active: Tensor, side: int) -> Tensor:
    """
    A baseline after DynamicViT (Rao et al., 2021), untrained and frame by frame: after a quarter, a half and three
    quarters of the layers, only the 70% of the patches are kept that the pooling head's probe attends to most: [1, D].
    """
    hidden, layers = embed(tower, pixels, side), list(tower.encoder.layers)
    stages = {len(layers) * quarter // 4 for quarter in (1, 2, 3)}
    for number, layer in enumerate(layers):
        if number in stages:
            normed = tower.post_layernorm(hidden)
            weights = tower.head.attention(tower.head.probe, normed, normed)[1][0, 0]
            hidden = hidden[:, weights.topk(round(0.7 * len(weights))).indices]
        hidden = layer(hidden)
    return tower.head(tower.post_layernorm(hidden))


# --- the report ------------------------------------------------------------------------------------------------------


def cosines(embeddings: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """The cosine of each row [T, D] to dense: [T]."""
    ours, theirs = (torch.from_numpy(array).double() for array in (embeddings, dense))
    return torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).numpy()


def held(dense: np.ndarray, every: int) -> np.ndarray:
    """Dense embeddings [T, D] of every `every`-th frame, each repeated until the next."""
    places = np.arange(len(dense))
    return dense[places - places % every]


def rows_of(bench: Bench, side: int, measured: list[dict[str, np.ndarray]]) -> Iterator[dict]:
    """A row for each method and activity at a side; figures are of sparse frames."""
    dense_ms = statistics.median(value for clip in measured for value in clip["dense||ms"])

    def figures(name: str, activity: str, embeddings: list[np.ndarray], ms: float | None, cost: float | None) -> dict:
        found = [
            cosines(ours[1:], clip["dense||embeddings"][1:]) for ours, clip in zip(embeddings, measured, strict=True)
        ]
        per_frame = None if cost is None else 1 / KEYFRAME_EVERY + (1 - 1 / KEYFRAME_EVERY) * cost
        row = {
            "side": side,
            "method": name,
            "activity": activity,
            "frames": sum(map(len, found)),
            "sparse_cost": cost,
            "cost": per_frame,
            "ms": ms,
            "speed_up": None if not ms else dense_ms / ms,
            "mean": float(np.concatenate(found).mean()),
            "p5": float(np.quantile(np.concatenate(found), 0.05)),
            "top1": top1(bench, embeddings, measured),
        }
        every = None if not per_frame else math.floor(1 / per_frame)
        if every is not None and every < min(len(clip["truth"]) for clip in measured):
            holds = [
                cosines(held(clip["dense||embeddings"], every), clip["dense||embeddings"])[1:] for clip in measured
            ]
            row["hold_mean"] = float(np.concatenate(holds).mean())
            row["hold_p5"] = float(np.quantile(np.concatenate(holds), 0.05))
            row["above_hold"] = mean_interval(
                [ours.mean() - hold.mean() for ours, hold in zip(found, holds, strict=True)]
            )
        return row

    every_dense = [clip["dense||embeddings"] for clip in measured]
    yield figures("dense", "", every_dense, dense_ms, 1.0)
    yield figures("keyframe repeated", "", [held(array, len(array)) for array in every_dense], None, 0.0)
    names = {tuple(key.split("|")[:2]) for clip in measured for key in clip if "|" in key} - {("dense", "")}
    order = [f"dense of {FULL}", *METHODS]
    for name, activity in sorted(names, key=lambda pair: (pair[1], order.index(pair[0]) if pair[0] in order else 99)):
        if any(f"{name}|{activity}|ms" not in clip for clip in measured):
            continue
        parts = {
            what: [clip[f"{name}|{activity}|{what}"] for clip in measured] for what in ("embeddings", "ms", "cost")
        }
        ms = float(np.median(np.concatenate([part[1:] for part in parts["ms"]])))
        cost = float(np.concatenate([part[1:] for part in parts["cost"]]).mean())
        yield figures(
            name, activity, parts["embeddings"], None if math.isnan(ms) else ms, None if math.isnan(cost) else cost
        )


def top1(bench: Bench, embeddings: list[np.ndarray], measured: list[dict[str, np.ndarray]]) -> float | None:
    """The share of sparse frames that show a thing whose label is the best one."""
    right, count = 0, 0
    for ours, clip in zip(embeddings, measured, strict=True):
        shown = clip["truth"] >= 0
        shown[0] = False
        if shown.any():
            best = bench.labels.logits(torch.from_numpy(ours[shown])).argmax(-1).numpy()
            right, count = right + int((best == clip["truth"][shown]).sum()), count + int(shown.sum())
    return right / count if count else None


def main(
    sides: Annotated[
        str, typer.Option(help="Sides of the frames in pixels, separated by commas.")
    ] = "224,448,896,1792",
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "headline.json",
):
    """Measure what is missing, and write and show the report."""
    console = Console(stderr=True)
    bench, rows = Bench(console), []
    folder = default_tower_dir().parent / "eval" / "headline"
    for side in map(int, sides.split(",")):
        motions, recorded, count = PLAN[side]
        weights = key_of(
            tower=fingerprint(bench.tower),
            variants={name: fingerprint(adapter) for name, adapter in bench.adapters.items()},
            full=None if bench.full is None or side != TRAINED_SIDE else fingerprint(bench.full),
            code=model_version(),
            methods={name: dataclasses.asdict(method) for name, method in METHODS.items()},
        )
        measured = []
        for name in (*motions, *recorded):
            path = folder / f"{side}-{name.replace(' ', '-')}-{count}-{weights}.npz"
            console.print(f"{side} px: {name}")
            measure = functools.partial(bench.measure, side, name, count)
            measured.append(composed_bench.stored_figures(path, measure))
        rows += rows_of(bench, side, measured)
    report = {
        **provenance(),
        "commit": checkout_commit(),
        "checkpoint": CHECKPOINT.name,
        "keyframe_every": KEYFRAME_EVERY,
        "stride": STRIDE,
        "clips": {str(side): [*PLAN[side][0], *PLAN[side][1]] for side in map(int, sides.split(","))},
        "rows": rounded(rows),
    }
    publish(output, report, headline_table(report))


if __name__ == "__main__":
    typer.run(main)
