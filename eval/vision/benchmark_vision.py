"""
How long a frame takes in every mode, against dense in the same run.

    python -m eval.vision.benchmark_vision    # everything: half an hour on two cores
    python -m eval.vision.benchmark_vision --resolutions 224,448 --dtypes float32   # some minutes

SigLIP-base's geometry (patch 16) and random weights: time does not depend on them. The whole forward is timed, from
pixel values to the embedding. A token budget fixes how many patches are active, and half as many change from frame to
frame. Dense frames are timed in between, so
that both meet the same machine. Where dense takes long, what everything active takes is read off a first frame.

Every finished mode is in `eval/results/benchmark_vision.json` at once, and skipped when the command is run again on
the same machine, unless with `--fresh`. Draws `docs/speed.png`.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eval.docs.tables import ratios
from eval.report import RESULTS, provenance, wide_console, write_json
from neuroflow_hf import NeuroFlowSiglipVisionConfig, NeuroFlowSiglipVisionModel
from neuroflow_hf.utils.jobs import timed
from neuroflow_hf.vision.cost import dense_frame
from neuroflow_hf.vision.gate_config import MODE_NAMES

MODES = tuple(mode for mode in MODE_NAMES if mode not in ("dense", "hold"))  # those that encode some patches
PICTURE = Path(__file__).parents[2] / "docs" / "speed.png"
COLOURS = ("#6b7280", "#0e7490", "#15803d", "#d97706", "#b91c1c", "#7c3aed", "#db2777", "#111827")


def spread(values: list[float]) -> dict:
    """Median, least, most, and of how many."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "frames": len(values),
    }


def without_warm_up(values: list[float]) -> list[float]:
    """All but the first, if there are others."""
    return values[1:] or values


