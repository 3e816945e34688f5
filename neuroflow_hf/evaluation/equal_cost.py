"""
Figures of methods over videos, each beside the best baseline at the same cost; and the choice among settings of the
gate by a requirement. Pure functions.

The first frame of every video is left out, because every method encodes it in full. A user can mix two settings of a
baseline, so a baseline at any cost is the mixture of its two neighbours in cost. The best baseline is chosen for each
figure after the fact, which favours the baselines.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .statistics import middle
from .zero_shot import checked_top_k, paired_counts, paired_figures, share_figures

BLOCK = 10  # frames that the bootstrap draws together where there are too few videos to draw whole ones
LEAST_VIDEOS = 5  # to draw whole videos
LEVEL = 1e-4  # smaller differences are called level, even if the interval is clear of zero
TOP_K = (1, 5)

COSINES = {
    "mean": lambda cosines: float(cosines.mean()),
    "p5": lambda cosines: float(np.percentile(cosines, 5)),
    "p1": lambda cosines: float(np.percentile(cosines, 1)),
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """
    One method over V videos, F frames in all, without each video's first.

    Args:
        name: of the method and its setting.
        family: what it is a setting of.
        control: whether this is a baseline.
        cost: multiply-adds over those of dense, float64 [F].
        cosine: of the embedding to dense's, float64 [F].
        skip: share of patches not encoded, float64 [F]; None where the method knows of none.
        agrees: whether the best label is the one that dense gives, bool [A] on the frames about which labels are
            asked; None without labels.
        ranks: how many labels score at least as much as the true one, int [V]; None without true labels.
        milliseconds: of a frame, median.
    """

    name: str
    family: str
    control: bool
    cost: np.ndarray
    cosine: np.ndarray
    skip: np.ndarray | None = None
    agrees: np.ndarray | None = None
    ranks: np.ndarray | None = None
    milliseconds: float = math.nan

    @property
    def mean_cost(self) -> float:
        """Mean cost of a frame."""
        return float(self.cost.mean())


# --- figures of one method -----------------------------------------------------------------------------------------


def outcome_figures(outcome: Outcome, dense: Outcome | None = None, labels: int = 0) -> dict:
    """
    What a method costs and keeps, as plain values.

    Args:
        outcome: the method.
        dense: the dense run on the same videos, for what is retained of its accuracy; None for dense itself.
        labels: how many there are to choose among.
    """
    figures = {
        "cost": outcome.mean_cost,
        "skip_rate": None if outcome.skip is None else float(outcome.skip.mean()),
        "cosine": {name: reduce(outcome.cosine) for name, reduce in COSINES.items()}
        | {"min": float(outcome.cosine.min())},
        "milliseconds": outcome.milliseconds,
    }
    if outcome.agrees is not None:
        figures["agreement"] = float(outcome.agrees.mean())
    if outcome.ranks is not None:
        accuracy = {"videos": len(outcome.ranks)}
        for k in [k for k in checked_top_k(None, labels) if k == 1 or k < labels]:
            accuracy |= share_figures(f"top{k}", outcome.ranks < k)
            if dense is not None:
                accuracy |= paired_figures(f"top{k}", paired_counts(outcome.ranks < k, dense.ranks < k))
        figures["accuracy"] = accuracy
    return figures


# --- baselines at a cost -------------------------------------------------------------------------------------------


def shares_at(costs: Sequence[float], cost: float) -> list[tuple[float, int]]:
    """Which settings to mix, and in which shares, for an expected `cost`: the neighbours, or the last at the ends."""
    order = np.argsort(costs, kind="stable")
    ordered = np.asarray(costs)[order]
    above = int(np.searchsorted(ordered, cost))
    if above == 0 or above == len(ordered):
        return [(1.0, int(order[min(above, len(ordered) - 1)]))]
    share = (cost - ordered[above - 1]) / (ordered[above] - ordered[above - 1])
    return [(1 - share, int(order[above - 1])), (share, int(order[above]))]


@dataclass(frozen=True, eq=False)
class Mixture:
    """
    Settings of one family, each used for its share of the time.

    Args:
        family: of the settings.
        parts: shares, above 0, and settings.
    """

    family: str
    parts: Sequence[tuple[float, Any]]

    def mean(self, value_of: Callable) -> Any:
        """The mean of the settings' values by their shares; a user has one setting at a time."""
        return sum(share * value_of(setting) for share, setting in self.parts)


def affordable(families: Mapping[str, Sequence], cost: float, cost_of: Callable) -> list[Mixture]:
    """
    What each family offers for at most `cost`: the mixture of the two settings nearest in cost, and every cheaper
    setting, because spending more need not help.
    """
    found = []
    for family, settings in families.items():
        costs = [cost_of(setting) for setting in settings]
        if cost >= min(costs):
            shares = shares_at(costs, cost)
            found.append(Mixture(family, [(share, settings[place]) for share, place in shares if share > 0]))
            cheaper = (setting for setting, own in zip(settings, costs, strict=True) if own <= cost)
            found += [Mixture(family, [(1.0, setting)]) for setting in cheaper]
    return found


