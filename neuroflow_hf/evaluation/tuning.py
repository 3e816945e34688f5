"""
Find gate settings for a checkpoint and a camera: measure candidates and baselines on stretches of a video, and choose
the cheapest that stays close enough to dense, or the closest that is cheap enough.

    model, preprocess = load_model("path/to/siglip")
    result = tune_video(VideoReader("street.mp4"), model, preprocess, min_cosine=0.99)
    result.chosen.options, result.chosen.cost(), result.chosen.fidelity("p5")
    write_tuning(result, "neuroflow-tuned", checkpoint_config("path/to/siglip"))  # of `tuning_report`
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..utils.jobs import stop_on_interrupt, timed
from ..video.preprocess import Preprocessor
from ..video.reader import VideoError, VideoReader
from ..video.run import settings
from ..vision.gate_config import PRESETS, NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .methods import Dense, Method, Step, Streamed, dense_cost, looking_cost
from .points import (
    Point,
    Requirement,
    choose,
    first_frame_repeated,
    fitting_interval,
    hold_by_the_clock,
    nearest,
    whole_periods,
)

SHORTEST_STRETCH = 12
REFINEMENTS = 3


def ladder(mode: str, **options: Sequence) -> list[dict]:
    """Settings of one mode: the first value of each option, the second of each, and so on."""
    columns = zip(*options.values(), strict=True)
    return [{"mode": mode, **dict(zip(options, values, strict=True))} for values in columns]


# Candidates of each family, from cheap to faithful. `Bench.climb` interpolates between neighbours.
# `keyframe_interval` is adjusted to the length of the stretches, which is its default.
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
    # for moving cameras: encode as often as the budget allows
    "extrapolate, paced": ladder(
        "extrapolate",
        threshold=(0.05, 0.03, 0.02, 0.01, 0.006),
        sentinels=(0.02, 0.03, 0.05, 0.06, 0.1),
        cost_budget=(0.06, 0.12, 0.2, 0.35, 0.6),
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
    """The result of a tuning."""

    status: str  # `"complete"`, or `"interrupted"` (Ctrl-C); then `points` holds what was measured before
    requirement: Requirement  # what was asked for
    points: list[Point]  # all measured settings, including baselines
    chosen: Point | None  # the point that meets the requirement best; None if none does
    nearest: Point | None  # `chosen`, or the point nearest to the requirement
    first_frame: Point  # the baseline that repeats each stretch's first frame
    frames: list[list[int]]  # the indices in the file of each stretch's frames
    dense_milliseconds: float  # mean of a dense forward
    provenance: dict  # the video, the model and the machine
    note: str = ""  # why the video broke off; empty if it did not

    @property
    def measured_frames(self) -> int:
        """Number of frames in all stretches."""
        return sum(len(indices) for indices in self.frames)


# --- frames --------------------------------------------------------------------------------------------------------


def plan_stretches(expected_frames: int, frames: int, stretches: int) -> list[range]:
    """
    Spread `stretches` stretches of equal length, `frames` frames in all, evenly over the video; fewer, if they would
    be shorter than 12 frames.
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
    """Consecutive frames of a video."""

    indices: list[int]  # of the frames in the file, from 0
    images: list[torch.Tensor]  # uint8 [1, 3, R, R] of each frame, resized but not yet normalised, to save memory


