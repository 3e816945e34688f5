"""
Does a stream stay close to dense over thousands of frames? Cosine over time, its trend, and what is remembered.

    torchrun --nproc_per_node 2 -m eval.vision.fidelity         # run again to continue
    python -m eval.vision.fidelity --quick                      # fewer baselines, as in the other quick runs
    python -m eval.vision.fidelity --frames 10000 --methods balanced

One composed clip of 1,000 frames of each motion; compared are frames drawn by chance, one of every `--dense-every`,
without the first. Mean, 5th and 1st percentile of the cosine to dense by `eval/metrics/embedding_fidelity`, over all
clips and by motion. Trend: the cosine's slope over time, per 1,000 frames, each clip around its own mean, with a 95 %
interval by a moving-block bootstrap over the frames of each clip (neighbours are alike): a stream that drifts away has
one below zero. Memory: the stream's bytes on every frame after the first, which must be one number. Beside each
method, the best baseline at its own cost as in `accuracy.py`, by the 5th percentile, with intervals from drawing
clips; of all clips, and of those whose label changes alone, at the cost on those. Dense itself is recorded in the same
arithmetic; embeddings are kept in float16, which hides differences below about 1e-6.
Writes `eval/results/fidelity.json`.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import evaluate
import numpy as np
import typer
from rich.table import Table
from torch.nn import functional

from eval.report import RESULTS, wide_console, with_interval, write_json
from eval.vision.composed_bench import CHECKPOINT
from eval.vision.equal_cost import best_baseline, families_of
from eval.vision.evidence import (
    QUICK_FRAMES,
    Checkpoint,
    DenseEvery,
    Dtype,
    Evidence,
    FewSettings,
    Folder,
    Frames,
    Methods,
    Plan,
    Quick,
    gather_evidence,
    rounded,
)
from neuroflow_hf import PRESETS
from neuroflow_hf.evaluation.statistics import Interval, middle

METRIC = Path(__file__).parents[1] / "metrics" / "embedding_fidelity"
METHODS = "|".join([*PRESETS, "every", "surprise", "pixels", "smaller", "ToMe"])  # the presets, and all baselines
RESAMPLES = 2000
BLOCK = 20  # of compared frames
FEWEST_BLOCKS = 5
LONG = 0  # the batch of the long clips


def cosines_of(evidence: Evidence, name: str, dense: str) -> np.ndarray:
    """A method's cosines to dense on the drawn frames of the long clips, [S, m]."""
    ours, theirs = evidence.recording(name, LONG), evidence.recording(dense, LONG)
    return np.stack(
        [
            functional.cosine_similarity(
                ours.of(scene.name, drawn=True)[1].double(), theirs.of(scene.name, drawn=True)[1].double(), dim=-1
            ).numpy()
            for scene in evidence.batches[LONG]
        ]
    )


def frames_of(evidence: Evidence, dense: str) -> np.ndarray:
    """The numbers of those frames, [S, m]."""
    recording = evidence.recording(dense, LONG)
    return np.stack([recording.of(scene.name, drawn=True)[0].numpy() for scene in evidence.batches[LONG]])


def fifth_percentile(cosines: np.ndarray) -> np.ndarray:
    """Over all frames of [R, S, m], interpolated: [R]."""
    return np.quantile(cosines.reshape(len(cosines), -1), 0.05, axis=1)


