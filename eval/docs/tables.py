"""
Write the tables of README.md and docs/results/*.md from the JSON files in eval/results/.

    python -m eval.docs.tables

Each table stands between two comments, `<!-- figures:NAME:begin -->` and `<!-- figures:NAME:end -->`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from eval.language import json_drift
from eval.report import RESULTS, fill_block, write_whole
from neuroflow_hf import PRESETS
from neuroflow_hf.drift.tables import description, summary_table
from neuroflow_hf.utils.tables import markdown_table

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "models" / "neuroflow-siglip-small-reconstruct" / "README.md",
)
# Recorded with the presets as they were before the controller of the cost budget. To be measured again; then the name
# goes from this list.
BEFORE_CONTROLLER = {
    *("accuracy", "fidelity", "headline_variants", "motion_masks", "reaction"),
}
MASKS = {
    "balanced, last_update, 0.01": "`balanced` (default)",
    "balanced, last_update, 0.03": "`balanced`, threshold 0.03",
    "balanced, ema, 0.01": "`balanced`, reference `ema`",
    "context, last_update, 0.01": "`context`",
    "context, ema, 0.01": "`context`, reference `ema`",
    "everything": "baseline: everything",
}
MASK_COLUMNS = {
    "IoU with the thing": "thing",
    "IoU with the change": "change",
    "false alarms where nothing moved": "false share",
    "boxes: recall": "recall",
    "boxes: precision": "precision",
    "label accuracy: object": "object",
    "label accuracy: whole frame": "whole frame",
    "label accuracy: true patches": "truth's mask",
}


def load(result: str) -> dict:
    """A report in `eval/results/`."""
    return json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))


def table(rows: Iterable[dict | tuple], columns: dict[str, str | Callable], *notes: str) -> str:
    """A table in Markdown: each column's cells are a format string filled from the row, or a function of the row."""

    def cell(row, column):
        if callable(column):
            return str(column(row))
        return column.format(**row) if isinstance(row, dict) else column.format(*row)

    cells = [[cell(row, column) for column in columns.values()] for row in rows]
    return "\n".join([markdown_table((list(columns), cells)), *(["", *notes] if notes else [])])


def spread(value: float | None, interval: list[float] | None = None, scale: float = 1, form: str = "+.1f") -> str:
    """A value and its interval, both multiplied by `scale`."""
    if value is None:
        return ""
    between = f" ({' to '.join(format(scale * end, form) for end in interval)})" if interval else ""
    return f"{scale * value:{form}}{between}"


def method_and_cost(head: str = "method") -> dict:
    """The first columns of most tables. Names of presets are set as code, and baselines are marked."""

    def name_of(row):
        name = row.get("name", row.get("method"))
        return f"*baseline:* {name}" if row.get("control") else f"`{name}`" if name in PRESETS else name

    return {head: name_of, "cost": "{cost:.3f}"}


def at(row: dict, path: str):
    """The value in a row at a path such as `top1.difference`; None if the row has none."""
    for key in path.split("."):
        row = row.get(key) if row else None
    return row


def estimate(value: str, interval: str = "", scale: float = 1, form: str = "+.1f") -> Callable:
    """A column of values and intervals, given by two paths. It is empty for dense, the reference."""
    return lambda row: "" if row.get("name") == "dense" else spread(at(row, value), at(row, interval), scale, form)


def beside(form: str, scale: float = 1, signed: str = "+.1f", part: str = "", head: str = "", unit: str = "") -> dict:
    """Two columns: the best baseline at a method's cost, and the difference to it, from `part` of a row."""
    best = f"{part}best control"

    def baseline(row):
        return "{control:{form}} ({family})".format(form=form, **at(row, best)) if at(row, best) else ""

    return {
        f"{head}best baseline at its cost": baseline,
        f"{head}difference to it{unit}": estimate(f"{best}.difference", f"{best}.interval", scale, signed),
    }


def rows_shown(rows: list[dict], default: str = "balanced") -> list[dict]:
    """Dense, the presets, the first setting of each mode, and each baseline's setting that is nearest in cost."""
    cost = next((row["cost"] for row in rows if row["name"] == default), 0)
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
    return [row for row in report["pooled"] if row["clips"] == "all"]


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


