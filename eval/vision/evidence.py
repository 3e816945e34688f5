"""
What `accuracy.py`, `reaction.py` and `fidelity.py` share: composed clips, methods, recordings, the command line, and
comparison with baselines at a method's own cost.

Recordings are made once and kept in the cache folder (`NEUROFLOW_CACHE`). Each of the three scripts uses what the
others recorded. Clips are those of `composed_clips.py`, drawings and photographs that were in no training picture.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional

from eval.recordings import Recorder, Recording, RecordSettings, Scene
from eval.report import RESULTS, provenance, publish
from eval.vision.composed_bench import CHECKPOINT
from eval.vision.token_merging import merging_baselines
from neuroflow_hf.evaluation.equal_cost import ranked_at
from neuroflow_hf.evaluation.methods import MethodSpec, tower_of
from neuroflow_hf.evaluation.settings import (
    DENSE,
    FIRST,
    hold_baselines,
    mode_methods,
    preset_methods,
    smaller_baselines,
)
from neuroflow_hf.evaluation.statistics import Interval, middle, resamples
from neuroflow_hf.loading import load_text_model
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, code_version, key_of
from neuroflow_hf.video.labels import embed_labels
from neuroflow_hf.vision.modeling_neuroflow_siglip import NeuroFlowSiglipModel
from recipes import composed_clips
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_small.captions import EMPTY_PHRASES, HELD_OUT_PHRASINGS, prompts
from recipes.siglip_small.compose import load_material
from recipes.siglip_small.sources import things

SEED = 3
NOTHING = "nothing"
QUICK_FRAMES = 1000
SLOW_MODES = ("mlp",)
FEW_HOLDS = (4, 8), (0.05, 0.1), (0.15, 0.25), (0.1, 0.2)  # arguments of `hold_baselines` in a quick run
FEWEST_SCENES = 3  # fewer give no interval
Statistic = Callable[[np.ndarray], np.ndarray]  # values of drawn scenes [R, S, m] to [R]

# --- what is recorded ------------------------------------------------------------------------------------------------


def methods_of(model: torch.nn.Module, quick: bool, few_settings: bool, with_modes: bool) -> list[MethodSpec]:
    """
    The methods to record. A quick run leaves out the slowest mode, and has two settings of each baseline that holds
    dense frames: with many settings, nearly every frame would be encoded densely for one of them. With few settings,
    each mode has one, and there is no `extrapolate`, which is the presets' mode.
    """
    few, modes, config = quick or few_settings, mode_methods() if with_modes else [], tower_of(model).config
    if few:
        first = {spec.family: spec for spec in reversed(modes)}
        left_out = ("extrapolate", *(SLOW_MODES if quick else ()))
        modes = [spec for spec in reversed(first.values()) if spec.options["mode"] not in left_out]
    holds = hold_baselines(*(FEW_HOLDS if quick else ()))
    smaller = [*smaller_baselines(config.patch_size, config.image_size, few), *merging_baselines(model, few)]
    return [DENSE, *preset_methods(), *modes, FIRST, *holds, *smaller]


def composed_scene(spec: composed_clips.ClipSpec) -> Scene:
    """A composed clip as a scene."""
    pictures = [spec.ground, *(actor.cut for actor in spec.actors)]
    code = code_version([Path(composed_clips.__file__)])
    return Scene(
        name=f"{spec.motion} {spec.number}, {spec.frames} frames",
        frames=lambda: composed_clips.frames(spec),
        labels=composed_clips.right_labels(spec),
        identity=key_of(seed=spec.seed, side=spec.side, pictures=[one.tobytes().hex() for one in pictures], code=code),
        group=spec.motion,
    )


def composed_batches(material: Any, clips: int, frames: int, side: int = composed_clips.SIDE) -> list[list[Scene]]:
    """One batch for each clip number, with that clip of every motion."""
    return [
        [
            composed_scene(composed_clips.specify(material, motion, number, frames=frames, seed=SEED, side=side))
            for motion in composed_clips.MOTIONS
        ]
        for number in range(clips)
    ]


def text_embeddings(model: NeuroFlowSiglipModel, tokenizer: Any) -> tuple[list[str], Tensor]:
    """
    Names and unit embeddings float32 [L, D] of all things that the embedded checkpoint was trained on, and of
    `nothing`. Each embedding is the mean over several phrasings; no training caption used those of things.
    """

    def unit(texts: Sequence[str]) -> Tensor:
        return embed_labels(model, tokenizer, texts, "{}").text_embeddings

    of_things = sum(unit(prompts(phrasing)) for phrasing in HELD_OUT_PHRASINGS)
    together = torch.cat([of_things, unit(EMPTY_PHRASES).sum(0, keepdim=True)])
    return [*(thing.name for thing in things()), NOTHING], functional.normalize(together, dim=-1)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that was recorded."""

    scenes: list[Scene]  # all S scenes
    specs: list[MethodSpec]  # the methods, including dense
    recordings: dict[str, dict[str, Recording]]  # by the method's name and the scene's name
    names: list[str]  # names, texts: labels and their unit embeddings, float32 [L, D]
    texts: Tensor
    settings: RecordSettings  # which frames were sampled
    about: dict  # the code, machine and settings of the recordings, for JSON

    @property
    def motions(self) -> dict[str, list[int]]:
        """By kind of motion, the indices of its scenes."""
        motions = dict.fromkeys(scene.group for scene in self.scenes)
        return {motion: [at for at, scene in enumerate(self.scenes) if scene.group == motion] for motion in motions}

    def costs(self, places: Sequence[int]) -> dict[str, float]:
        """By method, the mean cost over the scenes with these indices, without the first frames."""
        names = [self.scenes[place].name for place in places]
        return {
            method: float(np.mean([found[name].cost[1:].mean().item() for name in names]))
            for method, found in self.recordings.items()
        }


