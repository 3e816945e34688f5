"""
Presets and modes against the best trivial baseline, on every clip of the suite, at equal cost.

    python -m eval.vision.vision_policies    # everything; what was measured before is reused
    python -m eval.vision.vision_policies --clips pan,webcam --methods balanced --frames 30

Question: is what a method returns closer to the dense outputs than what holding dense outputs gives for the same
expense? Baselines, which all return an earlier frame's dense output: a dense frame every k frames (all k, all phases),
a dense frame when the mean surprise or the share of changed patches since the last one exceeds a level, and the first
frame for ever. Between two levels anybody can mix, so a baseline at any cost is the mixture of its two neighbours in
cost. The best baseline is chosen for each clip and each statistic after the fact, which favours the baselines.

Measured frame by frame, against a dense forward of the same frame, without the first frame, which is dense in every
method: cosine of the pooled output (mean, and 5th percentile over frames), and cosine of each patch (mean over all
patches, and the 5th percentile over a frame's patches, averaged over frames). Intervals are 95 %, from a paired
moving-block bootstrap over frames, and over clips where clips are pooled; with 31 clips about one in 40 of the
intervals lies beside the truth on each side. Writes `eval/results/vision_policies.json` and `docs/policies.png`.
"""

import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

import neuroflow_hf
from eval.report import RESULTS, provenance, tidy, wide_console, with_interval, write_figure
from eval.vision.clips import NAMES, load_clips
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.evaluation.equal_cost import shares_at
from neuroflow_hf.utils.files import write_whole
from neuroflow_hf.utils.provenance import code_version, fingerprint, key_of, model_version
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.vision.gate_config import DEFAULT_PRESET, PRESETS
from neuroflow_hf.vision.patches import project_patches
from recipes.recordings import TABLE, Clip
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir

METHODS = {
    **PRESETS,
    "extrapolate": {"mode": "extrapolate"},
    "context": {"mode": "context"},
    "context + keyframes": {"mode": "context", "keyframe_interval": 12},
    "reconstruct (the paper's C)": {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.05},
}

SURPRISE_LEVELS = tuple(np.geomspace(0.003, 0.4, 15).tolist())
FRACTION_LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CHANGED = 0.01  # the surprise above which `keyframe_fraction` counts a patch: the default of `threshold`
LONGEST_INTERVAL = 100

STATISTICS = {
    "pooled_mean": "pooled, mean",
    "pooled_p5": "pooled, p5",
    "patch_mean": "patches, mean",
    "patch_p5": "patches, p5",
}
BLOCK = 10
RESAMPLES = 2000
LEVEL = 1e-4  # two figures that differ by less are called level, however clear of zero the interval
DELAY_CAP = 30
DENSE_EVERY = 5  # frames; a dense forward is timed among a method's frames, so that both meet the same machine

# --- measuring -------------------------------------------------------------------------------------------------------


@functools.cache
def load_tower() -> tuple[NeuroFlowSiglipVisionModel, Preprocessor, str]:
    """The model, its preprocessing and the weights' fingerprint, once in each process."""
    folder = build_tower(default_tower_dir())
    model = NeuroFlowSiglipVisionModel.from_pretrained(folder).eval()
    return model, Preprocessor.from_pretrained(folder), fingerprint(model)