def read_stretches(
    reader: VideoReader, preprocess: Preprocessor, plan: Sequence[range], on_frame: Callable[[int, int], None]
) -> tuple[list[Stretch], str]:
    """
    Read the planned stretches, as far as the video goes, and say why reading ended early (empty if it did not).

    Raises:
        VideoError: if the video breaks off before the second frame.
        ValueError: if the video has a single frame.
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
    pairs = zip(plan, stretches, strict=True)
    complete = [stretch for planned, stretch in pairs if len(stretch.images) == len(planned)]
    # the file may hold less than its header says; one short stretch is better than none
    kept = [stretch for stretch in complete or stretches[:1] if len(stretch.images) > 1]
    if not kept:
        raise ValueError(f"{reader.path} gives a single frame; tuning compares neighbouring frames and needs more.")
    return kept, note


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """The stretches with their dense embeddings, on which candidates are measured."""

    model: NeuroFlowSiglipVisionModel  # model, preprocess: from `load_model`
    preprocess: Preprocessor
    stretches: list[Stretch]  # of equal length
    stop: threading.Event  # set to stop measuring with a KeyboardInterrupt
    on_step: OnStep  # as in `tune_video`
    points: list[Point]  # measured so far

    def steps(self, method: Method, stretch: Stretch, count: int | None = None) -> Iterator[tuple[Step, float]]:
        """What a method gives for the first `count` frames of a stretch (default: all), and its milliseconds."""
        model = self.model
        method.start(1)
        for image in stretch.images[:count]:
            if self.stop.is_set():
                raise KeyboardInterrupt
            pixel_values = self.preprocess.normalise(image, model.dtype, model.device)
            with torch.inference_mode():
                yield timed(lambda x=pixel_values: method.step(x), model.device)

    def measure_dense(self):
        """Run dense over all stretches; sets `dense`, float32 [T, D] on the CPU for each, and `dense_milliseconds`."""
        method, total = Dense(self.model), sum(len(stretch.images) for stretch in self.stretches)
        self.dense, milliseconds = [], []
        list(self.steps(method, self.stretches[0], 1))  # warm up
        for stretch in self.stretches:
            embeddings = []
            for step, elapsed in self.steps(method, stretch):
                embeddings.append(step.embeddings[0].cpu())
                milliseconds.append(elapsed)
                self.on_step("dense", len(milliseconds), total, None)
            self.dense.append(torch.stack(embeddings))
        self.dense_milliseconds = float(np.mean(milliseconds))

    def measure(self, family: str, options: dict, control: bool = False) -> Point:
        """
        Measure one setting with a new stream for each stretch, and add its point. A stretch stands for the middle of a
        longer video, so under a `cost_budget` it starts without credit, and its first keyframe is charged.
        """
        length = len(self.stretches[0].images)
        if "mode" not in options or "preset" in options:
            options = spelt_out(options)
        interval = fitting_interval(options.get("keyframe_interval"), length)
        options, counted = {**options, "keyframe_interval": interval}, whole_periods(length, interval)
        budget = options.get("cost_budget")
        patches = self.preprocess.patches_per_side(self.model.config.patch_size) ** 2
        looking = looking_cost(self.model, patches) / dense_cost(self.model, patches)
        first_keyframe = (1 - looking) / interval if interval else 0
        if budget is not None and budget <= looking + first_keyframe:
            options["cost_budget"] = budget = None  # no gate can keep it on so short a stretch
        method, total = Streamed(self.model, options), len(self.stretches) * counted
        costs, cosines, milliseconds = [], [], []
        for place, stretch in enumerate(self.stretches):
            embeddings, figures = [], []
            for step, elapsed in self.steps(method, stretch, counted):
                if not embeddings and budget is not None:
                    method.stream.credit = [budget - 1]
                embeddings.append(step.embeddings[0].cpu())
                figures.append((step.cost.item(), elapsed))
                self.on_step(family, place * counted + len(figures), total, None)
            cost, elapsed = np.mean(figures, axis=0).tolist()
            costs.append(cost)
            milliseconds.append(elapsed)
            dense = self.dense[place][:counted].double()
            similarity = torch.nn.functional.cosine_similarity(torch.stack(embeddings).double(), dense, dim=1)
            cosines.append(similarity.numpy()[None])
        point = Point(family, options, costs, cosines, float(np.mean(milliseconds)), control)
        self.points.append(point)
        self.on_step(family, total, total, point)
        return point

    def climb(self, family: str, ladder: Sequence[dict], requirement: Requirement, control: bool = False):
        """
        Measure settings from cheap to faithful until one passes the requirement or none can win any more, then bisect
        between the last two.
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
                return  # a cheaper setting meets the requirement, and the rest of the ladder costs more
        for _ in range(REFINEMENTS):
            if below is None or above is None:
                return
            options = between(below.options, above.options)
            if options in (below.options, above.options):
                return
            point = self.measure(family, options, control)
            below, above = (below, point) if requirement.passed_by(point) else (point, above)


def spelt_out(options: dict) -> dict:
    """A preset's options as options of its mode: those that differ from the mode's defaults."""
    gate = NeuroFlowGateConfig.from_options(options)
    plain = NeuroFlowGateConfig(mode=gate.mode).to_dict()
    return {"mode": gate.mode} | {name: value for name, value in gate.to_dict().items() if value != plain[name]}


def between(frugal: dict, faithful: dict) -> dict:
    """Geometric means of the positive numbers in two settings; other options as in `faithful`."""
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

    Dense and the baselines (mode `hold`) run over a few stretches of consecutive frames, then each family of
    candidates, from cheap to faithful, as long as it can still win. A baseline may be chosen. `keyframe_interval` is
    at most the length of a stretch, because longer intervals were not measured. After Ctrl-C, the choice is among the
    settings measured before.

    Args:
        reader: the video, with the stride that the settings are for.
        model, preprocess: from `load_model`.
        min_cosine, max_cost, statistic: exactly one of the bounds, see [`Requirement`]. A `min_cosine` of 0.99 suits
            search and labels, 0.999 a classifier trained on dense embeddings.
        frames: number of frames in all stretches. 120 take one or two minutes on a CPU with a small tower.
        stretches: number of stretches. More cover more of the video; fewer allow longer keyframe intervals.
        candidates: gate options from cheap to faithful, by the family's name; default: `FAMILIES`.
        on_step: called after each frame with the name of the step, the number of frames done, the number of frames in
            the step, and, after the last one, the [`Point`], else None.

    Raises:
        ValueError: for bounds, numbers, gate options or a resolution out of range, and videos of a single frame.
        VideoError: if the video cannot be read.
        KeyboardInterrupt: for Ctrl-C before dense is measured.
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
        bench.measure_dense()
        bench.points += hold_by_the_clock(bench.dense, bench.dense_milliseconds)
        status = "complete"
        try:
            bench.climb(TRIGGERED_HOLD, TRIGGERED_HOLDS, requirement, control=True)
            for family, ladder in (FAMILIES if candidates is None else candidates).items():
                bench.climb(family, ladder, requirement)
        except KeyboardInterrupt:
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
