"""What each mode does inside an encoder layer, and what it costs."""

from collections.abc import Callable

from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from .attention import attend
from .cost import attention as attention_cost
from .cost import mlp as mlp_cost
from .layer_step import LayerStep, ModeSpec, widths
from .sparse_adapter import LayerAdapter
from .stream_state import KEY, MLP, VALUE
from .summary import attend_with_summary, whole_streams

AttendTo = Callable[[SiglipAttention, Tensor, Tensor, Tensor], Tensor]


def layer_among_active(layer: SiglipEncoderLayer, hidden: Tensor, step: LayerStep) -> Tensor:
    """
    An encoder layer whose active patches attend only to each other (Architectures B and C of the paper), and to the
    summary tokens: rows [M, D] to rows [M, D]. With everything active this is the dense layer.
    """
    active, (dim, inner), summary = step.active, widths(layer), step.summary

    def attend_to(attention: SiglipAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if summary is None:
            return attend(attention, query, key, value, active.counts)
        return attend_with_summary(attention, query, key, value, active, summary, step.memory)

    whole = set() if summary is None else set(whole_streams(active))
    step.multiply_adds = [
        attention_cost(count, count if summary is None or stream in whole else count + summary.tokens, count, dim)
        + mlp_cost(count, dim, inner)
        + step.adapter.multiply_adds(count, active.num_patches)
        for stream, count in enumerate(active.counts)
    ]
    return layer_on_rows(layer, hidden, attend_to, step.adapter)


def layer_in_context(layer: SiglipEncoderLayer, hidden: Tensor, step: LayerStep) -> Tensor:
    """
    An encoder layer whose active patches attend to all N patches: fresh keys and values for the active, those of
    their last update for the rest, corrected first in `extrapolate`. Rows [M, D] to rows [M, D].
    """
    active, patches, (dim, inner) = step.active, step.active.num_patches, widths(layer)
    heads = layer.self_attn.num_heads

    def remembered(name: str, fresh: Tensor) -> Tensor:
        for correction in step.corrections:
            correction.apply(step.memory, name, fresh)
        if step.mode.heads_first:
            return active.remember_by_head(step.memory, name, fresh, heads)
        return active.remember(step.memory, name, fresh).unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend_to(attention: SiglipAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(attention, query, remembered(KEY, key), remembered(VALUE, value), active.counts)

    step.multiply_adds = [
        attention_cost(count, patches, count, dim)
        + mlp_cost(count, dim, inner)
        + step.adapter.multiply_adds(count, patches)
        for count in active.counts
    ]
    for correction in step.corrections:
        step.multiply_adds[correction.stream] += 2 * correction.multiply_adds(dim)
    return layer_on_rows(layer, hidden, attend_to, step.adapter)


def layer_on_rows(layer: SiglipEncoderLayer, hidden: Tensor, attend_to: AttendTo, adapter: LayerAdapter) -> Tensor:
    """SigLIP's encoder layer for rows [M, D]; `attend_to` takes its attention, and queries, keys, values."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query, key, value = (
        adapter.linear(f"self_attn.{name}", getattr(attention, name), normed)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    attended = attend_to(attention, query, key, value)
    hidden = hidden + adapter.linear("self_attn.out_proj", attention.out_proj, attended)
    return hidden + adapter.mlp(layer.mlp, layer.layer_norm2(hidden))


def layer_with_stored_mlp(layer: SiglipEncoderLayer, hidden: Tensor, step: LayerStep) -> Tensor:
    """
    An encoder layer with attention over all patches and the MLP for active ones only (Architecture A of the paper);
    the others reuse the MLP output of their last update. [B', N, D] to [B', N, D] for the B' streams with an active
    patch; the others are not encoded.
    """
    active, patches, (dim, inner) = step.active, step.active.num_patches, widths(layer)
    hidden = hidden + layer.self_attn(layer.layer_norm1(hidden))[0]
    rows = active.among_live.gather(hidden)
    outputs = active.remember(step.memory, MLP, layer.mlp(layer.layer_norm2(rows)))
    attention = attention_cost(patches, patches, patches, dim)
    step.multiply_adds = [(attention if count else 0) + mlp_cost(count, dim, inner) for count in active.counts]
    return hidden + active.of_live(outputs)


MODES: dict[str, ModeSpec] = {
    "dense": ModeSpec(layer_among_active),
    "hold": ModeSpec(layer_among_active),
    "mlp": ModeSpec(layer_with_stored_mlp, encodes_all_patches=True, layer_memories=(MLP,)),
    "eliminate": ModeSpec(layer_among_active, pools_all_patches=False),
    "reconstruct": ModeSpec(layer_among_active),
    "context": ModeSpec(layer_in_context, layer_memories=(KEY, VALUE), heads_first=True),
    "extrapolate": ModeSpec(layer_in_context, layer_memories=(KEY, VALUE), corrects_stale=True),
}
