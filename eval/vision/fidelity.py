"""
Does a stream stay close to dense over thousands of frames? Cosine over time, its trend, and the memory used.

    torchrun --nproc_per_node 2 -m eval.vision.fidelity --few-settings    # run again to continue
    python -m eval.vision.fidelity --quick                                # fewer baselines, as in the other quick runs

There is one composed clip of 1,000 frames for each motion. One random frame of every eight is compared, never the
first. Cosine to dense: mean, 5th and 1st percentile over all clips. Trend: the slope of the cosine over time, per
1,000 frames, each clip around its own mean, with a 95 % interval from a bootstrap over blocks of frames of each clip
(neighbouring frames are alike). It is below zero if a stream drifts away from dense. Memory: the stream's bytes, which
must be the same on every frame after the first. Each method is compared with the best baseline at its own cost as in
`accuracy.py`, by the 5th percentile, with intervals from a bootstrap over clips: on all clips, and on those whose
label changes. Dense is recorded in the same arithmetic. Embeddings are kept in float16, which hides differences below
about 1e-6. Writes `eval/results/fidelity.json`, shown in `docs/results/long-clips.md`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional

from eval.docs.fidelity import fidelity_table
from eval.report import rounded
from eval.vision.clip_statistics import drawn_blocks
from eval.vision.evidence import QUICK_FRAMES, Evidence, best_baseline, command, families_of
from neuroflow_hf.evaluation.equal_cost import COSINES
from neuroflow_hf.evaluation.settings import DENSE
from neuroflow_hf.evaluation.statistics import Interval, middle

RESAMPLES = 2000
BLOCK = 20  # compared frames
FEWEST_BLOCKS = 5


def drawn_frames(evidence: Evidence, name: str) -> tuple[np.ndarray, Tensor]:
    """Numbers of the randomly drawn frames of all clips, [S, m], and a method's embeddings of these, [S, m, D]."""
    recordings = [evidence.recordings[name][scene.name] for scene in evidence.scenes]
    frames = torch.stack([one.frames[one.drawn] for one in recordings])
    return frames.numpy(), torch.stack([one.embeddings[one.drawn] for one in recordings])


def fifth_percentile(cosines: np.ndarray) -> np.ndarray:
    """The 5th percentile over all frames of [R, S, m], interpolated: [R]."""
    return np.quantile(cosines.reshape(len(cosines), -1), 0.05, axis=1)


def slope(frames: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Least-squares slope per 1,000 frames, each scene around its own means: from [..., S, m] to [...]."""
    time = frames / 1000
    time = time - time.mean(-1, keepdims=True)
    centred = cosines - cosines.mean(-1, keepdims=True)
    return (time * centred).sum((-1, -2)) / (time * time).sum((-1, -2))


def slope_interval(
    frames: np.ndarray, cosines: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """
    A 95 % interval of the slope of [S, m], from a bootstrap over blocks of BLOCK compared frames within each scene.
    None from fewer than FEWEST_BLOCKS blocks, whose interval would mean nothing.
    """
    scenes, count = cosines.shape
    if count < FEWEST_BLOCKS * BLOCK:
        return None
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for place in range(resamples):
        drawn = drawn_blocks(rng, scenes, count, BLOCK)
        draws[place] = slope(np.take_along_axis(frames, drawn, 1), np.take_along_axis(cosines, drawn, 1))
    return middle(draws)


def beside_baselines(evidence: Evidence, cosines: dict[str, np.ndarray], places: Sequence[int]) -> dict[str, dict]:
    """By method, on the clips with these indices: cost, 5th percentile of `cosines` [S, m], and the best baseline."""
    values = {name: found[places] for name, found in cosines.items()}
    costs, families, rows = evidence.costs(places), families_of(evidence.specs), {}
    for spec in evidence.specs:
        row: dict = {"cost": costs[spec.name], "p5": fifth_percentile(values[spec.name][None]).item()}
        if not spec.control:
            row["best control"] = best_baseline(spec.name, values, costs, families, fifth_percentile)
        rows[spec.name] = row
    return rows


def fidelity_report(evidence: Evidence) -> dict:
    """All figures."""
    scenes = evidence.scenes
    frames, dense = drawn_frames(evidence, DENSE.name)
    cosines = {}
    for spec in evidence.specs:
        embeddings = drawn_frames(evidence, spec.name)[1]
        cosines[spec.name] = functional.cosine_similarity(embeddings.double(), dense.double(), dim=-1).numpy()
    of_all = beside_baselines(evidence, cosines, range(len(scenes)))
    changing = [place for place, scene in enumerate(scenes) if scene.changes]
    of_changing = beside_baselines(evidence, cosines, changing) if changing else {}
    results = []
    for spec in evidence.specs:
        if spec == DENSE:
            continue
        recordings = evidence.recordings[spec.name].values()
        nbytes = sorted({size for one in recordings for size in one.nbytes[1:].tolist()})
        row = {
            "name": spec.name,
            "family": spec.family,
            "control": spec.control,
            **of_all[spec.name],
            **{figure: reduce(cosines[spec.name]) for figure, reduce in COSINES.items()},
            "trend": float(slope(frames, cosines[spec.name])),
            "trend_interval": slope_interval(frames, cosines[spec.name]),
            "bytes": nbytes[-1],
            "bytes_constant": len(nbytes) == 1,
        }
        if changing:
            row["changing"] = of_changing[spec.name]
        results.append(row)
    return rounded({**evidence.about, "block": BLOCK, "resamples": RESAMPLES, "results": results}, digits=8)


main = command(fidelity_report, fidelity_table, "fidelity", clips=1, frames=QUICK_FRAMES, with_modes=False)

if __name__ == "__main__":
    typer.run(main)
