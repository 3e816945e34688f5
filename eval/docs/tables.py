"""
Write the tables of README.md and docs/results/*.md from the JSON files in eval/results/.

    python -m eval.docs.tables
    python -m eval.docs.tables --run neuroflow-run --labelled neuroflow-run-things  # keep the runs of `make demo`

Each table stands between two comments, `<!-- figures:NAME:begin -->` and `<!-- figures:NAME:end -->`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from eval.report import RESULTS, fill_block, write_json, write_whole
from eval.vision.benchmark_vision import ratios
from neuroflow_hf import PRESETS
from neuroflow_hf.drift.tables import readme_table

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
REMOVED = "propagate"  # measurement removed this mode (docs/results/dropped.md); its rows stay in the JSON files

MASKS = {
    "balanced, last_update, 0.01": "`balanced` (default)",
    "balanced, last_update, 0.03": "`balanced`, threshold 0.03",
    "balanced, ema, 0.01": "`balanced`, reference `ema`",
    "context, last_update, 0.01": "`context`",
    "context, ema, 0.01": "`context`, reference `ema`",
    "everything": "baseline: everything",
}
MOTION_COLUMNS = (
    (1, "thing", "IoU with the thing", ".2f"),
    (1, "change", "IoU with the change", ".2f"),
    (1, "false share", "marked where nothing moved", ".0%"),
    (2, "recall", "boxes: recall", ".0%"),
    (2, "precision", "precision", ".0%"),
    (3, "object", "named right: object", ".0%"),
    (3, "whole frame", "whole frame", ".0%"),
    (3, "truth's mask", "true patches", ".0%"),
)
DRAFTS = {
    "acceptance": ("acceptance rate", ".0%"),
    "draft_length": ("tokens drafted at once", ".1f"),
    "tokens_per_check": ("tokens per check", ".1f"),
}


def load(result: str) -> dict:
    """A report, without the rows of the removed mode."""

    def keep(value):
        if isinstance(value, dict):
            return {name: keep(part) for name, part in value.items() if not name.startswith(f"`{REMOVED}")}
        if not isinstance(value, list):
            return value
        rows = [row for row in value if isinstance(row, dict)]
        removed = [row for row in rows if any(REMOVED in str(row.get(key)) for key in ("mode", "name", "method"))]
        return [keep(part) for part in value if part not in removed]

    return keep(json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8")))


def table(rows: Iterable[dict | tuple], columns: dict[str, str | Callable], *notes: str) -> str:
    """A table in Markdown: each column's cells are a format string filled from the row, or a function of the row."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        keys = row if isinstance(row, dict) else {}
        fields = () if keys else row
        lines.append([c.format(*fields, **keys) if isinstance(c, str) else str(c(row)) for c in columns.values()])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *(["", *notes] if notes else [])])


def spread(value: float | None, interval: tuple | None, scale: float = 1, form: str = "+.1f") -> str:
    """A value and its interval, multiplied by `scale`."""
    if value is None:
        return ""
    between = f" ({' to '.join(format(scale * end, form) for end in interval)})" if interval else ""
    return f"{scale * value:{form}}{between}"


def named(name: str, control: bool = False) -> str:
    """A method's name: baselines are marked, presets are code."""
    return f"*baseline:* {name}" if control else f"`{name}`" if name in PRESETS else name


def with_method(head: str = "method") -> dict:
    """The columns that most tables begin with."""
    return {head: lambda row: named(row.get("name", row.get("method")), row.get("control")), "cost": "{cost:.3f}"}