def footage_version() -> str:
    """The version of the code and of the table that the pixel values depend on."""
    root, package = Path(__file__).parents[2], Path(neuroflow_hf.__file__).parent
    code = [root / "eval" / "vision" / "clips.py", root / "recipes" / "recordings.py"]
    code += [package / "video" / "reader.py", package / "video" / "preprocess.py"]
    return key_of(code=code_version(code), table=TABLE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Measured:
    """Where the results of a clip lie: the dense references, and a file for each method."""

    clip: str
    dense: Path
    methods: dict[str, Path]


@torch.inference_mode()
def measure_clip(name: str, frames: int, methods: dict[str, dict], cache: Path) -> Measured:
    """Measure what is not in the cache yet, each result written as soon as it is there."""
    torch.set_num_threads(1)
    model, preprocess, weights = load_tower()
    pixels = functools.cache(
        lambda: [preprocess(image) for image in itertools.islice(load_clip(name).frames(), frames)]
    )
    shown = key_of(clip=name, digest=pixels_digest(name, frames, pixels, preprocess, cache), weights=weights)
    dense_path = cache / "dense" / f"{name}-{shown}.safetensors"
    if not dense_path.is_file():
        dense_path.parent.mkdir(parents=True, exist_ok=True)
        partial = dense_path.with_name(dense_path.name + ".part")
        save_file(measure_dense(model, pixels()), partial)
        partial.replace(dense_path)
    paths = {}
    for label, options in methods.items():
        resolved = model.new_stream(**options).gate.to_dict()
        paths[label] = cache / "methods" / f"{name}-{key_of(shown=shown, gate=resolved, code=model_version())}.npz"
        if not paths[label].is_file():
            with safe_open(dense_path, "pt") as dense:
                pooled, patches = dense.get_tensor("pooled"), dense.get_tensor("patches")
            buffer = io.BytesIO()
            np.savez(buffer, **measure_method(model, pixels(), pooled, patches, options))
            write_whole(paths[label], buffer.getvalue())
    return Measured(name, dense_path, paths)


def load_clip(name: str) -> Clip:
    """One clip of the suite."""
    (clip,) = load_clips([name])
    return clip


def pixels_digest(name: str, frames: int, pixels, preprocess: Preprocessor, cache: Path) -> str:
    """What identifies a clip's pixel values; they are made anew for it only where the code that makes them changed."""
    made = key_of(clip=name, frames=frames, resolution=preprocess.resolution, code=footage_version())
    memo = cache / "pixels" / f"{name}-{made}.txt"
    if not memo.is_file():
        digest = hashlib.blake2b(digest_size=8)
        for frame in pixels():
            digest.update(frame.numpy().tobytes())
        write_whole(memo, digest.hexdigest().encode())
    return memo.read_text()


def timed(call) -> tuple:
    """What `call` returns, and the milliseconds it took."""
    start = time.perf_counter()
    return call(), 1e3 * (time.perf_counter() - start)


def measure_dense(model: NeuroFlowSiglipVisionModel, pixels: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A clip's dense outputs, and every pair of its frames compared: what all baselines are made of.

    Returns:
        `pooled` [T, D] and `patches` float16 [T, N, D], the outputs; `milliseconds` [T]; `pair_pooled`,
        `pair_patch_mean`, `pair_patch_p5` [T, T], cosines of the outputs of two frames, pooled, and mean and 5th
        percentile over patches; `pair_surprise` and `pair_changed` [T, T], mean surprise between two frames, and
        share of patches over CHANGED; `trigger_costs` [2], what a triggered hold spends on a keyframe and on another.
    """
    pooled, patches, signals, milliseconds = [], [], [], []
    for frame in pixels:
        output, spent = timed(lambda frame=frame: model(pixel_values=frame))
        pooled.append(output.pooler_output[0])
        patches.append(output.last_hidden_state[0].half())
        signals.append(project_patches(model, frame, as_product=True)[0])
        milliseconds.append(spent)
    stream = model.new_stream(mode="hold", keyframe_surprise=2.0)
    costs = [model(pixel_values=pixels[0], stream=stream).cost.item() for _ in range(2)]
    pooled, patches = torch.stack(pooled), torch.stack(patches)
    of_patches = patch_pairs(patches)
    surprises = 1 - patch_pairs(torch.stack(signals))
    return {
        "pooled": pooled,
        "patches": patches,
        "milliseconds": torch.tensor(milliseconds),
        "pair_pooled": patch_pairs(pooled[:, None])[0].contiguous(),
        "pair_patch_mean": of_patches.mean(0),
        "pair_patch_p5": of_patches.quantile(0.05, dim=0),
        "pair_surprise": surprises.mean(0),
        "pair_changed": (surprises > CHANGED).float().mean(0),
        "trigger_costs": torch.tensor(costs),
    }


def patch_pairs(features: torch.Tensor) -> torch.Tensor:
    """Cosines of each patch in every two frames: [T, N, D] to float32 [N, T, T], at most 1."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1).transpose(0, 1)
    return (unit @ unit.mT).clamp(max=1)


def measure_method(
    model: NeuroFlowSiglipVisionModel,
    pixels: Sequence[torch.Tensor],
    pooled: torch.Tensor,
    patches: torch.Tensor,
    options: dict,
) -> dict[str, np.ndarray]:
    """
    One method over one clip, against the dense outputs `pooled` [T, D] and `patches` [T, N, D].

    Returns:
        For each frame `cost`, `milliseconds`, `pooled` [T, D], and its cosines `pooled_cosine`, `patch_mean`,
        `patch_p5`; and `dense_milliseconds`, of dense forwards among them.
    """
    stream = model.new_stream(**options)
    rows: dict[str, list] = {name: [] for name in ("cost", "milliseconds", "pooled", "patch_mean", "patch_p5")}
    dense_milliseconds = []
    for index, frame in enumerate(pixels):
        if index % DENSE_EVERY == 1:
            dense_milliseconds.append(timed(lambda frame=frame: model(pixel_values=frame))[1])
        output, spent = timed(lambda frame=frame: model(pixel_values=frame, stream=stream))
        if output.token_mask is not None:
            raise ValueError(f"Mode {stream.gate.mode!r} does not return all patches, which are compared here.")
        cosines = torch.cosine_similarity(output.last_hidden_state[0], patches[index].float(), dim=-1)
        rows["cost"].append(output.cost.item())
        rows["milliseconds"].append(spent)
        rows["pooled"].append(output.pooler_output[0].numpy())
        rows["patch_mean"].append(cosines.mean().item())
        rows["patch_p5"].append(cosines.quantile(0.05).item())
    rows["dense_milliseconds"] = dense_milliseconds
    rows["pooled_cosine"] = torch.cosine_similarity(torch.from_numpy(np.stack(rows["pooled"])), pooled, dim=-1)
    return {name: np.asarray(values) for name, values in rows.items()}


# --- baselines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """
    A policy that returns dense outputs of earlier frames: the expectation over V runs.

    Attributes:
        cost: expected, over dense's, per frame after the first.
        references: int [V, T], the frame whose output is returned.
        weights: [V], sum 1.
    """

    cost: float
    references: np.ndarray
    weights: np.ndarray


def last_keyframes(keyframes: np.ndarray) -> np.ndarray:
    """For each frame the last keyframe up to it, bool [..., T] to int [..., T]; the first frame always is one."""
    index = np.arange(keyframes.shape[-1])
    return np.maximum.accumulate(np.where(keyframes, index, 0), axis=-1)


def hold_every(interval: int, frames: int) -> Baseline:
    """Dense every `interval` frames, whichever the phase: a run for each, all equally likely."""
    phases = np.arange(interval)
    keyframes = np.arange(frames) % interval == phases[:, None]
    return Baseline(1 / interval, last_keyframes(keyframes), np.full(interval, 1 / interval))


def hold_triggered(pairs: np.ndarray, level: float, costs: Sequence[float]) -> Baseline:
    """
    Dense whenever a frame differs from the last dense one by more than `level`: mode `hold` with a keyframe trigger.

    Args:
        pairs: [T, T], how much a frame differs from another.
        level: `keyframe_surprise` or `keyframe_fraction`.
        costs: of a keyframe, and of a frame that is looked at and held.
    """
    keyframes = np.zeros(len(pairs), dtype=bool)
    last = 0
    for frame in range(1, len(pairs)):
        if pairs[frame, last] > level:
            keyframes[frame], last = True, frame
    share = keyframes[1:].mean()
    return Baseline(share * costs[0] + (1 - share) * costs[1], last_keyframes(keyframes)[None], np.ones(1))


def first_repeated(frames: int) -> Baseline:
    """The first frame's output for ever, at no cost."""
    return Baseline(0.0, np.zeros((1, frames), dtype=int), np.ones(1))


def always_dense(frames: int) -> Baseline:
    """Every frame dense."""
    return Baseline(1.0, np.arange(frames)[None], np.ones(1))


def baseline_families(
    surprise: np.ndarray, changed: np.ndarray, trigger_costs: Sequence[float]
) -> dict[str, list[Baseline]]:
    """
    All baselines of a clip, by family; member i of a family has the same settings on every clip.

    Args:
        surprise, changed: [T, T], between two frames: mean surprise, share of patches changed.
        trigger_costs: as in `hold_triggered`.
    """
    frames = len(surprise)
    first, dense = first_repeated(frames), always_dense(frames)
    triggers = {
        name: [first, *(hold_triggered(pairs, level, trigger_costs) for level in (math.inf, *levels)), dense]
        for name, pairs, levels in (
            ("mean surprise", surprise, SURPRISE_LEVELS),
            ("share changed", changed, FRACTION_LEVELS),
        )
    }
    every = [hold_every(interval, frames) for interval in range(1, LONGEST_INTERVAL + 1)]
    return {"every k": [first, *every], **triggers, "first frame": [first]}


def mixed(baselines: Sequence[Baseline], shares: Iterable[tuple[float, int]]) -> Baseline:
    """The mixture of some of the baselines: one of them is drawn for the clip."""
    parts = [(share, baselines[index]) for share, index in shares if share > 0]
    return Baseline(
        sum(share * part.cost for share, part in parts),
        np.concatenate([part.references for _, part in parts]),
        np.concatenate([share * part.weights for share, part in parts]),
    )


# --- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Cosines to dense of V runs over F frames after the first; what they stand for is the expectation over them.

    Attributes:
        cosines: `pooled_mean` and `pooled_p5` (the same array), `patch_mean`, `patch_p5`: [V, F] each.
        weights: [V], sum 1.
    """

    cosines: dict[str, np.ndarray]
    weights: np.ndarray

    @classmethod
    def of(cls, pooled: np.ndarray, patch_mean: np.ndarray, patch_p5: np.ndarray, weights: np.ndarray) -> "Runs":
        """From [V, T] with the first frame, which is left out here."""
        names = ("pooled_mean", "pooled_p5", "patch_mean", "patch_p5")
        parts = (pooled, pooled, patch_mean, patch_p5)
        return cls({name: part[:, 1:] for name, part in zip(names, parts, strict=True)}, weights)


def statistic(name: str, runs: Runs, drawn: np.ndarray | None = None) -> np.ndarray:
    """
    One of STATISTICS, for each of R resamples of the frames: int [R, F] to [R]; by default of the frames as they are.

    A percentile is taken within each run and averaged then: a user has one run.
    """
    cosines = runs.cosines[name]
    if drawn is None:
        drawn = np.arange(cosines.shape[1])[None]
    if name == "pooled_p5":
        return sum(w * fifth_percentile(run[drawn]) for w, run in zip(runs.weights, cosines, strict=True))
    return (runs.weights @ cosines)[drawn].mean(-1)


def fifth_percentile(values: np.ndarray) -> np.ndarray:
    """Over the last axis, interpolated as `np.quantile` does, which takes a hundred times as long here."""
    ordered = np.sort(values, axis=-1)
    place = 0.05 * (values.shape[-1] - 1)
    below = math.floor(place)
    above = min(below + 1, values.shape[-1] - 1)
    return ordered[..., below] + (place - below) * (ordered[..., above] - ordered[..., below])


def block_resamples(frames: int, seed: int, block: int = BLOCK, resamples: int = RESAMPLES) -> np.ndarray:
    """
    Indices [resamples, frames] of a moving-block bootstrap: neighbouring frames are alike, so blocks are drawn. They
    go round at the end, or the first and last frames would be drawn less often.
    """
    if frames == 0:
        return np.zeros((resamples, 0), dtype=int)
    block = min(block, frames)
    starts = np.random.default_rng(seed).integers(frames, size=(resamples, math.ceil(frames / block)))
    drawn = (starts[..., None] + np.arange(block)) % frames
    return drawn.reshape(resamples, -1)[:, :frames]


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline on one clip, in one statistic; `draws` [R] are resampled differences."""

    value: float
    baseline: float
    family: str
    draws: np.ndarray

    @property
    def difference(self) -> float:
        """Above zero where the method is closer to dense."""
        return self.value - self.baseline

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return interval_of(self.draws)

    @property
    def verdict(self) -> str:
        """Above, level or below."""
        return verdict_of(self.difference, self.interval)


def compare(name: str, family: str, method: Runs, baseline: Runs, drawn: np.ndarray) -> Comparison:
    """One statistic of both over the same resamples of the same frames."""
    draws = statistic(name, method, drawn) - statistic(name, baseline, drawn)
    return Comparison(statistic(name, method).item(), statistic(name, baseline).item(), family, draws)


def interval_of(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values; NaN of none."""
    if len(draws) == 0 or np.isnan(draws).any():
        return (math.nan, math.nan)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def verdict_of(difference: float, interval: tuple[float, float]) -> str:
    """`above` or `below` if the interval is clear of zero and the difference at least LEVEL, else `level`."""
    if abs(difference) >= LEVEL:
        if interval[0] > 0:
            return "above"
        if interval[1] < 0:
            return "below"
    return "level"


def pooled_draws(draws: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Resampled means over clips: [clips, R] resampled differences to [R]. Clips are drawn, and for each that is drawn
    one of its own resamples; what is drawn twice comes with two resamples.
    """
    clips, resamples = draws.shape
    if clips == 0:
        return np.full(resamples, np.nan)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(clips, size=(resamples, clips))
    return draws[chosen, rng.integers(resamples, size=(resamples, clips))].mean(1)


# --- delay -----------------------------------------------------------------------------------------------------------


def delay(to_now: np.ndarray, to_before: np.ndarray, event: int) -> int:
    """
    Frames from an event until the output follows it, DELAY_CAP at most, or until the end of the clip.

    Args:
        to_now: [T], cosine of each frame's output to dense's output of that frame.
        to_before: [T], the same to dense's output of the frame before the event.
        event: the first frame that shows something else.
    """
    followed = (to_now > to_before)[event : event + DELAY_CAP]
    return int(followed.argmax()) if followed.any() else len(followed)


def method_delay(pooled: np.ndarray, dense: np.ndarray, event: int) -> int:
    """`delay` of pooled outputs [T, D] beside dense ones [T, D]."""
    ours, theirs = (features / np.linalg.norm(features, axis=-1, keepdims=True) for features in (pooled, dense))
    return delay((ours * theirs).sum(-1), ours @ theirs[event - 1], event)


def baseline_delay(baseline: Baseline, pairs: np.ndarray, event: int) -> float:
    """Expected `delay` of a baseline, from the cosines [T, T] of dense outputs."""
    index = np.arange(len(pairs))
    delays = [delay(pairs[index, run], pairs[event - 1, run], event) for run in baseline.references]
    return float(baseline.weights @ delays)


# --- one clip --------------------------------------------------------------------------------------------------------


PAIRS = ("pooled", "patch_mean", "patch_p5", "surprise", "changed")


@dataclass(frozen=True)
class ClipBaselines:
    """A clip's dense outputs and baselines, and the resamples of its frames that all comparisons share."""

    clip: Clip
    pooled: np.ndarray
    pairs: dict[str, np.ndarray]
    families: dict[str, list[Baseline]]
    drawn: np.ndarray

    @classmethod
    def load(cls, clip: Clip, path: Path) -> "ClipBaselines":
        """From what `measure_dense` gave."""
        with safe_open(path, "np") as dense:
            pairs = {name: dense.get_tensor(f"pair_{name}") for name in PAIRS}
            costs = dense.get_tensor("trigger_costs").tolist()
            pooled = dense.get_tensor("pooled")
        families = baseline_families(pairs["surprise"], pairs["changed"], costs)
        drawn = block_resamples(len(pooled) - 1, seed=zlib.crc32(clip.name.encode()))
        return cls(clip, pooled, pairs, families, drawn)

    def runs(self, baseline: Baseline) -> Runs:
        """A baseline's cosines to dense."""
        index = np.arange(len(self.pooled))
        looked_up = [self.pairs[name][index, baseline.references] for name in ("pooled", "patch_mean", "patch_p5")]
        return Runs.of(*looked_up, baseline.weights)

    def at_cost(self, cost: float) -> dict[str, Baseline]:
        """Each family's baseline at a cost."""
        return {
            name: mixed(family, shares_at([baseline.cost for baseline in family], cost))
            for name, family in self.families.items()
        }


@dataclass(frozen=True)
class ClipResult:
    """
    A method on one clip.

    Attributes:
        cost: mean, without the first frame.
        wall: milliseconds over dense's, measured in turns.
        runs: cosines to dense.
        comparisons: by statistic, with the best baseline at equal cost.
        delays: for each event, by `method` and by family of baselines at equal cost, in excess of dense's.
    """

    clip: Clip
    cost: float
    wall: float
    runs: Runs
    comparisons: dict[str, Comparison]
    delays: list[dict[str, float]]


def judge(baselines: ClipBaselines, path: Path) -> ClipResult:
    """A method's figures on a clip, from what `measure_method` gave, beside the best baselines."""
    with np.load(path) as stored:
        measured = dict(stored)
    runs = Runs.of(*(measured[name][None] for name in ("pooled_cosine", "patch_mean", "patch_p5")), np.ones(1))
    cost = float(measured["cost"][1:].mean())
    wall = float(measured["milliseconds"][1:].mean() / measured["dense_milliseconds"].mean())
    candidates = {family: baselines.runs(baseline) for family, baseline in baselines.at_cost(cost).items()}
    comparisons = {}
    for name in STATISTICS:
        best = max(candidates, key=lambda family, name=name: statistic(name, candidates[family]).item())
        comparisons[name] = compare(name, best, runs, candidates[best], baselines.drawn)
    delays = []
    for event in baselines.clip.events:
        if event >= len(baselines.pooled):
            continue
        pairs = baselines.pairs["pooled"]
        own = baseline_delay(always_dense(len(pairs)), pairs, event)
        held = {family: baseline_delay(baseline, pairs, event) for family, baseline in baselines.at_cost(cost).items()}
        found = {"method": method_delay(measured["pooled"], baselines.pooled, event), **held}
        delays.append({name: frames - own for name, frames in found.items()})
    return ClipResult(baselines.clip, cost, wall, runs, comparisons, delays)


# --- all clips -------------------------------------------------------------------------------------------------------


def pool(comparisons: Sequence[Comparison], names: Sequence[str]) -> dict:
    """Comparisons of several clips, whose names these are, in one row: means, the interval, verdicts."""
    difference = float(np.mean([one.difference for one in comparisons]))
    interval = interval_of(pooled_draws(np.stack([one.draws for one in comparisons])))
    by_verdict = {verdict: [] for verdict in ("above", "level", "below")}
    for name, one in zip(names, comparisons, strict=True):
        by_verdict[one.verdict].append(name)
    return {
        "value": rounded(np.mean([one.value for one in comparisons])),
        "control": rounded(np.mean([one.baseline for one in comparisons])),
        "difference": rounded(difference),
        "interval": [rounded(end) for end in interval],
        "verdict": verdict_of(difference, interval),
        "clips": {verdict: len(found) for verdict, found in by_verdict.items()},
        "below": by_verdict["below"],
    }


def rounded(value: float) -> float:
    """To a millionth."""
    return round(float(value), 6)


def pooled_rows(method: str, results: Sequence[ClipResult]) -> list[dict]:
    """A method's rows over all clips, over the recorded and over the composed ones."""
    rows = []
    for which, real in (("all", (True, False)), ("real", (True,)), ("composed", (False,))):
        some = [result for result in results if result.clip.real in real]
        if not some:
            continue
        names = [result.clip.name for result in some]
        rows.append(
            {
                "method": method,
                "clips": which,
                "equal": "cost",
                "cost": rounded(np.mean([result.cost for result in some])),
                "wall": rounded(np.mean([result.wall for result in some])),
                **{name: pool([result.comparisons[name] for result in some], names) for name in STATISTICS},
                "delay": mean_delays(some),
            }
        )
    return rows


def mean_delays(results: Sequence[ClipResult]) -> dict:
    """Over all events of these clips: how many, and the mean delay of the method and of each family of baselines."""
    events = [event for result in results for event in result.delays]
    names = events[0] if events else ()
    return {"events": len(events), **{name: rounded(np.mean([event[name] for event in events])) for name in names}}


CLIP_COLUMNS = ("value", "control", "family", "low", "high", "verdict")


def clip_row(method: str, result: ClipResult) -> dict:
    """A method's row on one clip; each comparison is a list, as CLIP_COLUMNS."""
    row = {"method": method, "clip": result.clip.name, "cost": rounded(result.cost), "wall": rounded(result.wall)}
    row["equal_cost"] = {
        name: [rounded(one.value), rounded(one.baseline), one.family, *map(rounded, one.interval), one.verdict]
        for name, one in result.comparisons.items()
    }
    row["delays"] = [{name: rounded(frames) for name, frames in event.items()} for event in result.delays]
    return row


def report_text(report: dict, tables: dict[str, list[dict]]) -> str:
    """A report as JSON whose tables have a line for each row."""
    parts = [json.dumps(report, indent=2).removesuffix("\n}")]
    for name, rows in tables.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        parts.append(f'  "{name}": [\n{lines}\n  ]')
    return ",\n".join(parts) + "\n}\n"


# --- showing ---------------------------------------------------------------------------------------------------------


def pooled_table(rows: Sequence[dict], title: str) -> Table:
    """All clips: a line for each method and statistic."""
    columns = ("method", "cost", "wall", "cosine of", "method's", "baseline's", "difference, thousandths")
    table = Table(*columns, "clips above, level, below", title=title, title_justify="left")
    for row in rows:
        for name, heading in STATISTICS.items():
            one = row[name]
            table.add_row(
                row["method"],
                f"{row['cost']:.3f}",
                f"{row['wall']:.3f}",
                heading,
                f"{one['value']:.4f}",
                f"{one['control']:.4f}",
                with_interval(one["difference"], one["interval"], "{:+.2f}", 1e3),
                ", ".join(map(str, one["clips"].values())),
            )
    return table


VERDICT_COLOURS = {"above": "#15803d", "level": "#9ca3af", "below": "#b91c1c"}
FAMILY_LINES = {"every k": "#475569", "mean surprise": "#2563eb", "share changed": "#93c5fd"}
METHOD_COLOURS = (
    "#d97706", "#dc2626", "#db2777", "#7c3aed", "#0d9488", "#65a30d", "#854d0e", "#111827", "#06b6d4", "#f472b6",
)  # fmt: skip
LEAST_ERROR = 1e-5


def plot_policies(
    baselines: Sequence[ClipBaselines],
    results: dict[str, list[ClipResult]],
    rows: Sequence[dict],
    detailed: str,
) -> Figure:
    """
    Above, error of the pooled output over cost, mean over clips: baselines with one setting for all clips as lines,
    methods as points, each with its best baselines at its own cost on each clip. Below, one method clip by clip.
    """
    figure = Figure(figsize=(13, 14), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2, height_ratios=(1, 1.35))
    for panel, name, title in (
        (top_left, "pooled_mean", "mean error"),
        (top_right, "pooled_p5", "error at the 5th percentile of frames"),
    ):
        draw_error_over_cost(panel, baselines, rows, name)
        panel.set_title(f"Pooled output, {title}, {len(baselines)} clips", loc="left", fontsize=11)
    top_left.legend(loc="lower left", frameon=False, fontsize=9)
    top_right.legend(handles=method_handles(rows), loc="lower left", frameon=False, fontsize=9)
    ordered = sorted(results[detailed], key=lambda result: result.comparisons["pooled_mean"].difference)
    for panel, name, title in (
        (bottom_left, "pooled_mean", "mean"),
        (bottom_right, "pooled_p5", "5th percentile"),
    ):
        draw_differences(panel, ordered, name)
        panel.set_title(f"`{detailed}` less the best baseline at equal cost: {title}", loc="left", fontsize=11)
    bottom_right.tick_params(labelleft=False)
    bottom_left.legend(
        handles=[Line2D([], [], color=colour, marker="o", label=name) for name, colour in VERDICT_COLOURS.items()],
        loc="lower right",
        fontsize=9,
    )
    return figure


def draw_error_over_cost(panel, baselines: Sequence[ClipBaselines], rows: Sequence[dict], name: str):
    """Baseline families as lines, methods as points."""
    for family, colour in FAMILY_LINES.items():
        costs = np.mean([[baseline.cost for baseline in one.families[family]] for one in baselines], axis=0)
        fidelity = np.mean(
            [[statistic(name, one.runs(baseline)).item() for baseline in one.families[family]] for one in baselines],
            axis=0,
        )
        order = [index for index in np.argsort(costs) if costs[index] > 0 and fidelity[index] < 1 - LEAST_ERROR]
        label = "baseline: dense every k frames" if family == "every k" else f"baseline: dense on {family}"
        panel.plot(costs[order], 1 - fidelity[order], color=colour, linewidth=1.6, label=label)
    for row, colour in zip(rows, itertools.cycle(METHOD_COLOURS), strict=False):
        cost, value, baseline = row["cost"], 1 - row[name]["value"], 1 - row[name]["control"]
        value, baseline = max(value, LEAST_ERROR), max(baseline, LEAST_ERROR)
        panel.plot([cost, cost], [value, baseline], color=colour, linewidth=0.8)
        panel.plot(cost, baseline, "o", color="white", markeredgecolor=colour, markersize=6)
        panel.plot(cost, value, color=colour, zorder=4, **marker_of(row["method"]))
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(0.02, 1.1)
    panel.set_xlabel("cost (share of dense)")
    panel.set_ylabel("1 - cosine to dense")
    tidy(panel)


def marker_of(method: str) -> dict:
    """Presets are stars, other methods points."""
    return {"marker": "*", "markersize": 13} if method in PRESETS else {"marker": "o", "markersize": 7}


def method_handles(rows: Sequence[dict]) -> list[Line2D]:
    """A legend's entries for the methods' points and their baselines."""
    handles = [
        Line2D([], [], linestyle="", color=colour, label=row["method"], **marker_of(row["method"]))
        for row, colour in zip(rows, itertools.cycle(METHOD_COLOURS), strict=False)
    ]
    hollow = {"marker": "o", "markerfacecolor": "white", "color": "#475569"}
    return [*handles, Line2D([], [], linestyle="", label="best baseline on each clip at that cost", **hollow)]


def draw_differences(panel, results: Sequence[ClipResult], name: str):
    """Each clip's difference and interval."""
    for place, result in enumerate(results):
        one = result.comparisons[name]
        colour = VERDICT_COLOURS[one.verdict]
        panel.plot(one.interval, (place, place), color=colour, linewidth=2)
        panel.plot(one.difference, place, "o", color=colour, markersize=5)
    panel.axvline(0, color="#111827", linewidth=1)
    panel.set_yticks(range(len(results)), [result.clip.name for result in results], fontsize=9)
    panel.set_ylim(-0.6, len(results) - 0.4)
    panel.set_xscale("symlog", linthresh=1e-3, linscale=1)
    panel.set_xlabel("difference (right: the method is closer to dense)")
    tidy(panel)


# --- main ------------------------------------------------------------------------------------------------------------


def chosen_methods(names: str | None) -> dict[str, dict]:
    """The methods named, with commas between them; None takes all."""
    wanted = list(METHODS) if names is None else [name.strip() for name in names.split(",")]
    unknown = sorted(set(wanted) - set(METHODS))
    if unknown:
        raise typer.BadParameter(f"Unknown methods: {', '.join(unknown)}. There are: {', '.join(METHODS)}.")
    return {name: METHODS[name] for name in wanted}


def measure_all(
    clips: Sequence[str], frames: int, methods: dict[str, dict], workers: int, cache: Path
) -> list[Measured]:
    """`measure_clip` of all clips, in so many processes; in the clips' order."""
    load_clips(clips)  # downloads once, not in every process
    build_tower(default_tower_dir())
    measured = {}
    context = multiprocessing.get_context("spawn")
    with Progress(console=Console(stderr=True)) as progress, ProcessPoolExecutor(workers, context) as pool:
        task = progress.add_task("clips", total=len(clips))
        for done in as_completed([pool.submit(measure_clip, name, frames, methods, cache) for name in clips]):
            measured[done.result().clip] = done.result()
            progress.advance(task)
    return [measured[name] for name in clips]


def main(
    methods: Annotated[str | None, typer.Option(help="Measure only these methods, separated by commas.")] = None,
    clips: Annotated[str | None, typer.Option(help="Measure only these clips, separated by commas.")] = None,
    frames: Annotated[int, typer.Option(help="Use the first N frames of each clip.", min=2)] = 100,
    workers: Annotated[int, typer.Option(help="Number of processes, each with one thread.", min=1)] = 1,
    detail: Annotated[str, typer.Option(help="Show this method clip by clip.")] = DEFAULT_PRESET,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "vision_policies.json",
    plot: Annotated[Path, typer.Option(help="Write this picture.")] = RESULTS.parents[1] / "docs" / "policies.png",
):
    """Measure what is missing, compare, and write the tables and the picture."""
    torch.set_num_threads(1)
    chosen = chosen_methods(methods)
    if detail not in chosen:
        raise typer.BadParameter(f"--detail {detail!r} is not among the methods: {', '.join(chosen)}.")
    names = list(NAMES) if clips is None else clips.split(",")
    cache = default_tower_dir().parent / "eval"
    measured = measure_all(names, frames, chosen, workers, cache)
    baselines = [
        ClipBaselines.load(clip, one.dense) for clip, one in zip(map(load_clip, names), measured, strict=True)
    ]
    results = {
        method: [judge(one, found.methods[method]) for one, found in zip(baselines, measured, strict=True)]
        for method in chosen
    }
    rows = [row for method, found in results.items() for row in pooled_rows(method, found)]

    report = {
        **provenance(),
        "tower": "DINOv2-small in SigLIP's architecture, 224 px, float32",
        "code": model_version(),
        "clips_measured": {one.clip.name: len(one.pooled) for one in baselines},
        "block": BLOCK,
        "resamples": RESAMPLES,
        "level_below": LEVEL,
        "controls": {
            "every k": LONGEST_INTERVAL,
            "mean surprise": [rounded(level) for level in SURPRISE_LEVELS],
            "share changed": FRACTION_LEVELS,
        },
        "methods": chosen,
        "clip_columns": CLIP_COLUMNS,
    }
    clip_rows = [clip_row(method, result) for method, found in results.items() for result in found]
    write_whole(output, report_text(report, {"pooled": rows, "clips": clip_rows}))

    over_all = [row for row in rows if row["clips"] == "all"]
    write_figure(plot, plot_policies(baselines, results, over_all, detail))
    wide_console(130).print(pooled_table(over_all, f"best baseline at equal cost; {len(names)} clips"))


if __name__ == "__main__":
    typer.run(main)
