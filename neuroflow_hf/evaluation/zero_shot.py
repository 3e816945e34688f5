"""Figures of zero-shot classification: top-k accuracy, and how much of dense's accuracy is retained."""

from collections.abc import Sequence

import numpy as np

from .statistics import PairedCounts, mcnemar, paired_difference, paired_ratio, wilson


def ranks(name: str, scores: Sequence[Sequence[float]], references: Sequence[int]) -> np.ndarray:
    """
    The rank of the true label among L scores in each of M rows, int [M]: the number of other labels that score at
    least as much. `references` are the true labels' indices; `name` is the scores' name in errors.

    Raises:
        ValueError: for no rows, rows of different lengths, scores that are NaN, and labels out of range.
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
        f"{name}_difference": (counts.first - counts.second) / counts.total,
        f"{name}_difference_interval": list(paired_difference(counts, confidence)),
        f"{name}_only_ours": counts.only_first,
        f"{name}_only_dense": counts.only_second,
        f"{name}_mcnemar": mcnemar(counts.only_first, counts.only_second),
    }
