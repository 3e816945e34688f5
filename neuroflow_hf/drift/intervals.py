"""
How sure a figure is: intervals by a bootstrap over prompts, and what no failure in n says. Pure functions.

Prompts are drawn, not tokens, for the tokens of one text depend on each other. Dense and the other model answer the
same prompts, so differences are taken prompt by prompt before anything is drawn (paired).
"""

import math
from collections.abc import Callable, Sequence

import torch

Interval = tuple[float, float]


def zero_failure_bound(trials: int) -> float:
    """
    The upper 95 % bound of a failure's probability after no failure in so many independent trials: 3/n, the rule of
    three, and no more than 1. None seen in 50 prompts may still be 6 % of all.

    Raises:
        ValueError: for a negative number of trials.
    """
    if trials < 0:
        raise ValueError(f"The number of trials is {trials}; expected 0 or more.")
    return min(1.0, 3 / trials) if trials else 1.0


def bootstrap_interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[torch.Tensor], torch.Tensor],
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """
    The bootstrap's percentile interval of a statistic of sums over prompts.

    Args:
        rows: what a prompt adds to each of K sums, [N, K]. Their order plays no part.
        statistic: from sums [S, K], float64, to the S values of the statistic; NaN where there is none.
        level: share of the bootstrap's values inside.
        samples: how often N prompts are drawn, with replacement.
        seed: of the drawing; the same for figures that are compared.

    Returns:
        Low and high, or None if there are no rows, or no value.
    """
    if not rows:
        return None
    table = torch.tensor(sorted(map(tuple, rows)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(table), (samples, len(table)), generator=generator)
    counts = torch.zeros(samples, len(table), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    values = statistic(counts @ table)
    values = values[~values.isnan()]
    if not len(values):
        return None
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def paired_interval(values: Sequence[float], baseline: Sequence[float], **options) -> Interval | None:
    """
    An interval of the mean difference `values - baseline`, both [N], one for each prompt and in the same order; other
    arguments as of `bootstrap_interval`.

    Raises:
        ValueError: if they are not equally many.
    """
    if len(values) != len(baseline):
        raise ValueError(f"There are {len(values)} values and {len(baseline)} to pair them with; expected as many.")
    rows = [(value - base, 1.0) for value, base in zip(values, baseline, strict=True)]
    return bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1], **options)


def difference_interval(
    values: Sequence[float], others: Sequence[float], level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval | None:
    """An interval of the difference of the means of two sets of prompts, [N] and [M], drawn apart; None if one is
    empty."""
    if not values or not others:
        return None
    generator = torch.Generator().manual_seed(seed)

    def means(numbers):
        table = torch.tensor(sorted(numbers), dtype=torch.float64)
        return table[torch.randint(len(table), (samples, len(table)), generator=generator)].mean(dim=1)

    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (means(values) - means(others)).quantile(ends).tolist()
    return low, high


def mean(values: Sequence[float]) -> float | None:
    """The mean, whatever the values' order; None of none."""
    return math.fsum(values) / len(values) if len(values) else None


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which a share of the values lies, interpolated; None of none."""
    if not len(values):
        return None
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()
