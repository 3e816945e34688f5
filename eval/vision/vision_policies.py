"""
Are presets and modes closer to dense than the best trivial baseline of the same cost, on the suite of clips?

    python -m eval.vision.vision_policies --frames 60    # run again to continue
    python -m eval.vision.vision_policies --clips pan,webcam --methods balanced --frames 30
    torchrun --nproc_per_node 2 -m eval.vision.vision_policies

All baselines return the dense output of an earlier frame. They encode a frame every k frames (all k, all phases), or
when the mean surprise or the share of changed patches since the last dense frame exceeds a level, or only the first
frame. A baseline can also switch between two settings, so its value at any cost is the mixture of the two settings
nearest in cost. For each clip and each statistic, the best baseline is chosen afterwards, which favours the baselines.

Every frame is compared with a dense forward of the same frame, except the first, which every method encodes in full:
cosine of the pooled output, mean and 5th percentile over frames. Intervals are 95 %, from a paired moving-block
bootstrap over frames, and over clips where results of clips are pooled; about one in 40 of the intervals lies above
the truth and one in 40 below it. Recordings hold embeddings in float16, which hides differences below about 1e-6.
Writes `eval/results/vision_policies.json` and `docs/policies.png`, shown in `docs/results/fidelity.md` and README.
"""

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn import functional

from eval.docs.tables import delays_table, policies_table
from eval.recordings import Recorder, RecordSettings, Scene
from eval.report import RESULTS, provenance, publish, rounded, tidy
from eval.vision import clips as clips_module
from eval.vision.clip_statistics import drawn_blocks
from eval.vision.clips import NAMES, Clip, load_clips
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.evaluation.equal_cost import LEVEL, Mixture, shares_at, verdict
from neuroflow_hf.evaluation.methods import MethodSpec
from neuroflow_hf.evaluation.settings import DENSE, FIRST
from neuroflow_hf.evaluation.statistics import middle
from neuroflow_hf.utils.provenance import code_version, key_of
from neuroflow_hf.video import reader
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.vision.gate_config import DEFAULT_PRESET, PRESETS
from recipes import recordings as footage
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir

METHODS = {
    **PRESETS,
    "extrapolate": {"mode": "extrapolate"},
    "context": {"mode": "context"},
    "context + keyframes": {"mode": "context", "keyframe_interval": 12},
    "reconstruct (the paper's C)": {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.05},
}
EVERY, SURPRISE, SHARE = "every k", "mean surprise", "share changed"  # families of baselines
SURPRISE_LEVELS = tuple(np.geomspace(0.003, 0.4, 15).tolist())
FRACTION_LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LONGEST_INTERVAL = 100
NEVER = MethodSpec("surprise over inf", SURPRISE, "surprise", {"level": math.inf}, True)
TRIGGERED = [
    NEVER,
    *(MethodSpec(f"surprise over {x:.3g}", SURPRISE, "surprise", {"level": x}, True) for x in SURPRISE_LEVELS),
    *(
        MethodSpec(f"changed over {x}", SHARE, "stream", {"mode": "hold", "keyframe_fraction": x}, True)
        for x in FRACTION_LEVELS
    ),
]

STATISTICS = ("pooled_mean", "pooled_p5")
BLOCK = 10
RESAMPLES = 2000
DELAY_CAP = 30
CLIP_COLUMNS = ("value", "control", "family", "low", "high", "verdict")

# --- one clip --------------------------------------------------------------------------------------------------------


def clip_scene(clip: Clip, frames: int) -> Scene:
    """The first frames of a clip of the suite."""
    code = code_version(map(Path, (clips_module.__file__, footage.__file__, reader.__file__)))
    identity = key_of(code=code, table=footage.TABLE.read_text(encoding="utf-8"))
    count = min(frames, clip.count)
    return Scene(clip.name, lambda: itertools.islice(clip.frames(), count), (None,) * count, identity)


@dataclass(frozen=True, eq=False)
class Outcome:
    """
    V equally likely runs of a method over a clip, such as the phases of a dense frame every k frames. Figures are
    means over the runs.

    Attributes:
        cost: cost relative to dense, mean over the F frames after the first.
        cosines: cosine of the output to dense's on these frames, [V, F].
        delays: [E], frames from each event until the output follows it.
    """

    cost: float
    cosines: np.ndarray
    delays: np.ndarray


def outcome(cost: float, outputs: Tensor, dense: Tensor, events: Sequence[int]) -> Outcome:
    """The outcome of unit outputs [V, T, D], with dense's [T, D]."""
    cosines = (outputs * dense).sum(-1)
    delays = []
    for event in events:
        followed = (cosines > outputs @ dense[event - 1])[:, event : event + DELAY_CAP]
        frames = torch.where(followed.any(1), followed.int().argmax(1), followed.shape[1])
        delays.append(frames.double().mean().item())
    return Outcome(cost, cosines[:, 1:].double().numpy(), np.array(delays))


