"""Gate settings measured on stretches of a video, and the choice among them by a requirement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": np.mean,
    "p5": lambda cosines: np.percentile(cosines, 5),
    "min": np.min,
}


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

    def met_by(self, point: Point) -> bool:
        """Whether a point keeps the bound, and is cheaper than dense."""
        if self.min_cosine is None:
            return point.cost <= self.max_cost
        return point.cost < 1 and point.fidelity(self.statistic) >= self.min_cosine

    def preference(self, point: Point) -> tuple[float, float]:
        """A sort key for points that meet the requirement, the best first."""
        cost, fidelity = point.cost, point.fidelity(self.statistic)
        return (cost, -fidelity) if self.max_cost is None else (-fidelity, cost)


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
