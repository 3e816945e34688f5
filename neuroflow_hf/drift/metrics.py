"""How far a text is from the dense model's: figures of tokens and logits, for one prompt and for many."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from ..evaluation.statistics import bootstrap_interval, mean, mean_interval, quantile, zero_failure_bound
from ..utils.files import significant
from .prompts import ALL, order_tasks


def first_divergence(dense: Sequence[int], other: Sequence[int]) -> int | None:
    """
    The first position, from 0, at which two sequences of tokens differ; None if they are equal. A sequence that ends
    earlier differs at its end.
    """
    pairs = itertools.zip_longest(dense, other)
    return next((place for place, (expected, found) in enumerate(pairs) if expected != found), None)


def position_drift(dense: Sequence[int], other: Sequence[int]) -> float:
    """
    The share of positions at which two sequences of tokens differ, 0 to 1; the published "token drift". Positions are
    those of the longer sequence, and differ where the shorter one has ended. Two empty sequences have drift 0.

    One inserted token shifts all that follow, so a high drift need not mean that much of the text changed; see also
    `first_divergence` and `compare_steps`.
    """
    differ = [expected != found for expected, found in itertools.zip_longest(dense, other)]
    return sum(differ) / len(differ) if differ else 0.0


def kl_divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """
    KL(dense || other) in nats, float64 [...], from logits [..., V] each. Infinite if a token is impossible for `other`
    only.
    """
    expected, found = (logits.double().log_softmax(dim=-1) for logits in (dense, other))
    probabilities = expected.exp()
    terms = torch.where(probabilities > 0, probabilities * (expected - found), 0.0)
    return terms.sum(dim=-1).clamp(min=0)  # rounding may make it negative


def compare_steps(dense: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compare two models at n steps, after the same tokens (teacher forcing), by their logits [n, V]: bool [n], whether
    another token is the most probable; and KL(dense || other) in nats, float64 [n]. ValueError if the shapes differ.
    """
    if dense.shape != other.shape or dense.ndim != 2:
        raise ValueError(
            f"The logits have shapes {list(dense.shape)} and {list(other.shape)}; expected [steps, vocabulary] "
            "twice. Compare both models after the same tokens."
        )
    return dense.argmax(dim=-1) != other.argmax(dim=-1), kl_divergence(dense, other)


def negative_log_likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, in nats, of `tokens` int64 [...] under `logits` [..., V]: float64 [...]."""
    return -logits.double().log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


# --- one configuration, prompt by prompt ----------------------------------------------------------------------------


@dataclass
class PromptRecord:
    """One prompt under one configuration, compared with dense."""

    task: str
    drift: float = 0.0  # share of positions with another token, in greedy generation
    first_divergence: int | None = None  # the first such position
    margin: float | None = None  # between dense's two highest logits at that position
    forced_steps: int = 0  # tokens at the end of the prompt that are predicted under teacher forcing
    forced_divergent: int = 0  # number of these steps whose most probable token is not dense's
    kl: list[float] = field(default_factory=list)  # KL(dense || other) at each of these steps, in nats
    dense_nll: float = 0.0  # total negative log-likelihood of these tokens, in nats, under the dense model
    nll: float = 0.0  # the same under the other model
    steps: int = 0  # steps of greedy generation
    bypassed: int = 0  # number of these steps that were bypassed


# what a report keeps of each prompt
COLUMNS = tuple(field.name for field in fields(PromptRecord) if field.name not in ("task", "kl"))


def figures(records: Sequence[PromptRecord], **bootstrap) -> dict[str, dict]:
    """
    A report's figures of one configuration. `tasks`: a summary of each task, and of all together if there are several;
    `prompts`: for each task and each of `COLUMNS` the values of all prompts, rounded to 6 significant digits.
    """
    tasks = order_tasks(record.task for record in records)
    groups = {task: [record for record in records if record.task == task] for task in tasks}
    prompts = {
        task: {name: [significant(getattr(record, name)) for record in found] for name in COLUMNS}
        for task, found in groups.items()
    }
    if len(groups) > 1:
        groups[ALL] = list(records)
    return {"tasks": {task: summarise(found, **bootstrap) for task, found in groups.items()}, "prompts": prompts}


def summarise(records: Sequence[PromptRecord], **bootstrap) -> dict:
    """
    Summary of some prompts, with 95 % intervals from a bootstrap over prompts. Shares are 0 to 1, KL divergence is in
    nats; figures without data are None.
    """

    def total(name: str) -> int:
        return sum(getattr(record, name) for record in records)

    drifts, kl = [record.drift for record in records], [value for record in records for value in record.kl]
    firsts = [record.first_divergence for record in records if record.first_divergence is not None]
    ratio = {"statistic": lambda sums: sums[:, 0] / sums[:, 1], **bootstrap}
    return {
        "prompts": len(records),
        "drift": mean(drifts),
        "drift_interval": mean_interval(drifts, **bootstrap),
        "diverged_prompts": len(firsts),
        # without a divergence, a bootstrap would give (0, 0)
        "diverged_bound": None if firsts else zero_failure_bound(len(records)),
        "first_divergence": {"min": min(firsts, default=None), "median": quantile(firsts, 0.5)},
        "forced_steps": total("forced_steps"),
        "forced_divergent": share(total("forced_divergent"), total("forced_steps")),
        "forced_interval": bootstrap_interval([(r.forced_divergent, r.forced_steps) for r in records], **ratio),
        "kl": {
            "mean": mean(kl),
            "interval": bootstrap_interval([(math.fsum(r.kl), len(r.kl)) for r in records], **ratio),
            "p99": quantile(kl, 0.99),
        },
        "perplexity": perplexity(records, **bootstrap),
        "bypass_rate": share(total("bypassed"), total("steps")),
    }


def perplexity(records: Sequence[PromptRecord], **bootstrap) -> dict:
    """Both perplexities, and their difference with a paired interval; None if nothing was scored."""
    tokens = sum(record.forced_steps for record in records)
    if not tokens:
        return {"dense": None, "bypass": None, "delta": None, "interval": None}

    rows = [(record.dense_nll, record.nll, float(record.forced_steps)) for record in records]
    dense, other = (math.exp(min(700, math.fsum(row[column] for row in rows) / tokens)) for column in (0, 1))
    paired = {"statistic": lambda sums: np.exp(sums[:, 1] / sums[:, 2]) - np.exp(sums[:, 0] / sums[:, 2]), **bootstrap}
    interval = bootstrap_interval(rows, **paired)
    return {"dense": dense, "bypass": other, "delta": other - dense, "interval": interval}


def share(part: float, whole: float) -> float | None:
    """`part / whole`; None if `whole` is 0."""
    return part / whole if whole else None
