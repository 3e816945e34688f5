"""
Means, differences and correlations over clips, with 95 % intervals from a bootstrap over clips. Pure functions.

The bootstrap draws clips and not frames, because the frames of one clip are alike. Each clip contributes values of
some of its frames; a mean is over the frames of all clips.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from neuroflow_hf.evaluation.statistics import bootstrap_interval


def drawn_blocks(rng: np.random.Generator, rows: int, count: int, block: int) -> np.ndarray:
    """
    Indices [rows, count] of a moving-block bootstrap over `count` frames: neighbouring frames are alike, so blocks of
    frames are drawn. Blocks go round at the end, or the first and last frames would be drawn less often.
    """
    starts = rng.integers(count, size=(rows, math.ceil(count / block)))
    return ((starts[..., None] + np.arange(block)) % count).reshape(rows, -1)[:, :count]


class Estimate(NamedTuple):
    """A figure, its interval, and the number of clips; None where the clips give no value."""

    value: float | None
    low: float | None
    high: float | None
    clips: int

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return self.low is not None


NOTHING = Estimate(None, None, None, 0)


def estimate(rows: Sequence[tuple[float, ...]], statistic) -> Estimate:
    """A statistic of sums over clips, from [S, K] to [S], and its interval; None from fewer than three clips."""
    if not rows:
        return NOTHING
    with np.errstate(all="ignore"):
        value = statistic(np.sum(rows, axis=0, keepdims=True, dtype=np.float64)).item()
    if np.isnan(value):
        return NOTHING
    interval = bootstrap_interval(rows, statistic) if len(rows) > 2 else None
    low, high = interval or (None, None)
    return Estimate(value, low, high, len(rows))


def sums(values: np.ndarray) -> tuple[float, float]:
    """Sum and number of the values that are not NaN."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.sum()), float(len(values))


def mean(clips: Sequence[np.ndarray]) -> Estimate:
    """Mean over the values of all clips, each an array of any length; NaN is no value."""
    rows = [row for row in map(sums, clips) if row[1]]
    return estimate(rows, lambda total: total[:, 0] / total[:, 1])


def difference(clips: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Estimate:
    """The mean over some clips' values less that over other clips' (or other frames of the same clips)."""
    rows = [(*sums(values), 0.0, 0.0) for values in clips] + [(0.0, 0.0, *sums(values)) for values in others]
    rows = [row for row in rows if row[1] or row[3]]
    return estimate(rows, lambda total: total[:, 0] / total[:, 1] - total[:, 2] / total[:, 3])


def share(parts: Sequence[np.ndarray], rests: Sequence[np.ndarray]) -> Estimate:
    """The share of the first sum in the total of both, over the same clips."""
    rows = [(sums(part)[0], sums(rest)[0]) for part, rest in zip(parts, rests, strict=True)]
    return estimate(rows, lambda total: total[:, 0] / total.sum(-1))


def correlation(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> Estimate:
    """Spearman's correlation of two values of each frame, over all frames; the bootstrap draws clips."""
    lengths = [len(x) for x in xs]
    flat_x, flat_y = np.concatenate(xs), np.concatenate(ys)
    if len(flat_x) < 3:
        return NOTHING
    parts = np.split(np.stack([ranks(flat_x), ranks(flat_y)]), np.cumsum(lengths)[:-1], axis=1)
    rows = [
        (float(x.sum()), float(y.sum()), float(x @ x), float(y @ y), float(x @ y), float(len(x))) for x, y in parts
    ]
    return estimate(rows, pearson_of_sums)


def pearson_of_sums(total: np.ndarray) -> np.ndarray:
    """Pearson's correlation from sums [S, 6] of x, y, x x, y y, x y and 1: [S]; NaN if either does not vary."""
    x, y, xx, yy, xy, count = total.T
    spread = (xx - x * x / count) * (yy - y * y / count)
    return np.where(spread > 1e-18, (xy - x * y / count) / np.sqrt(spread.clip(min=1e-30)), np.nan)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks scaled to 0 to 1; equal values get the mean of their ranks."""
    return (rankdata(values) - 1) / max(1, len(values) - 1)


def shown(found: Estimate, form: str = "{:.4f}", scale: float = 1.0) -> str:
    """An estimate with its interval, as text."""
    if found.value is None:
        return "no frames"
    value = form.format(scale * found.value)
    if not found.known:
        return f"{value} ({found.clips} clips, no interval)"
    return f"{value} ({form.format(scale * found.low)} to {form.format(scale * found.high)})"


def rounded(found: Estimate) -> dict:
    """An estimate for a report, with 6 significant digits."""

    def digits(value):
        return None if value is None else float(f"{value:.6g}")

    interval = [digits(found.low), digits(found.high)] if found.known else None
    return {"value": digits(found.value), "interval": interval, "clips": found.clips}
