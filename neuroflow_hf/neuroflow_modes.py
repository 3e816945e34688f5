"""What each mode does inside an encoder layer, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .neuroflow_active import ActiveSet
from .neuroflow_attention import attend
from .neuroflow_cost import attention as attention_cost
from .neuroflow_cost import mlp as mlp_cost

LayerMemory = dict[str, torch.Tensor]


def layer_among_active(layer: nn.Module, hidden: torch.Tensor, active: ActiveSet, memory: LayerMemory) -> torch.Tensor:
    """
    An encoder layer whose active patches attend to each other only (Architectures B and C of the paper): rows [M, D]
    to rows [M, D]. Keeps nothing. With everything active this is the dense layer.
    """
    return layer_on_rows(layer, hidden, active, lambda key, value: (key, value, active.counts))


def layer_in_context(layer: nn.Module, hidden: torch.Tensor, active: ActiveSet, memory: LayerMemory) -> torch.Tensor:
    """
    An encoder layer whose active patches attend to all N patches: fresh keys and values for the active, those of
    their last update for the rest. Rows [M, D] to rows [M, D]; keeps `key` and `value`, [B, N, D] each.
    """

    def with_stored(key, value):
        keys = active.remember(memory, "key", key)
        values = active.remember(memory, "value", value)
        return keys.flatten(0, 1), values.flatten(0, 1), [active.num_patches] * len(active.counts)

    return layer_on_rows(layer, hidden, active, with_stored)


def layer_on_rows(
    layer: nn.Module, hidden: torch.Tensor, active: ActiveSet, keys_and_values: Callable
) -> torch.Tensor:
    """SigLIP's encoder layer for rows [M, D], attending to what `keys_and_values` makes of their keys and values."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query = attention.q_proj(normed)
    keys, values, key_counts = keys_and_values(attention.k_proj(normed), attention.v_proj(normed))
    attended = attend(attention, query, keys, values, active.counts, key_counts)
    hidden = hidden + attention.out_proj(attended)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def layer_with_stored_mlp(
    layer: nn.Module, hidden: torch.Tensor, active: ActiveSet, memory: LayerMemory
) -> torch.Tensor:
    """
    An encoder layer with attention over all patches and the MLP for active ones only (Architecture A of the paper);
    the others reuse the MLP output of their last update. [B', N, D] to [B', N, D] for the B' streams with an active
    patch; keeps `mlp`, [B, N, D].
    """
    hidden = hidden + layer.self_attn(layer.layer_norm1(hidden))[0]
    rows = active.among_live.gather(hidden)
    outputs = active.remember(memory, "mlp", layer.mlp(layer.layer_norm2(rows)))
    return hidden + active.of_live(outputs)


@dataclass(frozen=True)
class Mode:
    """
    How one mode encodes its active set.

    Args:
        layer: what is done in an encoder layer, `(layer, hidden, active, memory) -> hidden`; `memory` is that layer's.
        layer_cost: multiply-adds of one layer for one stream, `(active, patches, dim, inner) -> int`.
        encodes_all_patches: whether all patches of a stream with an active one pass through the layers, [B', N, D],
            or only the active rows, [M, D].
        pools_all_patches: whether the head sees all N patches, or the active ones.
        layer_memories: the names of what is kept for every layer, [B, N, D] each.
    """

    layer: Callable[[nn.Module, torch.Tensor, ActiveSet, LayerMemory], torch.Tensor]
    layer_cost: Callable[[int, int, int, int], int]
    encodes_all_patches: bool = False
    pools_all_patches: bool = True
    layer_memories: tuple[str, ...] = ()


def cost_among_active(active: int, patches: int, dim: int, inner: int) -> int:
    """Multiply-adds of `layer_among_active`."""
    return attention_cost(active, active, active, dim) + mlp_cost(active, dim, inner)


def cost_in_context(active: int, patches: int, dim: int, inner: int) -> int:
    """Multiply-adds of `layer_in_context`."""
    return attention_cost(active, patches, active, dim) + mlp_cost(active, dim, inner)


def cost_with_stored_mlp(active: int, patches: int, dim: int, inner: int) -> int:
    """Multiply-adds of `layer_with_stored_mlp`; a stream with nothing active is not encoded at all."""
    return (attention_cost(patches, patches, patches, dim) if active else 0) + mlp_cost(active, dim, inner)


MODES = {
    "dense": Mode(layer_among_active, cost_among_active),
    "hold": Mode(layer_among_active, cost_among_active),
    "mlp": Mode(layer_with_stored_mlp, cost_with_stored_mlp, encodes_all_patches=True, layer_memories=("mlp",)),
    "eliminate": Mode(layer_among_active, cost_among_active, pools_all_patches=False),
    "reconstruct": Mode(layer_among_active, cost_among_active),
    "context": Mode(layer_in_context, cost_in_context, layer_memories=("key", "value")),
}


@dataclass(frozen=True)
class LayerStep:
    """One layer's part in a frame: the mode, the active set, and the layer's memory."""

    mode: Mode
    active: ActiveSet
    memory: LayerMemory
