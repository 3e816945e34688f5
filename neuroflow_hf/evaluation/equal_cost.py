"""
Cost and fidelity of methods over videos, each compared with the best baseline at no more than its cost.

The first frame of every video is left out, because every method encodes it in full. Between two settings, a baseline
counts as their mixture, which a user can run. The best baseline is chosen for each figure after the fact, which
favours the baselines.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from .methods import MethodSpec
from .statistics import middle, paired_counts, paired_figures, share_figures

MIN_VIDEOS = 5  # with fewer, the bootstrap draws blocks of frames instead of whole videos
BLOCK = 10  # frames in a block
LEVEL = 1e-4  # smaller differences are called level, even if their interval does not contain zero

COSINES: dict[str, Callable] = {
    "mean": np.mean,
    "p5": lambda cosines: np.percentile(cosines, 5),
    "p1": lambda cosines: np.percentile(cosines, 1),
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """A method's results: lists with an item for each video, which has F frames after the first one."""

    spec: MethodSpec
    cost: list[np.ndarray]  # relative to dense, float64 [F]
    cosine: list[np.ndarray]  # to dense, float64 [F]
    skip: list[np.ndarray] = field(default_factory=list)  # share of patches not encoded, float64 [F]; NaN if unknown
    milliseconds: list[float] = field(default_factory=list)  # median of a frame
    # for videos with labels
    agrees: list[np.ndarray] = field(default_factory=list)  # whether a frame's best label is dense's, bool [F]
    labels: list[str] = field(default_factory=list)  # the best label of the video
    ranks: list[int] = field(default_factory=list)  # of the true label, from 0; for videos that have one

    @classmethod
    def joined(cls, outcomes: Sequence["Outcome"]) -> "Outcome":
        """Join one method's outcomes over several sets of videos."""
        lists = [one.name for one in fields(cls) if one.name != "spec"]
        joined = {name: [part for one in outcomes for part in getattr(one, name)] for name in lists}
        return cls(outcomes[0].spec, **joined)

    @property
    def mean_cost(self) -> float:
        """Mean cost of a frame."""
        return float(np.concatenate(self.cost).mean())

    def is_right(self, k: int) -> list[np.ndarray]:
        """Whether the true label is among the k best ones, bool [1] for each video that has a true label."""
        return [np.array([rank < k]) for rank in self.ranks]


def asked_top_k(labels: int) -> list[int]:
    """The k for which top-k accuracy is measured: 1, and 5 if there are more than 5 labels."""
    return [k for k in (1, 5) if k == 1 or k < labels]


