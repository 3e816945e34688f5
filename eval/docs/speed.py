"""Tables of times: streams, archives, other runtimes, start-up."""

from collections.abc import Callable

from eval.docs.cells import device_of, table


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
