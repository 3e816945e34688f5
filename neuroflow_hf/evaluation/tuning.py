"""
Find settings of the gate for a checkpoint and a camera: run candidates and baselines over stretches of a video, and
choose the cheapest that stays close enough to dense, or the closest that is cheap enough.

    model, preprocess = load_model("path/to/siglip")
    result = tune_video(VideoReader("street.mp4"), model, preprocess, min_cosine=0.99)
    result.chosen.options, result.chosen.cost(), result.chosen.fidelity("p5")
    write_tuning(result, "neuroflow-tuned", checkpoint_config("path/to/siglip"))
"""

import copy
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..utils.files import staging_folder
from ..utils.jobs import stop_on_interrupt, timed
from ..video.plots import save_plot
from ..video.preprocess import Preprocessor
from ..video.reader import VideoError, VideoReader
from ..video.run import settings
from ..vision.budget import least_cost
from ..vision.configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig
from ..vision.gate_config import PRESETS, NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from ..vision.stream import NeuroFlowStream
from .methods import dense_cost, looking_cost
from .plots import plot_tuning
from .points import (
    STATISTICS,
    Point,
    Requirement,
    choose,
    first_frame_repeated,
    fitting_interval,
    hold_by_the_clock,
    leave_one_out,
    nearest,
    whole_periods,
)

# config.json last: where it exists, the others are of the same tuning
TUNE_FILES = ("curve.png", "tune.json", "config.json")
SHORTEST_STRETCH = 12
REFINEMENTS = 3


def ladder(mode: str, **options: Sequence) -> list[dict]:
    """Settings of one mode: the first value of each option, the second of each, and so on."""
    columns = zip(*options.values(), strict=True)
    return [{"mode": mode, **dict(zip(options, values, strict=True))} for values in columns]


# Candidates of each family, from cheap to faithful. `Bench.climb` interpolates between two of them.
# A `keyframe_interval` is made to fit the stretches, and defaults to their length.
FAMILIES: dict[str, list[dict]] = {
    "extrapolate": ladder(
        "extrapolate",
        threshold=(0.5, 0.2, 0.06, 0.02, 0.006),
        sentinels=(0.01, 0.02, 0.03, 0.05, 0.1),
    ),
    "extrapolate, keyframes by the clock": ladder(
        "extrapolate",
        threshold=(0.2, 0.1, 0.05, 0.02, 0.01),
        sentinels=(0.02, 0.02, 0.03, 0.05, 0.1),
        keyframe_interval=(20, 14, 10, 6, 4),
    ),
    # for moving cameras: while much changes, hold the embedding until enough or enough time has passed
    "extrapolate, held while much changes": ladder(
        "extrapolate",
        threshold=(0.05, 0.03, 0.02, 0.01, 0.006),
        sentinels=(0.02, 0.03, 0.05, 0.06, 0.1),
        hold_fraction=(0.2, 0.25, 0.25, 0.3, 0.4),
        keyframe_surprise=(0.2, 0.15, 0.1, 0.06, 0.03),
        max_hold=(15, 11, 7, 4, 2),
    ),
    "presets": [PRESETS["thrifty"], PRESETS["balanced"], PRESETS["faithful"]],
    "context, keyframes by the clock": ladder(
        "context",
        threshold=(0.1, 0.05, 0.02, 0.01, 0.003),
        keyframe_interval=(40, 20, 12, 6, 3),
    ),
}
TRIGGERED_HOLD = "hold until enough changed"
TRIGGERED_HOLDS = ladder("hold", keyframe_surprise=(0.3, 0.15, 0.08, 0.04, 0.02, 0.01))

OnStep = Callable[[str, int, int, Point | None], None]


@dataclass(frozen=True, eq=False)
class TuneResult:
    """
    What a tuning found.

    Args:
        status: `"complete"`, or `"interrupted"` (Ctrl-C); then `points` holds what was measured before.
        requirement: of the settings.
        points: all measured settings, baselines included.
        chosen: the point that meets the requirement best; None if none does.
        nearest: `chosen`, or the point nearest to the requirement.
        first_frame: the baseline that repeats each stretch's first frame.
        frames: for each stretch, the indices in the file of its frames.
        dense_milliseconds: of a dense forward, mean.
        provenance: what was run and on what machine.
        note: why the video broke off; else empty.
    """

    status: str
    requirement: Requirement
    points: list[Point]
    chosen: Point | None
    nearest: Point | None
    first_frame: Point
    frames: list[list[int]]
    dense_milliseconds: float
    provenance: dict
    note: str = ""

    @property
    def measured_frames(self) -> int:
        """Number of frames in all stretches."""
        return sum(len(indices) for indices in self.frames)

    def summary(self) -> dict:
        """The contents of `tune.json`."""
        return {
            "status": self.status,
            "note": self.note,
            "requirement": asdict(self.requirement),
            "chosen": None if self.chosen is None else self.points.index(self.chosen),
            "nearest": None if self.nearest is None else self.points.index(self.nearest),
            "stretches": [
                {"first": indices[0], "last": indices[-1], "frames": len(indices)} for indices in self.frames
            ],
            "measured_frames": self.measured_frames,
            "leave_one_out": leave_one_out(self.points, self.requirement),
            "dense_milliseconds": self.dense_milliseconds,
            **self.provenance,
            "first_frame_repeated": point_figures(self.first_frame),
            "points": [point_figures(point) for point in self.points],
        }


