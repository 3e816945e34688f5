"""A run's summary as rows of tables and as sentences, for the command line and the page. Pure functions."""

from ..utils.tables import Table
from ..vision.gate_config import NeuroFlowGateConfig
from .records import gate_rule, percent


def settings_in_words(summary: dict) -> str:
    """The size of the video, the model, the gate and the machine."""
    video, gate, grid = summary["video"], summary["gate"], summary["grid"]
    return "  |  ".join(
        [
            f"{video['width']}x{video['height']}, {summary['frames']} frames",
            f"{summary['model']}, {summary['resolution']} px, {grid[0]}x{grid[1]} patches",
            f"{gate['mode']}, {gate['reference']}, {gate_rule(NeuroFlowGateConfig(**gate))}",
            f"{summary['dtype']} on {summary['device']}, {summary['torch_threads']} threads",
        ]
    )


def per_frame_rows(summary: dict) -> Table:
    """Skip rate, cost and milliseconds per frame."""
    times, frames = summary["milliseconds_per_frame"], summary["frames"]
    measured = [
        ("skip rate", frames, summary["skip_rate"], ".1%"),
        ("cost (dense = 1)", frames, summary["cost"], ".3f"),
        ("milliseconds, streamed", frames, times["streamed"], ".1f"),
        ("milliseconds, dense", summary["sampled_frames"], times["dense"], ".1f"),
    ]
    columns = ["mean", "median", "p5", "p95"]
    rows = [
        [label, str(count), *(format(values[name], form) for name in columns)]
        for label, count, values, form in measured
        if values
    ]
    return ["per frame", "frames", *columns], rows


def comparison_rows(summary: dict) -> Table:
    """
    The stream and its baselines beside dense, on the sampled frames after the first: cosines and, with labels, how
    often the best label is the same. Held outputs are compared at their oldest.
    """
    cosines, held = summary["cosine_to_dense"], summary["held_at_cost"]
    compared = [
        ("streamed", summary["cost"]["mean"], cosines["streamed"]),
        ("baseline: first frame repeated", 0.0, cosines["first_frame"]),
    ]
    if held:
        compared.append((f"baseline: dense every {held['every']} frames, held between", held["cost"], held["cosine"]))
    headers = [f"to dense, {summary['compared_frames']} frames", "cost", "mean cosine", "p5", "min"]
    rows = [
        [title, f"{cost:.3f}", *(f"{cosine[column]:.4f}" for column in ("mean", "p5", "min"))]
        for title, cost, cosine in compared
    ]
    if "labels" in summary:
        found = summary["labels"]["agreement"]
        same = [f"{found[name]} of {found['compared_frames']}" for name in ("streamed", "first_frame")]
        if held:
            same.append("{agreed} of {compared_frames}".format(**found["held_at_cost"]))
        headers, rows = [*headers, "same label"], [[*row, cell] for row, cell in zip(rows, same, strict=True)]
    return headers, rows


def baseline_note(summary: dict) -> str:
    """A warning if a baseline of at most the stream's cost is about as close to dense by the mean; else empty."""
    cosines, held = summary["cosine_to_dense"], summary["held_at_cost"]
    # a stream that removes less than a tenth of a baseline's error is not worth its cost
    allowed = (1 - cosines["streamed"]["mean"]) / 0.9
    if 1 - cosines["first_frame"]["mean"] <= allowed:
        return "Here, repeating the first frame's embedding is about as close to dense: these settings gain little."
    if held and 1 - held["cosine"]["mean"] <= allowed:
        return f"Here, dense every {held['every']} frames, held between, is about as close or closer, at no more cost."
    return ""


def timeline_rows(labels: dict) -> Table:
    """The best label over time."""
    rows = [
        [
            stretch["label"],
            f"{stretch['start']:.1f} to {stretch['end']:.1f}",
            str(stretch["frames"]),
            percent(stretch["confidence"]),
            percent(stretch["share"]),
        ]
        for stretch in labels["timeline"]
    ]
    return ["best label", "seconds", "frames", "confidence", f"share among {len(labels['names'])}"], rows


def figures_in_words(summary: dict) -> list[str]:
    """Moving objects, speed-up, keyframes and times, in sentences."""
    lines, speed_up = [], summary["speed_up"]
    if "objects" in summary:
        counts = summary["objects"]["per_frame"]
        lines.append(
            f"Moving objects: on {summary['objects']['frames']} of {summary['frames']} frames, {counts['mean']:.1f} "
            f"per frame on average, at most {counts['max']:.0f}."
        )
    if speed_up:
        lines.append(
            f"Speed-up over dense: {speed_up['median']:.2f}x (median of the sampled frames, each against its own "
            f"dense forward), {speed_up['mean']:.2f}x by the means of all frames, keyframes included."
        )
    return [
        *lines,
        f"Keyframes (all patches encoded): {summary['keyframes']} of {summary['frames']} frames, with the first; "
        f"{summary['compared_keyframes']} of the {summary['compared_frames']} compared.  "
        f"Stream memory: {summary['stream_bytes'] / 2**20:.1f} MiB.",
        "Milliseconds are of the forward alone; decoding and preprocessing wait meanwhile.  "
        f"Wall clock with everything: {summary['wall_clock_seconds']:.1f} s.",
    ]