def change_patches(frame: torch.Tensor, count: int, patch: int) -> torch.Tensor:
    """A frame [1, 3, R, R] with fresh noise in `count` of its patches, anywhere."""
    columns = frame.shape[-1] // patch
    chosen = torch.randperm(columns**2)[:count]
    changed = frame.clone()
    patches = changed.view(3, columns, patch, columns, patch).permute(1, 3, 0, 2, 4)
    patches[chosen // columns, chosen % columns] = torch.randn(count, 3, patch, patch)
    return changed


def time_mode(
    model, resolution: int, mode: str, fractions: list[float], repeats: int, case_seconds: float
) -> list[dict]:
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
        on_first_frame = budget == num_patches and first_time > 1000 * case_seconds
        if not on_first_frame:
            values = []
            while len(values) <= repeats and sum(values) < 1000 * case_seconds:
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
                "streamed": spread(without_warm_up(values)),
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


class Results:
    """
    What was measured so far, in a file that is whole at any time.

    Args:
        path: the JSON file; results there of the same settings are continued, others replaced.
        settings: what must be equal for two runs to be one.
        fresh: whether to begin anew whatever is there.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool = False):
        self.path = path
        self.report = {**settings, "dense": [], "cases": []}
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not fresh else {}
        if before and all(before.get(name) == value for name, value in settings.items()):
            self.report |= before

    def save(self):
        """Write the file, and which command wrote it last."""
        write_json(self.path, {**self.report, **provenance()})

    def dense(self, dtype: str, resolution: int) -> dict:
        """The entry of dense frames, made if there is none."""
        for entry in self.report["dense"]:
            if (entry["dtype"], entry["resolution"]) == (dtype, resolution):
                return entry
        self.report["dense"].append({"dtype": dtype, "resolution": resolution, "values": []})
        return self.report["dense"][-1]

    def missing(self, dtype: str, resolution: int, mode: str, fractions: list[float]) -> list[float]:
        """The fractions that a mode was not measured at."""
        found = {case_key(row) for row in self.report["cases"]}
        return [fraction for fraction in fractions if (dtype, resolution, fraction, mode) not in found]

    def add(self, rows: list[dict]):
        """Take in a mode's rows, in order."""
        self.report["cases"] += rows
        self.report["cases"].sort(
            key=lambda row: (row["dtype"] != "float32", row["resolution"], row["active"], MODES.index(row["mode"]))
        )


def case_key(row: dict) -> tuple[str, int, float, str]:
    """What tells a row of the cases from the others."""
    return row["dtype"], row["resolution"], row["active"], row["mode"]


def time_group(
    results: Results, model, dtype: str, resolution: int, modes: list[str], limits: dict, until: float
) -> Iterator[str]:
    """
    Time dense and what is missing of the modes at one resolution, and save after each mode. Begins none after the time
    `until`. Yields the modes' names.
    """
    dense, slow = results.dense(dtype, resolution), 1000 * limits["case_seconds"]
    missing = {mode: results.missing(dtype, resolution, mode, limits["fractions"]) for mode in modes}
    missing = {mode: fractions for mode, fractions in missing.items() if fractions}
    num_patches = (resolution // model.config.patch_size) ** 2
    for place, (mode, fractions) in enumerate(missing.items(), start=1):
        if time.monotonic() > until:
            return
        if not dense["values"]:
            first = time_dense(model, resolution)
            dense["values"] = [first if first > slow else time_dense(model, resolution)]
        rows = time_mode(model, resolution, mode, **limits | {"fractions": fractions})
        results.add([{"dtype": dtype, **row} for row in rows])
        # about a minute of dense frames, spread evenly over the modes; at least one after each start of the program
        frames = max(2, min(2 * limits["repeats"], round(60_000 / dense["values"][0])))
        more = max(place == 1, math.ceil(frames * place / len(missing)) - len(dense["values"]))
        dense["values"] += [time_dense(model, resolution) for _ in range(more)]
        dense |= {"milliseconds": spread(dense["values"]), "gigamacs": dense_gigamacs(model.config, num_patches)}
        results.save()
        yield mode


def plot(report: dict, path: Path):
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
        panel.grid(color="#e5e7eb", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)


def table(report: dict) -> Table:
    """All cases, as they are printed at the end."""
    shown = Table("type", "px", "active", "mode", "cost", "GMAC", "ms", "least", "most", "dense, ms", "times faster")
    for column in shown.columns[4:]:
        column.justify = "right"
    for case, dense, ratio in ratios(report):
        times = [case["streamed"][name] for name in ("median", "min", "max")] + [dense["milliseconds"]["median"]]
        shown.add_row(
            *(case["dtype"], str(case["resolution"]), f"{case['active']:.0%}", case["mode"]),
            *(f"{case['cost']:.3f}", f"{case['gigamacs']:.1f}"),
            *(f"{milliseconds:.1f}" for milliseconds in times),
            f"{ratio:.2f}",
        )
    return shown


def base_model(dtype: str, device: str) -> NeuroFlowSiglipVisionModel:
    """SigLIP-base's vision tower, with random weights and torch's attention."""
    config = NeuroFlowSiglipVisionConfig(image_size=224, patch_size=16, attn_implementation="sdpa")
    return NeuroFlowSiglipVisionModel(config).eval().to(device, getattr(torch, dtype))


@torch.inference_mode()
def main(
    resolutions: Annotated[str, typer.Option(help="Sides in pixels, with commas.")] = "224,448,896,1792",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16 or float16, with commas.")] = "float32,bfloat16",
    fractions: Annotated[str, typer.Option(help="Shares of active patches, with commas.")] = "0.03,1",
    modes: Annotated[str, typer.Option(help="Modes, with commas.")] = ",".join(MODES),
    repeats: Annotated[int, typer.Option(help="Frames timed of each, at most.")] = 5,
    case_seconds: Annotated[float, typer.Option(help="Begin no further frame of a case after so many seconds.")] = 10,
    budget_minutes: Annotated[float, typer.Option(help="Begin no further mode after so many minutes.")] = math.inf,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not continue what is in the file.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "benchmark_vision.json",
    picture: Annotated[Path, typer.Option(help="The picture to draw.")] = PICTURE,
):
    """Time all modes at all resolutions and shares, and print the table."""
    torch.manual_seed(0)
    until = time.monotonic() + 60 * budget_minutes
    shares = [float(fraction) for fraction in fractions.split(",")]
    limits = {"fractions": shares, "repeats": repeats, "case_seconds": case_seconds}
    settings = {name: provenance()[name] for name in ("machine", "versions")}
    results = Results(output, {"device": device, "limits": limits, **settings}, fresh)
    console = Console()
    for dtype in dtypes.split(","):
        model = base_model(dtype, device)
        for resolution in (int(side) for side in resolutions.split(",")):
            for mode in time_group(results, model, dtype, resolution, modes.split(","), limits, until):
                console.print(f"{dtype}, {resolution} px, {mode}: done")
    if not results.report["cases"]:
        console.print("Nothing was measured.")
        raise typer.Exit(1)
    plot(results.report, picture)
    wide_console(120).print(table(results.report))
    if time.monotonic() > until:
        console.print("The time is up. Run the same command again to continue.")


if __name__ == "__main__":
    typer.run(main)
