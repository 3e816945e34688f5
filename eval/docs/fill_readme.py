"""
Write README's figures and pictures from the results: tables from `eval/results/*.json`, pictures from a run.

    python -m eval.vision.vision_policies --frames 60 --workers 2
    python -m eval.vision.vision_controls && make demo
    python -m eval.vision.benchmark_vision --fresh && python -m eval.vision.benchmark_streams
    python -m eval.language.token_drift && python -m eval.language.benchmark_lossless
    python -m eval.vision.motion_masks && python -m eval.vision.published_laws
    python -m eval.vision.fidelity
    python -m eval.docs.fill_readme

"""

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from eval.docs.readme_evidence import (
    accuracy_table,
    aims_table,
    calibration_table,
    fidelity_table,
    laws_table,
    motions_table,
    reaction_table,
)
from eval.language.findings import readme_table
from eval.report import RESULTS, fill_block, write_json, write_whole
from eval.vision.benchmark_streams import WAYS
from eval.vision.benchmark_vision import ratios
from eval.vision.motion_measure import LABEL_COLUMNS
from neuroflow_hf import PRESETS

ROOT = Path(__file__).parents[2]
DIVERGENCES = ("within_rounding", "others")


def controls_table(report: dict) -> str:
    """The methods' table in Markdown, from `vision_controls.json`."""
    lines = [
        "| method | cost | cosine to dense: mean | 5th percentile | patches' cosine |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["methods"].items():
        patches = "" if row["patch_cosine_mean"] is None else f"{row['patch_cosine_mean']:.3f}"
        lines.append(
            f"| {name} | {row['cost_after_first_frame']:.3f} | {row['cosine_mean']:.4f} | {row['cosine_p5']:.4f} "
            f"| {patches} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"`{report['command']}`: {report['frames']} frames of {report['clip']}, {report['tower']}; the first "
            "frame, which every method encodes in full, is left out. Cost: multiply-adds spent, gate and pooling head "
            "included, over those of dense. Plain modes with threshold 0.01 and reference `last_update` unless said.",
        ]
    )


def policies_table(report: dict) -> str:
    """The methods over all clips, each beside the best control at its own cost, from `vision_policies.json`."""

    def with_interval(found):
        low, high = found["interval"]
        return f"{found['value']:.4f} | {found['control']:.4f} | {1e3 * low:+.2f} to {1e3 * high:+.2f}"

    lines = [
        "| method | cost | mean cosine | best control | difference, thousandths | p5 | best control | difference "
        "| clips above, level, below |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in report["pooled"] if row["clips"] == "all" and row["equal"] == "cost"]
    for row in rows:
        mean, low = row["pooled_mean"], row["pooled_p5"]
        verdicts = ", ".join(str(mean["clips"][verdict]) for verdict in ("above", "level", "below"))
        name = f"`{row['method']}`" if row["method"] in PRESETS else row["method"]
        lines.append(f"| {name} | {row['cost']:.3f} | {with_interval(mean)} | {with_interval(low)} | {verdicts} |")
    frames = report["clips_measured"]
    return "\n".join(
        [
            *lines,
            "",
            f"`{report['command']}`: {len(frames)} clips, {sum(frames.values())} frames in all, {report['tower']}; "
            "the first frame of each, dense in every method, is left out. The best control is, for each clip and "
            "statistic and chosen after the fact, the better of dense every k frames and dense by a trigger, at the "
            "method's own cost on that clip. Differences: 95 % intervals of a paired bootstrap over clips and blocks "
            "of frames. "
            "Last column: clips on which the mean is above, level with or below that control. "
            f"Below are {'; '.join(losses(report, row['method']) for row in rows if row['method'] in PRESETS)}.",
        ]
    )


def losses(report: dict, method: str) -> str:
    """The clips on which a method's mean cosine is below the best control's at its cost, and by how much at most."""
    below = {}
    for row in report["clips"]:
        found = dict(zip(report["clip_columns"], row["equal_cost"]["pooled_mean"], strict=True))
        if row["method"] == method and found["verdict"] == "below":
            below[row["clip"]] = found["control"] - found["value"]
    if not below:
        return f"`{method}` nowhere"
    return f"`{method}` on {', '.join(below)} (by at most {1e3 * max(below.values()):.2f} thousandths)"


def delays_table(report: dict) -> str:
    """By how many frames outputs lag behind events, from `vision_policies.json`."""
    rows = [row for row in report["pooled"] if row["clips"] == "all" and row["equal"] == "cost"]
    families = [name for name in rows[0]["delay"] if name not in ("events", "method")]
    lines = [
        f"| method | cost | its delay | {' | '.join(families)} |",
        f"|{'---|' * (3 + len(families))}",
    ]
    for row in rows:
        delays = [row["delay"][name] for name in ("method", *families)]
        name = f"`{row['method']}`" if row["method"] in PRESETS else row["method"]
        lines.append(f"| {name} | {row['cost']:.3f} | {' | '.join(f'{delay:.1f}' for delay in delays)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Frames until the output is closer to the dense output of the moment than to that before the event, in "
            f"excess of dense's own, mean of {rows[0]['delay']['events']} events; controls at equal cost.",
        ]
    )


