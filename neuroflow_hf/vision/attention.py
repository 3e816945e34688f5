"""Attention of streams with different numbers of active patches."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .tower import LayerParts


def attend(
    parts: LayerParts, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """
    Every stream's queries attend to the same stream's keys.

    Args:
        parts: of the layer whose heads, scaling and attention implementation are used.
        query: rows [M, D], stream after stream; `counts` says how many each of the B has.
        key, value: rows [M, D] likewise, or keys and values of all tokens by head, [B, H, T, D / H].

    Returns:
        Rows [M, D], before the output projection.
    """
    if len(set(counts)) == 1:
        return attend_batch(parts, query, key, value, len(counts))
    keys, values = (rows.split(counts) if rows.ndim == 2 else rows.split(1) for rows in (key, value))
    streams = zip(query.split(counts), keys, values, strict=True)
    return torch.cat([attend_batch(parts, *stream, 1) for stream in streams if len(stream[0])])


def attend_batch(
    parts: LayerParts,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_streams: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` for streams with equally many queries, and equally many keys; `bias` [1, 1, 1, keys] adds to scores."""

    def split_heads(rows: torch.Tensor) -> torch.Tensor:
        if rows.ndim == 4:
            return rows
        return rows.view(num_streams, -1, parts.num_heads, rows.shape[-1] // parts.num_heads).transpose(1, 2)

    attention = parts.attention
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, parts.eager)
    output, _ = attention_interface(
        attention,
        split_heads(query),
        split_heads(key),
        split_heads(value),
        bias,
        is_causal=False,
        scaling=parts.scaling,
        dropout=parts.dropout if attention.training else 0.0,
    )
    return output.reshape(len(query), -1)