def glance_table(
    accuracy: dict, reaction: dict, fidelity: dict, alternatives: dict, headline: dict, drift: dict, lossless: dict
) -> str:
    """README's results at a glance for the default preset: one row for each question."""
    results = (accuracy["results"], reaction["own"]["results"], fidelity["results"])
    labels, delay, cosine = (next(row for row in rows if row["name"] == "balanced") for rows in results)
    top1, texts = labels["top1"], lossless["summary"]["all"]
    lookup, stock = (texts[name]["processor"]["times_dense"] for name in ("lookup", "stock lookup"))
    ways = {row["method"]: row for row in alternatives["rows"] if row["resolution"] == 448}
    times, own = {name: row["ms"] for name, row in ways.items()}, ways["balanced"]
    dense = [name for name in times if name.startswith("dense")]
    best = min(dense, key=times.__getitem__)
    large = {
        row["method"]: row for row in headline["rows"] if row["side"] == 1792 and row["activity"] != "own activity"
    }
    adapter = large["reconstruct with summary, distilled"]
    rows = [
        (
            "Times faster than dense, and cosine to it: 1792 px, 3% of the patches active, `reconstruct` with the "
            "adapter that ships, CPU, float32",
            f"{adapter['speed_up']:.0f}; {adapter['mean']:.3f}",
            f"{large['keyframe repeated']['mean']:.3f} (keyframe repeated)",
        ),
        (
            f"Zero-shot top-1, {len(accuracy['scenes'])} composed clips (dense: {top1['dense']:.1%})",
            f"{top1['accuracy']:.1%}",
            f"{top1['best control']['control']:.1%}",
        ),
        (
            f"Frames by which the label changes later than dense's, {reaction['own']['events']} events",
            spread(delay["delay"], delay["interval"], form=".1f"),
            f"{delay['best control']['control']:.1f}",
        ),
        (
            f"5th percentile of the cosine to dense over {fidelity['frames'][0]:,} frames",
            f"{cosine['p5']:.3f}",
            f"{cosine['best control']['control']:.3f}",
        ),
        (
            f"Times faster than transformers' model, 448 px, the shipped street clip at cost {own['cost']:.2f}, CPU",
            f"{times['dense, torch'] / own['ms']:.1f}",
            f"{times['dense, torch'] / times[best]:.1f} ({best}, the fastest of {len(dense)})",
        ),
        (
            f"SmolLM2, {sum(drift['prompts']['of_task'].values())} texts: tokens that change if an attention layer is "
            "bypassed on a fifth of the steps",
            f"{drift['configurations'][0]['tasks']['all']['drift']:.0%}",
            "0%, lossless generation",
        ),
        (
            "Times faster than dense, lossless text of SmolLM2, drafts by lookup",
            spread(lookup["median"], lookup["interval"], form=".2f"),
            f"{stock['median']:.2f} (transformers' prompt lookup)",
        ),
    ]
    return table(rows, {"question": "{0}", "measured": "{1}", "best baseline at equal cost": "{2}"})


def thousandths(key: str) -> Callable:
    """A column of the interval of a difference, in thousandths."""
    return lambda row: " to ".join(f"{1e3 * end:+.2f}" for end in row[key]["interval"])


def policies_table(report: dict) -> str:
    """The methods over all clips, each beside the best baseline at its own cost."""
    losses = {name: {} for name in PRESETS}
    for row in report["clips"]:
        found = dict(zip(report["clip_columns"], row["equal_cost"]["pooled_mean"], strict=True))
        if row["method"] in PRESETS and found["verdict"] == "below":
            losses[row["method"]][row["clip"]] = 1e3 * (found["control"] - found["value"])
    columns = method_and_cost()
    for name, key in {"mean cosine": "pooled_mean", "p5": "pooled_p5"}.items():
        columns[name], columns[f"best baseline's {name}"] = f"{{{key}[value]:.4f}}", f"{{{key}[control]:.4f}}"
        columns[f"difference in {name}, thousandths"] = thousandths(key)
    counts = "{pooled_mean[clips][above]}, {pooled_mean[clips][level]}, {pooled_mean[clips][below]}"
    below = (f"`{name}` on {', '.join(of)} (by at most {max(of.values()):.2f})" for name, of in losses.items() if of)
    note = "`{command}`: {clips_measured} clips, {frames} frames each, {tower}.".format(**report)
    if any(losses.values()):
        note += f" Below the best baseline, in thousandths: {'; '.join(below)}."
    return table(pooled(report), columns | {"clips above, level, below": counts}, note)


def holding_table(report: dict) -> str:
    """Each preset on each clip, beside the best hold at the same cost."""
    columns: dict = {
        "preset": "`{method}`",
        "clip": lambda row: row["clip"] if row["development"] else f"*{row['clip']}*",
    }
    columns |= {"kind": "{kind}", "cost": "{cost:.3f}"}
    for name in ("mean", "p5"):
        key = f"pooled_{name}"
        columns[f"{name} (best hold)"] = f"{{equal_cost[{key}][0]:.4f}} ({{equal_cost[{key}][1]:.4f}})"
        columns[f"{name}: difference, thousandths"] = lambda row, key=key: (
            f"{1e3 * (row['equal_cost'][key][0] - row['equal_cost'][key][1]):+.2f}"
        )
    rows, below = [row for row in report["clips"] if row["method"] in PRESETS], []
    for preset in PRESETS:
        of_preset = [row for row in rows if row["method"] == preset]
        names = [row["clip"] for row in of_preset if is_below_hold(row)]
        below.append(f"`{preset}` on {len(names)} of {len(of_preset)} clips" + f" ({', '.join(names)})" * bool(names))
    note = "`{command}`: {frames} frames a clip, {tower}.".format(**report)
    note += f" Below the best hold by more than 0.3 thousandths in mean or 1 in p5: {'; '.join(below)}."
    return table(rows, columns, note)


def is_below_hold(row: dict) -> bool:
    """Whether a preset misses the best hold on a clip by more than rounding and chance explain."""
    mean, p5 = (row["equal_cost"][f"pooled_{name}"][:2] for name in ("mean", "p5"))
    return mean[0] - mean[1] < -0.3e-3 or p5[0] - p5[1] < -1e-3


def oracle_table(report: dict) -> str:
    """The clips on which a preset is below the best hold, beside a hold that sees its own error."""
    columns = {"preset": "`{method}`", "clip": "{clip}", "cost": "{cost:.3f}"}
    for name in ("mean", "p5"):
        key = f"pooled_{name}"
        columns[name] = f"{{equal_cost[{key}][0]:.4f}}"
        columns[f"best hold's {name}"] = f"{{equal_cost[{key}][1]:.4f}} ({{equal_cost[{key}][2]}})"
        columns[f"oracle's {name}"] = f"{{oracle[{key}]:.4f}}"
    rows = [row for row in report["clips"] if row["method"] in PRESETS and is_below_hold(row)]
    return table(rows, columns)


