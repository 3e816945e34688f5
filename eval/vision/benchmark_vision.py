"""
How long does a frame take in every mode, against dense in the same run?

    python -m eval.vision.benchmark_vision    # everything: half an hour on two cores; run again to continue
    python -m eval.vision.benchmark_vision --resolutions 224,448 --dtypes float32   # some minutes

SigLIP-base's geometry (patch 16) and random weights: time does not depend on them. The whole forward is timed, from
pixel values to the embedding. A token budget fixes how many patches are active, and half as many change from frame to
frame. Dense frames are timed in between, so that both meet the same machine. Where dense takes long, what everything
active takes is read off a first frame. Every finished mode is written at once, and skipped when the command is run
again on the same machine with the same settings. Writes `eval/results/benchmark_vision.json` and `docs/speed.png`,
shown in `docs/results/speed.md`.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from eval.docs.speed import ratios, speed_table
from eval.report import RESULTS, provenance, publish, tidy, write_json
from neuroflow_hf import NeuroFlowSiglipVisionConfig, NeuroFlowSiglipVisionModel
from neuroflow_hf.utils.jobs import timed
from neuroflow_hf.vision.cost import dense_frame
from neuroflow_hf.vision.gate_config import MODE_NAMES

MODES = tuple(mode for mode in MODE_NAMES if mode not in ("dense", "hold"))  # those that encode some patches
COLOURS = ("#6b7280", "#0e7490", "#15803d", "#d97706", "#b91c1c", "#7c3aed", "#db2777", "#111827")
FRACTIONS = [0.03, 1]  # shares of active patches
CASE_SECONDS = 10  # after these, no further frame of a case is begun
DENSE_MILLISECONDS = 60_000  # of dense frames, in about as many turns as there are modes


def spread(values: list[float]) -> dict:
    """Median, least, most, and of how many."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "frames": len(values)}


