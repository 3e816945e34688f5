"""A run's summary as rows of tables and as sentences, for the command line and the page. Pure functions."""

from ..vision.gate_config import NeuroFlowGateConfig
from .label_records import percent
from .records import gate_rule

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]  # headers, and the cells of each row


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


def per_frame_rows(summary: dict) -> Rows:
    """Skip rate, cost and milliseconds per frame."""
    times = summary["milliseconds_per_frame"]
    measured = [
        ("skip rate", summary["frames"], summary["skip_rate"], "{:.1%}"),
        ("cost (dense = 1)", summary["frames"], summary["cost"], "{:.3f}"),
        ("milliseconds, streamed", summary["frames"], times["streamed"], "{:.1f}"),
        ("milliseconds, dense", summary["sampled_frames"], times["dense"], "{:.1f}"),
    ]
    columns = ("mean", "median", "p5", "p95")
    rows = [
        (label, str(frames), *(form.format(values[name]) for name in columns))
        for label, frames, values, form in measured
        if values
    ]
    return ("per frame", "frames", *columns), rows


def comparison_rows(summary: dict) -> Rows:
    """
    The stream and its baselines beside dense, on the sampled frames after the first: cosines and, with labels, how
    often the best label is the same. Held outputs are compared at their oldest.
    """
    cosines, held = dict(summary["cosine_to_dense"]), summary["held_at_cost"]
    titles = {
        "streamed": ("streamed", summary["cost"]["mean"]),
        "first_frame": ("baseline: first frame repeated", 0.0),
    }
    if held:
        titles["held_at_cost"] = f"baseline: dense every {held['every']} frames, held between", held["cost"]
        cosines["held_at_cost"] = held["cosine"]
    found = summary["labels"]["agreement"] if "labels" in summary else {}
    rows = []
    for name, (title, cost) in titles.items():
        row = [title, f"{cost:.3f}", *(f"{cosines[name][column]:.4f}" for column in ("mean", "p5", "min"))]
        if name == "held_at_cost" and found:
            row.append(f"{found[name]['agreed']} of {found[name]['compared_frames']}")
        elif found:
            row.append(f"{found[name]} of {found['compared_frames']}")
        rows.append(tuple(row))
    headers = (f"to dense, {summary['compared_frames']} frames", "cost", "mean cosine", "p5", "min")
    return (*headers, *(["same label"] if found else [])), rows


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


def timeline_rows(labels: dict) -> Rows:
    """The best label over time."""
    headers = ("best label", "seconds", "frames", "confidence", f"share among {len(labels['names'])}")
    rows = []
    for stretch in labels["timeline"]:
        seconds = f"{stretch['start']:.1f} to {stretch['end']:.1f}"
        figures = percent(stretch["confidence"]), percent(stretch["share"])
        rows.append((stretch["label"], seconds, str(stretch["frames"]), *figures))
    return headers, rows


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
    lines.append(
        f"Keyframes (all patches encoded): {summary['keyframes']} of {summary['frames']} frames, with the first; "
        f"{summary['compared_keyframes']} of the {summary['compared_frames']} compared.  "
        f"Stream memory: {summary['stream_bytes'] / 2**20:.1f} MiB."
    )
    lines.append(
        "Milliseconds are of the forward alone; decoding and preprocessing wait meanwhile.  "
        f"Wall clock with everything: {summary['wall_clock_seconds']:.1f} s."
    )
    return lines