def promises_table(report: dict) -> str:
    """What `min_fidelity` promises, and what is kept."""
    columns = {
        "`min_fidelity`": lambda row: row["method"].removeprefix("fidelity "),
        "clips": "{clips} ({count})",
        "frames at or above it": "{promise[kept]:.1%}",
        "the same, worst clip": "{promise[least_kept]:.0%}",
        "cost": "{cost:.3f}",
    }
    for name in ("mean", "p5"):
        columns[f"{name} (best hold)"] = f"{{pooled_{name}[value]:.4f}} ({{pooled_{name}[control]:.4f}})"
    rows = [row for row in report["pooled"] if "promise" in row and row["clips"] != "fixed camera"]
    return table(rows, columns, "`{command}`: {frames} frames a clip, {tower}.".format(**report))


def times_table(report: dict) -> str:
    """Presets and promised fidelities beside the best hold that takes as much processor time."""
    columns = method_and_cost() | {"processor time (dense = 1)": "{time:.3f}"}
    for name in ("mean", "p5"):
        key = f"time pooled_{name}"
        columns[f"{name} (best hold)"] = f"{{{key}[value]:.4f}} ({{{key}[control]:.4f}})"
        columns[f"{name}: difference, thousandths"] = thousandths(key)
    return table([row for row in pooled(report) if row["method"] in PRESETS or "promise" in row], columns)


def delays_table(report: dict) -> str:
    """How many frames pass between an event and the output's change."""
    rows = pooled(report)
    columns = method_and_cost() | {"the method's delay": "{delay[method]:.1f}"}
    columns |= {name: f"{{delay[{name}]:.1f}}" for name in rows[0]["delay"] if name not in ("events", "method")}
    return table(rows, columns, f"Mean of {rows[0]['delay']['events']} events, baselines at equal cost.")


def beforehand_table(report: dict) -> str:
    """The presets over all clips and over held-out ones, beside the hold that can be chosen beforehand."""
    columns = {"preset": "`{method}`", "clips": "{clips} ({count})", "cost": "{cost:.3f}"}
    for name in ("mean", "p5"):
        key = f"beforehand pooled_{name}"
        columns[name] = f"{{{key}[value]:.4f}}"
        columns[f"the hold's {name}"] = f"{{{key}[control]:.4f}}"
        columns[f"{name}: difference, thousandths"] = thousandths(key)
    rows = [row for row in report["pooled"] if row["method"] in PRESETS and row["clips"] != "fixed camera"]
    return table(rows, columns)


def run_table(summary: dict) -> str:
    """Speed and fidelity of a run."""
    times, cosines, held = (summary[key] for key in ("milliseconds_per_frame", "cosine_to_dense", "held_at_cost"))
    frames = [("skip rate", summary["skip_rate"], ".1%"), ("cost (dense = 1)", summary["cost"], ".3f")]
    frames += [(f"milliseconds, {way}", times[way], ".1f") for way in ("streamed", "dense")]
    columns = {key: lambda row, key=key: format(row[1][key], row[2]) for key in ("median", "p5", "p95")}
    found = {
        "streamed (cost {cost[mean]:.2f})": cosines["streamed"],
        "baseline: first frame repeated": cosines["first_frame"],
    }
    found |= {f"baseline: dense every {held['every']} frames (cost {held['cost']:.2f})": held["cosine"]}
    rows = ({"name": name.format(**summary), **cosine} for name, cosine in found.items())
    fidelity = {"cosine to dense": "{name}", **{key: f"{{{key}:.4f}}" for key in ("mean", "p5", "min")}}
    note = "{frames} frames, {resolution} px, {dtype}, {torch_threads} threads, torch {versions[torch]}; fidelity on "
    note += "{compared_frames} sampled frames."
    return f"{table(frames, {'per frame': '{0}', **columns})}\n\n{table(rows, fidelity, note.format(**summary))}"


def labels_table(summary: dict) -> str:
    """A run's labels over time, and how often dense and the baselines agree with them."""
    columns = {"seconds": "{start:.1f} to {end:.1f}", "best label": "{label}", "confidence": "{confidence:.0%}"}
    note = "{frames} frames, mean cost {cost[mean]:.2f} of dense. The best label is dense's on {0[streamed]} of "
    note += "{0[compared_frames]} sampled frames; with the first frame's label repeated on {0[first_frame]}, with one "
    note += (
        "held for {0[held_at_cost][every]} frames on {0[held_at_cost][agreed]} of {0[held_at_cost][compared_frames]}."
    )
    labels = summary["labels"]
    return table(labels["timeline"], columns, note.format(labels["agreement"], **summary))


def ratios(report: dict) -> list[tuple[dict, dict, float]]:
    """Every case, the dense entry that it is compared with, and the ratio of their speeds."""
    dense = {(entry["dtype"], entry["resolution"]): entry for entry in report["dense"]}
    pairs = [(case, dense[case["dtype"], case["resolution"]]) for case in report["cases"]]
    return [(case, entry, entry["milliseconds"]["median"] / case["streamed"]["median"]) for case, entry in pairs]


