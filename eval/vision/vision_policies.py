"""
Is a preset ever further from dense than holding a dense frame at the same cost? And how far are the modes?

    torchrun --nproc_per_node 2 -m eval.vision.vision_policies    # an hour on two cores; run again to continue
    python -m eval.vision.vision_policies --tower dinov2 --methods faithful,balanced,thrifty

Every clip of `clips.py`, 120 frames each; a clip with fewer frames is played forward and back. Every frame is compared
with a dense forward of the same frame, except the first, which every method encodes in full. The figure is the cosine,
of the pooled output and of the patches.

All baselines hold the dense output of an earlier frame. They encode a new frame every k frames (all k, all phases);
when its mean surprise or its share of changed patches exceeds a level; when the motion vectors or packet sizes of an
H.264 encoder, summed since the last encoded frame, exceed a level; or never. A baseline can also switch between two
settings, so its value at any cost is the mixture of the two settings nearest in cost. For each clip and statistic, the
best baseline is chosen afterwards, which favours the baselines: once at equal cost, and once at equal processor time.
A preset is also compared with the baseline that can be chosen beforehand, dense every 1 / `cost_budget` frames,
and with an oracle, which sees the error of the held output and encodes when it exceeds a level.

Intervals are 95 %, from a paired moving-block bootstrap over frames, and over clips where results of clips are pooled.
Recordings are kept in the cache, embeddings in float16, which hides differences below about 1e-6. Writes
`eval/results/vision_policies.json` and `docs/policies.png` (`--tower dinov2`: with `_dinov2` in their names), shown in
`docs/results/fidelity.md`, `docs/results/holding.md`, `docs/guides/vlms.md` and README.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from torch import Tensor

from eval.docs.fidelity import delays_table, policies_table
from eval.report import RESULTS, provenance, publish, rounded, tidy
from eval.vision.clip_recorder import FRAMES, PATCH_FIGURES, ClipRecorder, load_clip
from eval.vision.clip_statistics import drawn_blocks
from eval.vision.clips import NAMES, Clip
from neuroflow_hf import NeuroFlowDinov2Model, NeuroFlowSiglipVisionModel
from neuroflow_hf.evaluation.equal_cost import Mixture, shares_at, verdict
from neuroflow_hf.evaluation.statistics import middle, resamples
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.vision.gate_config import DEFAULT_PRESET, PRESETS, NeuroFlowGateConfig
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir, load_original_from_wheels, wheel_dir

TOWERS = {"siglip": "DINOv2-small in SigLIP's architecture", "dinov2": "DINOv2-small"}
FIDELITIES = (0.98, 0.99, 0.999)
METHODS = {
    **{preset: {"preset": preset} for preset in PRESETS},
    **{f"fidelity {least}": {"min_fidelity": least} for least in FIDELITIES},
    "extrapolate": {"mode": "extrapolate"},
    "context": {"mode": "context"},
    "reconstruct (the paper's C)": {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.05},
    "eliminate (the paper's B)": {"mode": "eliminate", "reference": "ema", "ema_rate": 0.05},
    "mlp (the paper's A)": {"mode": "mlp"},
}
# The controller of the cost budget was developed on these clips; the others are held out.
DEVELOPMENT = (
    *("walker", "street-cuts", "carphone", "webcam", "big-buck-bunny", "city-by-night"),
    *("waving-grass", "hand-held"),
)
# families of baselines, and the oracle
EVERY, SURPRISE, SHARE, ORACLE = "every k", "mean surprise", "share changed", "oracle"
MOTION, PACKETS = "motion vectors", "packet sizes"
SURPRISE_LEVELS = tuple(np.geomspace(0.003, 0.4, 15).tolist())
FRACTION_LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MOTION_LEVELS = tuple(np.geomspace(0.0005, 2, 25).tolist())
PACKET_LEVELS = tuple(np.geomspace(0.001, 8, 25).tolist())
ERROR_LEVELS = tuple(np.geomspace(1e-5, 0.5, 40).tolist())
LONGEST_INTERVAL = 100

STATISTICS = ("pooled_mean", "pooled_p5")
BLOCK = 10
RESAMPLES = 2000
DELAY_CAP = 30
CLIP_COLUMNS = ("value", "control", "family", "low", "high", "verdict")

# --- one clip --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """
    V equally likely runs of a method over a clip, such as the phases of a dense frame every k frames. Figures are
    means over the runs.
    """

    cost: float  # relative to dense, mean over the F frames after the first
    cosines: np.ndarray  # of the output to dense's on these frames, [V, F]
    delays: np.ndarray  # frames from each event until the output follows it, [E]
    time: float  # processor time relative to dense; of a baseline, what its dense frames take


def outcome(cost: float, outputs: Tensor, dense: Tensor, events: Sequence[int], time: float | None = None) -> Outcome:
    """The outcome of unit outputs [V, T, D], with dense's [T, D]."""
    cosines = (outputs * dense).sum(-1)
    delays = []
    for event in events:
        followed = (cosines > outputs @ dense[event - 1])[:, event : event + DELAY_CAP]
        frames = torch.where(followed.any(1), followed.int().argmax(1), followed.shape[1])
        delays.append(frames.double().mean().item())
    return Outcome(cost, cosines[:, 1:].double().numpy(), np.array(delays), cost if time is None else time)


