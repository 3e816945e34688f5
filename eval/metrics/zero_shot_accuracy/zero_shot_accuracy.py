"""Top-k accuracy with intervals, and how much of a dense model's is retained."""

from collections.abc import Sequence

import datasets
import evaluate

from neuroflow_hf.evaluation.statistics import paired_counts, paired_figures, ranks, share_figures

DESCRIPTION = """
Zero-shot classification: is a picture's own label among the k that score highest? Shares come with Wilson's interval.
With the configuration "against_dense", the same pictures' scores of a dense run are given too, and what is retained of
its accuracy comes with an interval for pairs and McNemar's exact test.
"""

INPUTS = """
Args:
    predictions: scores of L labels, [M, L], higher is better: logits, probabilities or cosines of any floating type.
    references: the right label's place, 0 to L - 1, [M].
    dense_predictions: only in the configuration "against_dense": the dense run's scores, [M, L].
    top_k (defaults to (1, 5)): one or several k, each at most L; those above L are left out of the default.
    confidence (defaults to 0.95): of the intervals.

A label that scores as much as the right one counts as before it: equal scores, frequent in bfloat16, are no answer.

Returns:
    count: M.
    and for every k:
    top{k}: share of right answers, 0 to 1; top{k}_interval: [low, high], Wilson's.
    with "against_dense" also
    dense_top{k}, dense_top{k}_interval: the same of the dense run.
    top{k}_retention: the accuracy over dense's, from 0; None where dense is never right.
    top{k}_retention_interval: [low, high], Bonett and Price's for pairs; None where neither is ever right, and `high`
        is None where there is no upper bound.
    top{k}_difference, top{k}_difference_interval: the accuracy less dense's, -1 to 1, and Newcombe's interval for
        pairs.
    top{k}_only_ours, top{k}_only_dense: on how many pictures only one of both is right.
    top{k}_mcnemar: p-value, 0 to 1.

Raises:
    ValueError: for a label or a k out of range, rows of different widths, or scores that are NaN.

Example:
    >>> import evaluate
    >>> accuracy = evaluate.load("eval/metrics/zero_shot_accuracy", "against_dense")
    >>> found = accuracy.compute(
    ...     predictions=[[0.9, 0.1], [0.8, 0.2]],
    ...     dense_predictions=[[0.9, 0.1], [0.4, 0.6]],
    ...     references=[0, 1],
    ...     top_k=1,
    ... )
    >>> found["top1"], found["dense_top1"], found["top1_retention"], found["top1_mcnemar"]
    (0.5, 1.0, 0.5, 1.0)
"""

CITATION = """
@article{newcombe1998paired,
  title = {Improved confidence intervals for the difference between binomial proportions based on paired data},
  author = {Newcombe, Robert G.},
  journal = {Statistics in Medicine},
  volume = {17},
  year = {1998}
}
@article{bonett2006ratio,
  title = {Confidence intervals for a ratio of binomial proportions based on paired data},
  author = {Bonett, Douglas G. and Price, Robert M.},
  journal = {Statistics in Medicine},
  volume = {25},
  year = {2006}
}
"""
CONFIGURATIONS = ("default", "against_dense")


def checked_top_k(top_k: int | Sequence[int] | None, labels: int) -> list[int]:
    """The numbers k in ascending order, by default 1 and 5; a ValueError for one beyond the number of labels."""
    if top_k is None:
        return [k for k in (1, 5) if k <= labels]
    asked = sorted({top_k} if isinstance(top_k, int) else set(top_k))
    for k in asked:
        if not isinstance(k, int) or not 1 <= k <= labels:
            raise ValueError(f"`top_k` holds {k!r}; expected numbers from 1 to {labels}, the number of labels.")
    return asked


class ZeroShotAccuracy(evaluate.Metric):
    """Top-k accuracy, alone or against a dense run."""

    def _info(self):
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(f"There is no configuration {self.config_name!r}; expected one of {CONFIGURATIONS}.")
        scores = datasets.List(datasets.Value("float32"))
        features = {"predictions": scores, "references": datasets.Value("int64")}
        if self.config_name == "against_dense":
            features["dense_predictions"] = scores
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, dense_predictions=None, top_k=None, confidence=0.95):
        ours = ranks("predictions", predictions, references)
        dense = None if dense_predictions is None else ranks("dense_predictions", dense_predictions, references)
        figures = {"count": len(ours)}
        for k in checked_top_k(top_k, len(predictions[0])):
            figures |= share_figures(f"top{k}", ours < k, confidence)
            if dense is not None:
                figures |= share_figures(f"dense_top{k}", dense < k, confidence)
                figures |= paired_figures(f"top{k}", paired_counts(ours < k, dense < k), confidence)
        return figures