def speed_table(report: dict) -> str:
    """The cases with fewest active patches, and in the note the range of those with all patches active."""
    found, least = ratios(report), min(case["active"] for case in report["cases"])
    rows: dict[tuple, dict] = {}
    for entry in sorted(report["dense"], key=lambda entry: entry["resolution"]):
        dense = {**entry, "mode": "dense", "cost": 1, "active": least, "streamed": entry["milliseconds"]}
        for case, ratio in [(dense, ""), *((case, f"{ratio:.1f}") for case, of, ratio in found if of is entry)]:
            if case["active"] == least:
                row = rows.setdefault((case["resolution"], case["mode"]), dict(case))
                row[case["dtype"]] = f"{case['streamed']['median']:.0f}", ratio
    columns = {"pixels": "{resolution}", "mode": "`{mode}`", "cost": "{cost:.3f}", "GMAC": "{gigamacs:.1f}"}
    for dtype in dict.fromkeys(entry["dtype"] for entry in report["dense"]):
        columns |= {f"{dtype}: ms": f"{{{dtype}[0]}}", f"{dtype}: times faster": f"{{{dtype}[1]}}"}
    note = f"`{report['command']}`: {least:.0%} of the patches active, {device_of(report)}."
    if full := sorted((ratio, case["mode"]) for case, _, ratio in found if case["active"] == 1):
        note += (
            " With everything active, all modes lie between {0[0]:.2f} (`{0[1]}`) and {1[0]:.2f} times dense's speed."
        )
        note = note.format(full[0], full[-1])
    return table(rows.values(), columns, note)


def alternatives_table(report: dict) -> str:
    """Streams beside every way to encode densely, times faster than transformers' and than the fastest of these."""
    rows = []
    for resolution in dict.fromkeys(row["resolution"] for row in report["rows"]):
        of_it = [row for row in report["rows"] if row["resolution"] == resolution]
        stock, best = (
            of_it[0],
            min((row for row in of_it if row["method"].startswith("dense")), key=lambda row: row["ms"]),
        )
        rows += [{**row, "faster": stock["ms"] / row["ms"], "than_best": best["ms"] / row["ms"]} for row in of_it]
    columns = {
        "pixels": "{resolution}",
        "method": "{method}",
        "ms a frame (of a stretch: least to most)": "{ms:.0f} ({least_ms:.0f} to {most_ms:.0f})",
        "cost": "{cost:.3f}",
        "1 / cost": lambda row: f"{1 / row['cost']:.1f}",
        "times faster than transformers": "{faster:.1f}",
        "than the fastest dense": "{than_best:.1f}",
        "cosine to dense, mean": "{cosine:.4f}",
    }
    versions = " and ".join(f"{name} {version}" for name, version in report["alternatives"].items())
    note = f"`{report['command']}`: float32, {report['machine']['threads']} threads on the CPU, {versions}."
    return table(rows, columns, note)


def start_up_table(report: dict) -> str:
    """Seconds until imports and the command line are there."""
    columns = {"command": "{0}", "seconds": "{1:.1f}"}
    return table(report["seconds"].items(), columns, "`{command}`: medians of {repeats}.".format(**report))


def linear_costs_table(report: dict) -> str:
    """What a layer's products take on few rows, by way, and how much more each row costs than among all."""
    names, last = list(report["rows"][0]["ms"]), report["rows"][-1]
    usual = names[0]
    columns: dict[str, str | Callable] = {"rows": "{rows}", f"{usual}: ms": lambda row: f"{row['ms'][usual]:.2f}"}
    columns[f"a row, relative to {last['rows']} rows"] = lambda row: (
        f"{row['ms'][usual] / row['rows'] / (last['ms'][usual] / last['rows']):.2f}"
    )
    for name in names[1:]:
        columns[f"{name}: times faster"] = lambda row, name=name: f"{row['ms'][usual] / row['ms'][name]:.2f}"
    note = (
        f"`{report['command']}`: width {report['width']}, {report['inner']} in the MLP, float32, one thread, medians."
    )
    return table(report["rows"], columns, note)


def compiled_frames_table(report: dict) -> str:
    """What `torch.compile` and fewer threads change for frames with a fixed number of patches."""
    usual, *others = report["rows"][0]["ms"]
    columns: dict[str, str | Callable] = {"patches": "{patches}", "cost": "{cost:.3f}"}
    columns[f"{usual}: ms"] = lambda row: f"{row['ms'][usual]:.1f}"
    for name in others:
        columns[f"{name}: times faster"] = lambda row, name=name: f"{row['ms'][usual] / row['ms'][name]:.2f}"
    note = f"`{report['command']}`: float32, {report['machine']['threads']} threads, medians."
    return table(report["rows"], columns, note)


def headline_table(report: dict) -> str:
    """Speed and fidelity of sparse frames by resolution, and what is left of dense accuracy."""

    def figure(name: str, form: str) -> Callable:
        return lambda row: "" if row.get(name) is None else format(row[name], form)

    several = [int(side) for side, clips in report.get("clips", {}).items() if len(clips) > 2]

    def hold(row: dict) -> str:
        if not row["activity"] or "hold_mean" not in row:
            return ""
        above = row.get("above_hold") if row["side"] in several else None
        return f"{row['hold_mean']:.4f}, {row['hold_p5']:.4f}" + (
            "; {:+.3f} to {:+.3f}".format(*above) if above else ""
        )

    columns = {
        "pixels": "{side}",
        "method": "{method}",
        "patches encoded": lambda row: {"97% skipped": "3%", "own activity": "own"}.get(row["activity"], ""),
        "cost of a sparse frame": figure("sparse_cost", ".3f"),
        "ms": figure("ms", ".0f"),
        "times faster": figure("speed_up", ".1f"),
        "mean": figure("mean", ".4f"),
        "p5": figure("p5", ".4f"),
        "top-1": figure("top1", ".1%"),
        "hold at equal cost: mean, p5; difference to it": hold,
    }
    return table(report["rows"], columns)


