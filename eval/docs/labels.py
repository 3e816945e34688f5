"""Tables of what survives of labels and of motion on composed clips."""

from eval.docs.cells import beside, estimate, method_and_cost, rows_shown, spread, table

MASKS = {
    "balanced, last_update, 0.01": "`balanced` (default)",
    "balanced, last_update, 0.03": "`balanced`, threshold 0.03",
    "balanced, ema, 0.01": "`balanced`, reference `ema`",
    "context, last_update, 0.01": "`context`",
    "context, ema, 0.01": "`context`, reference `ema`",
    "everything": "baseline: everything",
}
HELD_OUT, STYLE = "held-out renderings, photographs and phrasings", "a style never seen"
LEAST_SHARE = 0.15  # that the main thing covers, for it to count
PIPELINE_PHRASING = "This is a photo of {name}."
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


def zero_shot_table(report: dict, again: dict) -> str:
    """What the small SigLIP recognises; `again` is of a second run of its recipe."""

    def share_cell(found: dict) -> str:
        between = " ({:.1%} to {:.1%})".format(*found["interval"]) if "interval" in found else ""
        return f"{found['top1']:.1%}{between}"

    def accuracies(of: str, head: str, found: dict[str, dict]) -> str:
        rows = [(name, share_cell(one), one.get("pictures", "")) for name, one in found.items()]
        return table(rows, {of: "{0}", head: "{1}", "pictures": "{2}"})

    others = {name.replace("control:", "baseline:"): found for name, found in report["others"].items()}
    rows = {f"**{HELD_OUT}**": report[HELD_OUT], **others}
    rows["the first row, of the recipe run again from nothing"] = again[HELD_OUT]
    head = f"top-1 among {report['things']} things (95 % interval)"
    columns = {"held-out pictures, told what it is": "{0}", "right": "{1}", "most frequent answer": "{2:.1%}"}
    details = [(name, share_cell(f), f["most frequent"], f["pictures"]) for name, f in report["details"].items()]
    phrasings, photos = report["phrasings"], report["photographs"]
    known, held_out = ([f["top1"] for f in phrasings.values() if f["held out"] == which] for which in (False, True))
    photographs_right = sum(found["named"][0] in found["shows"] for found in photos)
    return "\n\n".join(
        [
            accuracies(f"main thing at least {LEAST_SHARE:.0%} of the frame", head, rows),
            accuracies("main thing covers", "top-1", report["by size"]),
            accuracies("in the picture", "top-1", report["by number"]),
            table(details, columns | {"pictures": "{3}"}),
            f"Five held-out phrasings together; one at a time {min(held_out):.1%} to {max(held_out):.1%}, those of "
            f"training {min(known):.1%} to {max(known):.1%}, `{PIPELINE_PHRASING}` (the pipeline's) "
            f"{phrasings[PIPELINE_PHRASING]['top1']:.1%}. Top-5: {report[HELD_OUT]['top5']:.1%}.",
            "Most confused: " + ", ".join(f"{a} taken for {b}" for a, b, _ in report["most confused"][:10]) + ".",
            f"Of {len(photos)} held-out photographs and scenes of footage that show one of the things, "
            f"{photographs_right} were named right: "
            + "; ".join(f"{' or '.join(found['shows'])}: {found['named'][0]}" for found in photos)
            + ".",
            "`{command}`, bfloat16, torch {versions[torch]}, transformers {versions[transformers]}.".format(**report),
        ]
    )