def point_figures(point: Point) -> dict:
    """A point as plain values."""
    return {
        "family": point.family,
        "control": point.control,
        "options": point.options,
        "cost": point.cost(),
        "cosine_to_dense": {name: point.fidelity(name) for name in STATISTICS},
        "milliseconds": point.milliseconds,
        "stretches": [
            {"cost": point.cost([place]), **{name: point.fidelity(name, [place]) for name in STATISTICS}}
            for place in point.stretches
        ],
    }


# --- frames --------------------------------------------------------------------------------------------------------


def plan_stretches(expected_frames: int, frames: int, stretches: int) -> list[range]:
    """
    Plan `stretches` stretches of equal length, `frames` frames in all, from the video's first frame to its last. Plan
    fewer if they would be shorter than 12 frames.
    """
    frames = min(frames, expected_frames)
    stretches = max(1, min(stretches, frames // SHORTEST_STRETCH))
    length = frames // stretches
    last_start = expected_frames - length
    return [
        range(start, start + length)
        for start in (round(place * last_start / max(1, stretches - 1)) for place in range(stretches))
    ]


@dataclass(frozen=True, eq=False)
class Stretch:
    """
    Consecutive frames of a video.

    Args:
        indices: in the file, from 0.
        images: uint8 [1, 3, R, R] each, resized and not yet normalised, which takes a quarter of the memory.
    """

    indices: list[int]
    images: list[torch.Tensor]


def read_stretches(
    reader: VideoReader, preprocess: Preprocessor, plan: Sequence[range], on_frame: Callable[[int, int], None]
) -> tuple[list[Stretch], str]:
    """
    Read the planned stretches that the video has; the note says why reading ended early (else empty).

    Raises:
        VideoError: if the video breaks off before the second frame.
        ValueError: if it has one frame only.
    """
    stretches, note = [Stretch([], []) for _ in plan], ""
    end = plan[-1].stop
    try:
        for place, frame in enumerate(reader):
            for planned, stretch in zip(plan, stretches, strict=True):
                if place in planned:
                    stretch.indices.append(frame.index)
                    stretch.images.append(preprocess.resize(frame.image))
            on_frame(place + 1, end)
            if place + 1 == end < reader.expected_frames:  # at the end, the reader says whether the file is cut short
                break
    except VideoError as error:
        if len(stretches[0].images) < 2:
            raise
        note = str(error)
    complete = [
        stretch for planned, stretch in zip(plan, stretches, strict=True) if len(stretch.images) == len(planned)
    ]
    # the file may hold less than its header says; one short stretch is better than none
    kept = [stretch for stretch in complete or stretches[:1] if len(stretch.images) > 1]
    if not kept:
        raise ValueError(f"{reader.path} gives a single frame; tuning compares neighbouring frames and needs more.")
    return kept, note


# --- measuring -----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Ctrl-C was pressed, and the current candidate is dropped."""


@dataclass(eq=False)
class Bench:
    """
    The stretches with their dense embeddings, on which candidates are measured.

    Args:
        model, preprocess: from `load_model`.
        stretches: of equal length.
        stop: set to end measuring.
        on_step: see `tune_video`.
        points: measured so far.
    """

    model: NeuroFlowSiglipVisionModel
    preprocess: Preprocessor
    stretches: list[Stretch]
    stop: threading.Event
    on_step: OnStep
    points: list[Point]

    def forward(self, image: torch.Tensor, stream: NeuroFlowStream | None = None) -> tuple[Any, float]:
        """The model's output for one frame, uint8 [1, 3, R, R], and its milliseconds."""
        if self.stop.is_set():
            raise Interrupted
        model, kwargs = self.model, {} if stream is None else {"stream": stream}
        pixel_values = self.preprocess.normalise(image, model.dtype, model.device)
        interpolate = self.preprocess.resolution != model.config.image_size
        with torch.inference_mode():
            return timed(
                lambda: model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate, **kwargs), model.device
            )

    @property
    def looking(self) -> float:
        """Cost of comparing a frame with the reference, relative to dense."""
        patches = self.preprocess.patches_per_side(self.model.config.patch_size) ** 2
        return looking_cost(self.model, patches) / dense_cost(self.model, patches)

    def measure_dense(self):
        """Run dense over all stretches; sets `dense`, float32 [T, D] on the CPU for each, and `dense_milliseconds`."""
        self.forward(self.stretches[0].images[0])  # warm up
        total, dense, milliseconds = sum(len(stretch.images) for stretch in self.stretches), [], []
        for stretch in self.stretches:
            embeddings = []
            for image in stretch.images:
                output, elapsed = self.forward(image)
                embeddings.append(output.pooler_output[0].float().cpu())
                milliseconds.append(elapsed)
                self.on_step("dense", len(milliseconds), total, None)
            dense.append(torch.stack(embeddings))
        self.dense, self.dense_milliseconds = dense, float(np.mean(milliseconds))

    def measure(self, family: str, options: dict, control: bool = False) -> Point:
        """
        Run one setting over all stretches, a new stream for each, and add its point. A stretch stands for the middle
        of a longer video, so under a `cost_budget` it starts without credit and is charged for its keyframe.
        """
        length = len(self.stretches[0].images)
        if "mode" not in options or "preset" in options:
            options = spelt_out(options)
        interval = fitting_interval(options.get("keyframe_interval"), length)
        options = {**options, "keyframe_interval": interval}
        budget = options.get("cost_budget")
        if budget is not None and budget <= least_cost(interval, self.looking):  # of a very short stretch
            options["cost_budget"] = None
        gate, counted = NeuroFlowGateConfig.from_options(options), whole_periods(length, interval)
        costs, cosines, milliseconds = [], [], []
        for place, stretch in enumerate(self.stretches):
            stream, outputs = NeuroFlowStream(gate), []
            for image in stretch.images[:counted]:
                output, elapsed = self.forward(image, stream)
                outputs.append((output.pooler_output[0].float().cpu(), output.cost[0].item(), elapsed))
                if len(outputs) == 1 and gate.cost_budget is not None:
                    stream.credit = [gate.cost_budget - 1]
                self.on_step(family, place * counted + len(outputs), len(self.stretches) * counted, None)
            embeddings, stretch_costs, stretch_milliseconds = zip(*outputs, strict=True)
            dense = self.dense[place][:counted].double()
            similarity = torch.nn.functional.cosine_similarity(torch.stack(embeddings).double(), dense, dim=1)
            cosines.append(similarity.numpy()[None])
            costs.append(float(np.mean(stretch_costs)))
            milliseconds.append(float(np.mean(stretch_milliseconds)))
        point = Point(family, options, costs, cosines, float(np.mean(milliseconds)), control)
        self.points.append(point)
        self.on_step(family, len(self.stretches) * counted, len(self.stretches) * counted, point)
        return point

    def climb(self, family: str, ladder: Sequence[dict], requirement: Requirement, control: bool = False):
        """
        Measure settings from cheap to faithful until one passes the requirement or can no longer win, then halve the
        gap around the requirement a few times.
        """
        below = above = None
        for options in ladder:
            best = choose(self.points, requirement)
            point = self.measure(family, options, control)
            if requirement.passed_by(point):
                above = point
                break
            below = point
            if requirement.max_cost is None and best is not None and point.cost() >= best.cost():
                return  # another setting is good enough and cheaper, and the rest cost more
        for _ in range(REFINEMENTS):
            if below is None or above is None:
                return
            options = between(below.options, above.options)
            if options in (below.options, above.options):
                return
            point = self.measure(family, options, control)
            below, above = (below, point) if requirement.passed_by(point) else (point, above)


def spelt_out(options: dict) -> dict:
    """Options of a preset as options of its mode: all that differ from the mode's defaults."""
    gate = NeuroFlowGateConfig.from_options(options)
    plain = NeuroFlowGateConfig(mode=gate.mode).to_dict()
    return {"mode": gate.mode} | {name: value for name, value in gate.to_dict().items() if value != plain[name]}


def between(frugal: dict, faithful: dict) -> dict:
    """Options half-way between two settings, by the geometric mean; others as in `faithful`."""
    halfway = dict(faithful)
    for name, value in faithful.items():
        other = frugal.get(name)
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in (value, other))
        if numbers and value != other:
            mean = math.sqrt(value * other)
            whole = isinstance(value, int) and isinstance(other, int)
            halfway[name] = round(mean) if whole else float(f"{mean:.2g}")
    return halfway


