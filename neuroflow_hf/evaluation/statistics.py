"""Figures of answers to questions with their intervals and tests, and intervals by bootstrap. Pure functions."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm


class Interval(NamedTuple):
    """An interval, both ends included."""

    low: float
    high: float


class PairedCounts(NamedTuple):
    """Number of questions that both models answer right, only the first, only the second, and neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def first(self) -> int:
        """Right answers of the first model."""
        return self.both + self.only_first

    @property
    def second(self) -> int:
        """Right answers of the second model."""
        return self.both + self.only_second


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """
    Wilson's score interval of a share; 0 to 1 without trials.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not trials:
        return Interval(0.0, 1.0)
    return Interval(*map(float, binomtest(successes, trials).proportion_ci(confidence, method="wilson")))


def paired_difference(counts: PairedCounts, confidence: float = 0.95) -> Interval:
    """
    Interval of the first model's share of right answers minus the second's: Wilson's intervals of both, combined with
    the correlation of their answers.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", 1998, method 10.
    """
    if not sum(counts):
        return Interval(-1.0, 1.0)
    first, second = (wilson(right, sum(counts), confidence) for right in (counts.first, counts.second))
    share, other = counts.first / sum(counts), counts.second / sum(counts)
    both, only_first, only_second, neither = counts
    margins = counts.first * (only_second + neither) * counts.second * (only_first + neither)
    product = both * neither - only_first * only_second
    if product > 0:
        product = max(product - sum(counts) / 2, 0.0)  # Newcombe's correction
    correlation = product / math.sqrt(margins) if margins else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    below = distance(share - first.low, second.high - other)
    above = distance(first.high - share, other - second.low)
    return Interval(max(-1.0, share - other - below), min(1.0, share - other + above))


def paired_ratio(counts: PairedCounts, confidence: float = 0.95) -> Interval | None:
    """
    Interval of the first model's right answers over the second's, such as the accuracy retained; `high` may be
    infinite. None if no question is answered right.

    Source: D. G. Bonett, R. M. Price, "Confidence intervals for a ratio of binomial proportions based on paired data",
    2006, the hybrid of two Wilson intervals.
    """
    some = sum(counts) - counts.neither  # questions that neither model answers say nothing about the ratio
    if not some:
        return None
    first, second = counts.first + 1, counts.second + 1
    of_ratio = math.sqrt((counts.only_first + counts.only_second + 2) / (first * second))
    of_first = math.sqrt((1 - first / (some + 2)) / first)
    of_second = math.sqrt((1 - second / (some + 2)) / second)
    each = 1 - 2 * norm.sf(norm.isf((1 - confidence) / 2) * of_ratio / (of_first + of_second))
    ours, theirs = wilson(counts.first, some, each), wilson(counts.second, some, each)
    return Interval(ours.low / theirs.high, ours.high / theirs.low if theirs.low else math.inf)


def mcnemar(only_first: int, only_second: int) -> float:
    """
    McNemar's exact test: the probability of counts at least as unequal, if both models are equally good. 1 if both
    counts are 0.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    1947, with the binomial distribution in place of its approximation.
    """
    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def ranks(name: str, scores: Sequence[Sequence[float]], references: Sequence[int]) -> np.ndarray:
    """
    The rank of the true label among L scores in each of M rows, int [M]: the number of other labels that score at
    least as much. `references` are the true labels' indices; `name` is the scores' name in errors. ValueError for no
    rows, rows of different lengths, scores that are NaN, and labels out of range.
    """
    widths = sorted({len(row) for row in scores})
    if len(widths) != 1:
        raise ValueError(f"`{name}` have rows of {widths} scores; expected at least one row, and equally long ones.")
    scores, references = np.array(scores, dtype=np.float64), np.array(references)
    for place in np.flatnonzero(np.isnan(scores).any(-1))[:1]:
        raise ValueError(f"Row {place} of `{name}` holds NaN; expected scores.")
    for place in np.flatnonzero((references < 0) | (references >= widths[0]))[:1]:
        raise ValueError(f"Label {place} is {references[place]}; expected from 0 to {widths[0] - 1}.")
    right = np.take_along_axis(scores, references[:, None], axis=1)
    return (scores >= right).sum(-1) - 1


def paired_counts(ours: np.ndarray, dense: np.ndarray) -> PairedCounts:
    """Count the pictures on which both, one, or neither is right, from bool [M] each."""
    return PairedCounts(*(int(both.sum()) for both in (ours & dense, ours & ~dense, ~ours & dense, ~ours & ~dense)))


def share_figures(name: str, right: np.ndarray, confidence: float = 0.95) -> dict:
    """The share of right answers, bool [M], as `name`, and its interval as `name_interval`."""
    interval = wilson(int(right.sum()), len(right), confidence)
    return {name: int(right.sum()) / len(right), f"{name}_interval": list(interval)}


def paired_figures(name: str, counts: PairedCounts, confidence: float = 0.95) -> dict:
    """Accuracy against dense's, under keys that begin with `name`: ratio, difference, intervals, McNemar's test."""
    ratio = paired_ratio(counts, confidence)
    # JSON has no infinity
    ratio_interval = None if ratio is None else [bound if np.isfinite(bound) else None for bound in ratio]
    return {
        f"{name}_retention": counts.first / counts.second if counts.second else None,
        f"{name}_retention_interval": ratio_interval,
        f"{name}_difference": (counts.first - counts.second) / sum(counts),
        f"{name}_difference_interval": list(paired_difference(counts, confidence)),
        f"{name}_only_ours": counts.only_first,
        f"{name}_only_dense": counts.only_second,
        f"{name}_mcnemar": mcnemar(counts.only_first, counts.only_second),
    }


def zero_failure_bound(trials: int) -> float:
    """Upper 95 % bound of a failure's probability after none in n independent trials: 3/n, the rule of three."""
    return min(1.0, 3 / trials) if trials else 1.0


