"""
How far a text is from the dense model's: metrics of tokens and logits, of one prompt and of many. Pure functions.

"Dense" is the text, or the logits, that the other is compared with.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..evaluation.statistics import bootstrap_interval, mean, paired_interval, quantile, zero_failure_bound
from .prompts import ALL, order_tasks

ROUNDING = 1e-5  # logits closer than this may change places by rounding alone, in float32
# the figures of each prompt that a report keeps
COLUMNS = (
    *("drift", "first_divergence", "margin", "forced_steps", "forced_divergent"),
    *("scored_tokens", "dense_nll", "nll", "steps", "bypassed"),
)


def cut_at_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and including the first end token; all of them if there is none."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: end + 1])


def first_divergence(dense: Sequence[int], other: Sequence[int]) -> int | None:
    """
    The first position, from 0, at which two sequences of tokens differ; None if they are equal. A sequence that ends
    earlier differs at its end.
    """
    pairs = zip(dense, other, strict=False)
    shorter = min(len(dense), len(other))
    first = next((place for place, (expected, found) in enumerate(pairs) if expected != found), shorter)
    return None if first == len(dense) == len(other) else first


def position_drift(dense: Sequence[int], other: Sequence[int]) -> float:
    """
    The share of positions at which two sequences of tokens differ, 0 to 1; the published "token drift". Positions are
    those of the longer sequence, and differ where the shorter one has ended. Two empty sequences have drift 0.

    One inserted token moves all that follow, so a high drift need not mean that much of the text changed. See
    `first_divergence`, and compare under teacher forcing.
    """
    positions = max(len(dense), len(other))
    same = sum(expected == found for expected, found in zip(dense, other, strict=False))
    return (positions - same) / positions if positions else 0.0


def kl_divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """
    KL divergence of the distributions behind two sets of logits, KL(dense || other) in nats.

    Args:
        dense, other: logits of any floating type [..., V]; minus infinity for impossible tokens.

    Returns:
        float64 [...], at least 0; infinite where a token is impossible only for `other`.
    """
    expected, found = (logits.double().log_softmax(dim=-1) for logits in (dense, other))
    probabilities = expected.exp()
    terms = torch.where(probabilities > 0, probabilities * (expected - found), 0.0)
    return terms.sum(dim=-1).clamp(min=0)  # rounding may take it below


@dataclass
class StepComparison:
    """
    Dense and another model at n steps, after the same tokens (teacher forcing).

    Args:
        same_top1 (`torch.BoolTensor` of shape `(n,)`): whether both have the same most probable next token.
        kl (`torch.DoubleTensor` of shape `(n,)`): KL(dense || other) in nats.
        entropy (`torch.DoubleTensor` of shape `(n,)`): the entropy of the dense distribution, in nats.
        margin (`torch.DoubleTensor` of shape `(n,)`): the dense model's highest logit minus its second highest.
    """

    same_top1: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    margin: torch.Tensor


def compare_steps(dense: torch.Tensor, other: torch.Tensor) -> StepComparison:
    """
    Compare the logits of n steps, [n, V] each of any floating type, V at least 2.

    Raises:
        ValueError: if their shapes differ.
    """
    if dense.shape != other.shape or dense.ndim != 2:
        raise ValueError(
            f"The logits have shapes {list(dense.shape)} and {list(other.shape)}; expected [steps, vocabulary] "
            "twice. Compare both models after the same tokens."
        )
    log_probabilities = dense.double().log_softmax(dim=-1)
    probabilities = log_probabilities.exp()
    first, second = dense.double().topk(2, dim=-1).values.unbind(-1)
    return StepComparison(
        same_top1=dense.argmax(dim=-1) == other.argmax(dim=-1),
        kl=kl_divergence(dense, other),
        entropy=-torch.where(probabilities > 0, probabilities * log_probabilities, 0.0).sum(dim=-1),
        margin=first - second,
    )


def negative_log_likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, in nats, of `tokens` int64 [...] under `logits` [..., V]: float64 [...]."""
    return -logits.double().log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


# --- one configuration, prompt by prompt ----------------------------------------------------------------------------


@dataclass
class PromptRecord:
    """
    One prompt under one configuration, compared with dense.

    Args:
        task: the prompt's task.
        drift: share of positions with another token, in greedy generation.
        first_divergence: the first such position; None if there is none.
        margin: the lead, in logits, of the dense model's first choice over its second at that position.
        forced_steps: steps after the prompt under teacher forcing.
        forced_divergent: those with another first choice than dense.
        kl: KL(dense || other) at each forced step, in nats.
        scored_tokens: tokens of the prompt's second half that were scored.
        dense_nll, nll: their total negative log-likelihood, in nats.
        steps, bypassed: steps of greedy generation, and those that were bypassed.
        similarity: the gate's similarity at each step that has one.
        entropy_bypassed, entropy_computed: dense entropy, in nats, at forced steps that were bypassed, and at others.
    """

    task: str
    drift: float = 0.0
    first_divergence: int | None = None
    margin: float | None = None
    forced_steps: int = 0
    forced_divergent: int = 0
    kl: list[float] = field(default_factory=list)
    scored_tokens: int = 0
    dense_nll: float = 0.0
    nll: float = 0.0
    steps: int = 0
    bypassed: int = 0
    similarity: list[float] = field(default_factory=list)
    entropy_bypassed: list[float] = field(default_factory=list)
    entropy_computed: list[float] = field(default_factory=list)


