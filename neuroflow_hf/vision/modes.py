"""What each mode does inside an encoder layer, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .active_set import ActiveSet
from .attention import attend
from .cost import attention as attention_cost
from .cost import mlp as mlp_cost
from .extrapolate import Correction
from .sparse_adapter import LayerAdapter
from .summary import SUMMARY_KEY, SUMMARY_VALUE, SummaryGrid, attend_with_summary, whole_streams
from .tower import LayerParts

AttendTo = Callable[[Tensor, Tensor, Tensor], Tensor]
KEY, VALUE, MLP = "key", "value", "mlp"


def layer_name(layer: int, name: str) -> str:
    """The name of an encoder layer's memory among those of a stream."""
    return f"layers.{layer}.{name}"


@dataclass(frozen=True)
class ModeSpec:
    """
    How one mode encodes its active set.

    Args:
        layer: what is done in an encoder layer, `(parts, hidden, step) -> hidden`; what it cost is left in the step.
        encodes_all_patches: whether all tokens of a stream with an active one pass through the layers, [B', T, D],
            or only the active rows, [M, D].
        pools_all_patches: whether the head sees all tokens, or the active ones.
        layer_memories: names of the features that every layer keeps of all tokens.
        heads_first: whether they are stored head by head, [B, H, T, D / H], as attention reads them; else [B, T, D].
        corrects_stale: whether what is stored of patches that were not encoded is corrected by those that were.
    """

    layer: Callable[[LayerParts, Tensor, "LayerStep"], Tensor]
    encodes_all_patches: bool = False
    pools_all_patches: bool = True
    layer_memories: tuple[str, ...] = ()
    heads_first: bool = False
    corrects_stale: bool = False


@dataclass
class LayerStep:
    """
    One layer's part in a frame, passed to the layer as `step`.

    Args:
        mode: how the stream encodes its active set.
        number: the layer's, from 0.
        active: the active set.
        memory: the stream's, see `stream_state.py`.
        corrections: of the stored keys and values, before they are used (mode `extrapolate`).
        summary: the cells of the summary tokens; None without them.
        adapter: the layer's part of the model's sparse adapter; without one, it changes nothing.

    Attributes:
        multiply_adds: what the layer cost each of the B streams, left here by the layer function: forward hooks of
            encoder layers expect that a layer returns the hidden states and nothing else.
    """

    mode: ModeSpec
    number: int
    active: ActiveSet
    memory: dict[str, Tensor]
    corrections: list[Correction]
    summary: SummaryGrid | None
    adapter: LayerAdapter
    multiply_adds: list[int] = field(default_factory=list)


def layer_among_active(parts: LayerParts, hidden: Tensor, step: LayerStep) -> Tensor:
    """
    An encoder layer whose active patches attend only to each other (Architectures B and C of the paper), and to the
    summary tokens: rows [M, D] to rows [M, D]. With everything active this is the dense layer.
    """
    active, dim, inner, summary = step.active, parts.dim, parts.inner, step.summary

    def attend_to(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if summary is None:
            return attend(parts, query, key, value, active.counts)
        names = [layer_name(step.number, name) for name in (SUMMARY_KEY, SUMMARY_VALUE)]
        return attend_with_summary(parts, query, key, value, active, summary, step.memory, names)

    whole = set() if summary is None else set(whole_streams(active))
    step.multiply_adds = [
        attention_cost(count, count if summary is None or stream in whole else count + summary.tokens, count, dim)
        + mlp_cost(count, dim, inner)
        + step.adapter.multiply_adds(count, active.num_tokens)
        for stream, count in enumerate(active.counts)
    ]
    return layer_on_rows(parts, hidden, attend_to, step.adapter)


def layer_in_context(parts: LayerParts, hidden: Tensor, step: LayerStep) -> Tensor:
    """
    An encoder layer whose active patches attend to all tokens: fresh keys and values for the active, those of
    their last update for the rest, corrected first in `extrapolate`. Rows [M, D] to rows [M, D].
    """
    active, tokens, dim, inner = step.active, step.active.num_tokens, parts.dim, parts.inner
    heads = parts.num_heads

    def remembered(kind: str, fresh: Tensor) -> Tensor:
        name = layer_name(step.number, kind)
        for correction in step.corrections:
            correction.apply(step.memory, name, fresh)
        if step.mode.heads_first:
            return active.remember_by_head(step.memory, name, fresh, heads)
        return active.remember(step.memory, name, fresh).unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend_to(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(parts, query, remembered(KEY, key), remembered(VALUE, value), active.counts)

    step.multiply_adds = [
        attention_cost(count, tokens, count, dim)
        + mlp_cost(count, dim, inner)
        + step.adapter.multiply_adds(count, tokens)
        for count in active.counts
    ]
    for correction in step.corrections:
        step.multiply_adds[correction.stream] += 2 * correction.multiply_adds(dim)
    return layer_on_rows(parts, hidden, attend_to, step.adapter)


def layer_on_rows(parts: LayerParts, hidden: Tensor, attend_to: AttendTo, adapter: LayerAdapter) -> Tensor:
    """An encoder layer for rows [M, D]; `attend_to` takes its queries, keys and values."""
    normed = parts.norm1(hidden)
    query, key, value = (
        adapter.linear(f"self_attn.{name}", module, normed)
        for name, module in (("q_proj", parts.query), ("k_proj", parts.key), ("v_proj", parts.value))
    )
    attended = adapter.linear("self_attn.out_proj", parts.output, attend_to(query, key, value))
    hidden = hidden + parts.scale1(attended)
    return hidden + parts.scale2(adapter.mlp(parts.mlp, parts.norm2(hidden)))


def layer_with_stored_mlp(parts: LayerParts, hidden: Tensor, step: LayerStep) -> Tensor:
    """
    An encoder layer with attention over all tokens and the MLP for active ones only (Architecture A of the paper);
    the others reuse the MLP output of their last update. [B', T, D] to [B', T, D] for the B' streams with an active
    patch; the others are not encoded.
    """
    active, tokens, dim, inner = step.active, step.active.num_tokens, parts.dim, parts.inner
    hidden = hidden + parts.scale1(parts.attention(parts.norm1(hidden))[0])
    rows = active.among_live.gather(hidden)
    outputs = active.remember(step.memory, layer_name(step.number, MLP), parts.scale2(parts.mlp(parts.norm2(rows))))
    attention = attention_cost(tokens, tokens, tokens, dim)
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