def rows_shown(rows: list[dict], default: str = "balanced") -> list[dict]:
    """Dense, the presets, the first setting of each mode, and of each baseline the setting nearest in cost."""
    cost = next(row["cost"] for row in rows if row["name"] == default)
    families: dict[str, list[dict]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    kept = []
    for family, settings in families.items():
        nearest = min(settings, key=lambda row: abs(row["cost"] - cost))
        kept += settings if family == "presets" else [nearest if settings[0]["control"] else settings[0]]
    return kept


def pooled(report: dict) -> list[dict]:
    """The methods over all clips, compared at equal cost."""
    return [row for row in report["pooled"] if row["clips"] == "all" and row["equal"] == "cost"]


def presets_table(report: dict) -> str:
    """README's first table: the presets, each beside the best baseline at its own cost."""
    columns = {
        "preset": "`{method}`",
        "compute (dense = 1)": "{cost:.3f}",
        "cosine to dense: mean": "{pooled_mean[value]:.4f}",
        "p5": "{pooled_p5[value]:.4f}",
        "best baseline at that compute: mean": "{pooled_mean[control]:.4f}",
        "its p5": "{pooled_p5[control]:.4f}",
    }
    return table([row for row in pooled(report) if row["method"] in PRESETS], columns)


def glance_table(accuracy: dict, reaction: dict, fidelity: dict, vision: dict, lossless: dict) -> str:
    """README's results at a glance: one row a question."""
    top1, delay, cosine = (
        next(row for row in rows if row["name"] == "balanced")
        for rows in (accuracy["results"], reaction["own"]["results"], fidelity["results"])
    )
    best, sooner, closer = top1["top1"]["best control"], delay["best control"], cosine["best control"]
    fast = next(
        ratio
        for case, _, ratio in ratios(vision)
        if (case["mode"], case["resolution"], case["dtype"]) == ("extrapolate", 448, "float32")
        and case["active"] < 0.1
    )
    lookup = [lossless["summary"]["all"]["lookup"]["times_dense"][key] for key in ("median", "interval")]
    rows = [
        (
            f"Zero-shot top-1, {len(accuracy['scenes'])} composed clips (dense: {top1['top1']['dense']:.1%})",
            f"{top1['top1']['accuracy']:.1%}",
            f"{best['control']:.1%}",
        ),
        (
            f"Frames until the label changes, beyond dense's, {reaction['own']['events']} events",
            spread(delay["delay"], delay["interval"], form=".1f"),
            f"{sooner['control']:.1f}",
        ),
        (
            f"5th percentile of the cosine to dense over {fidelity['frames'][0]:,} frames",
            f"{cosine['p5']:.3f}",
            f"{closer['control']:.3f}",
        ),
        ("Times faster than dense, 448 px, 3% of the patches active, CPU, float32", f"{fast:.1f}", ""),
        ("Times faster than dense, lossless text, drafts by lookup", spread(*lookup, form=".2f"), ""),
    ]
    return table(rows, {"question": "{0}", "measured": "{1}", "best baseline at equal cost": "{2}"})


def policies_table(report: dict) -> str:
    """The methods over all clips, each beside the best baseline at its own cost."""
    losses = {name: {} for name in PRESETS}
    for row in report["clips"]:
        found = dict(zip(report["clip_columns"], row["equal_cost"]["pooled_mean"], strict=True))
        if row["method"] in PRESETS and found["verdict"] == "below":
            losses[row["method"]][row["clip"]] = 1e3 * (found["control"] - found["value"])
    columns = with_method()
    for name, key in {"mean cosine": "pooled_mean", "p5": "pooled_p5"}.items():
        columns[name] = f"{{{key}[value]:.4f}}"
        columns[f"best baseline's {name}"] = f"{{{key}[control]:.4f}}"
        columns[f"difference in {name}, thousandths"] = lambda row, key=key: " to ".join(
            f"{1e3 * end:+.2f}" for end in row[key]["interval"]
        )
    columns["clips above, level, below"] = lambda row: ", ".join(
        str(row["pooled_mean"]["clips"][verdict]) for verdict in ("above", "level", "below")
    )
    below = (f"`{name}` on {', '.join(of)} (by at most {max(of.values()):.2f})" for name, of in losses.items() if of)
    clips, command = report["clips_measured"], report["command"].replace(f"{REMOVED} 0.3,", "")
    note = f"`{command}`: {len(clips)} clips, {sum(clips.values())} frames in all, {report['tower']}."
    return table(pooled(report), columns, f"{note} Below the best baseline, in thousandths: {'; '.join(below)}.")


def delays_table(report: dict) -> str:
    """By how many frames outputs lag behind events."""
    rows = pooled(report)
    columns = with_method() | {"its delay": "{delay[method]:.1f}"}
    columns |= {name: f"{{delay[{name}]:.1f}}" for name in rows[0]["delay"] if name not in ("events", "method")}
    return table(rows, columns, f"Mean of {rows[0]['delay']['events']} events, baselines at equal cost.")


def controls_table(report: dict) -> str:
    """Every mode and baseline on the shipped clip."""
    columns = {
        "method": lambda row: row["name"].replace("control:", "baseline:"),
        "cost": "{cost_after_first_frame:.3f}",
        "cosine to dense: mean": "{cosine_mean:.4f}",
        "5th percentile": "{cosine_p5:.4f}",
        "patches' cosine": lambda row: spread(row["patch_cosine_mean"], None, form=".3f"),
    }
    rows = [{"name": name, **row} for name, row in report["methods"].items()]
    note = f"`{report['command']}`: {report['frames']} frames of {report['clip']}, {report['tower']}."
    return table(rows, columns, note)


def run_table(summary: dict) -> str:
    """Speed and fidelity of a run."""
    times, cosines, every, held = (
        summary[key] for key in ("milliseconds_per_frame", "cosine_to_dense", "dense_every", "held_at_cost")
    )
    baselines = {every: (1 / every, cosines["held"]), held["every"]: (held["cost"], held["cosine"])}
    parts = [("skip rate", summary["skip_rate"], ".1%"), ("cost (dense = 1)", summary["cost"], ".3f")]
    parts += [(f"milliseconds, {way}", times[way], ".1f") for way in ("streamed", "dense")]
    found = {f"streamed (cost {summary['cost']['mean']:.2f})": cosines["streamed"]}
    found["baseline: first frame repeated"] = cosines["first_frame"]
    found |= {f"baseline: dense every {k} frames (cost {c:.2f})": cosine for k, (c, cosine) in baselines.items()}
    per_frame = [(name, *(format(part[key], form) for key in ("median", "p5", "p95"))) for name, part, form in parts]
    note = (
        f"{summary['frames']} frames, {summary['resolution']} px, {summary['dtype']}, "
        f"{summary['torch_threads']} threads, torch {summary['versions']['torch']}; fidelity on {summary['compared_frames']} sampled frames."
    )
    return "\n\n".join(
        [
            table(per_frame, {"per frame": "{0}", "median": "{1}", "p5": "{2}", "p95": "{3}"}),
            table(
                ({"name": name, **cosine} for name, cosine in found.items()),
                {"cosine to dense": "{name}", "mean": "{mean:.4f}", "p5": "{p5:.4f}", "min": "{min:.4f}"},
                note,
            ),
        ]
    )


def labels_table(summary: dict) -> str:
    """A run's labels over time, and how often dense and the baselines say the same."""
    labels, found = summary["labels"], summary["labels"]["agreement"]
    columns = {"seconds": "{start:.1f} to {end:.1f}", "best label": "{label}", "confidence": "{confidence:.0%}"}
    note = (
        f"{summary['frames']} frames, mean cost {summary['cost']['mean']:.2f} of dense. The best label is dense's on "
    )
    note += (
        f"{found['streamed']} of {found['compared_frames']} sampled frames; with the first frame's label repeated on "
    )
    note += f"{found['first_frame']}"
    if held := found["held_at_cost"]:
        note += f", with one held for {held['every']} frames on {held['agreed']} of {held['compared_frames']}"
    return table(labels["timeline"], columns, f"{note}.")


def speed_table(report: dict) -> str:
    """The sparsest cases, and the span of the full ones."""
    found, least = ratios(report), min(case["active"] for case in report["cases"])
    dtypes = list(dict.fromkeys(entry["dtype"] for entry in report["dense"]))
    rows: dict[tuple, dict] = {}
    for entry in sorted(report["dense"], key=lambda entry: entry["resolution"]):
        cases = [(case["streamed"], case, ratio) for case, dense, ratio in found if dense is entry]
        for times, case, ratio in [
            (entry["milliseconds"], entry | {"mode": "dense", "cost": 1, "active": least}, 0),
            *cases,
        ]:
            if case["active"] == least:
                row = rows.setdefault((case["resolution"], case["mode"]), dict(case))
                row[case["dtype"]] = f"{times['median']:.0f}", f"{ratio:.1f}" if ratio else ""
    columns = {"pixels": "{resolution}", "mode": "`{mode}`", "cost": "{cost:.3f}", "GMAC": "{gigamacs:.1f}"}
    for dtype in dtypes:
        columns |= {f"{dtype}: ms": f"{{{dtype}[0]}}", f"{dtype}: times faster": f"{{{dtype}[1]}}"}
    note = (
        f"`{report['command']}`: {least:.0%} of the patches active, {report['machine']['threads']} threads on the CPU."
    )
    if full := sorted((ratio, case["mode"]) for case, _, ratio in found if case["active"] == 1):
        note += (
            f" With everything active, all modes lie between {full[0][0]:.2f} (`{full[0][1]}`) and {full[-1][0]:.2f} "
        )
        note += "times dense's speed."
    return table(rows.values(), columns, note)


def streams_table(report: dict) -> str:
    """Several cameras in one call."""
    rate = "frames_per_second[{}][median]"
    ways = {"one call": "one_call", "a call each": "separate_calls", "dense, batched": "dense"}
    columns = {"mode": "`{mode}`", "cameras": "{cameras}"}
    columns |= {f"frames/s: {name}": f"{{{rate.format(way)}:.1f}}" for name, way in ways.items()}
    for way in ("separate_calls", "dense"):
        columns[f"times {'a call each' if way != 'dense' else 'dense'}"] = lambda row, way=way: "{:.1f}".format(
            row["frames_per_second"]["one_call"]["median"] / row["frames_per_second"][way]["median"]
        )
    note = f"`{report['command']}`: {report['dtype']}, {report['machine']['threads']} threads on the CPU."
    return table(report["cases"], columns, note)


def beside(form: str, scale: float = 1, signed: str = "+.1f", key: Callable = lambda row: row) -> dict:
    """Columns: the best baseline at a method's cost, and the difference to it."""

    def of(row, cell):
        found = key(row).get("best control")
        return cell(found) if found else ""

    return {
        "best baseline at its cost": lambda row: of(row, lambda f: f"{f['control']:{form}} ({f['family']})"),
        "difference to it": lambda row: of(row, lambda f: spread(f["difference"], f["interval"], scale, signed)),
    }


def accuracy_table(report: dict) -> str:
    """Zero-shot accuracy on composed clips."""

    def worst(row):
        found = {name: of["top1"]["difference"] for name, of in row["motions"].items()}
        name = min((name for name in found if found[name] is not None), key=found.get)
        return f"{spread(found[name], None, 100)} ({name})" if row["name"] != "dense" else ""

    columns = {
        "top-1": "{top1[accuracy]:.1%}",
        "less dense's, points": lambda row: (
            spread(row["top1"]["difference"], row["top1"]["interval"], 100) if row["name"] != "dense" else ""
        ),
        "largest loss in a motion": worst,
        **beside(".1%", 100, key=lambda row: row["top1"]),
        "top-5": "{top5[accuracy]:.1%}",
    }
    note = f"`{report['command']}`: {len(report['scenes'])} clips, {report['frames_counted']} frames counted, "
    note += f"{report['texts']} labels."
    return table(rows_shown(report["results"]), with_method() | columns, note)


def motions_table(report: dict, default: str = "balanced") -> str:
    """The default preset by kind of motion, beside dense every k frames at about the same cost."""
    ours = next(row for row in report["results"] if row["name"] == default)
    holds = [row for row in report["results"] if row["family"] == "every k"]
    held = min(holds, key=lambda row: abs(row["cost"] - ours["cost"]))
    columns = {"motion": "{motion}", "top-1 of dense": "{ours[top1][dense]:.1%}"}
    for name, key in {f"`{default}`": "ours", f"*baseline:* {held['name']}": "held"}.items():
        columns[f"cost of {name}"] = f"{{{key}[cost]:.3f}}"
        columns[f"{name}: top-1 less dense's, points"] = lambda row, key=key: spread(
            row[key]["top1"]["difference"], row[key]["top1"]["interval"], 100
        )
    rows = [{"motion": name, "ours": of, "held": held["motions"][name]} for name, of in ours["motions"].items()]
    return table(rows, columns, f"{len(report['frames'])} clips of each kind of motion.")


def reaction_table(report: dict) -> str:
    """Frames between an event and the label's change."""
    own = report["own"]
    columns = {
        "delay beyond dense's, frames": lambda row: (
            spread(row["delay"], row["interval"], form=".1f") if row["name"] != "dense" else ""
        ),
        "not within the frames looked at": "{censored}",
        **beside(".1f", signed=".1f"),
    }
    note = f"`{report['command']}`: {own['events']} events in {own['scenes']} clips; dense itself takes "
    note += (
        f"{own['dense_delay']:.1f} frames; {own['left_out']} events that dense does not follow, or says before, are "
    )
    note += f"left out. Looked at are {report['recorded']['settings']['after'] + 1} frames from an event on, or those "
    note += "until the next one: delays are lower bounds where some are longer."
    return table(rows_shown(own["results"]), with_method() | columns, note)


def fidelity_table(report: dict) -> str:
    """Cosine to dense over long clips."""
    columns = {
        "cosine: mean": "{mean:.4f}",
        "p5": "{p5:.4f}",
        "p1": "{p1:.4f}",
        "trend per 1,000 frames, thousandths": lambda row: spread(row["trend"], row["trend_interval"], 1e3),
        "MB a stream": lambda row: f"{row['bytes'] / 1e6:.1f}{'' if row['bytes_constant'] else ', not constant'}",
        **{f"p5, thousandths: {name}": cell for name, cell in beside(".4f", 1e3).items()},
        **{f"clips whose label changes: {n}": c for n, c in beside(".3f", 1e3, key=lambda r: r["changing"]).items()},
    }
    columns = {name.replace("p5, thousandths: best", "p5: best"): cell for name, cell in columns.items()}
    return table(rows_shown(report["results"]), with_method() | columns, f"`{report['command']}`")


def laws_table(report: dict) -> str:
    """What of the published observations holds."""
    columns = {"published observation": "{claim}", "measured": "{measured}", "baseline": "{control}"}
    clips = report["clips"]
    note = f"`{report['command']}`: {clips['in_all']} composed clips of {clips['frames']} frames, "
    note += f"{report['labels']} labels."
    return table(report["findings"], columns | {"verdict": "{verdict}"}, note)


def motion_table(report: dict) -> str:
    """How well masks, boxes and names of what moves fit, over all motions."""
    masks, objects, labels = (report[part]["all motions"] for part in ("masks", "objects", "labels"))
    pixels = max((way for way in masks if way.startswith("pixels")), key=lambda way: masks[way]["change"]["value"])
    ways = MASKS | {pixels: "baseline: difference of pixels, best level"}
    rows = [(name, masks[way], objects[way], labels.get(way.rpartition(", ")[0], {})) for way, name in ways.items()]
    columns = {"mask": "{0}"}
    for part, key, head, form in MOTION_COLUMNS:
        columns[head] = lambda row, part=part, key=key, form=form: spread(
            row[part].get(key, {}).get("value"), None, form=form
        )
    clips = report["clips"]
    note = f"`{report['command']}`: {clips['in_all']} composed clips of {clips['frames']} frames. A box is found "
    note += f"if its IoU with a moving thing's is at least {report['least_iou']}; "
    note += f"{labels['balanced, last_update']['objects']} found in the first row, named among {report['labels_known']} labels."
    return table(rows, columns, note)


def lossless_table(report: dict) -> str:
    """Tokens per second with each drafter and with none."""

    def ratio(key):
        return lambda row: spread(row[key]["median"], row[key]["interval"], form=".2f") if key in row else ""

    settings, last = report["settings"], list(report["summary"].values())[-1]
    rows = [{"task": task, "drafts": name} | row for task, of in report["summary"].items() for name, row in of.items()]
    columns = {"task": "{task}", "drafts": "{drafts}", "tokens/s": "{tokens_per_second:.0f}"}
    columns |= {"times dense": ratio("times_dense"), "times lookup": ratio("times_lookup")}
    for key, (head, form) in DRAFTS.items():
        columns[head] = lambda row, key=key, form=form: spread(row.get(key), None, form=form)
    differ = [sum(row["divergences"][key] for row in last.values()) for key in ("within_rounding", "others")]
    measured = sum(case["tokens"] >= settings["least_tokens"] for case in report["cases"])
    note = f"`{report['command']}`: {settings['model']}, {measured} held-out prompts with texts of "
    note += f"{settings['least_tokens']} to {settings['new_tokens']} tokens, {settings['dtype']}, {settings['turns']} turns, "
    note += (
        f"{settings['machine']['threads']} thread(s). Texts unlike the stock model's: {differ[0]} where its first two "
    )
    note += f"logits are level, {differ[1]} elsewhere."
    return table(rows, columns, note)


BLOCKS = {
    "presets": (presets_table, "vision_policies"),
    "glance": (glance_table, "accuracy", "reaction", "fidelity", "benchmark_vision", "benchmark_lossless"),
    "policies": (policies_table, "vision_policies"),
    "delays": (delays_table, "vision_policies"),
    "controls": (controls_table, "vision_controls"),
    "speed": (speed_table, "benchmark_vision"),
    "streams": (streams_table, "benchmark_streams"),
    "run": (run_table, "run"),
    "labels": (labels_table, "run_labels"),
    "motion": (motion_table, "motion_masks"),
    "accuracy": (accuracy_table, "accuracy"),
    "motions": (motions_table, "accuracy"),
    "reaction": (reaction_table, "reaction"),
    "fidelity": (fidelity_table, "fidelity"),
    "laws": (laws_table, "published_laws"),
    "drift": (readme_table, "token_drift"),
    "lossless": (lossless_table, "benchmark_lossless"),
}


def filled(page: str) -> str:
    """A page with each of its tables written anew."""
    for name, (make, *results) in BLOCKS.items():
        if f"<!-- figures:{name}:begin -->" in page:
            page = fill_block(page, f"figures:{name}", make(*map(load, results)))
    return page


def main(
    run: Annotated[
        Path | None, typer.Option(help="Folder of a `neuroflow run` to keep as the shipped clip's.")
    ] = None,
    labelled: Annotated[Path | None, typer.Option(help="Folder of a run with labels to keep.")] = None,
):
    """Write every table of README.md and docs/ from eval/results/."""
    for folder, result, sheet in ((run, "run", "contact_sheet"), (labelled, "run_labels", "labels")):
        if folder is not None:
            write_json(RESULTS / f"{result}.json", json.loads((folder / "summary.json").read_text(encoding="utf-8")))
            picture = Image.open(folder / "contact_sheet.png").convert("RGB")
            picture.save(ROOT / "docs" / f"{sheet}.jpg", quality=85, optimize=True)
    for page in PAGES:
        write_whole(page, filled(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    typer.run(main)