def ranked_at(
    families: Mapping[str, Sequence], cost: float, cost_of: Callable, value_of: Callable
) -> list[tuple[float, Mixture]]:
    """
    The baselines for at most `cost` with their figures, the best last; those without a figure (NaN) are left out.

    Args:
        families: settings of each baseline.
        cost: the most that a baseline may cost on average.
        cost_of, value_of: a setting's cost, and its figure, larger is better.
    """
    found = [(float(mixture.mean(value_of)), mixture) for mixture in affordable(families, cost, cost_of)]
    return sorted((pair for pair in reversed(found) if not math.isnan(pair[0])), key=lambda pair: pair[0])


# --- paired intervals ----------------------------------------------------------------------------------------------


def frame_draws(lengths: Sequence[int], samples: int, seed: int) -> Iterator[np.ndarray]:
    """
    Places of frames, drawn anew `samples` times: whole videos with replacement, or, of fewer than five, blocks of ten
    frames of each, for neighbouring frames are alike.

    Args:
        lengths: frames of each video.
        samples, seed: of the bootstrap.

    Yields:
        int [F'], places among the frames of all videos, one after the other.
    """
    generator = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    firsts = np.cumsum(lengths) - lengths
    for _ in range(samples):
        if len(lengths) >= LEAST_VIDEOS:
            drawn = generator.integers(len(lengths), size=len(lengths))
            yield run_places(firsts[drawn], lengths[drawn])
        else:
            parts = []
            for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
                block = min(BLOCK, length)
                starts = generator.integers(length - block + 1, size=-(-length // block))
                parts.append(first + run_places(starts, np.full(len(starts), block))[:length])
            yield np.concatenate(parts)


def enough_to_draw(lengths: Sequence[int]) -> bool:
    """Whether `frame_draws` of these lengths can say anything: five videos, or two blocks of one."""
    return len(lengths) >= LEAST_VIDEOS or max(lengths) >= 2 * BLOCK


def run_places(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[5, 9]`, `[2, 3]` to `[5, 6, 9, 10, 11]`: so many places from each of the first ones on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(firsts - before, lengths) + np.arange(int(lengths.sum()))


@dataclass(frozen=True, eq=False)
class Question:
    """
    A figure by which methods are compared.

    Args:
        name: such as `"p5"`, `"agreement"`, `"top1"`.
        values: a method's values, one for each unit [U]; None where it has none.
        reduce: the units' values to the figure.
        lengths: units of each group that is drawn as a whole.
    """

    name: str
    values: object
    reduce: object
    lengths: Sequence[int]


def questions(
    frames: Sequence[int], labelled: Sequence[int] | None, videos: int | None, labels: int = 0
) -> list[Question]:
    """
    All figures that can be compared.

    Args:
        frames: frames of each video.
        labelled: frames of each video about which labels are asked; None without labels.
        videos: how many have a true label; None without.
        labels: how many there are to choose among.
    """
    found = [Question(name, lambda one: one.cosine, reduce, frames) for name, reduce in COSINES.items()]
    if labelled is not None:
        found.append(Question("agreement", lambda one: one.agrees, lambda values: float(values.mean()), labelled))
    if videos is not None:
        found += [
            Question(f"top{k}", lambda one, k=k: one.ranks < k, lambda values: float(values.mean()), [1] * videos)
            for k in TOP_K
            if k == 1 or k < labels
        ]
    return found


def compare(
    outcome: Outcome,
    families: Mapping[str, Sequence[Outcome]],
    question: Question,
    samples: int = 1000,
    seed: int = 0,
) -> dict | None:
    """
    A method beside the best baseline at no more than its cost, by one figure.

    Returns:
        `value`, and the best figure of each affordable family under `controls`; of the best baseline: `best` (the
        settings), `control` (its figure), `difference`, its 95 % `interval` of a paired bootstrap, and `verdict`:
        `"above"`, `"level"` or `"below"`. With too little to draw from, there is no interval and the verdict is
        `"unknown"`. None if every baseline costs more.
    """
    ours = question.values(outcome)
    value = question.reduce(ours)
    ranked = ranked_at(
        families, outcome.mean_cost, lambda one: one.mean_cost, lambda one: question.reduce(question.values(one))
    )
    if not ranked:
        return None
    figure, best = ranked[-1]
    difference, interval = value - figure, None
    if enough_to_draw(question.lengths):
        drawn = [
            question.reduce(ours[places]) - best.mean(lambda one, at=places: question.reduce(question.values(one)[at]))
            for places in frame_draws(question.lengths, samples, seed)
        ]
        interval = list(middle(drawn))
    names = [(share, setting.name) for share, setting in best.parts]
    return {
        "value": value,
        "controls": {mixture.family: found for found, mixture in ranked},
        "best": names[0][1] if len(names) == 1 else ", ".join(f"{share:.0%} {name}" for share, name in names),
        "family": best.family,
        "control": figure,
        "difference": difference,
        "interval": interval,
        "verdict": verdict(difference, interval),
    }


def verdict(difference: float, interval: Sequence[float] | None) -> str:
    """Above or below, if the interval is clear of zero and the difference is more than rounding; else level."""
    if interval is None:
        return "unknown"
    if abs(difference) < LEVEL or interval[0] <= 0 <= interval[1]:
        return "level"
    return "above" if difference > 0 else "below"


# --- settings of the gate on one video -------------------------------------------------------------------------------

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
