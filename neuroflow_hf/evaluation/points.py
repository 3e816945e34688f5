"""
Settings of the gate measured on stretches of one video, the baselines that need only dense embeddings, and the choice
among all of them by a requirement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# of cosines [P, T], one value for each phase
STATISTICS = {
    "mean": lambda cosines: cosines.mean(axis=1),
    "p5": lambda cosines: np.percentile(cosines, 5, axis=1),
    "min": lambda cosines: cosines.min(axis=1),
}
HOLD_BY_THE_CLOCK = "hold by the clock"
# holds of all lengths up to this are tried, longer ones in steps of a tenth
EVERY_LENGTH_UP_TO = 24


@dataclass(frozen=True, eq=False)
class Point:
    """
    A setting of the gate, measured over S stretches of a video, on T frames of each (see `whole_periods`).

    Args:
        family: what it is a setting of, in words.
        options: of [`NeuroFlowGateConfig`], those that differ from the defaults.
        costs: in each stretch, multiply-adds over those of dense, mean of its frames.
        cosines: in each stretch, the cosine to the dense embedding, float64 [P, T]; P is 1, except for baselines with
            a fixed interval, which may start at P phases.
        milliseconds: of a frame, mean.
        control: whether this is a baseline, which the others have to beat.
    """

    family: str
    options: dict
    costs: Sequence[float]
    cosines: Sequence[np.ndarray]
    milliseconds: float
    control: bool = False

    @property
    def stretches(self) -> Sequence[int]:
        """The places of all stretches."""
        return range(len(self.costs))

    def cost(self, stretches: Sequence[int] | None = None) -> float:
        """Mean cost of a frame of these stretches (default: of all)."""
        stretches = self.stretches if stretches is None else stretches
        frames = [self.cosines[place].shape[1] for place in stretches]
        return float(np.average([self.costs[place] for place in stretches], weights=frames))

    def fidelity(self, statistic: str, stretches: Sequence[int] | None = None) -> float:
        """A statistic of the cosines in these stretches (default: in all), in each phase, then the phases' mean."""
        stretches = self.stretches if stretches is None else stretches
        cosines = np.concatenate([self.cosines[place] for place in stretches], axis=1)
        return float(STATISTICS[statistic](cosines).mean())


def fitting_interval(interval: int | None, length: int) -> int:
    """
    The keyframe interval near `interval` of which about a whole number fits into a stretch of `length` frames; `None`
    for none gives `length`: a stretch is then one period, and nothing is trusted for longer than it was measured.
    """
    return length if interval is None else max(1, length // max(1, round(length / interval)))


def whole_periods(length: int, interval: int) -> int:
    """
    How many of a stretch's frames count: as many as make whole periods between keyframes by the clock, the stretch's
    first frame being the first keyframe. What is measured on them is what a video that goes on would give; a part of
    a period would count fresh memories more often than old ones.
    """
    return length // interval * interval


def similarities(embeddings: torch.Tensor) -> np.ndarray:
    """Cosine of every frame's dense embedding to every other's: [T, D] to float64 [T, T]."""
    directions = torch.nn.functional.normalize(embeddings.double(), dim=1)
    return (directions @ directions.T).numpy()


def held_cosines(similarity: np.ndarray, every: int) -> np.ndarray:
    """
    Cosine to dense where every `every`-th frame is dense and held until the next: from the similarities [T, T] of a
    stretch, [every, T - 1], a row for each phase. In phase p the frames p, p + `every` ... are dense; frame 0 is in
    all, and is left out, so that one in `every` is dense.
    """
    frames = np.arange(1, len(similarity))
    age = (frames - np.arange(every)[:, None]) % every
    return similarity[frames, np.maximum(frames - age, 0)]


def hold_lengths(longest: int) -> list[int]:
    """Holds worth trying, in frames: all from 2, and above 24 those in steps of a tenth, up to `longest`."""
    lengths = list(range(2, min(longest, EVERY_LENGTH_UP_TO) + 1))
    while lengths and (after := round(1.1 * lengths[-1])) <= longest and lengths[-1] >= EVERY_LENGTH_UP_TO:
        lengths.append(after)
    if lengths and lengths[-1] < longest:
        lengths.append(longest)
    return lengths


def hold_by_the_clock(dense: Sequence[torch.Tensor], dense_milliseconds: float) -> list[Point]:
    """
    The baseline that needs only the dense embeddings, one [T, D] for each stretch: encode every k-th frame and hold
    its embedding, for each useful k up to the shortest stretch's length.
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
    Each stretch's first embedding for all its frames. It cannot be chosen, because its embedding gets older with the
    video; it shows how much there is to lose.
    """
    cosines = [similarities(embeddings)[:1, 1:] for embeddings in dense]
    return Point("first frame repeated", {"mode": "hold"}, [0.0] * len(dense), cosines, 0.0, control=True)


@dataclass(frozen=True)
class Requirement:
    """
    What is asked of a setting; exactly one of the bounds.

    Args:
        min_cosine: the cheapest setting is wanted whose `statistic` is at least this, above 0 and below 1.
        max_cost: the setting with the highest `statistic` is wanted that costs at most this, above 0 and below 1.
        statistic: of the frames' cosines to dense: `"p5"` (the 5th percentile: 19 of 20 frames are closer), `"mean"`
            or `"min"`.

    Raises:
        ValueError: for both bounds or none, and values out of range.
    """

    min_cosine: float | None = None
    max_cost: float | None = None
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
        """Whether a point reaches the bound in these stretches, and is cheaper than dense."""
        cost = point.cost(stretches)
        if self.min_cosine is None:
            return cost <= self.max_cost
        return cost < 1 and point.fidelity(self.statistic, stretches) >= self.min_cosine

    def passed_by(self, point: Point) -> bool:
        """Whether there is no use in settings that cost more and keep more than this one."""
        return self.met_by(point) if self.max_cost is None else not self.met_by(point)

    def preference(self, point: Point, stretches: Sequence[int] | None = None) -> tuple[float, float]:
        """Sorts points that meet the requirement, the best first."""
        cost, fidelity = point.cost(stretches), point.fidelity(self.statistic, stretches)
        return (cost, -fidelity) if self.max_cost is None else (-fidelity, cost)


def choose(points: Sequence[Point], requirement: Requirement, stretches: Sequence[int] | None = None) -> Point | None:
    """The best point, baselines included, that meets the requirement in these stretches; None if none does."""
    met = [point for point in points if requirement.met_by(point, stretches)]
    return min(met, key=lambda point: requirement.preference(point, stretches), default=None)


def nearest(points: Sequence[Point], requirement: Requirement) -> Point | None:
    """Where nothing meets the requirement: the most faithful point cheaper than dense, or the cheapest one."""
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
    How a choice does on footage that it was not made on: for each stretch, the choice on the other stretches, and its
    `cost`, its `fidelity` and whether it `met` the requirement in this one. Empty for a single stretch, or if nothing
    meets the requirement in the others.
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