def stretch_table(report: dict) -> str:
    """The error of sparse frames as a share of the repeated keyframe's, by the stretch of the position embeddings."""
    by_place = {(row["method"], row["activity"], row["side"]): row["mean"] for row in report["rows"]}
    sides = sorted({row["side"] for row in report["rows"]})

    def share(side: int) -> Callable:
        def cell(row: tuple) -> str:
            mean = by_place.get((*row, side))
            return "" if mean is None else f"{(1 - mean) / (1 - by_place['keyframe repeated', '', side]):.2f}"

        return cell

    methods = (
        "eliminate",
        "eliminate with summary",
        "reconstruct",
        "reconstruct with summary",
        "context",
        "extrapolate",
    )
    rows = [(method, activity) for activity in ("97% skipped", "own activity") for method in methods]
    columns: dict = {"method": "{}", "patches encoded": lambda row: "3%" if "97%" in row[1] else "own"}
    return table(rows, columns | {f"{side // sides[0]}x ({side})": share(side) for side in sides})


def headline_variants_table(report: dict) -> str:
    """The rows of an earlier headline that are of distilled weights, beside the trivial ones."""
    trivial = ("dense", "keyframe repeated")
    rows = [row for row in report["rows"] if row["method"] in trivial or "distilled" in row["method"]]
    rows += [row for row in report["rows"] if row["method"] == "dense of published"]
    return headline_table({**report, "rows": rows}) + "\n\n`{command}`, in commit `{commit:.7}`.".format(**report)


def adapters_table(*reports: dict) -> str:
    """Figures on held-out clips before and after each distillation, and of the keyframe repeated."""
    rows = []
    for report in reports:
        settings, after = report["settings"], report["held_out"][str(report["best_step"])]
        about = {
            "name": report["command"].split()[-1],
            "method": "adapter" if settings["method"] == "lora" else "all weights",
            "summary": settings["summary_tokens"] or 0,
            "steps": len(report["losses"]),
            "minutes": report["seconds"] / 60,
        }
        rows += [
            {**about, "share": share, "before": before, "after": after[share]}
            for share, before in report["held_out"]["0"].items()
        ]
    columns = {
        "variant": "`{name}`",
        "trained": "{method}",
        "summary tokens": "{summary}",
        "steps": "{steps}",
        "minutes": "{minutes:.0f}",
        "encoded": "{share}",
        "before: mean, p5": "{before[mean]:.4f}, {before[p5]:.4f}",
        "after: mean, p5": "{after[mean]:.4f}, {after[p5]:.4f}",
        "keyframe repeated: mean, p5": "{before[repeated_mean]:.4f}, {before[repeated_p5]:.4f}",
    }
    return table(rows, columns)


def distill_variants_table(report: dict) -> str:
    """What each loss and rank gains on held-out clips, and its difference to the usual one."""

    def change(name: str) -> Callable:
        return lambda row: spread(row.get(name), row.get(f"{name}_interval"), form="+.4f")

    columns = {
        "variant": "{variant}",
        "encoded": "{share}",
        "before: mean, p5": "{before:.4f}, {before_p5:.4f}",
        "after: mean, p5": "{mean:.4f}, {p5:.4f}",
        "gain": change("gain"),
        "to `angle`": change("to_reference"),
    }
    return table(report["rows"], columns)


def held_out_table(report: dict) -> str:
    """What one adapter gained on held-out clips, beside the keyframe repeated."""
    rows = []
    for share, before in report["held_out"]["0"].items():
        after = report["held_out"][str(report["best_step"])][share]
        rows += [
            {"share": share, "what": "the checkpoint's", **before},
            {"share": share, "what": "with the adapter", **after},
        ]
    columns = {"patches encoded on a sparse frame": "{share}", "cost": "{cost:.3f}", "weights": "{what}"}
    columns |= {"mean": "{mean:.4f}", "p5": "{p5:.4f}"}
    columns |= {"keyframe repeated: mean, p5": "{repeated_mean:.4f}, {repeated_p5:.4f}"}
    return table(rows, columns)


def device_of(report: dict) -> str:
    """What a benchmark ran on, for a note below its table."""
    on_cpu = report["device"] == "cpu"
    return f"{report['machine']['threads']} threads on the CPU" if on_cpu else report["machine"]["device"]


def streams_table(report: dict) -> str:
    """Several cameras in one call, and which share of 1 / cost their speed over dense is."""
    ways = {"one call": "one_call", "a call each": "separate_calls", "dense, batched": "dense"}
    columns: dict = {"mode": "`{mode}`", "cameras": "{cameras}", "cost": "{cost:.3f}"}
    columns |= {f"frames/s: {name}": f"{{frames_per_second[{way}][median]:.1f}}" for name, way in ways.items()}

    def speed(row: dict, way: str) -> float:
        return row["frames_per_second"]["one_call"]["median"] / row["frames_per_second"][way]["median"]

    columns["speed (a call each = 1)"] = lambda row: f"{speed(row, 'separate_calls'):.1f}"
    columns["speed (dense = 1)"] = lambda row: f"{speed(row, 'dense'):.1f}"
    columns["of 1 / cost"] = lambda row: f"{speed(row, 'dense') * row['cost']:.2f}"
    return table(report["cases"], columns, f"`{report['command']}`: {report['dtype']}, {device_of(report)}.")


def search_table(report: dict) -> str:
    """Processor time of a search."""
    columns = {
        "frames": "{frames:,}",
        "numbers in an embedding": "{dim}",
        "seconds of processor time": lambda row: (
            f"{sum(of['median'] for of in row['processor_seconds'].values()):.2f}"
        ),
        "of which comparing": "{processor_seconds[similarities][median]:.2f}",
    }
    return table(report["cases"], columns, "`{command}`, {machine[threads]} threads.".format(**report))


