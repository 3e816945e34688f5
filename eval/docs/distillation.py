"""Tables of distilled weights and adapters."""

from collections.abc import Callable

from eval.docs.cells import spread, table


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
