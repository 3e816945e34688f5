"""An evaluation's report as tables and in Markdown."""

from collections.abc import Sequence

from ..utils.tables import Table, escaped, markdown_table, number, with_interval


def compared(entry: dict, question: str, form: str, scale: float = 1.0) -> list[str]:
    """Cells: a method's figure, the best baseline's at that cost, and the difference with interval and verdict."""
    found = entry.get("beside", {}).get(question)
    if found is None:
        return [number(entry["figures"]["cosine"].get(question), form), "-", "-"]
    interval = found["interval"] and [scale * end for end in found["interval"]]
    difference = with_interval(scale * found["difference"], interval, "+.2f")
    return [number(found["value"], form), f"{found['control']:{form}}", f"{difference} {found['verdict']}"]


def streams(report: dict) -> list[dict]:
    """The entries of streams: no dense, no baselines."""
    return [entry for entry in report["methods"] if not entry["control"] and entry["kind"] != "dense"]


def fidelity_table(report: dict) -> Table:
    """Cost and cosine to dense of each stream, compared with the best baseline at its cost."""
    beside, rows = ["best baseline", "difference, thousandths"], []
    for entry in streams(report):
        figures = entry["figures"]
        row = [entry["name"], number(figures["cost"], ".3f"), number(figures["skip_rate"], ".1%")]
        row += compared(entry, "mean", ".4f", 1000) + compared(entry, "p5", ".4f", 1000)
        rows.append([*row, number(figures["cosine"]["p1"]), number(figures["milliseconds"], ".1f")])
    milliseconds = number(report["methods"][0]["figures"]["milliseconds"], ".1f")
    rows.append(["dense", "1.000", "0.0%", "1.0000", "-", "-", "1.0000", "-", "-", "1.0000", milliseconds])
    return ["method", "cost", "skip rate", "mean", *beside, "p5", *beside, "p1", "ms"], rows


def best_table(report: dict) -> Table:
    """For each stream and figure, the best baseline at the stream's cost."""
    rows = [
        [entry["name"], question, number(found["control"]), found["family"], found["best"]]
        for entry in streams(report)
        for question, found in entry["beside"].items()
        if found is not None
    ]
    return ["method", "figure", "of the best baseline", "family", "settings"], rows


def accuracy_table(report: dict) -> Table:
    """Accuracy over videos, compared with dense and the best baseline at each stream's cost."""
    dense = report["methods"][0]
    ks = [k for k in (1, 5) if f"top{k}" in dense["figures"]["accuracy"]]
    headers = ["method", "cost"]
    for k in ks:
        headers += [f"top-{k} (95 %)", "share of dense's", "difference to dense, points"]
        headers += ["right: only it, only dense", "McNemar's p", "best baseline", "difference to baseline, points"]
    rows = []
    for entry in [dense, *streams(report)]:
        accuracy, row = entry["figures"]["accuracy"], [entry["name"], number(entry["figures"]["cost"], ".3f")]
        for k in ks:
            name = f"top{k}"
            row.append(with_interval(accuracy[name], accuracy[f"{name}_interval"], ".1%"))
            if entry is dense:
                row += ["-"] * 6
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


def description(report: dict) -> list[str]:
    """What was measured, and with which labels, in two paragraphs."""
    model, videos, settings, labels = (report[part] for part in ("model", "videos", "settings", "labels"))
    first = "all frames" if settings["frames"] is None else f"the first {settings['frames']} frames"
    stride = "" if settings["stride"] == 1 else f", one of every {settings['stride']}"
    measured = (
        f"{model['name']} ({model['parameters'] / 1e6:.1f} million parameters in its vision tower, weights "
        f"{model['weights']}) on {videos['measured']} of {videos['count']} videos of {videos['name']}: {first} of "
        f"each{stride}, {videos['frames']} frames in all, without each video's first. {model['resolution']} px, "
        f"{model['grid'][0]}x{model['grid'][1]} patches, {model['dtype']}."
    )
    if not labels["names"]:
        return [measured, labels["note"] or "There are no labels: neither --labels nor subfolders name any."]
    names = ", ".join(labels["names"][:12]) + (", ..." if len(labels["names"]) > 12 else "")
    truth = (
        "The names of the subfolders are the true labels."
        if labels["true"]
        else "The true labels are not known, so methods are compared with dense's label."
    )
    asked = f"on {labels['videos_asked']} of the {videos['measured']} videos"
    return [
        measured,
        f"{len(labels['names'])} labels ({names}) with the template {labels['template']!r}, {asked}. {truth}",
    ]


