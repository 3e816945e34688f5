"""
What methods cost and keep over videos, each beside the best baseline at no more than its cost.

The first frame of every video is left out, because every method encodes it in full. A user can mix two settings of a
baseline, so a baseline at any cost is the mixture of its two neighbours in cost. The best baseline is chosen for each
figure after the fact, which favours the baselines.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .methods import MethodSpec
from .statistics import middle
from .zero_shot import checked_top_k, paired_counts, paired_figures, share_figures

BLOCK = 10  # frames that the bootstrap draws together where there are too few videos to draw whole ones
LEAST_VIDEOS = 5  # to draw whole videos
LEVEL = 1e-4  # smaller differences are called level, even if the interval is clear of zero

COSINES = {
    "mean": lambda cosines: float(cosines.mean()),
    "p5": lambda cosines: float(np.percentile(cosines, 5)),
    "p1": lambda cosines: float(np.percentile(cosines, 1)),
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """One method over videos: in each list an item for each video, F frames without the first one."""

    spec: MethodSpec
    cost: list[np.ndarray]  # multiply-adds over those of dense, float64 [F]
    cosine: list[np.ndarray]  # of the embedding to dense's, float64 [F]
    skip: list[np.ndarray] = field(default_factory=list)  # share of patches not encoded, float64 [F]; NaN if unknown
    milliseconds: list[float] = field(default_factory=list)  # of a frame, median
    # of the videos about which labels are asked: is the best label dense's, bool [F]; the best label over all frames
    agrees: list[np.ndarray] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)  # of the true label, where there is one, from 0

    @classmethod
    def joined(cls, outcomes: Sequence["Outcome"]) -> "Outcome":
        """One method's outcomes over several sets of videos as one."""
        lists = [one.name for one in fields(cls) if one.name != "spec"]
        joined = {name: [part for one in outcomes for part in getattr(one, name)] for name in lists}
        return cls(outcomes[0].spec, **joined)

    @property
    def mean_cost(self) -> float:
        """Mean cost of a frame."""
        return float(np.concatenate(self.cost).mean())

    def is_right(self, k: int) -> list[np.ndarray]:
        """Whether the true label is among the k best, bool [1] for each video that has one."""
        return [np.array([rank < k]) for rank in self.ranks]


def asked_top_k(labels: int) -> list[int]:
    """The k's for which top-k is measured among so many labels: 1, and 5 where there are more than 5."""
    return [k for k in checked_top_k(None, labels) if k == 1 or k < labels]


def outcome_figures(outcome: Outcome, dense: Outcome | None = None, labels: int = 0) -> dict:
    """
    What a method costs and keeps, as plain values.

    Args:
        outcome: the method.
        dense: the dense run on the same videos, for what is retained of its accuracy; None for dense itself.
        labels: how many there are to choose among.
    """
    skip, cosine = np.concatenate(outcome.skip), np.concatenate(outcome.cosine)
    figures = {
        "cost": outcome.mean_cost,
        "skip_rate": None if np.isnan(skip).any() else float(skip.mean()),
        "cosine": {name: reduce(cosine) for name, reduce in COSINES.items()} | {"min": float(cosine.min())},
        "milliseconds": float(np.median(outcome.milliseconds)),
    }
    if outcome.agrees:
        figures["agreement"] = float(np.concatenate(outcome.agrees).mean())
    if outcome.ranks:
        accuracy = {"videos": len(outcome.ranks)}
        for k in asked_top_k(labels):
            right = np.concatenate(outcome.is_right(k))
            accuracy |= share_figures(f"top{k}", right)
            if dense is not None:
                counts = paired_counts(right, np.concatenate(dense.is_right(k)))
                accuracy |= paired_figures(f"top{k}", counts)
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
    """Settings of one family of baselines, each used for its share of the time."""

    family: str
    parts: Sequence[tuple[float, Any]]  # shares, above 0, and settings

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


def baseline_families(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """
    The baselines by family. Dense ends every family, and the first frame repeated begins those that hold.
    """
    (dense,), (first,) = ([one for one in outcomes if one.spec.kind == kind] for kind in ("dense", "first"))
    families: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.spec.control:
            before = [first] if outcome.spec.shares_dense and outcome is not first else []
            families.setdefault(outcome.spec.family, before).append(outcome)
    return {name: found if found == [first] else [*found, dense] for name, found in families.items()}


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
    """A figure by which methods are compared; larger is better."""

    name: str  # such as "p5", "agreement", "top1"
    values: Callable[[Outcome], list[np.ndarray]]  # a method's values for each video
    reduce: Callable[[np.ndarray], float]  # all videos' values to the figure


def questions(dense: Outcome, labels: int = 0) -> list[Question]:
    """All figures that can be compared, by what there is of dense, among so many labels."""
    found = [Question(name, lambda one: one.cosine, reduce) for name, reduce in COSINES.items()]
    if dense.agrees:
        found.append(Question("agreement", lambda one: one.agrees, lambda values: float(values.mean())))
    if dense.ranks:
        found += [
            Question(f"top{k}", lambda one, k=k: one.is_right(k), lambda values: float(values.mean()))
            for k in asked_top_k(labels)
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

    def figure(one: Outcome) -> float:
        return question.reduce(np.concatenate(question.values(one)))

    ranked = ranked_at(families, outcome.mean_cost, lambda one: one.mean_cost, figure)
    if not ranked:
        return None
    value, (best_figure, best) = figure(outcome), ranked[-1]
    difference, interval = value - best_figure, None
    lengths = [len(values) for values in question.values(outcome)]
    if enough_to_draw(lengths):
        values = {one: np.concatenate(question.values(one)) for one in (outcome, *(part for _, part in best.parts))}
        drawn = [
            question.reduce(values[outcome][places])
            - best.mean(lambda one, places=places: question.reduce(values[one][places]))
            for places in frame_draws(lengths, samples, seed)
        ]
        interval = list(middle(drawn))
    names = [(share, setting.spec.name) for share, setting in best.parts]
    return {
        "value": value,
        "controls": {mixture.family: found for found, mixture in ranked},
        "best": names[0][1] if len(names) == 1 else ", ".join(f"{share:.0%} {name}" for share, name in names),
        "family": best.family,
        "control": best_figure,
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