def throughput_table(report: dict) -> str:
    """Frames per second from file to Parquet."""
    found = {row["preset"]: row for row in report["presets"]}

    def of_preset(key):
        return lambda row: f"{found[row[0]][key]:.2f}" if row[0] in found else ""

    columns = {
        "encoded by": lambda row: f"`{row[0]}`" if row[0] in found else f"{row[0]}",
        "frames/s": "{1:.1f}",
        "cost": of_preset("cost"),
        "speed (best dense = 1)": of_preset("times_dense"),
        "aim: 0.85 / cost": of_preset("aim"),
    }
    note = (
        "`{command}`: {videos} videos of {frames} frames ({dense_frames} for dense), {dtype} on {device}, "
        "{machine[threads]} threads. Best dense: {best_dense}."
    )
    return table(report["frames_per_second"].items(), columns, note.format(**report))


def accuracy_table(report: dict) -> str:
    """Zero-shot accuracy on composed clips."""

    def worst(row):
        found = {name: of["top1"]["difference"] for name, of in row["motions"].items()}
        name = min((name for name in found if found[name] is not None), key=found.get)
        return "" if row["name"] == "dense" else f"{spread(found[name], scale=100)} ({name})"

    columns = {
        "top-1": "{top1[accuracy]:.1%}",
        "difference to dense, points": estimate("top1.difference", "top1.interval", 100),
        "largest loss by kind of motion, points": worst,
        **beside(".1%", 100, part="top1.", unit=", points"),
        "top-5": "{top5[accuracy]:.1%}",
    }
    note = "`{command}`: {0} clips, {frames_counted} frames counted, {texts} labels, {recorded[dtype]}."
    note = note.format(len(report["scenes"]), **report)
    return table(rows_shown(report["results"]), method_and_cost() | columns, note)


def motions_table(report: dict, default: str = "balanced") -> str:
    """The default preset by kind of motion, beside dense every k frames at about the same cost."""
    ours = next(row for row in report["results"] if row["name"] == default)
    holds = (row for row in report["results"] if row["family"] == "every k")
    held = min(holds, key=lambda row: abs(row["cost"] - ours["cost"]))
    columns = {"motion": "{motion}", "top-1 of dense": "{ours[top1][dense]:.1%}"}
    for name, key in {f"`{default}`": "ours", f"*baseline:* {held['name']}": "held"}.items():
        columns[f"cost of {name}"] = f"{{{key}[cost]:.3f}}"
        top1 = f"{key}.top1"
        columns[f"{name}: top-1 less dense, points"] = estimate(f"{top1}.difference", f"{top1}.interval", 100)
    rows = ({"motion": name, "ours": of, "held": held["motions"][name]} for name, of in ours["motions"].items())
    return table(rows, columns, f"{len(report['frames'])} clips of each kind of motion.")


def reaction_table(report: dict) -> str:
    """Frames between an event and the label's change."""
    columns = {
        "delay after dense, frames": estimate("delay", "interval", form=".1f"),
        "events not followed in time": "{censored}",
        **beside(".1f", signed=".1f", unit=", frames"),
    }
    note = (
        "`{command}`: {own[events]} events in {own[scenes]} clips; dense itself takes {own[dense_delay]:.1f} frames. "
    )
    note += (
        "{own[left_out]} events that dense does not follow, or whose label it gives before them, are left out. Labels "
        "are compared on {0} frames from an event on, or until the next event: where a method follows later or not at "
        "all, its delay is a lower bound."
    )
    note = note.format(report["recorded"]["settings"]["after"] + 1, **report)
    return table(rows_shown(report["own"]["results"]), method_and_cost() | columns, note)


def fidelity_table(report: dict) -> str:
    """Cosine to dense over long clips."""
    columns = {
        "cosine: mean": "{mean:.4f}",
        "p5": "{p5:.4f}",
        "p1": "{p1:.4f}",
        "trend per 1,000 frames, thousandths": estimate("trend", "trend_interval", 1e3),
        "MB per stream": lambda row: f"{row['bytes'] / 1e6:.1f}{'' if row['bytes_constant'] else ', not constant'}",
        **beside(".3f", 1e3, head="p5: ", unit=", thousandths"),
        **beside(".3f", 1e3, part="changing.", head="p5 where labels change: ", unit=", thousandths"),
    }
    note = "`{command}`: {recorded[dtype]}.".format(**report)
    return table(rows_shown(report["results"]), method_and_cost() | columns, note)


def laws_table(report: dict) -> str:
    """The published observations, each with what was measured and a verdict."""
    columns = {"published observation": "{claim}", "measured": "{measured}", "baseline": "{control}"}
    note = "`{command}`: {clips[in_all]} composed clips of {clips[frames]} frames, {labels} labels.".format(**report)
    return table(report["findings"], columns | {"verdict": "{verdict}"}, note)


def motion_table(report: dict) -> str:
    """How well masks, boxes and labels fit the things that move, over all kinds of motion."""
    masks, objects, labels = report["masks"], report["objects"], report["labels"]
    pixels = max((way for way in masks if way.startswith("pixels")), key=lambda way: masks[way]["change"]["value"])
    ways = MASKS | {pixels: "baseline: difference of pixels, best level"}
    rows = [
        {"name": ways[way], **masks[way], **objects[way], **labels.get(way.rpartition(", ")[0], {})} for way in ways
    ]
    columns = {"mask": "{name}"}
    for head, key in MASK_COLUMNS.items():
        columns[head] = estimate(f"{key}.value", form=".2f" if "IoU" in head else ".0%")
    note = "`{command}`: {clips[in_all]} composed clips of {clips[frames]} frames. A box is found if its IoU with a "
    note += "moving thing's is at least {least_iou}; the first row found {0[objects]} of them. {labels_known} labels."
    return table(rows, columns, note.format(labels["balanced, last_update"], **report))


