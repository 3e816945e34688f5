"""
Figures of methods over videos, and each method beside the best control at the same cost. Pure functions.

Every video's first frame is left out: it is encoded in full by every method. Between two settings of a control anybody
can mix, so a control at any cost is the mixture of its two neighbours in cost. The best control is chosen for each
figure after the fact, which favours the controls.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .zero_shot import checked_top_k, paired_counts, paired_figures, share_figures

BLOCK = 10  # frames that a bootstrap draws together, where videos are too few to be drawn whole
LEAST_VIDEOS = 5  # to be drawn whole
LEVEL = 1e-4  # figures that differ by less are called level, however clear of zero the interval
TOP_K = (1, 5)

# What of the frames' cosines to dense is said.
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
        control: whether this is a trivial way to save.
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
        """Mean over the frames."""
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


# --- controls at a cost --------------------------------------------------------------------------------------------


def shares_at(costs: Sequence[float], cost: float) -> list[tuple[float, int]]:
    """Which policies to mix, and in which shares, for an expected `cost`: the neighbours, or the last at the ends."""
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
    parts: Sequence[tuple[float, Outcome]]

    @property
    def cost(self) -> float:
        """Expected cost of a frame."""
        return sum(share * part.mean_cost for share, part in self.parts)

    @property
    def words(self) -> str:
        """The settings and their shares."""
        if len(self.parts) == 1:
            return self.parts[0][1].name
        return ", ".join(f"{share:.0%} {part.name}" for share, part in self.parts)


def control_at(family: str, settings: Sequence[Outcome], cost: float) -> Mixture | None:
    """The mixture of a family's settings that costs `cost`; None if all of them cost more."""
    costs = [setting.mean_cost for setting in settings]
    if cost < min(costs):
        return None
    parts = [(share, settings[place]) for share, place in shares_at(costs, cost) if share > 0]
    return Mixture(family, parts)


def controls_at(families: Mapping[str, Sequence[Outcome]], cost: float) -> list[Mixture]:
    """
    What can be had of every family for no more than `cost`: the mixture that costs it, and each setting that costs
    less, for more expense need not help.
    """
    found = []
    for family, settings in families.items():
        mixture = control_at(family, settings, cost)
        if mixture is not None:
            cheaper = [setting for setting in settings if setting.mean_cost <= cost]
            found += [mixture, *(Mixture(family, [(1.0, setting)]) for setting in cheaper)]
    return found


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
    A method beside the best control at no more than its cost, by one figure.

    Returns:
        `value`, and of each family that can be had for this cost its best figure under `controls`; of the best: `best`
        (the settings), `control` (its figure), `difference`, its 95 % `interval` of a paired bootstrap, and `verdict`:
        `"above"`, `"level"` or `"below"`. Where there is too little to draw from, there is no interval, and the
        verdict is `"unknown"`. None if no control can be had for so little.
    """
    ours = question.values(outcome)
    at_cost = controls_at(families, outcome.mean_cost)
    if not at_cost:
        return None
    theirs = [[(share, question.values(part)) for share, part in control.parts] for control in at_cost]

    def mixed(parts, places=slice(None)) -> float:
        return float(sum(share * question.reduce(values[places]) for share, values in parts))

    figures = [mixed(parts) for parts in theirs]
    best = int(np.argmax(figures))
    difference = question.reduce(ours) - figures[best]
    interval = None
    if enough_to_draw(question.lengths):
        drawn = [
            question.reduce(ours[places]) - mixed(theirs[best], places)
            for places in frame_draws(question.lengths, samples, seed)
        ]
        interval = np.percentile(drawn, (2.5, 97.5)).tolist()
    return {
        "value": question.reduce(ours),
        "controls": {at_cost[place].family: figures[place] for place in np.argsort(figures, kind="stable")},
        "best": at_cost[best].words,
        "family": at_cost[best].family,
        "control": figures[best],
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
