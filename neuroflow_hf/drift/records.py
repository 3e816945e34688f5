"""What one configuration did to each prompt, and the figures of all of them. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..evaluation.statistics import bootstrap_interval, mean, paired_interval, quantile, zero_failure_bound
from .prompts import ALL, order_tasks

# what a report keeps of each prompt, to compare configurations by
COLUMNS = (
    "drift",
    "first_divergence",
    "margin",
    "forced_steps",
    "forced_divergent",
    "scored_tokens",
    "dense_nll",
    "nll",
    "steps",
    "bypassed",
)


@dataclass
class PromptRecord:
    """
    A prompt under one configuration, against dense.

    Args:
        task: what it is counted under.
        drift: share of positions with another token, in free generation.
        first_divergence: the first such position; None if there is none.
        margin: dense's lead, in logits, of its first choice over its second at that position; None if there is none.
        forced_steps: steps after the prompt at which both had read dense's text.
        forced_divergent: those at which the first choices differ.
        kl: KL(dense || other) at each of them, in nats.
        scored_tokens: tokens of the prompt's second half, fed one by one, that were predicted.
        dense_nll, nll: minus the log-probability of all these together, in nats.
        steps, bypassed: steps of free generation, and those that were bypassed.
        similarity: the gate's at those that had one.
        entropy_bypassed, entropy_computed: dense's entropy, in nats, at forced steps that were bypassed, and others.
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
    """What is kept of each prompt: by task, a list for each of `COLUMNS`, rounded to 6 significant digits."""
    tasks = order_tasks(record.task for record in records)
    return {
        task: {name: [significant(getattr(r, name)) for r in records if r.task == task] for name in COLUMNS}
        for task in tasks
    }


def column(entry: dict, name: str, task: str = ALL) -> list:
    """One of `COLUMNS` of a report's entry: of a task, or of all prompts, task after task."""
    found = entry["prompts"]
    return [value for part in (found if task == ALL else [task]) for value in found[part][name]]


def significant(value, digits: int = 6):
    """A float rounded to so many significant digits; anything else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def summarise_tasks(records: Sequence[PromptRecord], **bootstrap) -> dict[str, dict]:
    """The figures of each task, and of all prompts where there are several; arguments of `bootstrap_interval`."""
    tasks = order_tasks(record.task for record in records)
    found = {task: summarise([record for record in records if record.task == task], **bootstrap) for task in tasks}
    if len(tasks) > 1:
        found[ALL] = summarise(records, **bootstrap)
    return found


def summarise(records: Sequence[PromptRecord], **bootstrap) -> dict:
    """
    The figures of some prompts, with 95 % intervals of a bootstrap over prompts. Shares are 0 to 1, KL divergence and
    entropy in nats; None where there is nothing to tell by.
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
        # without a failure, an interval by drawing would be (0, 0)
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
    """Teacher forcing: the share of tokens with another first choice, and the KL divergence."""
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
    """Dense's perplexity, the other's, and the difference with its paired interval; None where nothing was scored."""
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
    """`part / whole`; None of nothing."""
    return part / whole if whole else None