# --- the job -------------------------------------------------------------------------------------------------------


def tune_video(
    reader: VideoReader,
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    *,
    min_cosine: float | None = None,
    max_cost: float | None = None,
    statistic: str = "p5",
    frames: int = 120,
    stretches: int = 3,
    candidates: Mapping[str, Sequence[dict]] | None = None,
    on_step: OnStep | None = None,
) -> TuneResult:
    """
    Find settings of the gate for a model and a video. The model's own gate options play no part.

    Dense and the baselines (`hold`) run over a few stretches of consecutive frames, then each family of candidates,
    from cheap to faithful, as long as it can still win. Baselines can be chosen, too. The `keyframe_interval` is at
    most a stretch's length, because longer intervals were not measured. Ctrl-C drops the current candidate and chooses
    among those before it.

    Args:
        reader: the video, with the stride that the settings are for.
        model, preprocess: from `load_model`.
        min_cosine, max_cost, statistic: exactly one of the bounds, see [`Requirement`]. A `min_cosine` of 0.99 suits
            search and labels, 0.999 a classifier trained on dense embeddings.
        frames: number of frames in all stretches. 120 take a minute or two on a CPU with a small tower.
        stretches: number of stretches. More cover more of the video; fewer allow longer keyframe intervals.
        candidates: gate options from cheap to faithful, by the family's name; default `FAMILIES`.
        on_step: called after each frame with the step, the number of frames done and of all in this step, and the
            [`Point`] after its last frame, else None.

    Raises:
        ValueError: for bounds, numbers, gate options or a resolution out of range, and videos of a single frame.
        VideoError: if the video cannot be read.
        KeyboardInterrupt: for Ctrl-C before dense was measured.
    """
    requirement = Requirement(min_cosine, max_cost, statistic)
    for name, value, least in (("frames", frames, 2), ("stretches", stretches, 1)):
        if value < least:
            raise ValueError(f"`{name}` is {value}; expected a whole number of at least {least}.")
    preprocess.patches_per_side(model.config.patch_size)  # refuses too low a resolution
    on_step = on_step or (lambda *_: None)
    with stop_on_interrupt() as stop:

        def on_frame(done: int, total: int):
            on_step("reading", done, total, None)
            if stop.is_set():
                raise KeyboardInterrupt

        plan = plan_stretches(reader.expected_frames, frames, stretches)
        read, note = read_stretches(reader, preprocess, plan, on_frame)
        bench = Bench(model, preprocess, read, stop, on_step, points=[])
        try:
            bench.measure_dense()
        except Interrupted:
            raise KeyboardInterrupt from None
        bench.points += hold_by_the_clock(bench.dense, bench.dense_milliseconds)
        status = "complete"
        try:
            bench.climb(TRIGGERED_HOLD, TRIGGERED_HOLDS, requirement, control=True)
            for family, ladder in (FAMILIES if candidates is None else candidates).items():
                bench.climb(family, ladder, requirement)
        except Interrupted:
            status = "interrupted"
    chosen = choose(bench.points, requirement)
    return TuneResult(
        status=status,
        requirement=requirement,
        points=bench.points,
        chosen=chosen,
        nearest=chosen or nearest(bench.points, requirement),
        first_frame=first_frame_repeated(bench.dense),
        frames=[stretch.indices for stretch in read],
        dense_milliseconds=bench.dense_milliseconds,
        provenance=settings(reader, model, preprocess),
        note=note,
    )


