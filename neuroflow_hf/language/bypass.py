"""
One step of a language model with a bypass: the gate's decision, and what the cache layers do with it.

Shapes: B sequences, n new tokens each, D the model's width. Only steps of one token are bypassed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, apply_rotary_pos_emb

from .bypass_config import ALWAYS, NeuroFlowBypassConfig
from .bypass_state import BYPASSED, COMPUTED, DENSE, BypassState, find_state
from .layer_skip import Compute, layer_index
from .plain import are_plain


def similarity_of(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Cosine of two gate outputs, [..., D] each, in float32: [...], within [-1, 1]; NaN if either has NaNs."""
    return F.cosine_similarity(now.float(), before.float(), dim=-1).clamp(-1, 1)


def confidence_of(logits: torch.Tensor) -> torch.Tensor:
    """Margin between the two highest logits, and entropy in nats, of logits [..., V]: [..., 2], float32."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    first, second = log_probabilities.topk(2, dim=-1).values.unbind(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).nan_to_num(0.0).sum(dim=-1)
    return torch.stack([first - second, entropy], dim=-1)


class BypassStep:
    """
    One forward pass over n new tokens: the gate's decision, and what is recorded at the end.

    Args:
        options: resolved.
        state: of the cache, or a new one.
        cache_length: positions in the cache before this step.
        shape: B and n.
        device: of the input.
        token_mask: bool [B, n], False for padding; None if there is none, and for a step of one token.

    Attributes:
        rows (`list[int]`): the rows that compute the cache layers; all, until the gate has decided.
        is_decided (`bool`): whether it has, which is the case after the gate layer.
    """

    def __init__(
        self,
        options: NeuroFlowBypassConfig,
        state: BypassState,
        cache_length: int,
        shape: tuple[int, int],
        device: torch.device,
        token_mask: torch.Tensor | None = None,
    ):
        self.options, self.state, self.shape, self.device = options, state, shape, device
        self.token_mask = token_mask
        self.cache_layers = frozenset(options.layers)
        self.gate_name = f"gate.{options.gate_layer}"
        self.records: dict[str, torch.Tensor] = {}
        self.rows = list(range(shape[0]))
        state.prepare(self.names(), cache_length)
        if state.batch_rows not in (None, shape[0]):
            raise ValueError(
                f"The cache holds {state.batch_rows} sequences, the input {shape[0]}. Continue with as many, or "
                "with a new cache."
            )
        self.is_decided = shape[1] > 1 or state.batch_rows is None
        if self.is_decided:
            outcome = DENSE if shape[1] > 1 else COMPUTED
            self.records["similarity"] = torch.full(shape, torch.nan, device=device)
            self.records["outcome"] = torch.full(shape, outcome, dtype=torch.uint8, device=device)
        elif options.is_inverted:
            last_two = state.last_few(self.gate_name, 2)
            self.decide(None if last_two is None else similarity_of(last_two[:, 1], last_two[:, 0]))

    def applies_to(self, layer: int) -> bool:
        """Whether this is the gate layer or a cache layer."""
        return layer == self.options.gate_layer or layer in self.cache_layers

    def names(self) -> list[str]:
        """The names of all records."""
        options = self.options
        parts = [name for name, skips in (("attention", options.skips_attention), ("mlp", options.skips_mlp)) if skips]
        names = [f"{part}.{layer}" for layer in options.layers for part in parts]
        return ["similarity", "outcome", self.gate_name, *names, *(["confidence"] if options.is_guarded else [])]

    def decide(self, similarity: torch.Tensor | None) -> None:
        """
        Decide which rows bypass the cache layers, by the gate's similarity [B]. A row without one (None, or NaN) is
        computed, unless the threshold is `ALWAYS`.
        """
        options, state = self.options, self.state
        if similarity is None:
            similarity = torch.full(self.shape[:1], torch.nan)
        similarity = similarity.to(self.device)
        fires = similarity >= options.threshold
        if options.threshold == ALWAYS:
            fires = torch.ones_like(fires)
        if options.max_consecutive is not None:
            outcomes = state.last_few("outcome", options.max_consecutive)
            if outcomes is not None:
                fires = fires & ~(outcomes == BYPASSED).all(dim=1)
        if options.is_guarded:
            margin, entropy = state.last("confidence")[:, 0].unbind(-1)
            if options.guard_margin is not None:
                fires = fires & (margin >= options.guard_margin)
            if options.guard_entropy is not None:
                fires = fires & (entropy <= options.guard_entropy)
        self.records["similarity"] = similarity.unsqueeze(1)
        self.records["outcome"] = torch.where(fires, BYPASSED, COMPUTED).to(torch.uint8).unsqueeze(1)
        self.is_decided = True
        if options.threshold == ALWAYS and options.max_consecutive is None and not options.is_guarded:
            self.rows = []
        elif options.threshold <= 1:  # the only time that the host waits for the device
            self.rows = [row for row, fired in enumerate(fires.tolist()) if not fired]
            state.count(self.shape[0], self.shape[0] - len(self.rows), options.threshold)

    @property
    def computes_all(self) -> bool:
        """Whether no row bypasses the cache layers."""
        return len(self.rows) == self.shape[0]

    def observe_gate(self, output: torch.Tensor) -> None:
        """Record the gate layer's attention output [B, n, D], and decide by it unless the decision is made."""
        if not self.is_decided:
            self.decide(similarity_of(output[:, 0], self.state.last(self.gate_name)[:, 0]))
        if self.token_mask is not None:  # padding is similar to no token
            output = output.masked_fill(~self.token_mask.unsqueeze(-1), torch.nan)
        if self.options.gate_layer in self.cache_layers and self.options.skips_attention and not self.computes_all:
            # a bypassed gate layer repeats its output, which would stay similar to itself for ever: store NaN
            computed = torch.zeros(self.shape[0], 1, 1, dtype=torch.bool, device=output.device)
            computed[self.rows] = True
            output = output.masked_fill(~computed, torch.nan)
        self.records[self.gate_name] = output

    def compute(
        self, name: str, inputs: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], whole_batch: bool
    ) -> torch.Tensor:
        """
        The output [B, n, D] of a part of a cache layer: `function` of `inputs` [B, n, D] for `self.rows`, and the last
        output for the others. With `whole_batch`, `function` is called with all rows.
        """
        if self.computes_all:
            output = function(inputs)
        else:
            output = self.state.last(name)
            if self.rows:
                rows = torch.tensor(self.rows, device=inputs.device)
                computed = function(inputs)[rows] if whole_batch else function(inputs[rows])
                output = output.index_copy(0, rows, computed)
        self.records[name] = output
        return output

    def run(self, layer: Phi3DecoderLayer, compute: Compute, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The output [B, n, D] of the gate layer or a cache layer for `hidden` [B, n, D]."""
        return bypassing_layer(layer, hidden, self, **kwargs)

    def finish(self, cache: Cache) -> None:
        """Record the step in the cache, whose own layers exist by now."""
        if self.state.first_layer is None:
            self.state.first_layer = cache.layers[0]  # type: ignore[assignment]  # transformers has narrower classes
            cache.layers.append(self.state)  # type: ignore[arg-type]
        if self.options.is_guarded:  # the head overwrites it later
            self.records["confidence"] = torch.full((*self.shape, 2), torch.nan, device=self.device)
        self.state.append(self.records)
        self.state.end = cache.get_seq_length()


def record_confidence(state: BypassState, logits: torch.Tensor, logits_to_keep: int | torch.Tensor) -> None:
    """
    Record for the guard how confident the head's logits [B, kept, V] of the last step are. Positions without logits
    stay NaN; the step after them is computed.
    """
    confidence = state.records["confidence"][-1]
    kept: torch.Tensor | tuple[slice | torch.Tensor, ...]
    if isinstance(logits_to_keep, int):
        kept = (slice(None), slice(-logits_to_keep, None))
    elif logits_to_keep.ndim == 1:
        kept = (slice(None), logits_to_keep)
    elif logits_to_keep.dtype == torch.bool:
        kept = logits_to_keep
    else:
        kept = (torch.arange(len(confidence), device=logits_to_keep.device).unsqueeze(1), logits_to_keep)
    confidence[kept] = confidence_of(logits).to(confidence.device)


def begin_step(
    options: NeuroFlowBypassConfig,
    cache: Cache,
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None,
) -> BypassStep:
    """
    Begin a step of `shape` (B, n) new tokens on a cache; `attention_mask` [B, T] as the caller gave it.

    Raises:
        ValueError: for a cache of fixed size or of another number of sequences.
    """
    if cache.is_compileable:
        raise ValueError(
            f"A bypass cannot use a {type(cache).__name__}: compiled graphs do the same on every step. Use "
            '`cache_implementation="dynamic"` or `DynamicCache(config=model.config)`, or turn the bypass off with '
            "`bypass=False`."
        )
    token_mask = None
    if attention_mask is not None and attention_mask.ndim == 2 and shape[1] > 1:
        token_mask = attention_mask[:, -shape[1] :].to(device).bool()
    return BypassStep(options, find_state(cache) or BypassState(), cache.get_seq_length(), shape, device, token_mask)


def bypassing_layer(
    layer: Phi3DecoderLayer,
    hidden: torch.Tensor,
    step: BypassStep,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **kwargs: Any,
) -> torch.Tensor:
    """
    Run a Phi-3 decoder layer, [B, n, D] to [B, n, D], as the gate layer, a cache layer, or both.

    Args:
        attention_mask: as the attention takes it, [B, 1, n, T], [B, T], or None.
        position_embeddings: cosines and sines, [B or 1, n, head_dim] each.
    """
    index = layer_index(layer)
    is_cache_layer = index in step.cache_layers

    def attend(inputs: torch.Tensor) -> torch.Tensor:
        cache: Cache | CacheOfRows = past_key_values
        per_row = [attention_mask, position_ids, *position_embeddings]
        if len(inputs) != len(hidden):
            cache = CacheOfRows(past_key_values, step.rows, others)
            rows = torch.tensor(step.rows, device=hidden.device)
            per_row = [tensor if tensor is None else take_rows(tensor, rows, len(hidden)) for tensor in per_row]
        return layer.self_attn(
            hidden_states=inputs,
            attention_mask=per_row[0],
            position_ids=per_row[1],
            past_key_values=cache,
            position_embeddings=tuple(per_row[2:]),
            **kwargs,
        )[0]

    # hooks that choose an adapter for each row (PEFT's `adapter_names`) expect all rows
    whole_batch = step.shape[0] > 1 and any(module._forward_pre_hooks for module in layer.modules())
    normed = layer.input_layernorm(hidden)
    if is_cache_layer and step.options.skips_attention:
        if not step.computes_all and not (whole_batch and step.rows):
            others = keys_and_values(layer.self_attn, normed, position_embeddings, step.rows)
            if not step.rows:
                past_key_values.update(*others, index)
        attended = step.compute(f"attention.{index}", normed, attend, whole_batch)
    else:
        attended = attend(normed)
    if index == step.options.gate_layer:
        step.observe_gate(attended)
    hidden = hidden + layer.resid_attn_dropout(attended)

    normed = layer.post_attention_layernorm(hidden)
    if is_cache_layer and step.options.skips_mlp:
        output = step.compute(f"mlp.{index}", normed, layer.mlp, whole_batch)
    else:
        output = layer.mlp(normed)
    return hidden + layer.resid_mlp_dropout(output)


def take_rows(tensor: torch.Tensor, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Some rows of a tensor with one row per sequence; other tensors as they are."""
    return tensor[rows] if len(tensor) == batch_size else tensor


def keys_and_values(
    attention: Phi3Attention,
    inputs: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, ...],
    left_out: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keys, rotated by their positions, and values of a Phi-3 attention, [B, heads, 1, head_dim] each, from inputs
    [B, 1, D]; zeros for the rows in `left_out`, which the attention itself computes.
    """
    batch_size = len(inputs)
    if left_out:
        rows = torch.tensor([row for row in range(batch_size) if row not in left_out], device=inputs.device)
        inputs = inputs[rows]
        position_embeddings = tuple(take_rows(tensor, rows, batch_size) for tensor in position_embeddings)
    projection = attention.qkv_proj
    query_size = attention.config.num_attention_heads * attention.head_dim
    # a plain projection can leave the queries out; adapters and quantised layers compute all
    if type(projection) is nn.Linear and are_plain([projection], [projection.weight]):
        projected = F.linear(inputs, projection.weight[query_size:])
    else:
        projected = projection(inputs)[..., query_size:]
    projected = projected.unflatten(-1, (2, -1, attention.head_dim)).permute(2, 0, 3, 1, 4)
    keys, values = projected.unbind(0)
    # transformers' function rotates queries and keys: pass the keys as both
    keys = apply_rotary_pos_emb(keys, keys, *position_embeddings)[1]
    if left_out:
        keys, values = (
            part.new_zeros(batch_size, *part.shape[1:]).index_copy(0, rows, part) for part in (keys, values)
        )
    return keys, values


class CacheOfRows:
    """
    Stands in for the cache where a layer's attention computes only some rows of the batch. It completes what the
    attention writes with the other rows' keys and values, and returns only the attention's rows.

    Args:
        cache: the cache.
        rows: the rows that the attention computes.
        others: keys and values of all rows, [B, heads, 1, head_dim] each; those of `rows` are ignored.
    """

    def __init__(self, cache: Cache, rows: list[int], others: tuple[torch.Tensor, torch.Tensor]):
        self.cache, self.rows, self.others = cache, rows, others

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_index: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """As the cache's method, for keys and values [rows, heads, 1, head_dim]."""
        rows = torch.tensor(self.rows, device=keys.device)
        keys, values = (
            other.index_copy(0, rows, part) for other, part in zip(self.others, (keys, values), strict=True)
        )
        return tuple(part[rows] for part in self.cache.update(keys, values, layer_index, *args, **kwargs))
