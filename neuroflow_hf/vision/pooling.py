"""How towers make one embedding of their tokens: the first token, or attention with a learned probe."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .cost import pooling_head
from .shortcuts import are_plain
from .summary import SummaryGrid
from .tower import unscaled


class Pooling:
    """
    How a tower makes one embedding of its tokens on one frame: here, it is the first token, a CLS token.

    Args:
        norm: applied to it.
    """

    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor] = unscaled):
        self.norm = norm

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens after the final norm, [B, A, D], to embeddings [B, D]."""
        return self.norm(tokens[:, 0])

    def pool_with_summary(
        self, tokens: torch.Tensor, summary_output: torch.Tensor, summary: SummaryGrid
    ) -> torch.Tensor:
        """As `pool`, of active tokens and the summary tokens' outputs [B, K, D]."""
        return self.pool(tokens)  # the first token has seen the summary tokens in every layer

    def cost(self, tokens: int, with_summary: bool) -> int:
        """Multiply-adds of pooling so many tokens."""
        return 0

    def dense_cost(self, tokens: int) -> int:
        """Multiply-adds of the stock model's pooling."""
        return 0


class ProbePooling(Pooling):
    """
    A learned probe attends to the tokens (multi-head attention pooling).

    Args:
        head: with `probe`, `attention` (`nn.MultiheadAttention`), `layernorm`, `mlp`.
        config: the tower's; its sizes are the head's, whose modules adapters may have replaced.
        exact: call the head, bit for bit, also where `pool_with_folded_probe` would do.
    """

    def __init__(self, head: Any, config: PreTrainedConfig, exact: bool):
        self.head, self.config, self.folded = head, config, not exact and can_fold_probe(head)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        return pool_with_folded_probe(self.head, tokens) if self.folded else self.head(tokens)

    def pool_with_summary(
        self, tokens: torch.Tensor, summary_output: torch.Tensor, summary: SummaryGrid
    ) -> torch.Tensor:
        # each summary token counts as all that it stands for
        head, attention = self.head, self.head.attention
        bias = summary.bias(tokens.shape[1], tokens).view(1, -1)
        tokens = torch.cat([tokens, summary_output], dim=1)
        attended = attention(head.probe.repeat(len(tokens), 1, 1), tokens, tokens, attn_mask=bias)[0]
        return (attended + head.mlp(head.layernorm(attended)))[:, 0]

    def cost(self, tokens: int, with_summary: bool) -> int:
        return self._cost(tokens, self.folded and not with_summary)

    def dense_cost(self, tokens: int) -> int:
        return self._cost(tokens, folded=False)

    def _cost(self, tokens: int, folded: bool) -> int:
        config = self.config
        return pooling_head(tokens, config.hidden_size, config.intermediate_size, config.num_attention_heads, folded)


# The classes that `nn.MultiheadAttention` itself uses for `out_proj`. It reads the weights of that module and never
# calls it, so an adapter around it has no effect without a stream, and must have none with one.
PLAIN_OUTPUT_PROJECTIONS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def can_fold_probe(head: Any) -> bool:
    """Whether `pool_with_folded_probe` may read the head's weights: see `are_plain`."""
    attention = getattr(head, "attention", None)
    if type(attention) is not nn.MultiheadAttention or type(attention.out_proj) not in PLAIN_OUTPUT_PROJECTIONS:
        return False
    weights = (head.probe, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight)
    return are_plain((head, attention, attention.out_proj), weights)


def pool_with_folded_probe(head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Probe pooling of [B, N, D] to [B, D], with the probe folded into the key projection.

    The probe is the only query, so `score_i = q . (W_k x_i)` is `(W_k^T q) . x_i`: one vector for each of H heads
    instead of a projection of every patch. Likewise `sum_i p_i (W_v x_i)` is `W_v (sum_i p_i x_i)`. That is 2 N H D
    multiply-adds instead of 2 N D^2. The key's bias adds the same to all scores, which the softmax ignores.
    """
    attention = head.attention
    batch_size, _, dim = hidden_states.shape
    num_heads, head_dim = attention.num_heads, attention.head_dim
    query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)

    query = F.linear(head.probe.view(1, dim), query_weight, query_bias).view(num_heads, 1, head_dim)
    folded = (query @ key_weight.view(num_heads, head_dim, dim)).view(num_heads, dim) * head_dim**-0.5
    scores = folded @ hidden_states.transpose(1, 2)  # [B, H, N]
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(hidden_states.dtype)
    means = weights @ hidden_states  # [B, H, D]
    values = torch.einsum("bhd,hed->bhe", means, value_weight.view(num_heads, head_dim, dim))
    pooled = attention.out_proj(values.reshape(batch_size, 1, dim) + value_bias)
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
