"""
Does a logit bias, fitted on a few clips, bring streamed labels closer to dense ones on others?

    python -m eval.vision.calibration --quick
    python -m eval.vision.calibration
    torchrun --nproc_per_node 2 -m eval.vision.calibration

Fitted on M composed clips (the mean of each label's logit, dense less streamed), applied to held-out clips of another
seed: how often the best label is dense's, and how often it is right, before and after, with paired intervals of a
bootstrap over clips. Controls: the same values shuffled among the labels, and one value for all labels, their mean,
which cannot change which label is best. What was measured before is reused. Writes `eval/results/calibration.json`;
with `--save models/neuroflow-siglip-small` also one setting's bias, beside the checkpoint, for `LogitBias.load`.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.report import RESULTS, provenance
from eval.vision.clip_statistics import mean, rounded
from eval.vision.composed_bench import (
    CHECKPOINT,
    SPLIT,
    Bench,
    Clip,
    Figures,
    clip_names,
    dense_outputs,
    label_places,
    measure_clips,
)
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, report_text, write_whole
from neuroflow_hf.video.calibration import LogitBias, fit_logit_bias

SETTINGS = {
    "reconstruct": {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.01},
    "balanced": {"preset": "balanced"},
    "thrifty": {"preset": "thrifty"},
}
CALIBRATION_CLIPS = (1, 4, 14, 28)
CALIBRATION_SEED, HELD_OUT_SEED = 1000, 0
SHUFFLES = 20


def measure_logits(bench: Bench, clip: Clip) -> Figures:
    """`label` int [T], and logits float32 [T, C] and cost [T] of dense and of each of SETTINGS."""
    pooled, _ = dense_outputs(bench.model, clip.pixels)
    figures: Figures = {"label": label_places(clip, bench.things), "dense": bench.labels.logits(pooled).cpu().numpy()}
    for name, options in SETTINGS.items():
        outputs = list(bench.model.stream_frames(clip.pixels.split(1), **options))
        figures[name] = torch.cat([bench.labels.logits(output.pooler_output) for output in outputs]).cpu().numpy()
        figures[f"{name}: cost"] = torch.cat([output.cost for output in outputs]).cpu().numpy()
    return figures


def logits_after_first(clips: Sequence[Figures], setting: str) -> tuple[Tensor, Tensor]:
    """Dense and streamed logits [n, C] of the frames after the first of these clips."""
    dense, streamed = (
        torch.from_numpy(np.concatenate([clip[name][1:] for clip in clips])) for name in ("dense", setting)
    )
    return dense, streamed


def fitted(clips: Sequence[Figures], setting: str) -> Tensor:
    """The bias [C] of a setting from the frames after the first of these clips."""
    return fit_logit_bias(*logits_after_first(clips, setting))


def bias_of(bench: Bench, clips: Sequence[Figures], setting: str) -> LogitBias:
    """A setting's bias from these clips, for `LogitBias.applied_to`."""
    gate = bench.model.new_stream(**SETTINGS[setting]).gate
    return LogitBias.fit(bench.labels, *logits_after_first(clips, setting), gate, bench.weights)


def agreements(clips: Sequence[Figures], setting: str, bias: Tensor) -> list[np.ndarray]:
    """Of each clip, on which frames after the first the best label is dense's, with a bias [C] added."""
    shift = bias.numpy()
    return [((clip[setting][1:] + shift).argmax(-1) == clip["dense"][1:].argmax(-1)).astype(float) for clip in clips]


def rights(clips: Sequence[Figures], setting: str, bias: Tensor) -> list[np.ndarray]:
    """Of each clip, on which frames after the first with something to see the best label is right."""
    shift, found = bias.numpy(), []
    for clip in clips:
        label = clip["label"][1:]
        found.append(((clip[setting][1:] + shift).argmax(-1) == label)[label >= 0].astype(float))
    return found


def squared_errors(clips: Sequence[Figures], setting: str, bias: Tensor) -> list[np.ndarray]:
    """Of each clip, the squared distance of each frame's logits to dense's, mean over labels."""
    shift = bias.numpy()
    return [np.square(clip[setting][1:] + shift - clip["dense"][1:]).mean(-1) for clip in clips]


MEASURES = {"agreement": agreements, "top1": rights, "squared error of logits": squared_errors}


def compared(clips: Sequence[Figures], setting: str, bias: Tensor) -> dict:
    """Each of MEASURES before and after, and the paired difference, with intervals."""
    none, rows = torch.zeros_like(bias), {}
    for name, measure in MEASURES.items():
        before, after = measure(clips, setting, none), measure(clips, setting, bias)
        rows[name] = {
            "before": rounded(mean(before)),
            "after": rounded(mean(after)),
            "difference": rounded(mean([new - old for new, old in zip(after, before, strict=True)])),
        }
    return rows