def run_table(summary: dict) -> str:
    """A run's table in Markdown, from its `summary.json`."""
    times, cosines, every = summary["milliseconds_per_frame"], summary["cosine_to_dense"], summary["dense_every"]
    at_cost = summary["held_at_cost"]

    def row(name, values, form):
        return f"| {name} | {' | '.join(form.format(values[key]) for key in ('median', 'p5', 'p95'))} |"

    def fidelity(name, values):
        return f"| {name} | {values['mean']:.4f} | {values['p5']:.4f} | {values['min']:.4f} |"

    return "\n".join(
        [
            "| per frame | median | p5 | p95 |",
            "|---|---|---|---|",
            row("skip rate", summary["skip_rate"], "{:.1%}"),
            row("cost (dense = 1)", summary["cost"], "{:.3f}"),
            row("milliseconds, streamed", times["streamed"], "{:.1f}"),
            row("milliseconds, dense", times["dense"], "{:.1f}"),
            "",
            "| cosine to dense | mean | p5 | min |",
            "|---|---|---|---|",
            fidelity(f"streamed (cost {summary['cost']['mean']:.2f})", cosines["streamed"]),
            fidelity("control: first frame repeated", cosines["first_frame"]),
            fidelity(f"control: dense every {every} frames (cost {1 / every:.2f}), held between", cosines["held"]),
            *(
                fidelity(
                    f"control: dense every {control['every']} frames (cost {control['cost']:.2f}), held between",
                    control["cosine"],
                )
                for control in [at_cost]
                if control["every"] != every
            ),
            "",
            f"`neuroflow run`: {summary['frames']} frames, {summary['resolution']} px, {summary['dtype']}, "
            f"{summary['torch_threads']} threads of a processor with {summary['cpu_count']} cores, torch "
            f"{summary['versions']['torch']}; fidelity on {summary['compared_frames']} sampled frames, "
            "held embeddings at their oldest.",
        ]
    )


def labels_table(summary: dict) -> str:
    """A run's timeline of labels in Markdown, and how often dense and the controls say the same."""
    labels, lines = summary["labels"], ["| seconds | best label | confidence |", "|---|---|---|"]
    for stretch in labels["timeline"]:
        seconds = f"{stretch['start']:.1f} to {stretch['end']:.1f}"
        lines.append(f"| {seconds} | {stretch['label']} | {stretch['confidence']:.0%} |")
    found, of = labels["agreement"], labels["agreement"]["compared_frames"]
    control = found["held_at_cost"]
    held = (
        f", one held for {control['every']} frames on {control['agreed']} of {control['compared_frames']}"
        if control
        else ""
    )
    return "\n".join(
        [
            *lines,
            "",
            f"The first command: {summary['frames']} frames of a composed clip, mean cost "
            f"{summary['cost']['mean']:.2f} of dense. The stream's best label is dense's on {found['streamed']} of "
            f"{of} sampled frames; the first frame's label repeated is on {found['first_frame']}{held}.",
        ]
    )


