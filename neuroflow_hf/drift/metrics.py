"""
What a bypass changed in a text, in figures: of two sequences of tokens, and of the logits behind them. Pure functions.

"Dense" is the text or the logits that the other ones are compared with.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch


def cut_at_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first that is one of `ends`, itself included; all of them if there is none."""
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    return list(tokens)


def first_divergence(dense: Sequence[int], other: Sequence[int]) -> int | None:
    """
    The first position, counted from 0, at which two sequences of tokens differ; None if they are the same. Where one
    has ended and the other goes on, they differ.
    """
    for place, (expected, found) in enumerate(zip(dense, other, strict=False)):
        if expected != found:
            return place
    return None if len(dense) == len(other) else min(len(dense), len(other))


def position_drift(dense: Sequence[int], other: Sequence[int]) -> float:
    """
    The share of positions at which two sequences of tokens differ, 0 to 1; the published "token drift". Positions are
    those of the longer one; at those that the shorter one lacks, they differ. Two empty sequences have drift 0.

    A word more or less moves all that follows, so this says little about how much of the text is other: see
    `first_divergence`, and compare under teacher forcing.
    """
    positions = max(len(dense), len(other))
    same = sum(expected == found for expected, found in zip(dense, other, strict=False))
    return (positions - same) / positions if positions else 0.0


def kl_divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """
    KL divergence of the distributions behind two sets of logits, KL(dense || other) in nats.

    Args:
        dense, other: logits of any floating type [..., V]; minus infinity for what cannot come.

    Returns:
        float64 [...], at least 0; infinite where `other` excludes what `dense` does not.
    """
    expected, found = (logits.double().log_softmax(dim=-1) for logits in (dense, other))
    probabilities = expected.exp()
    terms = torch.where(probabilities > 0, probabilities * (expected - found), 0.0)
    return terms.sum(dim=-1).clamp(min=0)  # rounding may take it below


@dataclass
class StepComparison:
    """
    n steps at which dense and another model had read the same tokens (teacher forcing).

    Args:
        same_top1 (`torch.BoolTensor` of shape `(n,)`): whether both have the same most probable next token.
        kl (`torch.DoubleTensor` of shape `(n,)`): KL(dense || other) in nats.
        entropy (`torch.DoubleTensor` of shape `(n,)`): of dense's distribution, in nats.
        margin (`torch.DoubleTensor` of shape `(n,)`): by how much dense's highest logit is above its second.
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
            f"The logits have shapes {list(dense.shape)} and {list(other.shape)}; expected [steps, vocabulary] twice "
            "the same. Compare both models after the same tokens."
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
    """Minus the log-probability, in nats, of `tokens` int64 [...] by `logits` [..., V]: float64 [...]."""
    return -logits.double().log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
