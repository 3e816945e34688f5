"""An evaluation's report as rows of tables and in Markdown."""

from collections.abc import Sequence

from ..vision.gate_config import DEFAULT_PRESET

MOST_VIDEOS = 60  # rows of the table of videos; all are in the JSON file
MOST_SKIPPED = 20
Table = tuple[list[str], list[list[str]]]


def number(value: float | None, form: str = ".4f") -> str:
    """A figure as text; empty for None."""
    return "" if value is None else format(value, form)


def interval(low_high: Sequence[float | None] | None, form: str) -> str:
    """An interval as text; an end without a bound is `...`."""
    if low_high is None:
        return ""
    low, high = ("..." if end is None else format(end, form) for end in low_high)
    return f"{low} to {high}"


def with_interval(value: float | None, low_high: Sequence[float | None] | None, form: str) -> str:
    """A figure with its interval."""
    if value is None:
        return ""
    return f"{value:{form}} ({interval(low_high, form)})" if low_high else format(value, form)


def compared(entry: dict, question: str, form: str, scale: float = 1.0) -> list[str]:
    """A method's figure, the best baseline's at its cost, and the difference with its interval and verdict."""
    found = entry.get("beside", {}).get(question)
    if found is None:
        return [number(entry["figures"]["cosine"].get(question), form), "", ""]
    ends = found["interval"] and [scale * end for end in found["interval"]]
    difference = with_interval(scale * found["difference"], ends, "+.2f")
    return [number(found["value"], form), f"{found['control']:{form}}", f"{difference} {found['verdict']}"]


def streams(report: dict) -> list[dict]:
    """The methods without dense and the baselines."""
    return [entry for entry in report["methods"] if not entry["control"] and entry["kind"] != "dense"]


def dense_entry(report: dict) -> dict:
    """The entry of dense."""
    return next(entry for entry in report["methods"] if entry["kind"] == "dense")


# --- tables --------------------------------------------------------------------------------------------------------


def fidelity_table(report: dict) -> Table:
    """Cost and fidelity of each method, beside the best baseline at its cost."""
    headers = ["method", "cost", "skip", "mean", "best baseline", "difference, thousandths"]
    headers += ["p5", "best baseline", "difference, thousandths", "p1", "ms"]
    rows = []
    for entry in streams(report):
        figures = entry["figures"]
        rows.append(
            [
                entry["name"],
                number(figures["cost"], ".3f"),
                number(figures["skip_rate"], ".1%"),
                *compared(entry, "mean", ".4f", 1000),
                *compared(entry, "p5", ".4f", 1000),
                number(figures["cosine"]["p1"]),
                number(figures["milliseconds"], ".1f"),
            ]
        )
    dense = dense_entry(report)["figures"]
    rows.append(
        ["dense", "1.000", "0.0%", "1.0000", "", "", "1.0000", "", "", "1.0000", number(dense["milliseconds"], ".1f")]
    )
    return headers, rows


def best_table(report: dict) -> Table:
    """The best baseline for each method and figure."""
    rows = [
        [entry["name"], question, number(found["control"]), found["family"], found["best"]]
        for entry in streams(report)
        for question, found in entry["beside"].items()
        if found is not None
    ]
    return ["method", "figure", "best baseline's", "family", "settings"], rows


def accuracy_table(report: dict) -> Table:
    """Right labels of whole videos, beside dense and the best baseline at the method's cost."""
    ks = [k for k in (1, 5) if f"top{k}" in dense_entry(report)["figures"]["accuracy"]]
    headers = ["method", "cost"]
    for k in ks:
        headers += [f"top-{k} (95 %)", "of dense's retained", "difference, points", "only it, only dense"]
        headers += ["McNemar's p", "best baseline", "difference to it, points"]
    rows = []
    for entry in [dense_entry(report), *streams(report)]:
        accuracy, row = entry["figures"]["accuracy"], [entry["name"], number(entry["figures"]["cost"], ".3f")]
        for k in ks:
            name = f"top{k}"
            row.append(with_interval(accuracy[name], accuracy[f"{name}_interval"], ".1%"))
            if f"{name}_retention" not in accuracy:
                row += [""] * 6
                continue
            points = [100 * end for end in accuracy[f"{name}_difference_interval"]]
            row += [
                with_interval(accuracy[f"{name}_retention"], accuracy[f"{name}_retention_interval"], ".1%"),
                with_interval(100 * accuracy[f"{name}_difference"], points, "+.1f"),
                f"{accuracy[f'{name}_only_ours']}, {accuracy[f'{name}_only_dense']}",
                number(accuracy[f"{name}_mcnemar"], ".2g"),
                *compared(entry, name, ".1%", 100)[1:],
            ]
        rows.append(row)
    return headers, rows