def speed_table(report: dict) -> str:
    """The sparsest cases of `benchmark_vision.json` as a table in Markdown, and the span of the full ones."""
    dtypes = list(dict.fromkeys(entry["dtype"] for entry in report["dense"]))
    fraction = min(case["active"] for case in report["cases"])
    rows: dict[tuple, list[str]] = {}

    def add(resolution, mode, cost, gigamacs, dtype, cells):
        row = rows.setdefault(
            (resolution, mode), [f"| {resolution} | `{mode}` | {cost:.3f} | {gigamacs:.1f}", *[" | |"] * len(dtypes)]
        )
        row[1 + dtypes.index(dtype)] = cells

    for entry in sorted(report["dense"], key=lambda entry: entry["resolution"]):
        milliseconds = entry["milliseconds"]["median"]
        add(entry["resolution"], "dense", 1, entry["gigamacs"], entry["dtype"], f" | {milliseconds:.0f} |")
        for case, dense, ratio in ratios(report):
            if dense is entry and case["active"] == fraction:
                cells = f" | {case['streamed']['median']:.0f} | {ratio:.1f}"
                add(case["resolution"], case["mode"], case["cost"], case["gigamacs"], case["dtype"], cells)

    full = [(ratio, case) for case, _, ratio in ratios(report) if case["active"] == 1]
    said = f"{fraction:.0%} of the patches active (in `propagate`, none joining)."
    if full:
        slowest, case = min(full, key=lambda pair: pair[0])
        said += (
            f" With everything active, all modes lie between {slowest:.2f} (`{case['mode']}`, {case['resolution']} "
            f"px, {case['dtype']}) and {max(ratio for ratio, _ in full):.2f} times dense's speed."
        )
    timed = [entry["milliseconds"] for entry in report["dense"]] + [case["streamed"] for case in report["cases"]]
    frames = [times["frames"] for times in timed]
    return "\n".join(
        [
            f"| pixels | mode | cost | GMAC |{''.join(f' {dtype}: ms | times faster |' for dtype in dtypes)}",
            f"|---|---|---|---|{'---|---|' * len(dtypes)}",
            *(f"{''.join(row)} |" for row in rows.values()),
            "",
            said,
            f"`{report['command']}`: SigLIP-base geometry, {report['machine']['threads']} threads on the CPU, from "
            f"pixels to embedding, medians of {min(frames)} to {max(frames)} frames, dense with torch's attention in "
            "the same run and type. GMAC: billions of multiply-adds.",
        ]
    )


def streams_table(report: dict) -> str:
    """`benchmark_streams.json` as a table in Markdown."""
    lines = []
    for case in report["cases"]:
        one, separate, dense = (case["frames_per_second"][way]["median"] for way in WAYS)
        lines.append(
            f"| `{case['mode']}` | {case['cameras']} | {one:.1f} | {separate:.1f} | {dense:.1f} "
            f"| {one / separate:.1f} | {one / dense:.1f} |"
        )
    return "\n".join(
        [
            "| mode | cameras | frames/s: one call | a call each | dense, batched | to a call each | to dense |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"`{report['command']}`: SigLIP-base geometry, 224 px, {report['dtype']}, {report['machine']['threads']} "
            "threads on the CPU; in each camera another share of the patches changes, 1% to 10%.",
        ]
    )


def drift_block(report: dict) -> str:
    """The drift report's tables, and its pictures, from `token_drift.json`."""
    return "\n\n".join(
        [
            readme_table(report),
            "![Drift by share of steps bypassed, a panel for each task](docs/drift.png)",
            "![Steps bypassed while no prompt's text changes, with and without the guard](docs/drift_reachable.png)",
        ]
    )


def lossless_table(report: dict) -> str:
    """`benchmark_lossless.json` as a table in Markdown."""
    lines = []
    for task, rows in report["summary"].items():
        for variant, row in rows.items():
            ratio, beside = row.get("times_dense"), row.get("times_lookup")
            cells = [f"{row['tokens_per_second']:.0f}"]
            for found in (ratio, beside):
                low, high = found["interval"] if found else (0, 0)
                cells.append(f"{found['median']:.2f} ({low:.2f} to {high:.2f})" if found else "")
            for name, form in (("acceptance", ".0%"), ("draft_length", ".1f"), ("tokens_per_check", ".1f")):
                cells.append("" if row.get(name) is None else format(row[name], form))
            lines.append(f"| {task} | {variant} | {' | '.join(cells)} |")
    settings, everything = report["settings"], list(report["summary"].values())[-1]
    differ = {name: sum(row["divergences"][name] for row in everything.values()) for name in DIVERGENCES}
    measured = [case for case in report["cases"] if case["tokens"] >= settings["least_tokens"]]
    return "\n".join(
        [
            "| task | drafts | tokens/s | times dense | times lookup | accepted | tokens drafted at once "
            "| tokens per check |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"`{report['command']}`: {settings['model']}, {len(measured)} held-out prompts with texts of "
            f"{settings['least_tokens']} to {settings['new_tokens']} tokens, {settings['dtype']}, "
            f"{settings['machine']['threads']} thread(s); medians over prompts of {settings['turns']} turns, variants "
            "taking turns, with 95 % intervals of a paired bootstrap. Dense: the same loop without drafts; stock: "
            f"transformers' own. Texts unlike the stock model's: {differ['within_rounding']} where its first two "
            f"logits are level, {differ['others']} elsewhere.",
        ]
    )