def columns(records: Sequence[PromptRecord]) -> dict[str, dict[str, list]]:
    """The kept figures by task: a list over prompts for each of `COLUMNS`, rounded to 6 significant digits."""
    tasks = order_tasks(record.task for record in records)
    return {
        task: {name: [significant(getattr(r, name)) for r in records if r.task == task] for name in COLUMNS}
        for task in tasks
    }


def column(entry: dict, name: str, task: str = ALL) -> list:
    """One of `COLUMNS` of a report's entry, for the prompts of one task or of all, task after task."""
    found = entry["prompts"]
    return [value for part in (found if task == ALL else [task]) for value in found[part][name]]


def significant(value, digits: int = 6):
    """A float rounded to significant digits; anything else unchanged."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def summarise_tasks(records: Sequence[PromptRecord], **bootstrap) -> dict[str, dict]:
    """The figures of each task, and of all tasks together if there are several. Options are `bootstrap_interval`'s."""
    tasks = order_tasks(record.task for record in records)
    found = {task: summarise([record for record in records if record.task == task], **bootstrap) for task in tasks}
    if len(tasks) > 1:
        found[ALL] = summarise(records, **bootstrap)
    return found


def summarise(records: Sequence[PromptRecord], **bootstrap) -> dict:
    """
    The figures of some prompts, with 95 % intervals from a bootstrap over prompts. Shares are 0 to 1, KL divergence
    and entropy in nats; None where there is no data.
    """
    drifts = [record.drift for record in records]
    diverged = [record for record in records if record.first_divergence is not None]
    kl = [value for record in records for value in record.kl]
    similarity = [value for record in records for value in record.similarity]
    firsts = [record.first_divergence for record in diverged]
    margins = [record.margin for record in diverged if record.margin is not None]
    return {
        "prompts": len(records),
        "drift": mean(drifts),
        "drift_interval": paired_interval(drifts, [0.0] * len(drifts), **bootstrap),
        "diverged_prompts": len(diverged),
        # without a divergence, a bootstrap would give (0, 0)
        "diverged_bound": None if diverged else zero_failure_bound(len(records)),
        "first_divergence": {"min": min(firsts, default=None), "median": quantile(firsts, 0.5)},
        "margin": {"median": quantile(margins, 0.5), "max": max(margins, default=None)},
        **forced_figures(records, kl, **bootstrap),
        "perplexity": perplexity(records, **bootstrap),
        "bypass_rate": share(sum(r.bypassed for r in records), sum(r.steps for r in records)),
        "similarity": {f"p{p}": quantile(similarity, p / 100) for p in (10, 50, 90)},
        "entropy": {
            "bypassed": mean([value for record in records for value in record.entropy_bypassed]),
            "computed": mean([value for record in records for value in record.entropy_computed]),
        },
    }


def forced_figures(records: Sequence[PromptRecord], kl: Sequence[float], **bootstrap) -> dict:
    """Figures of teacher forcing: the share of steps with another first choice, and the KL divergence."""
    steps = sum(record.forced_steps for record in records)
    divergent = sum(record.forced_divergent for record in records)
    ratio = {"statistic": lambda sums: sums[:, 0] / sums[:, 1], **bootstrap}
    return {
        "forced_steps": steps,
        "forced_divergent": share(divergent, steps),
        "forced_interval": bootstrap_interval([(r.forced_divergent, r.forced_steps) for r in records], **ratio),
        "kl": {
            "mean": mean(kl),
            "interval": bootstrap_interval([(math.fsum(r.kl), len(r.kl)) for r in records], **ratio),
            "p99": quantile(kl, 0.99),
        },
    }


def perplexity(records: Sequence[PromptRecord], **bootstrap) -> dict:
    """Both perplexities, and their difference with a paired interval; None where nothing was scored."""
    tokens = sum(record.scored_tokens for record in records)
    if not tokens:
        return {"tokens": 0, "dense": None, "bypass": None, "delta": None, "interval": None}

    def delta(sums):
        return np.exp(sums[:, 1] / sums[:, 2]) - np.exp(sums[:, 0] / sums[:, 2])

    rows = [(record.dense_nll, record.nll, float(record.scored_tokens)) for record in records]
    dense, other = (math.exp(min(700, math.fsum(row[column] for row in rows) / tokens)) for column in (0, 1))
    return {
        "tokens": tokens,
        "dense": dense,
        "bypass": other,
        "delta": other - dense,
        "interval": bootstrap_interval(rows, delta, **bootstrap),
    }


def share(part: float, whole: float) -> float | None:
    """`part / whole`; None if `whole` is 0."""
    return part / whole if whole else None


# --- a report's entries ----------------------------------------------------------------------------------------------


def rate_of(entry: dict, task: str = ALL) -> float:
    """The share of steps bypassed, in one task or in all."""
    return share(sum(column(entry, "bypassed", task)), sum(column(entry, "steps", task))) or 0.0


def rounding_margin(report: dict) -> float:
    """The largest lead, in logits, of dense's first choice that another batch shape overturned; at least ROUNDING."""
    noise = [entry for entry in report["noise"] if entry["kind"] == "batch"]
    return max([ROUNDING, *(margin for entry in noise for margin in column(entry, "margin") if margin is not None)])


def beyond_rounding(report: dict, entry: dict, task: str = ALL) -> int:
    """How many prompts diverge where dense's margin exceeds `rounding_margin`."""
    limit = rounding_margin(report)
    return sum(margin is not None and margin > limit for margin in column(entry, "margin", task))
