"""How close embeddings are to those of a dense run: cosine and length."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Compares embeddings with reference embeddings of the same inputs, such as those of a streamed video with those of a
dense forward of every frame: cosine (mean, median and the bad cases) and ratio of lengths.
"""

INPUTS = """
Args:
    predictions: embeddings [M, D], any floating type; bfloat16 too. Kept in float32.
    references: those to compare with, [M, D].

Returns:
    count: M.
    cosine_mean, cosine_median, cosine_p1, cosine_p5: of the M cosines, -1 to 1; percentiles are interpolated.
    norm_ratio_mean, norm_ratio_min, norm_ratio_max: of the lengths of predictions over those of references, from 0.

Raises:
    ValueError: for rows of different widths, of length 0, or that are not finite.

Example:
    >>> import evaluate
    >>> fidelity = evaluate.load("eval/metrics/embedding_fidelity")
    >>> fidelity.compute(predictions=[[2.0, 0.0], [1.0, 0.0]], references=[[1.0, 0.0], [0.0, 1.0]])["cosine_mean"]
    0.5
"""

CITATION = """
@software{neuroflow_hf,
  title = {neuroflow-hf: SigLIP over video without computing again what did not change},
  license = {Apache-2.0}
}
"""


class EmbeddingFidelity(evaluate.Metric):
    """Cosine and length of embeddings against references."""

    def _info(self):
        row = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references):
        ours, theirs = as_rows("predictions", predictions), as_rows("references", references)
        if ours.shape != theirs.shape:
            raise ValueError(f"`predictions` are {ours.shape} and `references` {theirs.shape}; expected one shape.")
        lengths, reference_lengths = lengths_of("predictions", ours), lengths_of("references", theirs)
        # sorted, sums do not depend on which process saw which row
        cosines = np.sort((ours * theirs).sum(-1) / (lengths * reference_lengths)).clip(-1, 1)
        ratios = np.sort(lengths / reference_lengths)
        p1, p5, median = np.percentile(cosines, (1, 5, 50)).tolist()
        return {
            "count": len(cosines),
            "cosine_mean": float(cosines.mean()),
            "cosine_median": median,
            "cosine_p1": p1,
            "cosine_p5": p5,
            "norm_ratio_mean": float(ratios.mean()),
            "norm_ratio_min": float(ratios[0]),
            "norm_ratio_max": float(ratios[-1]),
        }


def as_rows(name: str, rows: list[list[float]]) -> np.ndarray:
    """float64 [M, D] of M lists; ValueError if they differ in width."""
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1:
        raise ValueError(f"`{name}` have widths {widths}; expected M >= 1 embeddings of one width.")
    return np.array(rows, dtype=np.float64)


def lengths_of(name: str, rows: np.ndarray) -> np.ndarray:
    """Of each row of [M, D], [M]; ValueError for one that has no direction."""
    lengths = np.sqrt((rows * rows).sum(-1))
    for place in np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))[:1]:
        raise ValueError(f"Row {place} of `{name}` has length {lengths[place]}; expected finite numbers, not all 0.")
    return lengths