MOTION_ROWS = {
    "balanced, last_update, 0.01": "`balanced` (default)",
    "balanced, last_update, 0.03": "`balanced`, threshold 0.03",
    "balanced, ema, 0.01": "`balanced`, reference `ema`",
    "context, last_update, 0.01": "`context`",
    "context, ema, 0.01": "`context`, reference `ema`",
    "everything": "control: everything",
}
PIXEL_CONTROL = "control: difference of pixels, best level"


def motion_table(report: dict) -> str:
    """How well masks, boxes and names of what moves fit, from `motion_masks.json`; all motions together."""
    masks, objects, labels = (report[part]["all motions"] for part in ("masks", "objects", "labels"))

    def number(found, form):
        return "" if found["value"] is None else format(found["value"], form)

    pixels = max((way for way in masks if way.startswith("pixels")), key=lambda way: masks[way]["change"]["value"])
    lines = []
    for way, name in {**MOTION_ROWS, pixels: PIXEL_CONTROL}.items():
        of_labels = labels.get(way.rpartition(", ")[0])
        cells = [number(masks[way][column], ".2f") for column in ("thing", "change")]
        cells.append(number(masks[way]["false share"], ".0%"))
        cells += [number(objects[way][column], ".0%") for column in ("recall", "precision")]
        cells += [number(of_labels[column], ".0%") if of_labels else "" for column in LABEL_COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    clips, own = report["clips"], labels["balanced, last_update"]
    return "\n".join(
        [
            "| mask | IoU with the thing | with the change | marked where nothing moved | boxes: recall | precision "
            "| named right: object | whole frame | true patches |",
            "|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"`{report['command']}`: {clips['in_all']} composed clips of {clips['frames']} frames, in 14 kinds of "
            "motion. The change: the patches that a thing covers now or covered on the frame before. Boxes: found if "
            f"the IoU with a moving thing's box is at least {report['least_iou']}. Named right: of the boxes found "
            f"(in the first row {own['objects']}), among {report['labels_known']} labels, by the object's patches, by "
            "the whole frame, and by the thing's true patches through the same head. The pixels' level is chosen "
            "after the fact, which favours that control. By motion, with intervals: "
            "[all figures](eval/results/motion_masks.json).",
        ]
    )


BLOCKS = {
    "policies": (policies_table, "vision_policies"),
    "delays": (delays_table, "vision_policies"),
    "controls": (controls_table, "vision_controls"),
    "speed": (speed_table, "benchmark_vision"),
    "streams": (streams_table, "benchmark_streams"),
    "run": (run_table, "run"),
    "labels": (labels_table, "run_labels"),
    "motion": (motion_table, "motion_masks"),
    "accuracy": (accuracy_table, "accuracy"),
    "aims": (aims_table, "accuracy", "reaction", "fidelity"),
    "motions": (motions_table, "accuracy"),
    "reaction": (reaction_table, "reaction"),
    "fidelity": (fidelity_table, "fidelity"),
    "calibration": (calibration_table, "calibration"),
    "laws": (laws_table, "published_laws"),
    "drift": (drift_block, "token_drift"),
    "lossless": (lossless_table, "benchmark_lossless"),
}


def take_run(folder: Path, result: str, sheet: str, plot: str | None = None):
    """Keep a run's summary under the results, and its pictures under `docs/`."""
    write_json(RESULTS / f"{result}.json", json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    pictures = ROOT / "docs"
    pictures.mkdir(exist_ok=True)
    contact_sheet = Image.open(folder / "contact_sheet.png").convert("RGB")
    contact_sheet.save(pictures / f"{sheet}.jpg", quality=85, optimize=True)
    if plot is not None:
        Image.open(folder / "plot.png").convert("RGB").quantize(256).save(pictures / f"{plot}.png", optimize=True)


def main(
    run: Annotated[Path, typer.Option(help="Folder of a `neuroflow run` on the shipped clip.")] = ROOT
    / "neuroflow-run",
    labelled: Annotated[Path, typer.Option(help="Folder of a run with labels on the composed clip.")] = ROOT
    / "neuroflow-run-things",
):
    """Fill README's blocks; where there are the runs' folders, take their summaries and pictures before."""
    if (run / "summary.json").is_file():
        take_run(run, "run", "contact_sheet", "plot")
    if (labelled / "summary.json").is_file():
        take_run(labelled, "run_labels", "labels")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (table, *results) in BLOCKS.items():
        reports = [json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8")) for result in results]
        readme = fill_block(readme, f"figures:{name}", table(*reports))
    write_whole(ROOT / "README.md", readme)


if __name__ == "__main__":
    typer.run(main)