def held_every(interval: int, dense: Tensor) -> Tensor:
    """Outputs [interval, T, D] of a dense frame every `interval` frames, one run for each phase."""
    index = torch.arange(len(dense))
    return dense[(index - (index - torch.arange(interval)[:, None]) % interval).clamp(min=0)]


def held_when(distance: Tensor, level: float) -> list[int]:
    """For each of T frames, the held frame: a new one when the distance [T, T] to the held one exceeds a level."""
    held = [0]
    for number in range(1, len(distance)):
        held.append(number if distance[held[-1], number] > level else held[-1])
    return held


def held_since(amounts: Tensor, level: float) -> list[int]:
    """For each of T frames, the held frame: a new one when the sum of the amounts [T] since then exceeds a level."""
    held, total = [0], 0.0
    for number, amount in enumerate(amounts.tolist()[1:], start=1):
        total += amount
        held.append(number if total > level else held[-1])
        total = total if total <= level else 0.0
    return held


def baselines(recorded: dict[str, Tensor], events: Sequence[int]) -> dict[str, list[Outcome]]:
    """The baselines' outcomes by family, from what was recorded of dense; setting i is the same on every clip."""
    dense = recorded["outputs"]
    first = outcome(0.0, dense[:1].expand(1, *dense.shape), dense, events)
    by_clock = [outcome(1 / k, held_every(k, dense), dense, events) for k in range(1, LONGEST_INTERVAL + 1)]
    families = {EVERY: [first, *by_clock], "first frame": [first]}
    keyframe, looking = recorded["costs"].tolist()
    triggered = {
        SURPRISE: [held_when(recorded["mean_surprise"], level) for level in SURPRISE_LEVELS],
        SHARE: [held_when(recorded["changed"], level) for level in FRACTION_LEVELS],
        MOTION: [held_since(recorded["displacement"], level) for level in MOTION_LEVELS],
        PACKETS: [held_since(recorded["packet_size"], level) for level in PACKET_LEVELS],
        ORACLE: [held_when(1 - dense @ dense.T, level) for level in ERROR_LEVELS],
    }
    for family, settings in triggered.items():
        looks = looking if family in (SURPRISE, SHARE) else 0.0
        families[family] = [first]
        for held in settings:
            encoded = np.mean([number == kept for number, kept in enumerate(held)][1:])
            cost = float(encoded * (keyframe if looks else 1) + (1 - encoded) * looks)
            families[family].append(outcome(cost, dense[held][None], dense, events))
        families[family].append(outcome(1.0, dense[None], dense, events))
    return families


