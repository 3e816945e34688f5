"""Tables of fidelity to dense over cost, and of presets against holding."""

from eval.docs.cells import beside, estimate, method_and_cost, rows_shown, table, thousandths
from neuroflow_hf import PRESETS

OF_MEAN = "pooled_cosine_after_subtracting_mean_training_cls"
TOWER_ROWS = {
    "Patch features, tower against original": "patch_cosine",
    "*baseline:* the same, patch at another place": "patch_at_another_place_cosine",
    "Pooled output against CLS output": "pooled_cosine",
    "the same, mean training CLS output subtracted from both": OF_MEAN,
    "*baseline:* mean patch feature against CLS output": "mean_patch_cosine",
    "*baseline:* mean training CLS output against CLS output": "mean_training_cls_cosine",
    "*baseline:* CLS outputs of different photographs / of different frames": "others",
}


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


def patches_table(report: dict) -> str:
    """Cosine of the patches' outputs to dense, beside dense patches held at the same cost."""
    columns = {"method": method_and_cost()["method"], "clips": "{clips} ({count})", "cost": "{cost:.3f}"}
    for whose, head in (("own", ""), ("held", "held: ")):
        columns |= {f"{head}{name}": f"{{patches[{whose}][{name}]:.4f}}" for name in ("mean", "p5", "p1")}
        columns[f"{head}worst patch of a frame, mean"] = f"{{patches[{whose}][worst]:.3f}}"
    rows = [row for row in report["pooled"] if "patches" in row and row["clips"] != "held out"]
    return table(rows, columns, "`{command}`: {frames} frames a clip, {tower}.".format(**report))


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


def tower_table(result: dict) -> str:
    """How close the built tower is to the original."""
    parts = {"held-out photographs": result["held_out_photos"], "the clip's frames": result["clip"]}

    def cells(part: dict) -> list[str]:
        controls = part["controls"]
        others = controls.get("cls_of_different_photos_cosine") or controls.get("cls_of_different_frames_cosine")
        found = {**part, **controls, "others": others}
        cosines = [f"{found[key]['mean']:.3f} ({found[key]['p5']:.3f})" for key in TOWER_ROWS.values()]
        return [*cosines, f"{part['pooled_nearest_cls_is_own']:.2f} ({controls['nearest_by_chance']:.2f})"]

    titles = [*TOWER_ROWS, "Share of images whose pooled output is nearest to their own CLS output (by chance)"]
    columns = {"cosine: mean (5th percentile)": "{0}"}
    columns |= {
        f"{name} ({part['images']} images)": f"{{{place}}}" for place, (name, part) in enumerate(parts.items(), 1)
    }
    note = "Written by `{command}` from eval/results/tower_fidelity.json: seed {seed}, torch {versions[torch]}, "
    note += "transformers {versions[transformers]}."
    return table(zip(titles, *map(cells, parts.values()), strict=True), columns, note.format(**result))
