"""
Write README's figures and pictures from the results: tables from `eval/results/*.json`, pictures from a run.

    python eval/vision_policies.py --frames 60 --workers 2
    python eval/vision_controls.py && neuroflow run --out neuroflow-run
    python eval/benchmark_vision.py --resolutions 224,448,896 --fractions 0.03,1 --repeats 3
    python eval/fill_readme.py

"""

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from report import RESULTS, fill_block, write_json, write_text

from neuroflow_hf import PRESETS

ROOT = Path(__file__).parent.parent


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
            f"`{report['command']}`: {len(frames)} clips, {sum(frames.values())} frames in all, {report['tower']}; the "
            "first frame of each, dense in every method, is left out. The best control is, for each clip and statistic "
            "and chosen after the fact, the better of dense every k frames and dense by a trigger, at the method's own "
            "cost on that clip. Differences: 95 % intervals of a paired bootstrap over clips and blocks of frames. "
            "Last column: clips on which the mean is above, level with or below that control.",
        ]
    )


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
            fidelity(
                f"control: dense every {at_cost['every']} frames (cost {at_cost['cost']:.2f}), held between",
                at_cost["cosine"],
            ),
            "",
            f"`neuroflow run`: {summary['frames']} frames, {summary['resolution']} px, {summary['dtype']}, "
            f"{summary['torch_threads']} threads of a processor with {summary['cpu_count']} cores, torch "
            f"{summary['versions']['torch']}; fidelity on {summary['compared_frames']} sampled frames, "
            "held embeddings at their oldest.",
        ]
    )


def speed_table(report: dict) -> str:
    """The sparse cases of `benchmark_vision.json` as a table in Markdown, and the span of the others."""

    def ratio(case):
        return case["dense"]["median"] / case["streamed"]["median"]

    lines = [
        "| pixels | active | mode | cost | dense, ms | streamed, ms | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        if case["active"] < 1:
            lines.append(
                f"| {case['resolution']} | {case['active']:.0%} | `{case['mode']}` | {case['cost']:.3f} "
                f"| {case['dense']['median']:.0f} | {case['streamed']['median']:.0f} | {ratio(case):.1f} |"
            )
    full = [ratio(case) for case in report["cases"] if case["active"] == 1]
    return "\n".join(
        [
            *lines,
            "",
            f"With everything active, all modes and sizes lie between {min(full):.2f} and {max(full):.2f} times.",
            f"`{report['command']}`: SigLIP-base geometry, {report['dtype']}, {report['machine']['threads']} threads "
            f"on the CPU, from pixels to embedding, medians of {report['repeats']} frames, dense in the same run.",
        ]
    )


def main(
    run: Annotated[Path, typer.Option(help="Folder of a `neuroflow run` on the shipped clip.")] = ROOT
    / "neuroflow-run",
):
    """Fill README's blocks and copy the run's pictures."""
    controls = json.loads((RESULTS / "vision_controls.json").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = fill_block(readme, "figures:controls", controls_table(controls))
    policies = json.loads((RESULTS / "vision_policies.json").read_text(encoding="utf-8"))
    readme = fill_block(readme, "figures:policies", policies_table(policies))
    readme = fill_block(readme, "figures:delays", delays_table(policies))
    benchmark = json.loads((RESULTS / "benchmark_vision.json").read_text(encoding="utf-8"))
    readme = fill_block(readme, "figures:speed", speed_table(benchmark))
    readme = fill_block(readme, "figures:run", run_table(summary))
    write_json(RESULTS / "run.json", summary)  # what the second table says
    pictures = ROOT / "docs"
    pictures.mkdir(exist_ok=True)
    sheet = Image.open(run / "contact_sheet.png").convert("RGB")
    sheet.save(pictures / "contact_sheet.jpg", quality=85, optimize=True)
    Image.open(run / "plot.png").convert("RGB").quantize(256).save(pictures / "plot.png", optimize=True)
    write_text(ROOT / "README.md", readme)


if __name__ == "__main__":
    typer.run(main)