@dataclass(frozen=True, eq=False)
class Measured:
    """A clip with the outcomes of dense, the methods and the baselines."""

    clip: Clip
    dense: Outcome
    methods: dict[str, Outcome]
    # by method, PATCH_FIGURES of its patches, and of dense patches held at its cost, [2, 4]
    patches: dict[str, list[list[float]]]
    families: dict[str, list[Outcome]]  # member i of a family has the same settings on every clip
    drawn: np.ndarray  # int [RESAMPLES, F], the resamples of the frames, which all comparisons share


def measure(clip: Clip, recorder: ClipRecorder, methods: dict[str, dict]) -> Measured:
    """The outcomes of a clip, from what was recorded."""
    recorded = recorder.load(clip.name, None)
    dense, events = recorded["outputs"], [event for event in clip.events if event < FRAMES]
    found = {name: recorder.load(clip.name, options) for name, options in methods.items()}
    return Measured(
        clip,
        outcome(1.0, dense[None], dense, events),
        {
            name: outcome(one["cost"][1:].mean().item(), one["outputs"][None], dense, events, one["time"].item())
            for name, one in found.items()
        },
        {name: one["patches"].tolist() for name, one in found.items() if "patches" in one},
        baselines(recorded, events),
        drawn_blocks(np.random.default_rng(zlib.crc32(clip.name.encode())), RESAMPLES, FRAMES - 1, BLOCK),
    )


def statistic(name: str, cosines: np.ndarray, drawn: np.ndarray | None = None) -> np.ndarray:
    """
    One of STATISTICS of runs [V, F], for each of R resamples of the frames `drawn`, int [R, F]: [R]. Without `drawn`,
    of the frames themselves. A percentile is taken within each run and then averaged, because a user has one run.
    """
    if drawn is None:
        drawn = np.arange(cosines.shape[1])[None]
    if name == "pooled_p5":
        return sum(np.quantile(run[drawn], 0.05, axis=-1) for run in cosines) / len(cosines)
    return cosines.mean(0)[drawn].mean(-1)


def compared(own: Outcome, baseline: Mixture, name: str, drawn: np.ndarray) -> tuple[list, np.ndarray]:
    """One of STATISTICS beside a baseline's: CLIP_COLUMNS, and the resampled differences [RESAMPLES]."""
    value = statistic(name, own.cosines).item()
    control = baseline.mean(lambda one: statistic(name, one.cosines).item())
    draws = statistic(name, own.cosines, drawn) - baseline.mean(lambda one: statistic(name, one.cosines, drawn))
    interval = middle(draws)
    return [value, control, baseline.family, *interval, verdict(value - control, interval)], draws


def mixtures_at(families: dict[str, list[Outcome]], cost: float) -> dict[str, Mixture]:
    """Each family of baselines at a cost."""
    found = {}
    for family, settings in families.items():
        shares = shares_at([setting.cost for setting in settings], cost)
        found[family] = Mixture(family, [(share, settings[place]) for share, place in shares if share > 0])
    return found