def mean(values: Sequence[float]) -> float | None:
    """The mean, independent of the order of the values; None without values."""
    return math.fsum(values) / len(values) if len(values) else None


def quantile(values: Sequence[float], share: float) -> float | None:
    """The quantile at `share`, 0 to 1, interpolated; None without values."""
    return float(np.quantile(values, share)) if len(values) else None


# Bootstrap: whole groups (prompts, videos, scenes) are drawn, because the tokens or frames of one group depend on each
# other. scipy.stats.bootstrap does not fit: it draws single values, and returns NaN if one resample has no value.


def resamples(count: int, samples: int = 2000, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Which of `count` groups each bootstrap sample draws, with replacement: int [samples, count]."""
    return np.random.default_rng(seed).integers(count, size=(samples, count))


def middle(values: np.ndarray) -> Interval | None:
    """The 95 % percentile interval of resampled values [S], without NaN; None if none is left."""
    values = np.asarray(values)
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    return Interval(*np.quantile(values, (0.025, 0.975)).tolist())


def bootstrap_interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    samples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """
    95 % percentile interval of a statistic of sums over groups; None without rows or values.

    Args:
        rows: what each of N groups adds to each of K sums, [N, K], in any order.
        statistic: from sums, float64 [S, K], to S values of the statistic; NaN where it is undefined.
        samples: number of bootstrap samples, S.
        seed: of the generator; use the same for figures that are compared.
    """
    if not len(rows):
        return None
    table = np.array(sorted(map(tuple, rows)), dtype=np.float64)
    with np.errstate(all="ignore"):
        return middle(statistic(table[resamples(len(table), samples, seed)].sum(axis=1)))


def mean_interval(values: Sequence[float], **options) -> Interval | None:
    """Interval of the mean of one value for each group; options as of [`bootstrap_interval`]."""
    return bootstrap_interval([(value, 1.0) for value in values], lambda sums: sums[:, 0] / sums[:, 1], **options)


def difference_interval(
    values: Sequence[float], others: Sequence[float], samples: int = 2000, seed: int = 0
) -> Interval | None:
    """Interval of the difference of the means of two independent sets of groups; None if one is empty."""
    if not len(values) or not len(others):
        return None
    generator = np.random.default_rng(seed)
    first, second = (
        np.sort(np.asarray(group, dtype=np.float64))[resamples(len(group), samples, generator)].mean(axis=1)
        for group in (values, others)
    )
    return middle(first - second)
