"""What each mode does inside an encoder layer, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .active_set import ActiveSet
from .attention import attend
from .cost import attention as attention_cost
from .cost import mlp as mlp_cost
from .layer_step import LayerOutput, LayerStep, PatchMemory, widths


def layer_among_active(layer: nn.Module, hidden: torch.Tensor, step: LayerStep) -> LayerOutput:
    """
    An encoder layer whose active patches attend to each other only (Architectures B and C of the paper): rows [M, D]
    to rows [M, D]. Keeps nothing. With everything active this is the dense layer.
    """
    active, (dim, inner) = step.active, widths(layer)
    hidden = layer_on_rows(layer, hidden, active, lambda key, value: (key, value))
    costs = [attention_cost(count, count, count, dim) + mlp_cost(count, dim, inner) for count in active.counts]
    return LayerOutput(hidden, costs)


def layer_in_context(layer: nn.Module, hidden: torch.Tensor, step: LayerStep) -> LayerOutput:
    """
    An encoder layer whose active patches attend to all N patches: fresh keys and values for the active, those of
    their last update for the rest. Rows [M, D] to rows [M, D]; keeps `key` and `value`, laid out as `MODES` says.

    In `extrapolate`, the stored keys and values are first brought up to date by what the active patches show.
    """
    active, patches, (dim, inner) = step.active, step.active.num_patches, widths(layer)
    kept, heads = MODES[step.gate.mode].layer_memories, layer.self_attn.num_heads

    def with_stored(key, value):
        stored = []
        for name, fresh in (("key", key), ("value", value)):
            for correction in step.corrections:
                correction.apply(step.memory, name, fresh)
            if kept[name].heads_first:
                stored.append(active.remember_by_head(step.memory, name, fresh, heads))
            else:
                stored.append(active.remember(step.memory, name, fresh).unflatten(-1, (heads, -1)).transpose(1, 2))
        return stored

    hidden = layer_on_rows(layer, hidden, active, with_stored)
    costs = [attention_cost(count, patches, count, dim) + mlp_cost(count, dim, inner) for count in active.counts]
    for correction in step.corrections:
        costs[correction.stream] += 2 * correction.multiply_adds(dim)
    return LayerOutput(hidden, costs)


def layer_on_rows(
    layer: nn.Module, hidden: torch.Tensor, active: ActiveSet, keys_and_values: Callable
) -> torch.Tensor:
    """
    SigLIP's encoder layer for rows [M, D], attending to what `keys_and_values` makes of their keys and values, rows or
    by head as in `attend`.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query = attention.q_proj(normed)
    keys, values = keys_and_values(attention.k_proj(normed), attention.v_proj(normed))
    attended = attend(attention, query, keys, values, active.counts)
    hidden = hidden + attention.out_proj(attended)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def layer_with_stored_mlp(layer: nn.Module, hidden: torch.Tensor, step: LayerStep) -> LayerOutput:
    """
    An encoder layer with attention over all patches and the MLP for active ones only (Architecture A of the paper);
    the others reuse the MLP output of their last update. [B', N, D] to [B', N, D] for the B' streams with an active
    patch (one with none is not encoded at all); keeps `mlp`, [B, N, D].
    """
    active, patches, (dim, inner) = step.active, step.active.num_patches, widths(layer)
    hidden = hidden + layer.self_attn(layer.layer_norm1(hidden))[0]
    rows = active.among_live.gather(hidden)
    outputs = active.remember(step.memory, "mlp", layer.mlp(layer.layer_norm2(rows)))
    attention = attention_cost(patches, patches, patches, dim)
    costs = [(attention if count else 0) + mlp_cost(count, dim, inner) for count in active.counts]
    return LayerOutput(hidden + active.of_live(outputs), costs)


@dataclass(frozen=True)
class Mode:
    """
    How one mode encodes its active set.

    Args:
        layer: what is done in an encoder layer, `(layer, hidden, step) -> LayerOutput`.
        encodes_all_patches: whether all patches of a stream with an active one pass through the layers, [B', N, D],
            or only the active rows, [M, D].
        pools_all_patches: whether the head sees all N patches, or the active ones.
        layer_memories: what is kept for every layer, by name.
        corrects_stale: whether patches that were not encoded learn from those that were.
    """

    layer: Callable[[nn.Module, torch.Tensor, LayerStep], LayerOutput]
    encodes_all_patches: bool = False
    pools_all_patches: bool = True
    layer_memories: dict[str, PatchMemory] = field(default_factory=dict)
    corrects_stale: bool = False


MODES = {
    "dense": Mode(layer_among_active),
    "hold": Mode(layer_among_active),
    "mlp": Mode(layer_with_stored_mlp, encodes_all_patches=True, layer_memories={"mlp": PatchMemory()}),
    "eliminate": Mode(layer_among_active, pools_all_patches=False),
    "reconstruct": Mode(layer_among_active),
    "context": Mode(layer_in_context, layer_memories=dict.fromkeys(("key", "value"), PatchMemory(heads_first=True))),
    "extrapolate": Mode(
        layer_in_context, layer_memories=dict.fromkeys(("key", "value"), PatchMemory()), corrects_stale=True
    ),
}