def judge(method: str, options: dict, measured: Measured) -> tuple[dict, dict[str, np.ndarray]]:
    """
    Compare a method with the best baselines at its cost, on one clip, and a preset with the one chosen beforehand.

    Returns:
        A row for the report, with a list of CLIP_COLUMNS for each of STATISTICS; and the resampled differences
        [RESAMPLES] by statistic, and by `"beforehand " + statistic`.
    """
    own, clip = measured.methods[method], measured.clip
    row: dict = {"method": method, "clip": clip.name, "kind": clip.kind, "cost": own.cost}
    row["development"] = clip.name in DEVELOPMENT
    at_cost, at_time = (mixtures_at(measured.families, share) for share in (own.cost, own.time))
    oracle, holds = at_cost.pop(ORACLE), list(at_cost.values())
    row["equal_cost"], row["equal_time"], row["oracle"], draws = {}, {"time": own.time}, {}, {}
    for name in STATISTICS:
        judged = [compared(own, mixture, name, measured.drawn) for mixture in holds]
        row["equal_cost"][name], draws[name] = max(judged, key=lambda one: one[0][1])
        slower = [compared(own, at_time[family], name, measured.drawn) for family in at_cost]
        row["equal_time"][name], draws[f"time {name}"] = max(slower, key=lambda one: one[0][1])
        row["oracle"][name] = oracle.mean(lambda one, name=name: statistic(name, one.cosines).item())
    least = options.get("min_fidelity")
    if least is not None:
        row["promise"] = {"cosine": least, "kept": float((own.cosines >= least).mean())}
    budget = NeuroFlowGateConfig.from_options(**options).cost_budget
    if budget is not None:
        beforehand = mixtures_at({EVERY: measured.families[EVERY]}, budget)[EVERY]
        row["beforehand"] = {}
        for name in STATISTICS:
            row["beforehand"][name], draws[f"beforehand {name}"] = compared(own, beforehand, name, measured.drawn)
    if method in measured.patches:
        row["patches"] = dict(zip(("own", "held"), measured.patches[method], strict=True))
    held = {mixture.family: mixture.mean(lambda one: one.delays) for mixture in holds}
    beyond = {name: delays - measured.dense.delays for name, delays in {"method": own.delays, **held}.items()}
    row["delays"] = [dict(zip(beyond, map(float, event), strict=True)) for event in zip(*beyond.values(), strict=True)]
    return row, draws


# --- all clips -------------------------------------------------------------------------------------------------------


def pooled_draws(draws: np.ndarray) -> np.ndarray:
    """
    Resampled means over clips, from resampled differences [clips, R] to [R]. Each sample draws clips, and for each
    drawn clip one of its own resamples.
    """
    clips, samples = draws.shape
    rng = np.random.default_rng(0)
    chosen = resamples(clips, samples, rng)
    return draws[chosen, rng.integers(samples, size=(samples, clips))].mean(1)


def pooled_figure(rows: Sequence[list], draws: Sequence[np.ndarray]) -> dict:
    """A statistic over clips, from each clip's CLIP_COLUMNS and resampled differences."""
    found = [dict(zip(CLIP_COLUMNS, row, strict=True)) for row in rows]
    value, control = (float(np.mean([one[key] for one in found])) for key in ("value", "control"))
    interval, verdicts = middle(pooled_draws(np.stack(draws))), [one["verdict"] for one in found]
    return {
        "value": value,
        "control": control,
        "difference": value - control,
        "interval": interval,
        "verdict": verdict(value - control, interval),
        "clips": {name: verdicts.count(name) for name in ("above", "level", "below")},
    }


def pooled_row(method: str, clips: str, rows: Sequence[dict], draws: Sequence[dict[str, np.ndarray]]) -> dict:
    """A method over several clips: means, intervals and verdicts. Delays are means over events."""
    pooled: dict = {"method": method, "clips": clips, "count": len(rows)}
    pooled["cost"] = float(np.mean([row["cost"] for row in rows]))
    for name in STATISTICS:
        for part, key in (("equal_cost", name), ("equal_time", f"time {name}"), ("beforehand", f"beforehand {name}")):
            if part in rows[0]:
                pooled[key] = pooled_figure([row[part][name] for row in rows], [one[key] for one in draws])
    pooled["time"] = float(np.mean([row["equal_time"]["time"] for row in rows]))
    if "promise" in rows[0]:
        kept = [row["promise"]["kept"] for row in rows]
        pooled["promise"] = {"kept": float(np.mean(kept)), "least_kept": min(kept)}
    if "patches" in rows[0]:
        figures = np.mean([list(row["patches"].values()) for row in rows], axis=0).tolist()
        own, held = (dict(zip(PATCH_FIGURES, values, strict=True)) for values in figures)
        pooled["patches"] = {"own": own, "held": held}
    events = [event for row in rows for event in row["delays"]]
    found = events[0] if events else ()
    pooled["delay"] = {"events": len(events), **{n: float(np.mean([one[n] for one in events])) for n in found}}
    return pooled