def patches_table(report: dict) -> str:
    """Cosine of the patches' outputs to dense, beside dense patches held at the same cost."""
    columns = {"method": method_and_cost()["method"], "clips": "{clips} ({count})", "cost": "{cost:.3f}"}
    for whose, head in (("own", ""), ("held", "held: ")):
        columns |= {f"{head}{name}": f"{{patches[{whose}][{name}]:.4f}}" for name in ("mean", "p5", "p1")}
        columns[f"{head}worst patch of a frame, mean"] = f"{{patches[{whose}][worst]:.3f}}"
    rows = [row for row in report["pooled"] if "patches" in row and row["clips"] != "held out"]
    return table(rows, columns, "`{command}`: {frames} frames a clip, {tower}.".format(**report))


def tower_share_table(report: dict) -> str:
    """The tower's share of the multiply-adds of larger models."""
    columns = {
        "model": "{model}",
        "images": "{images}",
        "tower, billion multiply-adds": lambda row: f"{row['tower'] / 1e9:,.0f}",
        "whole model, billion multiply-adds": lambda row: f"{row['whole'] / 1e9:,.0f}",
        "the tower's share": "{share:.0%}",
    }
    prompts = " and ".join(f"{tokens} ({model})" for model, tokens in report["prompt_tokens"].items())
    return table(report["rows"], columns, f"`{report['command']}`: counted, not timed; prompts of {prompts} tokens.")


def export_table(report: dict) -> str:
    """How close exported streams are to the engine's."""
    columns = {
        "runs in": "{way}",
        "type": "{dtype}",
        "largest difference": "{difference:.0e}",
        "cosine to the engine: mean": "{to_engine:.5f}",
        "least": "{to_engine_least:.5f}",
        "least of a patch": "{patches_to_engine_least:.5f}",
        "to dense: mean": "{to_dense:.4f}",
        "p5": "{to_dense_p5:.4f}",
        "same patches encoded": lambda row: "" if row["same_patches"] is None else f"{row['same_patches']:.0%}",
    }
    note = (
        "`{command}`: {model}, {frames} frames, every {every}th of two clips, mode `extrapolate`, {token_budget} of "
        "256 patches on a sparse frame, every {interval}th a keyframe. The engine is that in float32; differences of "
        "the embedding are relative to its largest element; the last column is the share of sparse frames."
    )
    return table(report["rows"], columns, note.format(command=report["command"], **report["settings"]))


def static_tokens_table(report: dict) -> str:
    """Fidelity and cost of leaving out image tokens: by the gate, and by other rules at the same number of tokens."""
    columns = {
        "clips": "{clips} ({count})",
        "number of tokens": "{at}: {kept:.0%}",
        "method": "{method}",
        "cosine mean": "{mean:.4f}",
        "p5": "{p5:.4f}",
        "cost: tower": "{tower_share:.2f}",
        "prefill": "{prefill_share:.2f}",
        "sum (all tokens = 1)": "{cost:.2f}",
        "seconds: tower + prefill": "{tower_seconds:.1f} + {prefill_seconds:.1f} = {seconds:.1f}",
    }
    note = (
        "`{command}`: {frames} frames at most, every {every}th of the video, and {prompt} words; means over the clips."
    )
    return table(report["rows"], columns, note.format(**report))


def lossless_table(report: dict) -> str:
    """Tokens per second with each drafter and with none."""
    settings, last = report["settings"], list(report["summary"].values())[-1]
    columns = {"task": "{task}", "drafts": "{name}", "tokens/s": "{processor[tokens_per_second]:.0f}"}
    columns |= {
        "speed (dense = 1)": estimate("processor.times_dense.median", "processor.times_dense.interval", form=".2f"),
        "slowest text": "{processor[times_dense][least]:.2f}",
        "speed by wall clock": estimate("wall.times_dense.median", "wall.times_dense.interval", form=".2f"),
        "acceptance rate": estimate("acceptance", form=".0%"),
        "draft length, tokens": estimate("draft_length", form=".1f"),
        "tokens per verification": estimate("tokens_per_check", form=".1f"),
    }
    rows = ({"task": task, "name": name, **row} for task, of in report["summary"].items() for name, row in of.items())
    differ = [sum(row["divergences"][key] for row in last.values()) for key in ("within_rounding", "others")]
    measured = sum(case["tokens"] >= settings["least_tokens"] for case in report["cases"])
    note = (
        "`{0}`: {model}, {1} prompts with texts of {least_tokens} to {new_tokens} tokens, {dtype}, {turns} turn(s), "
        "{machine[threads]} thread(s). Speed in processor time, and by wall clock. Texts that differ from the "
        "stock model's: {2} where its two highest logits are within rounding, {3} elsewhere."
    )
    return table(rows, columns, note.format(report["command"], measured, *differ, **settings))


def drafter_speed_table(report: dict) -> str:
    """Speed with a trained drafter, alone and beside the lookup, and with the lookup alone."""
    names = ("lookup", "drafter", "drafter and lookup")
    summary = {task: {name: rows[name] for name in names} for task, rows in report["summary"].items()}
    return lossless_table({**report, "summary": summary})