# --- writing -------------------------------------------------------------------------------------------------------


def checkpoint_config(source: str | Path) -> NeuroFlowSiglipConfig | NeuroFlowSiglipVisionConfig:
    """The NeuroFlow configuration of a checkpoint, with or without its text tower."""
    config_dict, _ = NeuroFlowSiglipConfig.get_config_dict(source)
    vision_only = config_dict.get("model_type") == NeuroFlowSiglipVisionConfig.model_type
    return (NeuroFlowSiglipVisionConfig if vision_only else NeuroFlowSiglipConfig).from_pretrained(source)


def write_tuning(
    result: TuneResult, out: str | Path, config: Any, *, model_name: str = "", command: str = ""
) -> list[Path]:
    """
    Write `curve.png`, `tune.json` and, if a setting was chosen, `config.json`, replacing those of an earlier tuning.

    Args:
        result: from `tune_video`.
        out: folder to write to; made if missing.
        config: the checkpoint's, from `checkpoint_config`; written with the chosen gate.
        model_name, command: for `tune.json`.

    Returns:
        The files.

    Raises:
        NotADirectoryError, OSError: if `out` is a file or cannot be written to.
    """
    summary = {"command": command, "model": model_name or config.name_or_path, **result.summary()}
    with staging_folder(out, TUNE_FILES) as folder:
        title = f"{summary['video']['name']} at {summary['resolution']} px, {result.measured_frames} frames"
        save_plot(
            plot_tuning(result.points, result.requirement, result.chosen, result.first_frame, title),
            folder / "curve.png",
        )
        (folder / "tune.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if result.chosen is not None:
            # `save_pretrained` would copy code beside it
            tuned = copy.deepcopy(config)
            tuned.gate = result.chosen.options
            tuned.to_json_file(folder / "config.json")
    return [Path(out) / name for name in TUNE_FILES if (Path(out) / name).exists()]