def slope(frames: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Slope per 1,000 frames, by least squares with each scene around its own means: [..., S, m] each to [...]."""
    time = frames / 1000
    time = time - time.mean(-1, keepdims=True)
    centred = cosines - cosines.mean(-1, keepdims=True)
    return (time * centred).sum((-1, -2)) / (time * time).sum((-1, -2))


def slope_interval(
    frames: np.ndarray, cosines: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """A 95 % interval of the slope, from drawing blocks of BLOCK compared frames within each scene; [S, m] each.

    None of fewer than FEWEST_BLOCKS: drawing them says nothing.
    """
    scenes, count = cosines.shape
    block = BLOCK
    if count < FEWEST_BLOCKS * block:
        return None
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for place in range(resamples):
        starts = rng.integers(count, size=(scenes, math.ceil(count / block)))
        drawn = ((starts[..., None] + np.arange(block)) % count).reshape(scenes, -1)[:, :count]
        draws[place] = slope(np.take_along_axis(frames, drawn, 1), np.take_along_axis(cosines, drawn, 1))
    return middle(draws)


def metric_figures(metric, evidence: Evidence, name: str, dense: str, scenes: Sequence[str]) -> dict:
    """What the metric says of some of the long clips."""
    for scene in scenes:
        ours, theirs = (evidence.recording(one, LONG).of(scene, drawn=True)[1].numpy() for one in (name, dense))
        metric.add_batch(predictions=ours, references=theirs)
    found = metric.compute()
    return {short: found[f"cosine_{short}"] for short in ("mean", "p5", "p1")} | {"frames": found["count"]}


def beside_baselines(evidence: Evidence, cosines: dict[str, np.ndarray], scenes: Sequence[int]) -> dict[str, dict]:
    """
    By method, on some of the long clips: cost, 5th percentile, and the best baseline's at that cost.

    Args:
        cosines: by method [S, m].
        scenes: places of the clips.
    """
    pairs = [(LONG, evidence.batches[LONG][place]) for place in scenes]
    chosen = {name: values[scenes] for name, values in cosines.items()}
    costs = {name: evidence.cost(name, pairs) for name in chosen}
    families, found = families_of(evidence.specs), {}
    for spec in evidence.specs:
        row: dict = {"cost": costs[spec.name], "p5": float(fifth_percentile(chosen[spec.name][None])[0])}
        if not spec.control:
            compared = best_baseline(spec.name, chosen, costs, families, fifth_percentile)
            row["best control"] = compared
        found[spec.name] = row
    return found


def fidelity_report(evidence: Evidence) -> dict:
    """All figures."""
    metric = evaluate.load(str(METRIC))
    dense = next(spec.name for spec in evidence.specs if spec.kind == "dense")
    scenes = [(LONG, scene) for scene in evidence.batches[LONG]]
    frames = frames_of(evidence, dense)
    cosines = {spec.name: cosines_of(evidence, spec.name, dense) for spec in evidence.specs}
    of_all = beside_baselines(evidence, cosines, range(len(scenes)))
    changing = [place for place, (_, scene) in enumerate(scenes) if scene.changes]
    of_changing = beside_baselines(evidence, cosines, changing) if changing else {}
    motions = list(dict.fromkeys(scene.group for _, scene in scenes))
    results = []
    for spec in evidence.specs:
        if spec.name == dense:
            continue
        nbytes = sorted(set(evidence.recording(spec.name, LONG).nbytes[1:].tolist()))
        row = {
            "name": spec.name,
            "family": spec.family,
            "control": spec.control,
            **of_all[spec.name],
            **metric_figures(metric, evidence, spec.name, dense, [scene.name for _, scene in scenes]),
            "trend": float(slope(frames, cosines[spec.name])),
            "trend_interval": slope_interval(frames, cosines[spec.name]),
            "bytes": nbytes[-1] // len(scenes),
            "bytes_constant": len(nbytes) == 1,
            "motions": {
                motion: metric_figures(
                    metric, evidence, spec.name, dense, [scene.name for _, scene in scenes if scene.group == motion]
                )
                for motion in motions
            },
        }
        if changing:
            row["changing"] = of_changing[spec.name]
        results.append(row)
    about = {**evidence.about, "changing": [scenes[place][1].name for place in changing]}
    return rounded({**about, "block": BLOCK, "resamples": RESAMPLES, "results": results}, digits=8)


def table_of(report: dict) -> Table:
    """All clips together."""
    table = Table(title="cosine to dense over time, all motions", title_justify="left")
    for heading in (
        "method",
        "cost",
        "mean",
        "p5",
        "p1",
        "trend, thousandths per 1,000 frames",
        "MB a stream",
        "best baseline's p5",
        "difference, thousandths",
        "where labels change: cost",
        "p5",
        "best baseline's p5 there",
        "difference there",
    ):
        table.add_column(heading, justify="left" if heading.startswith(("method", "best baseline's p5")) else "right")
    for row in report["results"]:
        changing = row.get("changing")
        table.add_row(
            ("baseline: " if row["control"] else "") + row["name"],
            f"{row['cost']:.3f}",
            *(f"{row[name]:.4f}" for name in ("mean", "p5", "p1")),
            thousandths(row["trend"], row["trend_interval"]),
            f"{row['bytes'] / 1e6:.1f}" + ("" if row["bytes_constant"] else ", not constant"),
            *beside(row),
            *(("", "") if changing is None else (f"{changing['cost']:.3f}", f"{changing['p5']:.4f}")),
            *beside(changing or {}),
        )
    return table


def beside(row: dict) -> tuple[str, str]:
    """The best baseline beside a row, and the difference; empty if there is none."""
    compared = row.get("best control")
    if compared is None:
        return "", ""
    best = f"{compared['control']:.4f} {compared['family']}"
    return best, thousandths(compared["difference"], compared["interval"])


def thousandths(value: float, interval: Sequence[float] | None) -> str:
    """In thousandths, with its interval."""
    return with_interval(value, interval, "{:+.2f}", 1e3)


def main(
    quick: Quick = False,
    few_settings: FewSettings = False,
    frames: Frames = QUICK_FRAMES,
    dense_every: DenseEvery = 8,
    methods: Methods = METHODS,
    checkpoint: Checkpoint = CHECKPOINT,
    dtype: Dtype = "bfloat16",
    folder: Folder = None,
    output: Path = RESULTS / "fidelity.json",
):
    """Record what is missing, compare, and write the report."""
    plan = Plan(1, frames, dense_every, quick, methods, few_settings)
    evidence, processes = gather_evidence(plan, checkpoint, dtype, folder)
    if not processes.is_main:
        return
    report = fidelity_report(evidence)
    write_json(output, report)
    wide_console(160).print(table_of(report))


if __name__ == "__main__":
    typer.run(main)