def drafter_table(report: dict) -> str:
    """How often a trained drafter's drafts agree with the model on held-out prompts, and after each epoch."""
    rows = [{"task": task, **row} for task, row in report["held_out"].items()]
    columns = {"task": "{task}", "held-out tokens": "{tokens}", "first draft token agrees": "{agreement[0]:.0%}"}
    columns |= {"first two agree": "{agreement[1]:.0%}", "all three agree": "{agreement[2]:.0%}"}
    epochs = ", ".join(f"{first:.0%}" for first, *_ in report["agreement"])
    note = (
        f"`{report['command']}`: {report['texts']} texts of {report['tokens']} tokens. First token after each epoch:"
    )
    costs = f"draft token {report['draft']:.2f}, verification of one {report['check'][0]:.2f}"
    return table(rows, columns, f"{note} {epochs}. Times at its end, in dense steps: {costs}.")


def drift_table(report: dict) -> str:
    """Drift by task, a bypass in each row."""
    return f"{markdown_table(summary_table(report))}\n\n`{report['command']}`: {description(report)}"


def findings_table(report: dict) -> str:
    """The published findings on language, each with its verdict and rule."""
    rows = [[found[name] for name in ("claim", "measured", "verdict", "rule")] for found in report["findings"]]
    return markdown_table((["published", "measured here", "verdict", "rule"], rows))


def json_table(report: dict) -> str:
    """Drift of JSON under a schema, a bypass in each row."""
    return f"{markdown_table(json_drift.json_table(report))}\n\n`{report['command']}`: {json_drift.describe(report)}"


def check_table(report: dict) -> str:
    """What a verification costs, by its number of tokens."""
    names = {"turned": "weights times tokens", "usual": "tokens times weights, the usual product"}
    counts = [count for count in report["costs"]["turned"] if count != "1"]
    columns = {"products": "{name}"} | {f"{count} tokens, in dense steps": f"{{t{count}:.2f}}" for count in counts}
    rows = [
        {"name": words, **{f"t{count}": report["costs"][name][count] for count in counts}}
        for name, words in names.items()
    ]
    note = f"`{report['command']}`: {report['model']}, one thread, processor time, the least of seven."
    return table(rows, columns, note)


BLOCKS = {
    "presets": (presets_table, "vision_policies"),
    "glance": (
        glance_table,
        *("accuracy", "reaction", "fidelity", "benchmark_alternatives", "headline", "token_drift"),
        "benchmark_lossless",
    ),
    "policies": (policies_table, "vision_policies"),
    "modes": (policies_table, "vision_modes"),
    "dinov2": (policies_table, "vision_policies_dinov2"),
    "dinov2 beforehand": (beforehand_table, "vision_policies_dinov2"),
    "holding": (holding_table, "vision_policies"),
    "beforehand": (beforehand_table, "vision_policies"),
    "delays": (delays_table, "vision_policies"),
    "oracle": (oracle_table, "vision_policies"),
    "promises": (promises_table, "vision_policies"),
    "times": (times_table, "vision_policies"),
    "speed": (speed_table, "benchmark_vision"),
    "start-up": (start_up_table, "start_up"),
    "linear costs": (linear_costs_table, "linear_costs"),
    "compiled frames": (compiled_frames_table, "compiled_frames"),
    "alternatives": (alternatives_table, "benchmark_alternatives"),
    "streams": (streams_table, "benchmark_streams"),
    "speed cuda": (speed_table, "benchmark_vision_cuda"),
    "streams cuda": (streams_table, "benchmark_streams_cuda"),
    "search": (search_table, "benchmark_search"),
    "embed": (throughput_table, "embed_throughput"),
    "headline": (headline_table, "headline"),
    "stretch": (stretch_table, "headline"),
    "headline variants": (headline_variants_table, "headline_variants"),
    "adapters": (adapters_table, "distill_reconstruct", "distill_extrapolate"),
    "adapter variants": (distill_variants_table, "distill_variants"),
    "held-out": (held_out_table, "distill_reconstruct"),
    "run": (run_table, "run"),
    "labels": (labels_table, "run_labels"),
    "motion": (motion_table, "motion_masks"),
    "accuracy": (accuracy_table, "accuracy"),
    "motions": (motions_table, "accuracy"),
    "reaction": (reaction_table, "reaction"),
    "fidelity": (fidelity_table, "fidelity"),
    "laws": (laws_table, "published_laws"),
    "drift": (drift_table, "token_drift"),
    "drift-findings": (findings_table, "token_drift"),
    "drift-cascade": (drift_table, "drift_cascade"),
    "drift-json": (json_table, "json_drift"),
    "patches": (patches_table, "vision_policies"),
    "tower share": (tower_share_table, "tower_share"),
    "static tokens": (static_tokens_table, "static_tokens"),
    "export": (export_table, "export_fidelity"),
    "lossless": (lossless_table, "benchmark_lossless"),
    "drafter": (drafter_table, "drafter_training"),
    "drafter speed": (drafter_speed_table, "benchmark_drafter"),
    "checks": (check_table, "check_costs"),
}


def filled(page: str) -> str:
    """A page with each of its tables written anew, but for those that were not measured yet."""
    for name, (make, *results) in BLOCKS.items():
        is_measured = all((RESULTS / f"{result}.json").exists() for result in results)
        if is_measured and f"<!-- figures:{name}:begin -->" in page:
            text = make(*map(load, results))
            if BEFORE_CONTROLLER.intersection(results):
                text += "\n\nPresets: as they were before the controller of the cost budget."
            page = fill_block(page, f"figures:{name}", text)
    return page


if __name__ == "__main__":
    for path in PAGES:
        write_whole(path, filled(path.read_text(encoding="utf-8")))