def outcome_figures(outcome: Outcome, dense: Outcome | None = None, labels: int = 0) -> dict:
    """A method's figures over all videos, as plain values. Accuracy is compared with dense's, if that is not None."""
    skip, cosine = np.concatenate(outcome.skip), np.concatenate(outcome.cosine)
    figures = {
        "cost": outcome.mean_cost,
        "skip_rate": None if np.isnan(skip).any() else float(skip.mean()),
        "cosine": {name: float(reduce(cosine)) for name, reduce in {**COSINES, "min": np.min}.items()},
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
                accuracy |= paired_figures(f"top{k}", paired_counts(right, np.concatenate(dense.is_right(k))))
        figures["accuracy"] = accuracy
    return figures


def video_figures(outcome: Outcome) -> dict:
    """The figures of an outcome on one video, as plain values."""
    found = outcome_figures(outcome)
    figures = {"cost": found["cost"], **{f"cosine_{name}": found["cosine"][name] for name in ("mean", "p5")}}
    if outcome.agrees:
        figures |= {"agreement": found["agreement"], "label": outcome.labels[0]}
    return figures | ({"rank": outcome.ranks[0]} if outcome.ranks else {})


def shares_at(costs: Sequence[float], cost: float) -> list[tuple[float, int]]:
    """
    The settings to mix for an expected `cost`, as (share, place in `costs`): the neighbours of the cost, or the
    cheapest or most expensive setting alone.
    """
    order = np.argsort(costs, kind="stable")
    ordered = np.asarray(costs)[order]
    above = int(np.searchsorted(ordered, cost))
    if above == 0 or above == len(ordered):
        return [(1.0, int(order[min(above, len(ordered) - 1)]))]
    share = (cost - ordered[above - 1]) / (ordered[above] - ordered[above - 1])
    return [(1 - share, int(order[above - 1])), (share, int(order[above]))]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Settings of one family of baselines, each used for a share of the time."""

    family: str
    parts: Sequence[tuple[float, Any]]  # (share above 0, setting)

    def mean(self, value_of: Callable) -> Any:
        """The mean of the settings' values, weighted by their shares."""
        return sum(share * value_of(setting) for share, setting in self.parts)


def affordable(families: Mapping[str, Sequence], cost: float, cost_of: Callable) -> list[Mixture]:
    """
    The mixtures of each family that cost at most `cost`: that of the two settings nearest in cost, and every cheaper
    setting alone, because a higher cost need not help.
    """
    found = []
    for family, settings in families.items():
        costs = list(map(cost_of, settings))
        if cost >= min(costs):
            shares = shares_at(costs, cost)
            found.append(Mixture(family, [(share, settings[place]) for share, place in shares if share > 0]))
            found += [Mixture(family, [(1.0, setting)]) for setting in settings if cost_of(setting) <= cost]
    return found


def ranked_at(
    families: Mapping[str, Sequence], cost: float, cost_of: Callable, value_of: Callable
) -> list[tuple[float, Mixture]]:
    """
    The baselines for a mean cost of at most `cost` with their figures, the best last, without those whose figure is
    NaN. `cost_of` and `value_of` give a setting's cost and figure; larger figures are better.
    """
    found = [(float(mixture.mean(value_of)), mixture) for mixture in affordable(families, cost, cost_of)]
    return sorted((pair for pair in reversed(found) if not math.isnan(pair[0])), key=lambda pair: pair[0])


def baseline_families(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The baselines by family. Dense is added to every family, the first frame repeated to those that hold."""
    (dense,), (first,) = ([one for one in outcomes if one.spec.kind == kind] for kind in ("dense", "first"))
    families: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.spec.control:
            before = [first] if outcome.spec.shares_dense and outcome is not first else []
            families.setdefault(outcome.spec.family, before).append(outcome)
    return {name: found if found == [first] else [*found, dense] for name, found in families.items()}


def frame_draws(lengths: Sequence[int], samples: int, seed: int) -> Iterator[np.ndarray]:
    """
    Bootstrap samples of frames, as places int [F'] among the frames of all videos, one video after the other: of whole
    videos, or, with fewer than five videos, of blocks of ten frames of each video, because neighbouring frames are
    alike. `lengths` are the videos' numbers of frames.
    """
    generator = np.random.default_rng(seed)
    videos = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    for _ in range(samples):
        if len(videos) >= MIN_VIDEOS:
            parts = [videos[place] for place in generator.integers(len(videos), size=len(videos))]
        else:
            parts = []
            for places in videos:
                block = min(BLOCK, len(places))
                starts = generator.integers(len(places) - block + 1, size=-(-len(places) // block))
                parts.append(np.concatenate([places[start : start + block] for start in starts])[: len(places)])
        yield np.concatenate(parts)


def enough_to_draw(lengths: Sequence[int]) -> bool:
    """Whether there is enough data for `frame_draws`: five videos, or two blocks in one."""
    return len(lengths) >= MIN_VIDEOS or max(lengths) >= 2 * BLOCK


class Question(NamedTuple):
    """A figure by which methods are compared; larger is better."""

    name: str  # such as "p5", "agreement", "top1"
    values: Callable[[Outcome], list[np.ndarray]]  # a method's values for each video
    reduce: Callable[[np.ndarray], float]  # all videos' values to the figure


def questions(dense: Outcome, labels: int = 0) -> list[Question]:
    """The figures to compare: cosines; with labels also agreement; with true labels also accuracy."""
    found = [Question(name, lambda one: one.cosine, reduce) for name, reduce in COSINES.items()]
    if dense.agrees:
        found.append(Question("agreement", lambda one: one.agrees, np.mean))
    if dense.ranks:
        found += [Question(f"top{k}", lambda one, k=k: one.is_right(k), np.mean) for k in asked_top_k(labels)]
    return found


def compare(
    outcome: Outcome, families: Mapping[str, Sequence[Outcome]], question: Question, samples: int = 1000, seed: int = 0
) -> dict | None:
    """
    Compare a method with the best baseline at no more than its cost, by one figure; None if every baseline costs more.

    Returns the method's `value`; the best figure of each family of baselines, `controls`; the `best` baseline's
    settings, `family` and figure, `control`; the `difference` to it, with the 95 % `interval` of a paired bootstrap,
    None with too little data; and the `verdict`: `"above"`, `"level"`, `"below"`, or `"unknown"` without an interval.
    """

    def figure(one: Outcome) -> float:
        return float(question.reduce(np.concatenate(question.values(one))))

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
    """Above or below, if the interval does not contain zero and the difference is not tiny; else level."""
    if interval is None:
        return "unknown"
    if abs(difference) < LEVEL or interval[0] <= 0 <= interval[1]:
        return "level"
    return "above" if difference > 0 else "below"