def compared_shuffled(clips: Sequence[Figures], setting: str, bias: Tensor) -> dict:
    """As `compared`, with the values shuffled among the labels: differences, mean over SHUFFLES shuffles."""
    none, rows = torch.zeros_like(bias), {}
    shuffled = [
        bias[torch.randperm(len(bias), generator=torch.Generator().manual_seed(seed))] for seed in range(SHUFFLES)
    ]
    for name, measure in MEASURES.items():
        before = measure(clips, setting, none)
        after = np.mean([np.concatenate(measure(clips, setting, other)) for other in shuffled], axis=0)
        parts = np.split(after, np.cumsum([len(one) for one in before])[:-1])
        rows[name] = {"difference": rounded(mean([new - old for new, old in zip(parts, before, strict=True)]))}
    return rows


def figures_of(calibration: Sequence[Figures], held_out: Sequence[Figures]) -> dict:
    """By setting and number of calibration clips: what the bias does on held-out clips, and what the controls do."""
    table: dict[str, dict] = {}
    for setting in SETTINGS:
        rows = {}
        for count in CALIBRATION_CLIPS:
            if count > len(calibration):
                continue
            bias = fitted(calibration[:count], setting)
            rows[str(count)] = {
                "largest": bias.abs().max().item(),
                "spread": bias.std().item(),
                "bias": compared(held_out, setting, bias),
                "control: on the calibration clips themselves": compared(calibration[:count], setting, bias),
                "control: shuffled among labels": compared_shuffled(held_out, setting, bias),
                "control: one value for all labels": compared(held_out, setting, torch.full_like(bias, bias.mean())),
            }
        costs = np.concatenate([clip[f"{setting}: cost"][1:] for clip in held_out])
        table[setting] = {"cost": float(costs.mean()), "clips": rows}
    return table


def summary_table(settings: dict) -> Table:
    """Agreement with dense and top-1, and what the bias changes, in points."""
    table = Table("setting", "clips", "agreement", "bias", "shuffled", "top-1", "bias", "shuffled", "error of logits")

    def points(found):
        low, high = found["interval"] or (np.nan, np.nan)
        return f"{100 * found['value']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"

    for setting, row in settings.items():
        for count, found in row["clips"].items():
            bias, shuffled = found["bias"], found["control: shuffled among labels"]
            cells = []
            for name in ("agreement", "top1"):
                cells += [
                    f"{bias[name]['before']['value']:.1%}",
                    points(bias[name]["difference"]),
                    points(shuffled[name]["difference"]),
                ]
            errors = bias["squared error of logits"]
            cells.append(f"{errors['before']['value']:.3f} to {errors['after']['value']:.3f}")
            table.add_row(setting, count, *cells)
    return table


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    quick: Annotated[bool, typer.Option(help="One held-out clip of each motion, 20 frames: minutes.")] = False,
    clips: Annotated[int, typer.Option(help="Held-out clips of each motion.", min=1)] = 3,
    frames: Annotated[int, typer.Option(help="Frames of each clip.", min=16)] = 48,
    fresh: Annotated[bool, typer.Option(help="Measure again what was measured before.")] = False,
    save: Annotated[Path | None, typer.Option(help="Folder to write a bias to.", show_default="none")] = None,
    setting: Annotated[str, typer.Option(help=f"Whose: {', '.join(SETTINGS)}.")] = "balanced",
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "calibration.json",
):
    """Measure what is missing, fit, compare, and write the report."""
    if setting not in SETTINGS:
        raise typer.BadParameter(f"`--setting` is {setting!r}; expected one of {', '.join(SETTINGS)}.")
    processes, console, start = Processes(), Console(stderr=True), time.perf_counter()
    if quick:
        clips, frames = 1, 20
    bench = Bench(checkpoint, str(processes.device or "cpu"))
    calibration = clip_names(1 if quick else 2, frames, CALIBRATION_SEED)
    held_out = clip_names(clips, frames, HELD_OUT_SEED)

    def say(done, total):
        if processes.is_main:
            console.print(f"clips: {done} of {total} of this process")

    names = [*calibration, *held_out]
    found = measure_clips(bench, names, measure_logits, {"settings": SETTINGS}, processes, fresh=fresh, on_clip=say)
    if not processes.is_main:
        return
    fitting, judged = found[: len(calibration)], found[len(calibration) :]
    rng = np.random.default_rng(CALIBRATION_SEED)  # so that the first few clips are of several motions
    fitting = [fitting[place] for place in rng.permutation(len(fitting))]
    settings = figures_of(fitting, judged)
    report = {
        **provenance(),
        "commit": checkout_commit(),
        "checkpoint": {"name": checkpoint.name, "weights": bench.weights},
        "clips": {
            "calibration": {"in_all": len(calibration), "seed": CALIBRATION_SEED},
            "held_out": {"in_all": len(held_out), "seed": HELD_OUT_SEED},
            "frames": frames,
            "drawings": SPLIT,
        },
        "labels": len(bench.things),
        "processes": processes.count,
        "seconds": round(time.perf_counter() - start, 1),
        "options": SETTINGS,
        "settings": settings,
    }
    write_whole(output, report_text(report))
    if save is not None:
        console.print(f"Written: {bias_of(bench, fitting, setting).save(save)}")
    console = Console()
    console.width = max(console.width, 150)
    console.print(summary_table(settings))


if __name__ == "__main__":
    typer.run(main)
