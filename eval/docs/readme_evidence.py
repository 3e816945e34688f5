"""README's tables of evidence, in Markdown, each from its JSON file under `eval/results/`: pure functions."""

from collections.abc import Sequence

SHOWN = "Of each family of controls the setting nearest in cost to the default, of each mode one setting"
START = "Streams with a budget begin with a reserve, so that short clips cost more than long ones."


def points(difference: float | None, interval: Sequence[float] | None) -> str:
    """A difference of shares in points, with its interval."""
    if difference is None:
        return ""
    between = "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
    return f"{100 * difference:+.1f}{between}"


def frames(value: float, interval: Sequence[float] | None) -> str:
    """A number of frames, with its interval."""
    return f"{value:.1f}" + ("" if interval is None else f" ({interval[0]:.1f} to {interval[1]:.1f})")


def name_of(row: dict) -> str:
    """A method's name; controls are called so, presets are code."""
    if row["control"]:
        return f"*control:* {row['name']}"
    return f"`{row['name']}`" if row["family"] == "presets" else row["name"]


def rows_shown(rows: Sequence[dict], default: str = "balanced") -> list[dict]:
    """
    Of many settings those for a table: dense, the presets, of each family of methods the first setting, of each of
    controls the one whose cost is nearest to the default preset's.
    """
    cost = next(row["cost"] for row in rows if row["name"] == default)
    shown: dict[str, list[dict]] = {}
    for row in rows:
        shown.setdefault(row["family"], []).append(row)
    kept = []
    for family, settings in shown.items():
        if family == "presets":
            kept += settings
        elif settings[0]["control"]:
            kept.append(min(settings, key=lambda row: abs(row["cost"] - cost)))
        else:
            kept.append(settings[0])
    return kept


def what_was_recorded(report: dict) -> str:
    """The command, the clips and the machine."""
    lengths = sorted(set(report["frames"]), reverse=True)
    recorded = report["recorded"]
    return (
        f"`{report['command']}`: {len(report['scenes'])} composed clips, {len(report['frames'])} of each of 14 kinds "
        f"of motion, of {' or '.join(map(str, lengths))} frames, held-out drawings before held-out photographs; "
        f"neuroflow-siglip-small, {recorded['dtype']}"
    )


def accuracy_table(report: dict) -> str:
    """Zero-shot accuracy of all methods, from `accuracy.json`."""
    lines = [
        "| method | cost | top-1 | less dense's, points | largest loss in a motion | best control at its cost "
        "| difference to it, points | top-5 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_shown(report["results"]):
        compared = row["top1"].get("best control")
        differences = {
            motion: found["top1"]["difference"]
            for motion, found in row["motions"].items()
            if found["top1"]["difference"] is not None
        }
        worst = min(differences, key=differences.get)
        control = "" if compared is None else f"{compared['control']:.1%} ({compared['family']})"
        beside = "" if compared is None else points(compared["difference"], compared["interval"])
        loss = "" if row["name"] == "dense" else f"{points(differences[worst], None)} ({worst})"
        less = "" if row["name"] == "dense" else points(row["top1"]["difference"], row["top1"]["interval"])
        lines.append(
            f"| {name_of(row)} | {row['cost']:.3f} | {row['top1']['accuracy']:.1%} | {less} | {loss} | {control} "
            f"| {beside} | {row['top5']['accuracy']:.1%} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{what_was_recorded(report)}; {report['frames_counted']} frames counted, asked for one of "
            f"{report['texts']} labels. Intervals: 95 %, from drawing clips, paired. The best control, chosen after "
            "the fact, costs no more: a setting, or a mixture of the two of a family that are nearest in cost. "
            f"{START} {SHOWN}: [all {len(report['results'])}](eval/results/accuracy.json).",
        ]
    )


