"""
Find gate settings for a checkpoint and a camera: measure candidates and baselines on stretches of a video, and choose
the cheapest that stays close enough to dense, or the closest that is cheap enough.

    model, preprocess = load_model("path/to/siglip")
    result = tune_video(VideoReader("street.mp4"), model, preprocess, min_cosine=0.99)
    result.chosen.options, result.chosen.cost, result.chosen.fidelity("p5")
    write_tuning(result, "neuroflow-tuned", checkpoint_config("path/to/siglip"))  # of `tuning_report`
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..utils.jobs import stop_on_interrupt, timed
from ..video.preprocess import Preprocessor
from ..video.reader import DamagedVideoError, VideoReader
from ..video.records import cosines
from ..video.run import settings
from ..vision.gate_config import PRESETS
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .equal_cost import COSINES
from .methods import Dense, Method, Streamed, dense_cost, looking_cost

SHORTEST_STRETCH = 12  # frames
RUNGS = 7  # settings of each family
MOST_HOLDS = 30  # intervals of holds that are measured


def ladder(mode: str, **ends: tuple[float, float]) -> list[dict]:
    """Settings of one mode from cheap to faithful: each option goes from one end to the other in geometric steps."""
    rungs: list[dict] = [{"mode": mode} for _ in range(RUNGS)]
    for name, (cheap, faithful) in ends.items():
        for rung, value in zip(rungs, np.geomspace(cheap, faithful, RUNGS).tolist(), strict=True):
            rung[name] = round(value) if isinstance(cheap, int) else float(f"{value:.2g}")
    return rungs


# Candidates of each family, from cheap to faithful. `keyframe_interval` is adjusted to the length of the stretches,
# which is its default.
FAMILIES: dict[str, list[dict]] = {
    "extrapolate": ladder("extrapolate", threshold=(0.5, 0.006), sentinels=(0.01, 0.1)),
    "extrapolate, keyframes by the clock": ladder(
        "extrapolate", threshold=(0.2, 0.01), sentinels=(0.02, 0.1), keyframe_interval=(20, 4)
    ),
    # for moving cameras: encode as often as the budget allows
    "extrapolate, paced": ladder(
        "extrapolate", threshold=(0.05, 0.006), sentinels=(0.02, 0.1), cost_budget=(0.06, 0.6)
    ),
    "presets": [PRESETS["thrifty"], PRESETS["balanced"], PRESETS["faithful"]],
    "extrapolate, dilated and paced": ladder(
        "extrapolate", dilate=(1, 1), sentinels=(0.04, 0.1), cost_budget=(0.1, 0.75)
    ),
    "context, keyframes by the clock": ladder("context", threshold=(0.1, 0.003), keyframe_interval=(40, 3)),
}
HOLD = "hold by the clock"
TRIGGERED_HOLD, TRIGGERED_HOLDS = "hold until enough changed", ladder("hold", keyframe_surprise=(0.3, 0.01))

# consecutive frames of a video by their indices in the file, from 0: uint8 [1, 3, R, R] each, resized but not yet
# normalised, to save memory
Stretch = dict[int, torch.Tensor]
OnStep = Callable[[str, int, int], None]
STATISTICS = {"mean": COSINES["mean"], "p5": COSINES["p5"], "min": np.min}


@dataclass(frozen=True, eq=False)
class Point:
    """A setting of the gate, measured on T frames of each stretch of a video."""

    family: str  # of the setting, in words
    options: dict  # of [`NeuroFlowGateConfig`], those that differ from the defaults
    cost: float  # mean of a frame relative to dense
    cosines: Sequence[np.ndarray]  # to dense, float64 [T], for each stretch
    milliseconds: float  # mean of a frame
    control: bool = False  # whether this is a baseline

    def fidelity(self, statistic: str) -> float:
        """A statistic of the cosines of all stretches."""
        return float(STATISTICS[statistic](np.concatenate(self.cosines)))

    def worst_fidelity(self, statistic: str) -> float:
        """The statistic in the stretch where it is lowest."""
        return float(min(STATISTICS[statistic](cosines) for cosines in self.cosines))


@dataclass(frozen=True)
class Requirement:
    """
    The requirement of a setting: the cheapest whose `statistic` of the frames' cosines to dense is at least
    `min_cosine`, or that with the highest whose cost is at most `max_cost`. `"p5"` is the 5th percentile: 19 of 20
    frames are closer. ValueError unless there is exactly one bound, above 0 and below 1.
    """

    min_cosine: float | None = None
    max_cost: float | None = None
    statistic: str = "p5"  # or `"mean"` or `"min"`

    def __post_init__(self):
        if (self.min_cosine is None) == (self.max_cost is None):
            raise ValueError(
                "Give exactly one of --min-cosine (such as 0.99: find the cheapest settings that stay as close to "
                "dense) and --max-cost (such as 0.1: find the most faithful settings that cost no more)."
            )
        for name in ("min_cosine", "max_cost"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"`{name}` is {value}; expected a number above 0 and below 1.")
        if self.statistic not in STATISTICS:
            raise ValueError(f"`statistic` is {self.statistic!r}; expected {', '.join(STATISTICS)}.")

    def __str__(self):
        if self.min_cosine is None:
            return f"cost at most {self.max_cost:g}"
        return f"{self.statistic} of the cosine at least {self.min_cosine:g}"

    def met_by(self, point: Point) -> bool:
        """Whether a point keeps the bound, and is cheaper than dense."""
        if self.min_cosine is None:
            return point.cost <= self.max_cost
        return point.cost < 1 and point.fidelity(self.statistic) >= self.min_cosine

    def preference(self, point: Point) -> tuple[float, float]:
        """A sort key for points that meet the requirement, the best first."""
        cost, loss = point.cost, -point.fidelity(self.statistic)
        return (cost, loss) if self.max_cost is None else (loss, cost)


def choose(points: Sequence[Point], requirement: Requirement) -> Point | None:
    """The best point, baselines included, that meets the requirement; None if none does."""
    return min(filter(requirement.met_by, points), key=requirement.preference, default=None)


def nearest(points: Sequence[Point], requirement: Requirement) -> Point:
    """The chosen point; if none meets the requirement, the most faithful below the cost of dense, or the cheapest."""
    if requirement.max_cost is None:
        closest = most_faithful([point for point in points if point.cost < 1], requirement)
    else:
        closest = min(points, key=lambda point: point.cost)
    return choose(points, requirement) or closest


def most_faithful(points: Sequence[Point], requirement: Requirement) -> Point | None:
    """The point with the highest statistic; None without points."""
    return max(points, key=lambda point: point.fidelity(requirement.statistic), default=None)


@dataclass(frozen=True, eq=False)
class TuneResult:
    """The result of a tuning."""

    requirement: Requirement
    points: list[Point]  # all measured settings, including baselines
    chosen: Point | None  # the point that meets the requirement best; None if none does
    frames: list[list[int]]  # for each stretch, the indices of its frames in the file
    dense_milliseconds: float  # mean time of a dense forward
    provenance: dict  # the video, the model and the machine
    interrupted: bool  # by Ctrl-C; then `points` has the settings measured before

    @property
    def measured_frames(self) -> int:
        """Number of frames in all stretches."""
        return sum(map(len, self.frames))


def plan_stretches(expected_frames: int, frames: int, stretches: int) -> list[range]:
    """
    Spread `stretches` stretches of equal length, `frames` frames in all, evenly over the video. There are fewer if
    they would be shorter than SHORTEST_STRETCH.
    """
    frames = min(frames, expected_frames)
    stretches = max(1, min(stretches, frames // SHORTEST_STRETCH))
    length = frames // stretches
    starts = np.linspace(0, expected_frames - length, stretches).round().astype(int).tolist()
    return [range(start, start + length) for start in starts]


def read_stretches(
    reader: VideoReader, preprocess: Preprocessor, plan: Sequence[range], on_frame: Callable[[int, int], None]
) -> list[Stretch]:
    """
    Read the planned stretches. Of a file that is cut short or has fewer frames than its header says, those that are
    whole are enough. VideoError if the video cannot be read, ValueError if it has a single frame.
    """
    stretches: list[Stretch] = [{} for _ in plan]
    end = plan[-1].stop
    with contextlib.suppress(DamagedVideoError):
        for place, frame in enumerate(reader):
            for planned, stretch in zip(plan, stretches, strict=True):
                if place in planned:
                    stretch[frame.index] = preprocess.resize(frame.image)
            on_frame(place + 1, end)
            if place + 1 == end:
                break
    complete = [stretch for stretch in stretches if len(stretch) == len(plan[0])]
    kept = [stretch for stretch in complete or stretches[:1] if len(stretch) > 1]
    if not kept:
        raise ValueError(f"{reader.path} gives a single frame; tuning compares neighbouring frames and needs more.")
    return kept


# With a fixed keyframe interval, the frames after the last whole interval of a stretch are left out: they would give
# more weight to frames soon after a keyframe than these have in a long video.


def fitting_interval(interval: int | None, length: int) -> int:
    """
    The keyframe interval near `interval` that divides a stretch of `length` frames best; `length` for None, for no
    keyframes, because longer intervals are not measured.
    """
    return length if interval is None else max(1, length // max(1, round(length / interval)))


def hold_by_the_clock(dense: Sequence[torch.Tensor], every: int, dense_milliseconds: float) -> Point:
    """The baseline that encodes one frame in `every` and holds it, from dense embeddings [T, D] of each stretch."""
    found = []
    for embeddings in dense:
        frames = torch.arange(len(embeddings) // every * every)
        found.append(cosines(embeddings[frames - frames % every], embeddings[frames]).numpy())
    options = {"mode": "hold", "keyframe_interval": every}
    return Point(HOLD, options, 1 / every, found, dense_milliseconds / every, control=True)


@dataclass(eq=False)
class Bench:
    """The stretches with their dense embeddings, on which candidates are measured."""

    model: NeuroFlowSiglipVisionModel  # model, preprocess: from `load_model`
    preprocess: Preprocessor
    stretches: list[Stretch]  # of equal length
    on_step: OnStep  # as in `tune_video`

    @torch.inference_mode()
    def run(
        self, name: str, method: Method, count: int, credit: float | None = None
    ) -> tuple[list[torch.Tensor], float, float]:
        """
        Run a method over the first `count` frames of each stretch; a stream's `credit` is set after the first frame.
        Returns embeddings float32 [count, D] on the CPU for each stretch, mean cost, and mean milliseconds.
        """
        found, figures, total = [], [], len(self.stretches) * count
        for stretch in self.stretches:
            method.start(1)
            embeddings = []
            for image in itertools.islice(stretch.values(), count):
                pixel_values = self.preprocess.normalise(image, self.model.dtype, self.model.device)
                step, elapsed = timed(lambda x=pixel_values: method.step(x), self.model.device)
                if not embeddings and credit is not None:
                    method.stream.credit = [credit]
                embeddings.append(step.embeddings[0].cpu())
                figures.append((step.cost.item(), elapsed))
                self.on_step(name, len(figures), total)
            found.append(torch.stack(embeddings))
        return found, *np.mean(figures, axis=0).tolist()

    def measure_dense(self):
        """Run dense over all stretches; sets `dense`, float32 [T, D] on the CPU for each, and `dense_milliseconds`."""
        warm = Bench(self.model, self.preprocess, self.stretches[:1], lambda *_: None)
        warm.run("", Dense(self.model), 1)
        self.dense, _, self.dense_milliseconds = self.run("dense", Dense(self.model), len(self.stretches[0]))

    def holds(self) -> list[Point]:
        """Holds by the clock, with intervals up to the length of a stretch."""
        lengths = np.unique(np.geomspace(2, len(self.stretches[0]), MOST_HOLDS).round().astype(int)).tolist()
        return [hold_by_the_clock(self.dense, every, self.dense_milliseconds) for every in lengths]

    def measure(self, family: str, options: dict, control: bool = False) -> Point:
        """
        Measure one setting with a new stream for each stretch. A stretch represents the middle of a longer video:
        under a `cost_budget`, it starts without credit, and its first keyframe is charged.
        """
        length = len(self.stretches[0])
        interval = fitting_interval(options.get("keyframe_interval"), length)
        options, counted = {**options, "keyframe_interval": interval}, length // interval * interval
        budget = options.get("cost_budget")
        patches = self.preprocess.patches_per_side(self.model.config.patch_size) ** 2
        looking = looking_cost(self.model, patches) / dense_cost(self.model, patches)
        if budget is not None and budget <= looking + (1 - looking) / interval:
            options["cost_budget"] = budget = None  # no gate can keep this budget on a stretch so short
        credit = None if budget is None else budget - 1
        found, cost, milliseconds = self.run(family, Streamed(self.model, **options), counted, credit)
        pairs = zip(found, self.dense, strict=True)
        compared = [cosines(embeddings, dense[:counted]).numpy() for embeddings, dense in pairs]
        return Point(family, options, cost, compared, milliseconds, control)


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
    on_step: OnStep = lambda *_: None,
) -> TuneResult:
    """
    Find settings of the gate for a model and a video. The model's own gate options are not used.

    Dense and the baselines (mode `hold`) run over a few stretches of consecutive frames, then each of `FAMILIES`, from
    cheap to faithful, until a setting is faithful enough, too expensive, or beaten. A baseline may be chosen.
    `keyframe_interval` is at most the length of a stretch, because longer intervals were not measured.
    After Ctrl-C, the setting that is being measured is the last.

    Args:
        reader: the video, with the stride that the settings are for.
        model, preprocess: from `load_model`.
        min_cosine, max_cost, statistic: as of [`Requirement`]. A `min_cosine` of 0.99 suits search and labels, 0.999 a
            classifier trained on dense embeddings.
        frames: in all stretches. 120 take one or two minutes on a CPU with a small tower.
        stretches: how many. More cover more of the video; fewer allow longer keyframe intervals.
        on_step: called after each frame with the name of the step, and the frames done and to do in it.

    ValueError for bounds, numbers or a resolution out of range, and videos of a single frame; VideoError if the video
    cannot be read.
    """
    requirement = Requirement(min_cosine, max_cost, statistic)
    if frames < 2:
        raise ValueError(f"`frames` is {frames}; expected a whole number of at least 2.")
    preprocess.patches_per_side(model.config.patch_size)  # refuses too low a resolution
    plan = plan_stretches(reader.expected_frames, frames, stretches)
    read = read_stretches(reader, preprocess, plan, lambda done, total: on_step("reading", done, total))
    bench = Bench(model, preprocess, read, on_step)
    bench.measure_dense()
    points = bench.holds()
    with stop_on_interrupt() as stop:
        for family, rungs in {TRIGGERED_HOLD: TRIGGERED_HOLDS, **FAMILIES}.items():
            for options in rungs:
                if stop.is_set():
                    break
                best = choose(points, requirement)
                points.append(bench.measure(family, options, control=family == TRIGGERED_HOLD))
                beaten = max_cost is None and best is not None and points[-1].cost >= best.cost
                if beaten or requirement.met_by(points[-1]) == (max_cost is None):
                    break  # the rest of the family costs more
    return TuneResult(
        requirement=requirement,
        points=points,
        chosen=choose(points, requirement),
        frames=list(map(list, read)),
        dense_milliseconds=bench.dense_milliseconds,
        provenance=settings(reader, model, preprocess),
        interrupted=stop.is_set(),
    )