def policies_report(measured: Sequence[Measured], methods: dict[str, dict]) -> dict:
    """The figures of all methods: over all clips, over held-out clips, over clips of fixed cameras, and by clip."""
    report: dict = {"clip_columns": CLIP_COLUMNS, "patch_figures": PATCH_FIGURES, "pooled": [], "clips": []}
    parts: dict[str, Callable[[dict], bool]] = {
        "all": lambda row: True,
        "held out": lambda row: not row["development"],
        "fixed camera": lambda row: row["kind"] == "fixed camera",
    }
    for method, options in methods.items():
        judged = [judge(method, options, one) for one in measured]
        for part, belongs in parts.items():
            chosen = [pair for pair in judged if belongs(pair[0])]
            if chosen:
                report["pooled"].append(pooled_row(method, part, *zip(*chosen, strict=True)))
        report["clips"] += [row for row, _ in judged]
    return rounded(report)


# --- the picture -----------------------------------------------------------------------------------------------------

VERDICT_COLOURS = {"above": "#15803d", "level": "#9ca3af", "below": "#b91c1c"}
FAMILY_LINES = {EVERY: "#475569", SURPRISE: "#2563eb", SHARE: "#93c5fd", MOTION: "#16a34a", PACKETS: "#86efac"}
METHOD_COLOURS = ("#d97706", "#dc2626", "#db2777", "#7c3aed", "#0d9488", "#65a30d", "#854d0e", "#111827")
LEAST_ERROR = 1e-5


def plot_policies(report: dict, measured: Sequence[Measured], detailed: str) -> Figure:
    """
    In the upper row, error of the pooled output over cost, mean over clips: lines for baselines with one setting for
    all clips, and points for methods, each with the best baselines at its own cost on each clip. In the lower row, the
    method `detailed` on each clip.
    """
    figure = Figure(figsize=(13, 14), layout="constrained")
    above, below = figure.subplots(2, 2, height_ratios=(1, 1.35))
    heads = ("mean", "5th percentile")
    rows = [row for row in report["clips"] if row["method"] == detailed]
    rows = sorted(rows, key=lambda row: row["equal_cost"]["pooled_mean"][0] - row["equal_cost"]["pooled_mean"][1])
    for name, head, errors, differences in zip(STATISTICS, heads, above, below, strict=True):
        whole = [row for row in report["pooled"] if row["clips"] == "all"]
        draw_error_over_cost(errors, whole, measured, name)
        errors.set_title(f"Pooled output, error: {head}, {len(measured)} clips", loc="left", fontsize=11)
        draw_differences(differences, [row["equal_cost"][name] for row in rows])
        differences.set_title(f"`{detailed}` less the best baseline at equal cost: {head}", loc="left", fontsize=11)
        differences.set_yticks(range(len(rows)), [row["clip"] for row in rows], fontsize=9)
    above[0].legend(loc="lower left", frameon=False, fontsize=9)
    below[1].tick_params(labelleft=False)
    colours = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in VERDICT_COLOURS.items()]
    below[0].legend(handles=colours, loc="lower right", fontsize=9)
    return figure