def motions_table(report: dict, default: str = "balanced", family: str = "every k") -> str:
    """The default preset by kind of motion, beside the control of a family that is nearest in cost over all."""
    rows = {row["name"]: row for row in report["results"]}
    ours = rows[default]
    controls = [row for row in report["results"] if row["family"] == family]
    control = min(controls, key=lambda row: abs(row["cost"] - ours["cost"]))
    lines = [
        f"| motion | top-1 of dense | cost of `{default}` | its top-1 less dense's, points "
        f"| *control:* {control['name']}, cost | top-1 less dense's |",
        "|---|---|---|---|---|---|",
    ]
    for motion, found in ours["motions"].items():
        beside = control["motions"][motion]
        lines.append(
            f"| {motion} | {found['top1']['dense']:.1%} | {found['cost']:.3f} "
            f"| {points(found['top1']['difference'], found['top1']['interval'])} | {beside['cost']:.3f} "
            f"| {points(beside['top1']['difference'], beside['top1']['interval'])} |"
        )
    return "\n".join([*lines, "", f"The same run, {len(report['frames'])} clips of each kind of motion."])


def reaction_table(report: dict) -> str:
    """Delays between an event and the label's change, from `reaction.json`."""
    own = report["own"]
    lines = [
        "| method | cost | delay beyond dense's, frames | not within the frames looked at | best control at its cost "
        "| difference to it, frames |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows_shown(own["results"]):
        compared = row.get("best control")
        control = "" if compared is None else f"{compared['control']:.1f} ({compared['family']})"
        beside = "" if compared is None else frames(compared["difference"], compared["interval"])
        delay = "" if row["name"] == "dense" else frames(row["delay"], row["interval"])
        lines.append(f"| {name_of(row)} | {row['cost']:.3f} | {delay} | {row['censored']} | {control} | {beside} |")
    return "\n".join(
        [
            *lines,
            "",
            f"`{report['command']}`: {own['events']} events in {own['scenes']} clips, by the clip's own labels and "
            f"`nothing`; dense itself takes {own['dense_delay']:.1f} frames. {own['left_out']} events that dense does "
            "not follow, or says before, are left out. Looked at are "
            f"{report['recorded']['settings']['after'] + 1} frames from an event on, or those until the next one: "
            "what takes longer counts as that long, so that delays are lower bounds where there is any. "
            f"{SHOWN}: [all {len(own['results'])}](eval/results/reaction.json).",
        ]
    )


def thousandths(value: float, interval: Sequence[float] | None) -> str:
    """In thousandths, with its interval."""
    between = "" if interval is None else f" ({1e3 * interval[0]:+.1f} to {1e3 * interval[1]:+.1f})"
    return f"{1e3 * value:+.1f}{between}"


def fidelity_table(report: dict) -> str:
    """Cosine to dense over long clips, from `fidelity.json`."""
    lines = [
        "| method | cost | cosine: mean | p5 | p1 | trend per 1,000 frames, thousandths | MB a stream "
        "| p5 less the best control's, thousandths |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_shown(report["results"]):
        compared = row.get("best control")
        beside = "" if compared is None else thousandths(compared["difference"], compared["interval"])
        constant = "" if row["bytes_constant"] else ", not constant"
        lines.append(
            f"| {name_of(row)} | {row['cost']:.3f} | {row['mean']:.4f} | {row['p5']:.4f} | {row['p1']:.4f} "
            f"| {thousandths(row['trend'], row['trend_interval'])} | {row['bytes'] / 1e6:.1f}{constant} | {beside} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{what_was_recorded(report)}. {SHOWN}: [all {len(report['results'])}](eval/results/fidelity.json).",
        ]
    )


def calibration_table(report: dict) -> str:
    """What a logit bias changes on held-out clips, from `calibration.json`: with the most calibration clips."""
    lines = [
        "| setting | cost | best label is dense's | with the bias, points | control: shuffled | right | with the bias "
        "| control: shuffled | squared error of logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in report["settings"].items():
        count = max(setting["clips"], key=int)
        bias, shuffled = (setting["clips"][count][kind] for kind in ("bias", "control: shuffled among labels"))
        cells = []
        for measure in ("agreement", "top1"):
            cells += [
                f"{bias[measure]['before']['value']:.1%}",
                *(
                    points(one[measure]["difference"]["value"], one[measure]["difference"]["interval"])
                    for one in (bias, shuffled)
                ),
            ]
        errors = bias["squared error of logits"]
        lines.append(
            f"| `{name}` | {setting['cost']:.3f} | {' | '.join(cells)} "
            f"| {errors['before']['value']:.2f} to {errors['after']['value']:.2f} |"
        )
    clips = report["clips"]
    return "\n".join(
        [
            *lines,
            "",
            f"`{report['command']}`: fitted on {clips['calibration']['in_all']} composed clips, measured on "
            f"{clips['held_out']['in_all']} others, of {clips['frames']} frames each; {report['labels']} labels. "
            "`reconstruct`: the paper's dual memory. Intervals: 95 %, from drawing clips.",
        ]
    )


def laws_table(report: dict) -> str:
    """What of the published observations holds, from `published_laws.json`."""
    lines = ["| published observation | measured | control | verdict |", "|---|---|---|---|"]
    lines += [
        f"| {found['claim']} | {found['measured']} | {found['control']} | {found['verdict']} |"
        for found in report["findings"]
    ]
    clips = report["clips"]
    return "\n".join(
        [
            *lines,
            "",
            f"`{report['command']}`: {clips['in_all']} composed clips of {clips['frames']} frames, {report['labels']} "
            f"labels, {report['checkpoint']['name']}; the rules stand in [all figures]"
            "(eval/results/published_laws.json).",
        ]
    )


def verdict(value: float, interval: Sequence[float] | None, least: float) -> str:
    """Whether what should be at least so much is: by its interval, by its estimate alone, or not."""
    if value < least:
        return "missed"
    return "met" if interval is not None and interval[0] >= least else "by the estimate; its interval reaches beyond"


def aims_table(accuracy: dict, reaction: dict, fidelity: dict, default: str = "balanced") -> str:
    """What the default preset was to reach on composed clips, and what it does, from the three reports."""
    top1, delay, cosine = (
        next(row for row in rows if row["name"] == default)
        for rows in (accuracy["results"], reaction["own"]["results"], fidelity["results"])
    )
    pooled = top1["top1"]
    motions = {
        name: found["top1"] for name, found in top1["motions"].items() if found["top1"]["difference"] is not None
    }
    worst = min(motions, key=lambda name: motions[name]["difference"])
    sooner, closer = delay["best control"], cosine["changing"]["best control"]
    most = max(top1["cost"], cosine["cost"])
    rows = [
        (
            "cost at most 0.20 of dense",
            f"{top1['cost']:.3f} on short clips, {cosine['cost']:.3f} on long ones",
            "met" if most <= 0.2 else "missed",
        ),
        (
            "top-1 at most 1 point below dense, all motions",
            f"{points(pooled['difference'], pooled['interval'])} points",
            verdict(pooled["difference"], pooled["interval"], -0.01),
        ),
        (
            "at most 3 points below in any motion",
            f"{points(motions[worst]['difference'], motions[worst]['interval'])} points ({worst}, "
            f"{motions[worst]['scenes']} clips)",
            verdict(motions[worst]["difference"], motions[worst]["interval"], -0.03),
        ),
        (
            "5th percentile of the cosine above every control's at that cost, long clips whose label changes",
            f"{cosine['changing']['p5']:.3f}, the best control's {closer['control']:.3f} ({closer['family']}): "
            f"{thousandths(closer['difference'], closer['interval'])} thousandths",
            verdict(closer["difference"], closer["interval"], 0),
        ),
        (
            "labels change sooner than with every control at that cost",
            f"{delay['delay']:.1f} frames after dense, the best control's {sooner['control']:.1f} "
            f"({sooner['family']}): {frames(sooner['difference'], sooner['interval'])}",
            verdict(
                -sooner["difference"],
                None if sooner["interval"] is None else [-sooner["interval"][1], -sooner["interval"][0]],
                0,
            ),
        ),
    ]
    lines = [f"| {aim} | {measured} | {outcome} |" for aim, measured, outcome in rows]
    return "\n".join([f"| aim for `{default}` | measured | |", "|---|---|---|", *lines])