def agreement_table(report: dict) -> Table:
    """The share of frames whose best label is dense's."""
    rows = [
        [entry["name"], number(entry["figures"]["cost"], ".3f"), *compared(entry, "agreement", ".1%", 100)]
        for entry in streams(report)
    ]
    return ["method", "cost", "best label as dense's", "best baseline", "difference, points"], rows


def baselines_table(report: dict) -> Table:
    """Every baseline at every setting."""
    headers = ["baseline", "family", "cost", "mean", "p5", "p1"]
    baselines = sorted((one for one in report["methods"] if one["control"]), key=lambda one: one["figures"]["cost"])
    labelled, true = "agreement" in baselines[0]["figures"], report["labels"]["true"]
    headers += ["best label as dense's"] * labelled + ["top-1"] * true
    rows = []
    for entry in baselines:
        figures = entry["figures"]
        row = [entry["name"], entry["family"], number(figures["cost"], ".3f")]
        row += [number(figures["cosine"][name]) for name in ("mean", "p5", "p1")]
        row += [number(figures["agreement"], ".1%")] if labelled else []
        row += [number(figures["accuracy"]["top1"], ".1%")] if true else []
        rows.append(row)
    return headers, rows


def shown_method(report: dict) -> dict:
    """The method that is shown video by video: the default preset, else the first one."""
    found = streams(report)
    return next((entry for entry in found if entry["name"] == DEFAULT_PRESET), found[0])


def videos_table(report: dict) -> Table:
    """One method video by video, beside dense."""
    entry, dense = shown_method(report), dense_entry(report)
    labelled = any("label" in figures for figures in entry["videos"])
    true = report["labels"]["true"]
    headers = ["video", "cost", "mean", "p5"] + ["as dense's", "dense says", "it says"] * labelled + ["it is"] * true
    rows = []
    for place, name in enumerate(report["videos"]["names"][:MOST_VIDEOS]):
        ours, theirs = entry["videos"][place], dense["videos"][place]
        row = [name, number(ours["cost"], ".3f"), number(ours["cosine_mean"]), number(ours["cosine_p5"])]
        if labelled:
            row += [number(ours.get("agreement"), ".1%"), theirs.get("label", ""), ours.get("label", "")]
        if true:
            row.append(report["truths"][place])
        rows.append(row)
    return headers, rows


# --- words ---------------------------------------------------------------------------------------------------------


def description(report: dict) -> str:
    """What was measured, in one paragraph."""
    model, videos, settings = report["model"], report["videos"], report["settings"]
    first = "all frames" if settings["frames"] is None else f"the first {settings['frames']} frames"
    stride = "" if settings["stride"] == 1 else f", one of every {settings['stride']}"
    return (
        f"{model['name']} ({model['parameters'] / 1e6:.1f} million parameters in its vision tower, weights "
        f"{model['weights']}) on {videos['measured']} of {videos['count']} videos of {videos['name']}: {first} of "
        f"each{stride}, {videos['frames']} frames in all, each video's first left out. {model['resolution']} px, "
        f"{model['grid'][0]}x{model['grid'][1]} patches, {model['dtype']}."
    )


def label_words(report: dict) -> str:
    """What was asked about labels."""
    labels = report["labels"]
    if not labels["names"]:
        return labels["note"] or "There are no labels: none were named, by --labels or by subfolders."
    names = ", ".join(labels["names"][:12]) + (", ..." if len(labels["names"]) > 12 else "")
    where = f"asked about {labels['videos_asked']} of the {report['videos']['measured']} videos"
    truth = (
        "; subfolders' names are the right labels"
        if labels["true"]
        else "; the right labels are not known, so methods are compared with dense's label"
    )
    return f"{len(labels['names'])} labels ({names}), read as {labels['template']!r}, {where}{truth}."