def draw_error_over_cost(panel, rows: Sequence[dict], measured: Sequence[Measured], name: str):
    """Baseline families as lines, methods as points."""
    for family, colour in FAMILY_LINES.items():
        members = zip(*(one.families[family] for one in measured), strict=True)  # a setting on all clips
        points = sorted(
            (np.mean([one.cost for one in clips]), 1 - np.mean([statistic(name, one.cosines) for one in clips]))
            for clips in members
        )
        shown = [point for point in points if point[0] > 0 and point[1] > LEAST_ERROR]
        label = "baseline: dense every k frames" if family == EVERY else f"baseline: dense on {family}"
        panel.plot(*np.array(shown).reshape(-1, 2).T, color=colour, linewidth=1.6, label=label)
    label = "best baseline on each clip at that cost"
    for row, colour in zip(rows, itertools.cycle(METHOD_COLOURS), strict=False):
        look = {"marker": "*", "markersize": 13} if row["method"] in PRESETS else {"marker": "o", "markersize": 7}
        value, control = (max(1 - row[name][key], LEAST_ERROR) for key in ("value", "control"))
        panel.plot([row["cost"]] * 2, [value, control], color=colour, linewidth=0.8)
        panel.plot(row["cost"], value, color=colour, zorder=4, linestyle="", label=row["method"], **look)
        panel.plot(row["cost"], control, "o", color="white", markeredgecolor=colour, markersize=6, label=label)
        label = None
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(0.02, 1.1)
    panel.set_xlabel("cost (share of dense)")
    panel.set_ylabel("1 - cosine to dense")
    tidy(panel)


def draw_differences(panel, compared: Sequence[list]):
    """Each clip's difference and interval, from lists of CLIP_COLUMNS."""
    for place, (value, control, _, low, high, judged) in enumerate(compared):
        panel.plot((low, high), (place, place), color=VERDICT_COLOURS[judged], linewidth=2)
        panel.plot(value - control, place, "o", color=VERDICT_COLOURS[judged], markersize=5)
    panel.axvline(0, color="#111827", linewidth=1)
    panel.set_ylim(-0.6, len(compared) - 0.4)
    panel.set_xscale("symlog", linthresh=1e-3, linscale=1)
    panel.set_xlabel("difference (right: the method is closer to dense)")
    tidy(panel)


# --- main ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def main(
    methods: Annotated[str, typer.Option(help="Measure these methods, separated by commas.")] = ",".join(METHODS),
    tower: Annotated[
        Literal["siglip", "dinov2"], typer.Option(help="Run DINOv2-small in SigLIP's architecture, or as it is.")
    ] = "siglip",
    output: Annotated[
        Path | None, typer.Option(help="Write this JSON file; default: in eval/results, by the tower.")
    ] = None,
):
    """Record what is missing, compare methods with baselines, and write the report and the picture."""
    unknown = set(methods.split(",")) - set(METHODS)
    if unknown:
        raise typer.BadParameter(f"Unknown methods: {', '.join(unknown)}. There are: {', '.join(METHODS)}.")
    options = {name: METHODS[name] for name in METHODS if name in methods.split(",")}
    processes, folder = Processes(), build_tower(default_tower_dir())
    model: Any
    if tower == "siglip":
        model = NeuroFlowSiglipVisionModel.from_pretrained(folder).eval()
    else:
        model = NeuroFlowDinov2Model.from_dinov2(load_original_from_wheels(wheel_dir(folder)))
    recorder = ClipRecorder(model, Preprocessor.from_pretrained(folder), folder.parent / "policies", FRAMES)
    for place in processes.share(len(NAMES)):
        recorder.record(load_clip(NAMES[place], folder.parent), options)
        Console(stderr=True).print(f"{NAMES[place]} is recorded.")
    processes.gather([])  # waits for the others
    if not processes.is_main:
        return
    measured = [measure(load_clip(name, folder.parent), recorder, options) for name in NAMES]
    report = {
        **provenance(),
        "tower": f"{TOWERS[tower]}, 224 px, float32",
        "clips_measured": len(NAMES),
        "frames": FRAMES,
        "methods": {name: PRESETS.get(name, one) for name, one in options.items()},
        **policies_report(measured, options),
    }
    shown = DEFAULT_PRESET if DEFAULT_PRESET in options else next(iter(options))
    name = "policies" if tower == "siglip" else f"policies_{tower}"
    output = output or RESULTS / f"vision_{name}.json"
    pictures = {f"{name}.png": plot_policies(report, measured, shown)}
    publish(output, report, f"{policies_table(report)}\n\n{delays_table(report)}", pictures)


if __name__ == "__main__":
    typer.run(main)