def change_patches(frame: torch.Tensor, count: int, patch: int) -> torch.Tensor:
    """A frame [1, 3, R, R] with fresh noise in `count` of its patches, anywhere."""
    columns = frame.shape[-1] // patch
    chosen = torch.randperm(columns**2)[:count]
    changed = frame.clone()
    patches = changed.view(3, columns, patch, columns, patch).permute(1, 3, 0, 2, 4)
    patches[chosen // columns, chosen % columns] = torch.randn(count, 3, patch, patch)
    return changed


def time_mode(model, resolution: int, mode: str, fractions: list[float], repeats: int) -> list[dict]:
    """What each share of active patches takes in one stream: a row for each."""
    config = model.config
    num_patches = (resolution // config.patch_size) ** 2
    kwargs = {"interpolate_pos_encoding": resolution != config.image_size}

    def step(frame):
        pixels = frame.to(model.device, model.dtype)
        return timed(lambda: model(pixel_values=pixels, stream=stream, **kwargs), model.device)

    stream = model.new_stream(mode=mode, token_budget=num_patches, min_active_tokens=0)
    frame = torch.randn(1, 3, resolution, resolution)
    first, first_time = step(frame)
    rows = []
    for fraction in fractions:
        budget = max(1, round(fraction * num_patches))
        stream.gate.token_budget = budget
        output, values = first, [first_time]
        on_first_frame = budget == num_patches and first_time > 1000 * CASE_SECONDS
        if not on_first_frame:
            values = []
            while len(values) <= repeats and sum(values) < 1000 * CASE_SECONDS:
                frame = change_patches(frame, max(1, budget // 2), config.patch_size)
                output, milliseconds = step(frame)
                values.append(milliseconds)
        cost = output.cost.item()
        rows.append(
            {
                "resolution": resolution,
                "mode": mode,
                "active": fraction,
                "active_patches": int(output.active_mask.sum()),
                "cost": cost,
                "gigamacs": cost * dense_gigamacs(config, num_patches),
                "streamed": spread(values[1:] or values),  # the first is a warm-up
                "on_first_frame": on_first_frame,
                "stream_mebibytes": stream.nbytes / 2**20,
            }
        )
    return rows


def dense_gigamacs(config, num_patches: int) -> float:
    """Billions of multiply-adds of a dense frame."""
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    patch_features = config.num_channels * config.patch_size**2
    return dense_frame(num_patches, *sizes, patch_features, config.num_attention_heads, pooled=True) / 1e9


def time_dense(model, resolution: int) -> float:
    """Milliseconds of one dense frame."""
    kwargs = {"interpolate_pos_encoding": resolution != model.config.image_size}
    pixels = torch.randn(1, 3, resolution, resolution).to(model.device, model.dtype)
    return timed(lambda: model(pixel_values=pixels, **kwargs), model.device)[1]


def continued(output: Path, settings: dict) -> dict:
    """The report in the file, if it was measured with these settings; else an empty one."""
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    if before and all(before.get(name) == value for name, value in settings.items()):
        return before
    return {**settings, "dense": [], "cases": []}


def time_missing(report: dict, model, dtype: str, resolution: int, repeats: int, output: Path):
    """Time dense and what is missing of the modes at one resolution, and write the report after each mode."""
    done = {(row["dtype"], row["resolution"], row["active"], row["mode"]) for row in report["cases"]}
    missing = {mode: [f for f in FRACTIONS if (dtype, resolution, f, mode) not in done] for mode in MODES}
    missing = {mode: fractions for mode, fractions in missing.items() if fractions}
    found = (one for one in report["dense"] if (one["dtype"], one["resolution"]) == (dtype, resolution))
    dense = next(found, {"dtype": dtype, "resolution": resolution, "values": []})
    for mode, fractions in track(missing.items(), f"{dtype}, {resolution} px", console=Console(stderr=True)):
        if not dense["values"]:
            report["dense"].append(dense)
            first = time_dense(model, resolution)  # a warm-up, where that takes no time
            dense["values"] = [first if first > 1000 * CASE_SECONDS else time_dense(model, resolution)]
        rows = time_mode(model, resolution, mode, fractions, repeats)
        report["cases"] += [{"dtype": dtype, **row} for row in rows]
        report["cases"].sort(
            key=lambda row: (row["dtype"] != "float32", row["resolution"], row["active"], MODES.index(row["mode"]))
        )
        turns = min(2 * repeats, round(DENSE_MILLISECONDS / dense["values"][0])) / len(missing)
        dense["values"] += [time_dense(model, resolution) for _ in range(max(1, math.ceil(turns)))]
        num_patches = (resolution // model.config.patch_size) ** 2
        dense |= {"milliseconds": spread(dense["values"]), "gigamacs": dense_gigamacs(model.config, num_patches)}
        write_json(output, {**report, **provenance(report["device"])})


def plot(report: dict) -> Figure:
    """Times faster than dense over resolution, a line for each mode and a panel for each type, at the least share."""
    found = ratios(report)
    fraction = min(case["active"] for case, _, _ in found)
    dtypes = list(dict.fromkeys(case["dtype"] for case, _, _ in found))
    figure = Figure(figsize=(5 * len(dtypes) + 1, 4.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    figure.suptitle(
        f"Times faster than dense with {fraction:.0%} of the patches active", x=0.01, ha="left", fontweight="bold"
    )
    for panel, dtype in zip(panels, dtypes, strict=True):
        points: dict[str, list[tuple[int, float]]] = {}
        for case, _, ratio in found:
            if (case["dtype"], case["active"]) == (dtype, fraction):
                points.setdefault(case["mode"], []).append((case["resolution"], ratio))
        for mode, colour in zip(MODES, COLOURS, strict=False):
            if mode in points:
                line = sorted(points[mode])
                width = 4 if mode == "eliminate" else 1.8  # it lies under `reconstruct`
                panel.plot(*zip(*line, strict=True), "o-", color=colour, label=mode, linewidth=width, markersize=5)
        resolutions = sorted({resolution for line in points.values() for resolution, _ in line})
        panel.axhline(1, color="#111827", linewidth=1, linestyle=(0, (4, 3)), label="dense")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(resolutions, [str(resolution) for resolution in resolutions])
        panel.minorticks_off()
        panel.set_yticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200], [f"{tick}x" for tick in ticks])
        panel.set_ylim(0.8, 1.3 * max(2, *(ratio for _, _, ratio in found)))
        panel.set_xlabel("side of the frame (pixels)")
        panel.set_title(dtype, loc="left", fontsize=11)
        tidy(panel)
    panels[0].legend(frameon=False, fontsize=10)
    return figure


def base_model(dtype: str, device: str) -> NeuroFlowSiglipVisionModel:
    """SigLIP-base's vision tower, with random weights and torch's attention."""
    config = NeuroFlowSiglipVisionConfig(image_size=224, patch_size=16, attn_implementation="sdpa")
    return NeuroFlowSiglipVisionModel(config).eval().to(device, getattr(torch, dtype))


@torch.inference_mode()
def main(
    resolutions: Annotated[str, typer.Option(help="Sides in pixels, with commas.")] = "224,448,896,1792",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16 or float16, with commas.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(help="Time at most N frames of each.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "benchmark_vision.json",
):
    """Time all modes at all resolutions and shares, and show the table."""
    torch.manual_seed(0)
    limits = {"fractions": FRACTIONS, "repeats": repeats, "case_seconds": CASE_SECONDS}
    settings = {name: provenance(device)[name] for name in ("machine", "versions")}
    report = continued(output, {"device": device, "limits": limits, **settings})
    for dtype in dtypes.split(","):
        model = base_model(dtype, device)
        for resolution in map(int, resolutions.split(",")):
            time_missing(report, model, dtype, resolution, repeats, output)
    report |= provenance(device)
    picture = "speed.png" if device == "cpu" else f"speed_{device}.png"
    publish(output, report, speed_table(report), {picture: plot(report)})


if __name__ == "__main__":
    typer.run(main)
