"""Shares of right answers, and two models compared on the same questions: intervals and a test. Pure functions."""

import math
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """From `low` to `high`, both among what is possible."""

    low: float
    high: float


class PairedCounts(NamedTuple):
    """On how many of the same questions both models are right, only the first, only the second, and neither."""

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

    @property
    def total(self) -> int:
        """Questions."""
        return sum(self)


def quantile(confidence: float) -> float:
    """
    How many standard deviations to either side hold a share `confidence` of a normal distribution: 1.96 for 0.95.

    Raises:
        ValueError: unless `confidence` lies between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}; expected a share between 0 and 1, such as 0.95.")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """
    Wilson's score interval of a share. Without trials it is everything, 0 to 1.

    Raises:
        ValueError: for a negative count, or more successes than trials.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"There are {successes} successes in {trials} trials; expected from 0 to all of them.")
    return wilson_at(quantile(confidence), successes, trials)


def wilson_at(z: float, successes: int, trials: int) -> Interval:
    """`wilson` of `z` standard deviations to either side."""
    if not trials:
        return Interval(0.0, 1.0)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # at the ends, rounding would leave 1e-17 of what is exactly 0 or 1
    return Interval(
        0.0 if successes == 0 else max(0.0, middle - half), 1.0 if successes == trials else min(1.0, middle + half)
    )


def paired_difference(counts: PairedCounts, confidence: float = 0.95) -> Interval:
    """
    Interval of the first model's share of right answers minus the second's: Wilson's intervals of both, combined with
    the correlation of their answers.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", 1998, method 10.
    """
    if not counts.total:
        return Interval(-1.0, 1.0)
    first, second = (wilson(right, counts.total, confidence) for right in (counts.first, counts.second))
    share, other = counts.first / counts.total, counts.second / counts.total
    correlation = answers_correlation(counts)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    below = distance(share - first.low, second.high - other)
    above = distance(first.high - share, other - second.low)
    return Interval(max(-1.0, share - other - below), min(1.0, share - other + above))


def answers_correlation(counts: PairedCounts) -> float:
    """Newcombe's phi: the correlation of right and wrong, drawn in by n / 2 where it is positive; 0 if undefined."""
    both, only_first, only_second, neither = counts
    margins = counts.first * (only_second + neither) * counts.second * (only_first + neither)
    if not margins:
        return 0.0
    product = both * neither - only_first * only_second
    if product > 0:
        product = max(product - counts.total / 2, 0.0)
    return product / math.sqrt(margins)


def paired_ratio(counts: PairedCounts, confidence: float = 0.95) -> Interval | None:
    """
    Interval of the first model's right answers over the second's, such as the accuracy retained; `high` is infinite
    where no bound can be given. None if both are never right.

    Source: D. G. Bonett, R. M. Price, "Confidence intervals for a ratio of binomial proportions based on paired data",
    2006, the hybrid of two Wilson intervals.
    """
    some = counts.total - counts.neither  # questions that neither model answers say nothing about the ratio
    if not some:
        return None
    first, second = counts.first + 1, counts.second + 1
    of_ratio = math.sqrt((counts.only_first + counts.only_second + 2) / (first * second))
    of_first = math.sqrt((1 - first / (some + 2)) / first)
    of_second = math.sqrt((1 - second / (some + 2)) / second)
    z = quantile(confidence) * of_ratio / (of_first + of_second)
    ours, theirs = wilson_at(z, counts.first, some), wilson_at(z, counts.second, some)
    return Interval(ours.low / theirs.high, ours.high / theirs.low if theirs.low else math.inf)


def mcnemar(only_first: int, only_second: int) -> float:
    """
    McNemar's exact test: how probable so unequal counts are, or more unequal ones, if a question on which just one of
    two models is right is as likely the first's as the second's. 1 without any such question.

    Raises:
        ValueError: for a negative count.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    1947, with the binomial distribution in place of its approximation.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"The counts are {only_first} and {only_second}; expected none below 0.")
    total, fewer = only_first + only_second, min(only_first, only_second)
    # the largest term by its logarithm, the smaller ones from it: the integers themselves have thousands of digits
    largest = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1) - total * math.log(2)
    term = tail = 1.0
    for place in range(fewer, 0, -1):
        term *= place / (total - place + 1)
        tail += term
    return min(1.0, 2 * math.exp(largest) * tail)
