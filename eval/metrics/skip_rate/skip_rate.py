"""How much of a video was not encoded again, and what was spent of a dense run's multiply-adds."""

import math

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Skip rate and cost of streamed frames. The skip rate is the share of patches that were not encoded, at the first
layer; the cost is the share of dense's multiply-adds that was spent. They are not the same: a method may skip most
patches and still pay for the rest of the frame. Compare methods at equal cost.
"""

INPUTS = """
Args:
    active: patches encoded on each frame, [M].
    patches: patches that the frame has, [M].
    multiply_adds: spent on the frame, gate and head included, [M]; or, with 1 as `dense_multiply_adds`, a model
        output's `cost`.
    dense_multiply_adds: of a dense frame, [M].

Returns:
    frames: M.
    skip_rate: share of all frames' patches that were not encoded, 0 to 1.
    skip_rate_median: of the frames' own skip rates, 0 to 1.
    cost: all multiply-adds over those of dense, from 0; above 1 where it costs more than dense.
    cost_median, cost_p95: of the frames' own costs.

Raises:
    ValueError: for more active patches than there are, negative numbers, or ones that are not finite.

Example:
    >>> import evaluate
    >>> skip_rate = evaluate.load("eval/metrics/skip_rate")
    >>> found = skip_rate.compute(
    ...     active=[196, 49], patches=[196, 196], multiply_adds=[1.0, 0.5], dense_multiply_adds=[1, 1]
    ... )
    >>> found["skip_rate"], found["cost"]
    (0.375, 0.75)
"""

CITATION = """
@misc{schmitt2026ema,
  title = {EMA-Gated Temporal Sequence Compression in Vision Transformers},
  author = {Schmitt, Y.},
  year = {2026},
  doi = {10.5281/zenodo.19337577}
}
"""


class SkipRate(evaluate.Metric):
    """Skip rate, and cost as a share of dense."""

    def _info(self):
        kinds = {"active": "int64", "patches": "int64", "multiply_adds": "float64", "dense_multiply_adds": "float64"}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        )

    def _compute(self, active, patches, multiply_adds, dense_multiply_adds):
        active, patches, spent, dense = map(np.array, (active, patches, multiply_adds, dense_multiply_adds))
        require(
            (patches >= 1) & (active >= 0) & (active <= patches),
            "{} of {} patches are active; expected from 0 to all of at least one",
            active,
            patches,
        )
        require(
            np.isfinite(spent) & np.isfinite(dense) & (spent >= 0) & (dense > 0),
            "{} multiply-adds were spent and {} are dense's; expected finite numbers from 0, and above 0",
            spent,
            dense,
        )
        cost_median, cost_p95 = np.percentile(spent / dense, (50, 95)).tolist()
        return {
            "frames": len(active),
            "skip_rate": 1 - int(active.sum()) / int(patches.sum()),
            "skip_rate_median": float(np.median(1 - active / patches)),
            "cost": math.fsum(spent) / math.fsum(dense),  # exact sums do not depend on which process saw which frame
            "cost_median": cost_median,
            "cost_p95": cost_p95,
        }


def require(right: np.ndarray, message: str, *values: np.ndarray):
    """Raise a ValueError that names the first frame that is not `right` [M], with its values in the message."""
    for place in np.flatnonzero(~right)[:1]:
        raise ValueError(f"Frame {place}: " + message.format(*(value[place] for value in values)) + ".")