READING = """\
- *Cost*: multiply-adds relative to dense, including the gate's. All figures leave out the first frame of every video,
  which every method encodes in full. *ms*: median time per frame when the method was recorded, in this run or an
  earlier one. On small models, time saved is less than cost saved.
- *Mean, p5, p1*: mean, 5th and 1st percentile of the cosine between a frame's embedding and dense's.
- *Best baseline*: the best, at no more than the method's own cost, of: the first frame repeated; dense every k frames;
  dense when the patches or the pixels differ enough from the last dense frame; a smaller input. Between two settings,
  a baseline's figure (p5 and p1, too) is that of their mixture. The best is chosen for each figure after the fact,
  with one setting for all videos.
- *Difference*: to that baseline, with the 95 % interval of a paired bootstrap, for fixed settings of the baseline. The
  bootstrap draws whole videos; with fewer than five videos, it draws blocks of ten frames, which says nothing about
  other videos. *Above* and *below*: the interval does not contain zero. *Unknown*: too little data to draw from.
- A high cosine alone may only mean that the videos hardly change; compare it with the baselines."""

READING_TRUE = """\
- *Top-1, top-5*: a video's label is that of the mean of its frames' embeddings. Intervals are Wilson's for accuracy,
  Bonett and Price's for the share retained, and Newcombe's for differences to dense; McNemar's test is exact. They
  assume independent videos; for clips cut from one recording they are too narrow."""


def provenance_words(report: dict, command: str) -> str:
    """The command, machine, versions, commit and bootstrap behind the figures, in one line."""
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
        tables.append(("Accuracy over videos", accuracy_table(report)))
    if report["labels"]["names"]:
        headers = ["method", "cost", "agreement with dense", "best baseline", "difference, points"]
        rows = [
            [entry["name"], number(entry["figures"]["cost"], ".3f"), *compared(entry, "agreement", ".1%", 100)]
            for entry in streams(report)
        ]
        tables.append(("Agreement with dense over frames", (headers, rows)))
    return tables


def main_parts(report: dict) -> list[str]:
    """What was measured, the main tables, and how to read them."""
    parts = description(report)
    for title, table in main_tables(report):
        parts += [f"**{title}**", markdown_table(table)]
    return [*parts, READING + ("\n" + READING_TRUE if report["labels"]["true"] else "")]


def report_markdown(report: dict, plots: Sequence[str]) -> str:
    """The whole report."""
    parts = [f"# {report['model']['name']} on {report['videos']['name']}", *main_parts(report)]
    parts += [f"![{name}]({name})" for name in plots]
    parts += ["## Best baselines", markdown_table(best_table(report))]
    parts.append("`report.json` has the figures of all baselines, and of each video.")
    skipped = report["videos"]["skipped"]
    if skipped:
        lines = [f"- `{one['name']}`: {escaped(one['reason'])}" for one in skipped]
        parts += [f"## Skipped: {len(skipped)} of {report['videos']['count']} videos", "\n".join(lines)]
    parts += ["## Provenance", provenance_words(report, report["command"])]
    return "\n\n".join(parts) + "\n"


def card_markdown(report: dict) -> str:
    """The part of a model card: what was measured, the main tables, and how to read them."""
    parts = [f"### On video: {report['videos']['name']}", *main_parts(report)]
    skipped = report["videos"]["skipped"]
    if skipped:
        parts.append(f"{len(skipped)} of {report['videos']['count']} videos could not be read and are left out.")
    # the full command would publish folders of this machine
    return "\n\n".join([*parts, provenance_words(report, "neuroflow eval")])