READING = """\
- *Cost*: multiply-adds, the gate's included, relative to dense. All figures leave out the first frame of every video,
  which every method encodes in full. *ms*: median per frame when the method was recorded, in this run or an earlier
  one. Cost is not time, least of all on small models.
- *Mean, p5, p1*: of the cosine of a frame's embedding to dense's; 19 of 20 frames are above p5.
- *Best baseline*: the best at the method's own cost of: the first frame repeated; dense every k frames; dense when the
  patches or the pixels differ enough from the last dense frame; a smaller input; Token Merging. Between two settings,
  a baseline's figure (p5 and p1, too) is that of their mixture. The best is chosen for each figure after the fact,
  with one setting for all videos.
- *Differences*: to that baseline, with 95 % intervals of a paired bootstrap, the baseline's settings held fixed. It
  draws whole videos; with fewer than five, blocks of ten frames, which says nothing about other videos. *Above* and
  *below*: the interval is clear of zero. *Unknown*: too little to draw from.
- A high cosine alone may only mean that the videos hardly change; compare it with the baselines."""

READING_TRUE = """\
- *Top-1, top-5*: a video's label is that of the mean of its frames' embeddings. Intervals of shares are Wilson's;
  those of what is retained and of differences to dense are for pairs (Bonett and Price; Newcombe); McNemar's test is
  exact. They take videos to be independent; for clips cut from one recording they are too narrow."""


def reading(report: dict) -> str:
    """How to read the tables."""
    return READING + ("\n" + READING_TRUE if report["labels"]["true"] else "")


def markdown_table(table: Table) -> str:
    """A table in Markdown."""
    headers, rows = table
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(map(escaped, row)) + " |" for row in rows)])


def escaped(cell: str) -> str:
    """A cell's text with its `|` and line breaks escaped."""
    return cell.replace("|", "\\|").replace("\n", " ")


def skipped_words(report: dict) -> list[str]:
    """Which videos were skipped, and why."""
    skipped = report["videos"]["skipped"]
    lines = [f"- `{one['name']}`: {escaped(one['reason'])}" for one in skipped[:MOST_SKIPPED]]
    return lines + [f"- and {len(skipped) - MOST_SKIPPED} more, all in the JSON file"] * (len(skipped) > MOST_SKIPPED)


def provenance_words(report: dict, command: str) -> str:
    """Where the figures come from, in one line."""
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    machine = report["machine"]
    return (
        f"`{command}`, {report['processes']} process(es) of {machine['threads']} thread(s), "
        f"{machine['device']}, {machine['cores']} cores ({machine['processor']}); {versions}; commit "
        f"{report['commit'] or 'unknown'}; bootstrap of {report['settings']['samples']} samples, seed "
        f"{report['settings']['seed']}."
    )


def main_tables(report: dict) -> list[tuple[str, Table]]:
    """The tables that the terminal shows, with their titles."""
    tables = [("Cost and cosine to dense", fidelity_table(report))]
    if report["labels"]["true"]:
        tables.append(("Right labels, of videos", accuracy_table(report)))
    if report["labels"]["names"]:
        tables.append(("Dense's label, on frames", agreement_table(report)))
    return tables


def report_markdown(report: dict, plots: Sequence[str] = ()) -> str:
    """The whole report."""
    parts = [f"# {report['model']['name']} on {report['videos']['name']}", description(report), label_words(report)]
    parts += [f"![{name}]({name})" for name in plots]
    for title, table in main_tables(report):
        parts += [f"## {title}", markdown_table(table)]
    parts += ["## How to read this", reading(report)]
    parts += ["## Best baselines", markdown_table(best_table(report))]
    parts += ["## All baselines", markdown_table(baselines_table(report))]
    name, measured = shown_method(report)["name"], report["videos"]["measured"]
    parts += [f"## `{name}` by video", markdown_table(videos_table(report))]
    if measured > MOST_VIDEOS:
        parts.append(f"The first {MOST_VIDEOS} of {measured} videos; all are in the JSON file.")
    skipped = report["videos"]["skipped"]
    if skipped:
        parts += [
            f"## Skipped: {len(skipped)} of {report['videos']['count']} videos",
            "\n".join(skipped_words(report)),
        ]
    parts += ["## Where the figures come from", provenance_words(report, report["command"])]
    return "\n\n".join(parts) + "\n"


def card_markdown(report: dict) -> str:
    """The part for a model card: what was measured, the main tables, how to read them."""
    parts = [f"### On video: {report['videos']['name']}", description(report), label_words(report)]
    for title, table in main_tables(report):
        parts += [f"**{title}**", markdown_table(table)]
    skipped = report["videos"]["skipped"]
    if skipped:
        parts.append(f"{len(skipped)} of {report['videos']['count']} videos could not be read and are left out.")
    # the full command would publish folders of this machine
    return "\n\n".join([*parts, reading(report), provenance_words(report, "neuroflow eval")])
