"""
Gate settings measured on stretches of a video, baselines made from dense embeddings, and the choice among all of them
by a requirement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# from cosines [P, T] to a value for each phase, [P]
STATISTICS = {
    "mean": lambda cosines: cosines.mean(axis=1),
    "p5": lambda cosines: np.percentile(cosines, 5, axis=1),
    "min": lambda cosines: cosines.min(axis=1),
}
HOLD_BY_THE_CLOCK = "hold by the clock"
EVERY_LENGTH_UP_TO = 24  # longer holds are tried in steps of a tenth


@dataclass(frozen=True, eq=False)
class Point:
    """A setting of the gate, measured on S stretches of a video, on T frames of each (see `whole_periods`)."""

    family: str  # of the setting, in words
    options: dict  # of [`NeuroFlowGateConfig`], those that differ from the defaults
    costs: Sequence[float]  # mean cost of a frame relative to dense, for each stretch
    # cosines to dense, float64 [P, T], for each stretch; P is 1, except for baselines with a fixed interval, which may
    # start at P phases
    cosines: Sequence[np.ndarray]
    milliseconds: float  # mean of a frame
    control: bool = False  # whether this is a baseline

    @property
    def stretches(self) -> Sequence[int]:
        """The places of the stretches."""
        return range(len(self.costs))

    def cost(self, stretches: Sequence[int] | None = None) -> float:
        """Mean cost of a frame in some stretches (default: all)."""
        stretches = self.stretches if stretches is None else stretches
        frames = [self.cosines[place].shape[1] for place in stretches]
        return float(np.average([self.costs[place] for place in stretches], weights=frames))

    def fidelity(self, statistic: str, stretches: Sequence[int] | None = None) -> float:
        """A statistic of the cosines in some stretches (default: all), averaged over phases."""
        stretches = self.stretches if stretches is None else stretches
        cosines = np.concatenate([self.cosines[place] for place in stretches], axis=1)
        return float(STATISTICS[statistic](cosines).mean())


def fitting_interval(interval: int | None, length: int) -> int:
    """
    The keyframe interval near `interval` that divides a stretch of `length` frames best. None, for no keyframes, gives
    `length`, because longer intervals are not measured.
    """
    return length if interval is None else max(1, length // max(1, round(length / interval)))


def whole_periods(length: int, interval: int) -> int:
    """
    How many frames of a stretch count: as many as make whole keyframe intervals, as in a longer video. A part of an
    interval would count frames soon after a keyframe more often than others.
    """
    return length // interval * interval


def similarities(embeddings: torch.Tensor) -> np.ndarray:
    """Cosines between all pairs of embeddings [T, D]: float64 [T, T]."""
    directions = torch.nn.functional.normalize(embeddings.double(), dim=1)
    return (directions @ directions.T).numpy()


def held_cosines(similarity: np.ndarray, every: int) -> np.ndarray:
    """
    Cosines to dense if one frame in `every` is dense and held until the next, from `similarities` [T, T]: float64
    [every, T - 1]. In phase p, frames p, p + `every`, ... are dense. Frame 0, dense in all, is left out.
    """
    frames = np.arange(1, len(similarity))
    age = (frames - np.arange(every)[:, None]) % every
    return similarity[frames, np.maximum(frames - age, 0)]


def hold_lengths(longest: int) -> list[int]:
    """Lengths of holds to try, in frames: all from 2 to 24, then in steps of a tenth, up to `longest`."""
    lengths = list(range(2, min(longest, EVERY_LENGTH_UP_TO) + 1))
    while lengths and (after := round(1.1 * lengths[-1])) <= longest and lengths[-1] >= EVERY_LENGTH_UP_TO:
        lengths.append(after)
    if lengths and lengths[-1] < longest:
        lengths.append(longest)
    return lengths


def hold_by_the_clock(dense: Sequence[torch.Tensor], dense_milliseconds: float) -> list[Point]:
    """
    The baseline that encodes one frame in k and holds its embedding, for `hold_lengths` up to the shortest stretch,
    from dense embeddings [T, D] of each stretch.
    """
    similar = [similarities(embeddings) for embeddings in dense]
    return [
        Point(
            family=HOLD_BY_THE_CLOCK,
            options={"mode": "hold", "keyframe_interval": every},
            costs=[1 / every] * len(dense),
            cosines=[held_cosines(similarity, every) for similarity in similar],
            milliseconds=dense_milliseconds / every,
            control=True,
        )
        for every in hold_lengths(min(len(embeddings) for embeddings in dense))
    ]


def first_frame_repeated(dense: Sequence[torch.Tensor]) -> Point:
    """
    The baseline that repeats each stretch's first embedding. It shows how much the video changes, and cannot be
    chosen, because its embedding would grow older than measured.
    """
    cosines = [similarities(embeddings)[:1, 1:] for embeddings in dense]
    return Point("first frame repeated", {"mode": "hold"}, [0.0] * len(dense), cosines, 0.0, control=True)


@dataclass(frozen=True)
class Requirement:
    """
    The requirement of a setting: exactly one of two bounds.

    Raises:
        ValueError: for both bounds or none, and values out of range.
    """

    # ask for the cheapest setting whose `statistic` is at least this, above 0 and below 1
    min_cosine: float | None = None
    # ask for the setting with the highest `statistic` whose cost is at most this, above 0 and below 1
    max_cost: float | None = None
    # of the frames' cosines to dense: `"p5"` (the 5th percentile: 19 of 20 frames are closer), `"mean"` or `"min"`
    statistic: str = "p5"

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

    def met_by(self, point: Point, stretches: Sequence[int] | None = None) -> bool:
        """Whether a point keeps the bound in some stretches (default: all), and is cheaper than dense."""
        cost = point.cost(stretches)
        if self.min_cosine is None:
            return cost <= self.max_cost
        return cost < 1 and point.fidelity(self.statistic, stretches) >= self.min_cosine

    def passed_by(self, point: Point) -> bool:
        """Whether settings that are more expensive and more faithful than this point need not be measured."""
        return self.met_by(point) if self.max_cost is None else not self.met_by(point)

    def preference(self, point: Point, stretches: Sequence[int] | None = None) -> tuple[float, float]:
        """A sort key for points that meet the requirement, the best first."""
        cost, fidelity = point.cost(stretches), point.fidelity(self.statistic, stretches)
        return (cost, -fidelity) if self.max_cost is None else (-fidelity, cost)


def choose(points: Sequence[Point], requirement: Requirement, stretches: Sequence[int] | None = None) -> Point | None:
    """The best point, baselines included, that meets the requirement in some stretches; None if none does."""
    met = [point for point in points if requirement.met_by(point, stretches)]
    return min(met, key=lambda point: requirement.preference(point, stretches), default=None)


def nearest(points: Sequence[Point], requirement: Requirement) -> Point | None:
    """If no point meets the requirement: the most faithful point cheaper than dense, or the cheapest one."""
    if requirement.max_cost is not None:
        return min(points, key=Point.cost, default=None)
    cheaper = [point for point in points if point.cost() < 1]
    return max(cheaper, key=lambda point: point.fidelity(requirement.statistic), default=None)


def best_baseline(points: Sequence[Point], requirement: Requirement, cost: float) -> Point | None:
    """The most faithful baseline that costs at most `cost`."""
    affordable = [point for point in points if point.control and point.cost() <= cost]
    return max(affordable, key=lambda point: point.fidelity(requirement.statistic), default=None)


def leave_one_out(points: Sequence[Point], requirement: Requirement) -> list[dict]:
    """
    How choices do on other footage: for each `stretch`, the `options` chosen on the others, their `cost` and
    `fidelity` on it, and whether they `met` the requirement there. Empty for a single stretch, and if no point meets
    the requirement on the others.
    """
    stretches = list(points[0].stretches) if points else []
    found = []
    for left_out in stretches if len(stretches) > 1 else []:
        point = choose(points, requirement, [place for place in stretches if place != left_out])
        if point is None:
            return []
        found.append(
            {
                "stretch": left_out,
                "options": point.options,
                "cost": point.cost([left_out]),
                "fidelity": point.fidelity(requirement.statistic, [left_out]),
                "met": requirement.met_by(point, [left_out]),
            }
        )
    return found
