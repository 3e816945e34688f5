"""Attention of ragged streams, and attention pooling with a fixed probe."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward

from .shortcuts import are_plain


def attend(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """
    Every stream's queries attend to the same stream's keys.

    Args:
        attention: the `SiglipAttention` whose heads, scale and attention implementation are used.
        query: rows [M, D], stream after stream; `counts` says how many each of the B has.
        key, value: rows [M, D] likewise, or keys and values of all patches by head, [B, H, N, D / H].

    Returns:
        Rows [M, D], before the output projection.
    """
    if len(set(counts)) == 1:
        return attend_batch(attention, query, key, value, len(counts))
    keys, values = (rows.split(counts) if rows.ndim == 2 else rows.split(1) for rows in (key, value))
    streams = zip(query.split(counts), keys, values, strict=True)
    return torch.cat([attend_batch(attention, *stream, 1) for stream in streams if len(stream[0])])


def attend_batch(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_streams: int
) -> torch.Tensor:
    """`attend` for streams with equally many queries."""

    def heads(rows):
        if rows.ndim == 4:
            return rows
        return rows.view(num_streams, -1, attention.num_heads, attention.head_dim).transpose(1, 2)

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    output, _ = attention_interface(
        attention,
        heads(query),
        heads(key),
        heads(value),
        None,
        is_causal=False,
        scaling=attention.scale,
        dropout=attention.dropout if attention.training else 0.0,
    )
    return output.reshape(len(query), -1)


# What `nn.MultiheadAttention` makes for itself. It reads this module's weights and never calls it, so an adapter
# around it has no effect without a stream and must have none in one.
PLAIN_OUTPUT_PROJECTIONS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def can_fold_probe(head: nn.Module) -> bool:
    """
    Whether `pool_with_folded_probe` may read the head's weights: they must be plain parameters of plain modules,
    neither quantised, offloaded, adapted, parametrised nor hooked.
    """
    attention = getattr(head, "attention", None)
    if type(attention) is not nn.MultiheadAttention or type(attention.out_proj) not in PLAIN_OUTPUT_PROJECTIONS:
        return False
    weights = (head.probe, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight)
    return are_plain((head, attention, attention.out_proj), weights)


def pool_with_folded_probe(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    SigLIP's attention pooling of [B, N, D] to [B, D], with the probe folded into the key projection.

    The probe is the only query, so `score_i = q . (W_k x_i)` is `(W_k^T q) . x_i`, one vector a head instead of a
    projection of every patch; likewise `sum_i p_i (W_v x_i)` is `W_v (sum_i p_i x_i)`. That is 2 N H D
    multiply-adds, H heads, instead of 2 N D^2. The key's bias shifts all scores alike and drops out of the softmax.
    """
    attention = head.attention
    batch_size, _, dim = hidden_states.shape
    num_heads, head_dim = attention.num_heads, attention.head_dim
    query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)

    query = F.linear(head.probe.view(1, dim), query_weight, query_bias).view(num_heads, 1, head_dim)
    folded = (query @ key_weight.view(num_heads, head_dim, dim)).view(num_heads, dim) * head_dim**-0.5
    scores = folded @ hidden_states.transpose(1, 2)  # [B, H, N]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(hidden_states.dtype)
    means = weights @ hidden_states  # [B, H, D]
    values = torch.einsum("bhd,hed->bhe", means, value_weight.view(num_heads, head_dim, dim))
    pooled = attention.out_proj(values.reshape(batch_size, 1, dim) + value_bias)
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