def held_every(interval: int, dense: Tensor) -> Tensor:
    """Outputs [interval, T, D] of a dense frame every `interval` frames, one run for each phase."""
    index = torch.arange(len(dense))
    return dense[(index - (index - torch.arange(interval)[:, None]) % interval).clamp(min=0)]


@dataclass(frozen=True, eq=False)
class Measured:
    """
    A clip with the outcomes of dense, the methods and the baselines.

    Attributes:
        clip: the clip.
        dense: outcome with every frame dense.
        methods: outcomes by method.
        walls: by method, the time for all frames relative to dense.
        families: outcomes of the baselines; member i of a family has the same settings on every clip.
        drawn: int [RESAMPLES, F], the resamples of the frames, which all comparisons share.
    """

    clip: Clip
    dense: Outcome
    methods: dict[str, Outcome]
    walls: dict[str, float]
    families: dict[str, list[Outcome]]
    drawn: np.ndarray


def measure(clip: Clip, scene: Scene, recorder: Recorder, methods: Sequence[MethodSpec]) -> Measured:
    """The outcomes of a clip, from its recordings."""
    events = [event for event in clip.events if event < scene.count]
    found = {spec.name: recorder.load([scene], spec)[0] for spec in (DENSE, FIRST, *TRIGGERED, *methods)}
    first = found[FIRST.name].embeddings[:1]  # every method's first output
    outputs = {name: functional.normalize(torch.cat([first, one.embeddings]), dim=-1) for name, one in found.items()}
    dense = outputs[DENSE.name]
    outcomes = {
        name: outcome(one.cost[1:].mean().item(), outputs[name][None], dense, events) for name, one in found.items()
    }
    families = {
        EVERY: [
            outcomes[FIRST.name],
            *(
                outcome(1 / interval, held_every(interval, dense), dense, events)
                for interval in range(1, LONGEST_INTERVAL + 1)
            ),
        ],
        **{
            family: [
                outcomes[FIRST.name],
                *(outcomes[spec.name] for spec in TRIGGERED if spec is NEVER or spec.family == family),
                outcomes[DENSE.name],
            ]
            for family in (SURPRISE, SHARE)
        },
        "first frame": [outcomes[FIRST.name]],
    }
    seconds = {name: one.about["seconds"] for name, one in found.items()}
    return Measured(
        clip,
        outcomes[DENSE.name],
        {spec.name: outcomes[spec.name] for spec in methods},
        {spec.name: seconds[spec.name] / seconds[DENSE.name] for spec in methods},
        families,
        resampled_frames(scene.count - 1, seed=zlib.crc32(clip.name.encode())),
    )


def resampled_frames(frames: int, seed: int) -> np.ndarray:
    """The resamples int [RESAMPLES, frames] of a clip's frames."""
    return drawn_blocks(np.random.default_rng(seed), RESAMPLES, frames, min(BLOCK, frames))


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


def judge(method: str, measured: Measured) -> tuple[dict, dict[str, np.ndarray]]:
    """
    Compare a method with the best baselines at its cost, on one clip.

    Returns:
        A row for the report, with a list of CLIP_COLUMNS for each of STATISTICS; and by statistic the resampled
        differences [RESAMPLES].
    """
    own = measured.methods[method]
    row: dict = {"method": method, "clip": measured.clip.name, "cost": own.cost, "wall": measured.walls[method]}
    mixtures = []
    for family, settings in measured.families.items():
        shares = shares_at([setting.cost for setting in settings], own.cost)
        mixtures.append(Mixture(family, [(share, settings[place]) for share, place in shares if share > 0]))
    row["equal_cost"], draws = {}, {}
    for name in STATISTICS:
        values = [m.mean(lambda one, name=name: statistic(name, one.cosines).item()) for m in mixtures]
        control, best = max(zip(values, mixtures, strict=True), key=lambda pair: pair[0])
        value = statistic(name, own.cosines).item()
        draws[name] = statistic(name, own.cosines, measured.drawn) - best.mean(
            lambda one, name=name: statistic(name, one.cosines, measured.drawn)
        )
        interval = middle(draws[name])
        judged = verdict(value - control, interval)
        row["equal_cost"][name] = [value, control, best.family, *interval, judged]
    held = {mixture.family: mixture.mean(lambda one: one.delays) for mixture in mixtures}
    beyond = {name: delays - measured.dense.delays for name, delays in {"method": own.delays, **held}.items()}
    row["delays"] = [
        {name: float(delays[place]) for name, delays in beyond.items()} for place in range(len(own.delays))
    ]
    return row, draws


# --- all clips -------------------------------------------------------------------------------------------------------


