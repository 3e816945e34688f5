"""A tuning's result as the rows of a table, sentences and next steps. Pure functions."""

import shlex
from pathlib import Path
from typing import Any

from .points import Point, best_baseline, choose, leave_one_out
from .tuning import TuneResult


def setting_words(options: dict) -> str:
    """Gate options as one phrase: `extrapolate, threshold 0.01`."""
    return ", ".join([options["mode"], *(f"{name} {value}" for name, value in options.items() if name != "mode")])


def figure_words(point: Point, statistic: str) -> str:
    """A point's figures and its settings as one phrase."""
    return f"cost {point.cost():.3f}, {statistic} {point.fidelity(statistic):.4f}: {setting_words(point.options)}"


def point_cells(point: Point, statistic: str) -> list[str]:
    """A point's cost, mean, p5 and minimum, its statistic in the worst stretch, and its milliseconds."""
    worst = min(point.fidelity(statistic, [place]) for place in point.stretches)
    cosines = (*(point.fidelity(name) for name in ("mean", "p5", "min")), worst)
    return [f"{point.cost():.3f}", *(f"{value:.4f}" for value in cosines), f"{point.milliseconds:.1f}"]


def compared_points(result: TuneResult) -> list[tuple[str, Point]]:
    """The chosen (or nearest) point and the baselines beside it, each once, with a label."""
    requirement, points, found = result.requirement, result.points, result.nearest
    candidates = [
        ("nearest" if result.chosen is None else "chosen", found),
        ("best baseline at no more cost", best_baseline(points, requirement, found.cost())),
        ("best baseline that meets it", choose([point for point in points if point.control], requirement)),
        ("best of the others", choose([point for point in points if not point.control], requirement)),
    ]
    labels = {}
    for label, point in candidates:
        if point is not None:
            labels.setdefault(point, label)
    return [*((label, point) for point, label in labels.items()), ("first frame repeated", result.first_frame)]


def tuning_rows(result: TuneResult) -> list[list[str]]:
    """The table: the points compared, and dense."""
    rows = [[label, *point_cells(point, result.requirement.statistic)] for label, point in compared_points(result)]
    return [*rows, ["dense", "1", "1", "1", "1", "1", f"{result.dense_milliseconds:.1f}"]]


def tuning_sentences(result: TuneResult) -> list[str]:
    """The settings, whether a baseline won, the check on frames left out, and how many frames were measured."""
    requirement, points, statistic = result.requirement, result.points, result.requirement.statistic
    sentences = [f"{label}: {setting_words(point.options)}" for label, point in compared_points(result)[:-1]]
    if result.chosen is None:
        sentences.append(
            f"No setting meets the requirement ({requirement}). The nearest has "
            f"{figure_words(result.nearest, statistic)}. No configuration was written."
        )
    elif result.chosen.control:
        ours = choose([point for point in points if not point.control], requirement)
        best = "none meets it" if ours is None else f"the best has {figure_words(ours, statistic)}"
        sentences.append(
            "A baseline wins: on this footage, no measured setting does better than holding embeddings, so that is "
            f"what was written. Of the other settings, {best}."
        )
    checks = leave_one_out(points, requirement)
    if checks:
        met = sum(check["met"] for check in checks)
        values = ", ".join(f"{check['fidelity']:.4f} at cost {check['cost']:.3f}" for check in checks)
        sentences.append(
            "Check on frames left out: settings chosen without one of the stretches meet the requirement on it in "
            f"{met} of {len(checks)} cases ({statistic} {values})."
        )
    sentences.append(
        f"Measured: {len(points)} settings on {result.measured_frames} frames, {len(result.frames)} stretches of "
        f"{len(result.frames[0])}. No setting goes longer than a stretch without a keyframe."
    )
    return sentences


def next_steps(video: Path | None, given: dict[str, Any], config_class: str, source: str) -> list[str]:
    """
    The command and the line of Python that use the settings.

    Args:
        video: the file; None for the bundled clip.
        given: options for `neuroflow run` by name, `config` among them; None is left out.
        config_class: the name of the checkpoint's configuration class.
        source: the checkpoint.
    """
    # a name that begins with a dash is no option
    named = [] if video is None else [f"./{video}" if str(video).startswith("-") else str(video)]
    options = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    model_class = config_class.removesuffix("Config") + "Model"
    return [
        f"Next: {shlex.join(['neuroflow', 'run', *named, *options])}",
        f"  or: {model_class}.from_pretrained({source!r}, config={str(given['config'])!r})",
    ]
