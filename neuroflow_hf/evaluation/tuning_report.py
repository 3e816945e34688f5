"""The result of a tuning as files, a table and sentences."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..utils.files import staging_folder
from ..utils.plots import save_plot
from ..utils.tables import Table
from ..vision.configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig
from .plots import plot_tuning
from .tuning import STATISTICS, Point, TuneResult, choose, most_faithful, nearest

# config.json last: where it exists, the others are of the same tuning
TUNE_FILES = ("curve.png", "tune.json", "config.json")


def checkpoint_config(source: str | Path) -> NeuroFlowSiglipConfig | NeuroFlowSiglipVisionConfig:
    """The NeuroFlow configuration of a checkpoint with or without a text tower."""
    config_dict, _ = NeuroFlowSiglipConfig.get_config_dict(source)
    vision_only = config_dict.get("model_type") == NeuroFlowSiglipVisionConfig.model_type
    return (NeuroFlowSiglipVisionConfig if vision_only else NeuroFlowSiglipConfig).from_pretrained(source)


def write_tuning(result: TuneResult, out: Path, config: Any, model_name: str, command: str) -> list[str]:
    """
    Write `curve.png`, `tune.json` and, if a setting was chosen, `config.json` to a folder, in place of those of an
    earlier tuning. `config` is the checkpoint's, from `checkpoint_config`; it is written with the chosen gate. In
    `tune.json`, `chosen` and `nearest` are indices of `points`. Returns the files' names.
    """
    points, chosen = result.points, result.chosen
    summary = {
        "command": command,
        "model": model_name,
        "interrupted": result.interrupted,
        "requirement": asdict(result.requirement),
        "chosen": None if chosen is None else points.index(chosen),
        "nearest": points.index(nearest(points, result.requirement)),
        "stretches": [{"first": indices[0], "last": indices[-1], "frames": len(indices)} for indices in result.frames],
        "measured_frames": result.measured_frames,
        "dense_milliseconds": result.dense_milliseconds,
        **result.provenance,
        "points": [
            {
                "family": point.family,
                "control": point.control,
                "options": point.options,
                "cost": point.cost,
                "cosine_to_dense": {name: point.fidelity(name) for name in STATISTICS},
                "worst_stretch": {name: point.worst_fidelity(name) for name in STATISTICS},
                "milliseconds": point.milliseconds,
            }
            for point in points
        ],
    }
    with staging_folder(out, TUNE_FILES) as folder:
        title = f"{summary['video']['name']} at {summary['resolution']} px, {result.measured_frames} frames"
        figure = plot_tuning(points, result.requirement, chosen, title)
        save_plot(figure, folder / "curve.png")
        (folder / "tune.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if chosen is not None:
            # `save_pretrained` would copy code beside it
            tuned = copy.deepcopy(config)
            tuned.gate = chosen.options
            tuned.to_json_file(folder / "config.json")
    return [name for name in TUNE_FILES if (out / name).exists()]


def setting_words(options: dict) -> str:
    """Gate options as a phrase: `extrapolate, threshold 0.01`."""
    return ", ".join([options["mode"], *(f"{name} {value}" for name, value in options.items() if name != "mode")])


def compared_points(result: TuneResult) -> list[tuple[str, Point]]:
    """The chosen (or nearest) point and those to compare it with, each once, with a label."""
    requirement, found = result.requirement, nearest(result.points, result.requirement)
    baselines, others = ([point for point in result.points if point.control is kind] for kind in (True, False))
    affordable = [point for point in baselines if point.cost <= found.cost]
    candidates = [
        ("nearest" if result.chosen is None else "chosen", found),
        ("best baseline at no more cost", most_faithful(affordable, requirement)),
        ("best baseline that meets it", choose(baselines, requirement)),
        ("best of the others", choose(others, requirement)),
    ]
    labels: dict[Point, str] = {}
    for label, point in candidates:
        if point is not None:
            labels.setdefault(point, label)
    return [(label, point) for point, label in labels.items()]


def tuning_table(result: TuneResult) -> Table:
    """The figures of `compared_points` and of dense, with the statistic in the worst stretch."""
    rows = []
    for label, point in compared_points(result):
        cosines = [*map(point.fidelity, STATISTICS), point.worst_fidelity(result.requirement.statistic)]
        rows.append([label, f"{point.cost:.3f}", *(f"{value:.4f}" for value in cosines), f"{point.milliseconds:.1f}"])
    rows.append(["dense", "1", "1", "1", "1", "1", f"{result.dense_milliseconds:.1f}"])
    return ["", "cost", *STATISTICS, "worst stretch", "ms"], rows


def tuning_sentences(result: TuneResult) -> list[str]:
    """The settings, whether a baseline won, and how much was measured."""
    requirement, points, statistic = result.requirement, result.points, result.requirement.statistic

    def words(point: Point) -> str:
        return f"cost {point.cost:.3f}, {statistic} {point.fidelity(statistic):.4f}: {setting_words(point.options)}"

    sentences = [f"{label}: {setting_words(point.options)}" for label, point in compared_points(result)]
    if result.chosen is None:
        found = words(nearest(points, requirement))
        sentences.append(
            f"No setting meets the requirement ({requirement}). The nearest has {found}. No configuration was written."
        )
    elif result.chosen.control:
        ours = choose([point for point in points if not point.control], requirement)
        best = "none meets it" if ours is None else f"the best has {words(ours)}"
        sentences.append(
            "A baseline wins: on this footage, no measured setting does better than holding embeddings, so the "
            f"baseline was written. Of the other settings, {best}."
        )
    sentences.append(
        f"Measured: {len(points)} settings on {result.measured_frames} frames, in {len(result.frames)} stretches of "
        f"{len(result.frames[0])} frames. No setting goes longer than a stretch without a keyframe."
    )
    return sentences