def pooled_draws(draws: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Resampled means over clips, from resampled differences [clips, R] to [R]. Each sample draws clips, and for each
    drawn clip one of its own resamples.
    """
    clips, resamples = draws.shape
    rng = np.random.default_rng(seed)
    chosen = rng.integers(clips, size=(resamples, clips))
    return draws[chosen, rng.integers(resamples, size=(resamples, clips))].mean(1)


def pooled_row(method: str, rows: Sequence[dict], draws: Sequence[dict[str, np.ndarray]]) -> dict:
    """A method over all clips: means, intervals and verdicts. Delays are means over events."""
    pooled: dict = {"method": method, "clips": "all", "equal": "cost"}
    pooled |= {name: float(np.mean([row[name] for row in rows])) for name in ("cost", "wall")}
    for name in STATISTICS:
        found = [dict(zip(CLIP_COLUMNS, row["equal_cost"][name], strict=True)) for row in rows]
        value, control = (float(np.mean([one[key] for one in found])) for key in ("value", "control"))
        interval = middle(pooled_draws(np.stack([one[name] for one in draws])))
        verdicts = [one["verdict"] for one in found]
        pooled[name] = {
            "value": value,
            "control": control,
            "difference": value - control,
            "interval": interval,
            "verdict": verdict(value - control, interval),
            "clips": {name: verdicts.count(name) for name in ("above", "level", "below")},
            "below": [row["clip"] for row, one in zip(rows, verdicts, strict=True) if one == "below"],
        }
    events = [event for row in rows for event in row["delays"]]
    names = events[0] if events else ()
    pooled["delay"] = {"events": len(events), **{n: float(np.mean([one[n] for one in events])) for n in names}}
    return pooled


def policies_report(measured: Sequence[Measured]) -> dict:
    """The figures of all methods, over all clips and for each clip."""
    report: dict = {"clip_columns": CLIP_COLUMNS, "pooled": [], "clips": []}
    for method in measured[0].methods:
        rows, draws = zip(*(judge(method, one) for one in measured), strict=True)
        report["pooled"].append(pooled_row(method, rows, draws))
        report["clips"] += rows
    return rounded(report)


# --- the picture -----------------------------------------------------------------------------------------------------

VERDICT_COLOURS = {"above": "#15803d", "level": "#9ca3af", "below": "#b91c1c"}
FAMILY_LINES = {EVERY: "#475569", SURPRISE: "#2563eb", SHARE: "#93c5fd"}
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
        draw_error_over_cost(errors, report["pooled"], measured, name)
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
        costs, errors = zip(*(point for point in points if point[0] > 0 and point[1] > LEAST_ERROR), strict=True)
        label = "baseline: dense every k frames" if family == EVERY else f"baseline: dense on {family}"
        panel.plot(costs, errors, color=colour, linewidth=1.6, label=label)
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


def chosen_methods(names: str | None) -> list[MethodSpec]:
    """The methods with these names, separated by commas; all if `names` is None."""
    wanted = list(METHODS) if names is None else [name.strip() for name in names.split(",")]
    unknown = sorted(set(wanted) - set(METHODS))
    if unknown:
        raise typer.BadParameter(f"Unknown methods: {', '.join(unknown)}. There are: {', '.join(METHODS)}.")
    return [MethodSpec(name, name, "stream", METHODS[name]) for name in wanted]


def main(
    methods: Annotated[str | None, typer.Option(help="Measure only these methods, separated by commas.")] = None,
    clips: Annotated[str | None, typer.Option(help="Measure only these clips, separated by commas.")] = None,
    frames: Annotated[int, typer.Option(help="Use the first N frames of each clip.", min=3)] = 100,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "vision_policies.json",
):
    """Record what is missing, compare methods with baselines, and write the report and the picture."""
    chosen = chosen_methods(methods)
    folder = build_tower(default_tower_dir())
    model = NeuroFlowSiglipVisionModel.from_pretrained(folder).eval()
    preprocess = Preprocessor.from_pretrained(folder)
    suite = load_clips(list(NAMES) if clips is None else clips.split(","))
    scenes = [clip_scene(clip, frames) for clip in suite]
    recorder = Recorder(model, preprocess, folder.parent / "policies", RecordSettings(dense_every=1))
    recorder.run([[scene] for scene in scenes], [DENSE, FIRST, *TRIGGERED, *chosen])
    if not recorder.processes.is_main:
        return
    measured = [measure(clip, scene, recorder, chosen) for clip, scene in zip(suite, scenes, strict=True)]
    report = {
        **provenance(),
        "tower": "DINOv2-small in SigLIP's architecture, 224 px, float32",
        "clips_measured": {scene.name: scene.count for scene in scenes},
        "block": BLOCK,
        "resamples": RESAMPLES,
        "level_below": LEVEL,
        "controls": {EVERY: LONGEST_INTERVAL, SURPRISE: SURPRISE_LEVELS, SHARE: FRACTION_LEVELS},
        "methods": {spec.name: spec.options for spec in chosen},
        **policies_report(measured),
    }
    shown = DEFAULT_PRESET if DEFAULT_PRESET in measured[0].methods else chosen[0].name
    picture = plot_policies(report, measured, shown)
    publish(output, report, f"{policies_table(report)}\n\n{delays_table(report)}", {"policies.png": picture})


if __name__ == "__main__":
    typer.run(main)