def record_evidence(
    recorder: Recorder, batches: list[list[Scene]], specs: list[MethodSpec], texts: tuple[list[str], Tensor]
) -> Evidence:
    """Record what is missing, and load all recordings."""
    recorder.run(batches, specs)
    scenes = [scene for batch in batches for scene in batch]
    recordings = {
        spec.name: {
            scene.name: one for batch in batches for scene, one in zip(batch, recorder.load(batch, spec), strict=True)
        }
        for spec in specs
    }
    of_all = [one.about for found in recordings.values() for one in found.values()]
    machines = [one["machine"] for one in of_all]
    about = {
        **provenance(),
        "processes": recorder.processes.count,
        "commit": checkout_commit(),
        "recorded": {
            "commits": sorted({str(one["commit"]) for one in of_all}),
            "machines": [one for place, one in enumerate(machines) if one not in machines[:place]],
            **{name: of_all[0][name] for name in ("versions", "dtype", "settings")},
        },
        "weights": recorder.store.weights,
        "seed": SEED,
        "frames": [batch[0].count for batch in batches],
        "scenes": [scene.name for scene in scenes],
        "methods": list(map(asdict, specs)),
    }
    return Evidence(scenes, specs, recordings, *texts, recorder.settings, about)


# --- the command line ------------------------------------------------------------------------------------------------


def command(
    report_of: Callable,
    table_of: Callable,
    name: str,
    draw: Callable | None = None,
    clips: int = 5,
    frames: int = 125,
    with_modes: bool = True,
):
    """
    The command line of a script, from functions from evidence to the report, from the report to its table in Markdown,
    and from both to a picture. `name` is that of the JSON file and the picture. There are `clips` clips of each motion
    with so many frames, or, with `--quick`, one.
    """

    def main(
        quick: Annotated[bool, typer.Option("--quick", help="One clip of each motion, and fewer settings.")] = False,
        few_settings: Annotated[
            bool, typer.Option("--few-settings", help="One or two settings of each mode and each smaller input.")
        ] = False,
        output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / f"{name}.json",
    ):
        """Record what is missing, compare, and write and show the report."""
        processes = Processes()
        model, preprocess, tokenizer = load_text_model(CHECKPOINT, device=processes.device_for("auto"))
        folder = default_tower_dir().parent / "evidence"
        recorder = Recorder(model, preprocess, folder, RecordSettings(), processes)
        size = (1, QUICK_FRAMES) if quick else (clips, frames)
        batches = composed_batches(load_material()["held out"], *size)
        specs = methods_of(model, quick, few_settings, with_modes)
        evidence = record_evidence(recorder, batches, specs, text_embeddings(model, tokenizer))
        if processes.is_main:
            report = report_of(evidence)
            pictures = {} if draw is None else {f"{name}.png": draw(evidence, report)}
            publish(output, report, table_of(report), pictures)

    return main


# --- baselines at a method's own cost --------------------------------------------------------------------------------
# Methods and baselines have values of the same scenes, so differences are paired. Intervals come from a bootstrap over
# scenes, because the frames of one scene are not independent.


def families_of(specs: Sequence[MethodSpec]) -> dict[str, list[str]]:
    """
    The baselines' names by family. Each family begins with the first frame repeated, which costs nothing, and ends
    with dense.
    """
    families: dict[str, list[str]] = {}
    for spec in specs:
        if spec.control and spec != FIRST:
            families.setdefault(spec.family, [FIRST.name]).append(spec.name)
    return {family: [*found, DENSE.name] for family, found in families.items()}


def mean_of_scenes(values: np.ndarray) -> np.ndarray:
    """Mean of [R, S, m] without NaN: [R]."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=(1, 2)) / (~np.isnan(values)).sum((1, 2))


def statistic_interval(
    values: np.ndarray, statistic: Statistic, baseline: Callable[[np.ndarray], np.ndarray] | None = None
) -> Interval | None:
    """
    A 95 % interval of a statistic of S scenes' values [S, m], or of the difference between it and a baseline's
    statistic; None for fewer than FEWEST_SCENES scenes. `baseline` is a function from the indices of the drawn scenes
    [R, S] to the baseline's statistic [R].
    """
    if len(values) < FEWEST_SCENES:
        return None
    drawn = resamples(len(values))
    draws = statistic(values[drawn])
    return middle(draws if baseline is None else draws - baseline(drawn))


def best_baseline(
    name: str,
    values: dict[str, np.ndarray],
    costs: dict[str, float],
    families: dict[str, list[str]],
    statistic: Statistic,
) -> dict | None:
    """
    Compare a method with the best family of baselines at no more than its own cost (see `ranked_at`), pooled over S
    scenes, from values [S, m] and mean costs by name. The statistic of a mixture of two baselines is the mean of their
    statistics, weighted by their shares. A larger statistic is better.

    Returns:
        `control`, the statistic of the best baseline, and its `family`; the `difference` of the method's to it; and
        its `interval`, as of `statistic_interval`. None if there are no baselines.
    """
    own = statistic(values[name][None]).item()
    ranked = ranked_at(families, costs[name], costs.__getitem__, lambda one: statistic(values[one][None]).item())
    if not ranked or math.isnan(own):
        return None
    figure, best = ranked[-1]
    interval = statistic_interval(
        values[name], statistic, lambda drawn: best.mean(lambda one: statistic(values[one][drawn]))
    )
    return {"control": figure, "family": best.family, "difference": own - figure, "interval": interval}
