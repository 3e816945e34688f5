"""
One step of a language model with a bypass: the gate's decision, and what the cache layers do then.

Shapes: B sequences, n new tokens each, D the model's width. n is 1 wherever anything is bypassed.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from .bypass_config import ALWAYS, NeuroFlowBypassConfig
from .bypass_state import BYPASSED, COMPUTED, DENSE, BypassState, find_state
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
    One forward pass over n new tokens: what is decided, and what there is to record at its end.

    Args:
        options: resolved.
        state: of the cache in use, or None before the cache's first step.
        cache_length: positions in the cache before this step.
        shape: B and n.
        device: of the input.
        token_mask: bool [B, n], False for padding; None if there is none, and for a step of one token.

    Attributes:
        rows (`list[int]` or `None`):
            The rows that compute the cache layers; None before the decision, which stands from the gate layer on.
    """

    def __init__(
        self,
        options: NeuroFlowBypassConfig,
        state: BypassState | None,
        cache_length: int,
        shape: tuple[int, int],
        device: torch.device,
        token_mask: torch.Tensor | None = None,
    ):
        self.options, self.state, self.shape, self.device = options, state, shape, device
        self.token_mask = token_mask
        self.cache_layers = frozenset(options.cache_layers)
        self.gate_name = f"gate.{options.gate_layer}"
        self.records: dict[str, torch.Tensor] = {}
        self.rows: list[int] | None = None
        if state is not None:
            state.prepare(self.names(), cache_length)
            if state.batch_rows not in (None, shape[0]):
                raise ValueError(
                    f"The cache holds {state.batch_rows} sequences, the input {shape[0]}. Continue with as many, or "
                    "with a new cache."
                )
        if shape[1] > 1 or state is None or state.batch_rows is None:
            outcome = DENSE if shape[1] > 1 else COMPUTED
            self.records["similarity"] = torch.full(shape, torch.nan, device=device)
            self.records["outcome"] = torch.full(shape, outcome, dtype=torch.uint8, device=device)
            self.rows = list(range(shape[0]))
        elif options.is_inverted:
            last_two = state.last(self.gate_name, 2)
            self.decide(None if last_two is None else similarity_of(last_two[:, 1], last_two[:, 0]))

    def applies_to(self, layer: int) -> bool:
        """Whether this layer does anything but be computed."""
        return layer == self.options.gate_layer or layer in self.cache_layers

    def names(self) -> list[str]:
        """The names of all records."""
        options = self.options
        parts = [name for name, skips in (("attention", options.skips_attention), ("mlp", options.skips_mlp)) if skips]
        names = [f"{part}.{layer}" for layer in options.cache_layers for part in parts]
        return ["similarity", "outcome", self.gate_name, *names, *(["confidence"] if options.is_guarded else [])]

    def decide(self, similarity: torch.Tensor | None):
        """
        Which rows bypass the cache layers in this step, from the gate's similarity [B]. Where there is none (None, or
        NaN), none does, unless the threshold says always.
        """
        options, state = self.options, self.state
        if similarity is None:
            similarity = torch.full(self.shape[:1], torch.nan)
        similarity = similarity.to(self.device)
        fires = similarity >= options.threshold
        if options.threshold == ALWAYS:
            fires = torch.ones_like(fires)
        if options.max_consecutive is not None:
            outcomes = state.last("outcome", options.max_consecutive)
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
        if options.threshold > 1:
            self.rows = list(range(self.shape[0]))
        elif options.threshold == ALWAYS and options.max_consecutive is None and not options.is_guarded:
            self.rows = []
        else:  # the one read by the host: it decides what is computed
            self.rows = [row for row, fired in enumerate(fires.tolist()) if not fired]

    @property
    def computes_all(self) -> bool:
        """Whether no row bypasses the cache layers."""
        return len(self.rows) == self.shape[0]

    def observe_gate(self, output: torch.Tensor):
        """Take the gate layer's attention output [B, n, D]; decide, if that is what decides."""
        if self.rows is None:
            self.decide(similarity_of(output[:, 0], self.state.last(self.gate_name)[:, 0]))
        if self.token_mask is not None:
            output = output.masked_fill(~self.token_mask.unsqueeze(-1), torch.nan)  # padding is like nothing
        if self.options.gate_layer in self.cache_layers and self.options.skips_attention and not self.computes_all:
            # a bypassed gate layer repeats its own output; store NaN: its reused output would be like itself for ever
            computed = torch.zeros(self.shape[0], 1, 1, dtype=torch.bool, device=output.device)
            computed[self.rows] = True
            output = output.masked_fill(~computed, torch.nan)
        self.records[self.gate_name] = output

    def compute(self, name: str, inputs: torch.Tensor, function, whole_batch: bool) -> torch.Tensor:
        """
        The output [B, n, D] of a part of a cache layer: computed by `function` for the rows that need it, from
        `inputs` [B, n, D] of those, and as it was last for the others. With `whole_batch`, `function` gets all rows.
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

    def run(self, layer: nn.Module, compute, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        """The output [B, n, D] of a decoder layer that this applies to, for `hidden` [B, n, D]."""
        return bypassing_layer(layer, hidden, self, **kwargs)

    def finish(self, cache):
        """Record the step in the cache, whose own layers exist by now."""
        if self.state is None:
            self.state = BypassState(cache.layers[0])
            self.state.prepare(self.names(), 0)
            cache.layers.append(self.state)
        if self.options.is_guarded:  # the head, which comes later, writes over it
            self.records["confidence"] = torch.full((*self.shape, 2), torch.nan, device=self.device)
        self.state.append(self.records)
        self.state.end = cache.get_seq_length()


def record_confidence(state: BypassState, logits: torch.Tensor, logits_to_keep: int | torch.Tensor):
    """
    Let the guard know the head's logits [B, kept, V] of the step that was recorded last. Positions whose logits were
    not asked for stay NaN, and are never bypassed.
    """
    confidence = state.records["confidence"][-1]
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
    cache,
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None,
) -> BypassStep:
    """
    The step over `shape` (B, n) new tokens on a cache; `attention_mask` [B, T] as the caller gave it.

    Raises:
        ValueError: for a cache of fixed size, and for one that holds another number of sequences.
    """
    if cache.is_compileable:
        raise ValueError(
            f"A bypass cannot work with a {type(cache).__name__}, made for graphs that do the same on every step. Use "
            '`cache_implementation="dynamic"` or `DynamicCache(config=model.config)`, or turn the bypass off with '
            "`bypass=False`."
        )
    token_mask = None
    if attention_mask is not None and attention_mask.ndim == 2 and shape[1] > 1:
        token_mask = attention_mask[:, -shape[1] :].to(device).bool()
    return BypassStep(options, find_state(cache), cache.get_seq_length(), shape, device, token_mask)


def bypassing_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    step: BypassStep,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **kwargs,
) -> torch.Tensor:
    """
    A Phi-3 decoder layer, [B, n, D] to [B, n, D], as the gate layer, a cache layer, or both.

    Args:
        layer: a `Phi3DecoderLayer`.
        step: decided by now if this is a cache layer.
        attention_mask: as the attention takes it, [B, 1, n, T], [B, T], or None.
        position_embeddings: cosines and sines, [B or 1, n, head_dim] each.
    """
    index = layer.self_attn.layer_idx
    is_cache_layer = index in step.cache_layers

    def attend(inputs: torch.Tensor) -> torch.Tensor:
        cache, per_row = past_key_values, (attention_mask, position_ids, *position_embeddings)
        if len(inputs) != len(hidden):
            cache = CacheOfRows(past_key_values, step.rows, others)
            rows = torch.tensor(step.rows, device=hidden.device)
            per_row = (take_rows(tensor, rows, len(hidden)) for tensor in per_row)
        mask, ids, cosines, sines = per_row
        return layer.self_attn(
            hidden_states=inputs,
            attention_mask=mask,
            position_ids=ids,
            past_key_values=cache,
            position_embeddings=(cosines, sines),
            **kwargs,
        )[0]

    # adapters that differ between rows (PEFT's `adapter_names`) are chosen by hooks, which expect every row
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


def take_rows(tensor: torch.Tensor | None, rows: torch.Tensor, batch_size: int) -> torch.Tensor | None:
    """Some rows of what has one per sequence; what holds for all of them, as it is."""
    return tensor if tensor is None or tensor.shape[0] != batch_size else tensor[rows]


def keys_and_values(
    attention: nn.Module,
    inputs: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    left_out: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keys, turned by their positions, and values of a Phi-3 attention, [B, heads, 1, head_dim] each, from inputs
    [B, 1, D]; zeros for the rows `left_out`, whose own are made elsewhere.
    """
    batch_size = len(inputs)
    if left_out:
        rows = torch.tensor([row for row in range(batch_size) if row not in left_out], device=inputs.device)
        inputs = inputs[rows]
        position_embeddings = tuple(take_rows(tensor, rows, batch_size) for tensor in position_embeddings)
    projection = attention.qkv_proj
    query_size = attention.config.num_attention_heads * attention.head_dim
    # reading the weight past the module spares the queries; adapters and quantised layers are asked for everything
    if type(projection) is nn.Linear and are_plain([projection], [projection.weight]):
        projected = F.linear(inputs, projection.weight[query_size:])
    else:
        projected = projection(inputs)[..., query_size:]
    projected = projected.unflatten(-1, (2, -1, attention.head_dim)).permute(2, 0, 3, 1, 4)
    keys, values = projected.unbind(0)
    # turned with keys in the queries' place too, for lack of queries
    keys = apply_rotary_pos_emb(keys, keys, *position_embeddings)[1]
    if left_out:
        keys, values = (
            part.new_zeros(batch_size, *part.shape[1:]).index_copy(0, rows, part) for part in (keys, values)
        )
    return keys, values


class CacheOfRows:
    """
    Stands in for the cache where one layer's attention computes some rows of the batch only: what it writes is put
    together with the other rows' keys and values, what it is given back are its own rows'.

    Args:
        cache: the cache.
        rows: those that the attention computes.
        others: keys and values of all rows, [B, heads, 1, head_dim] each; right for all but `rows`.
    """

    def __init__(self, cache, rows: list[int], others: tuple[torch.Tensor, torch.Tensor]):
        self.cache, self.rows, self.others = cache, rows, others

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_index: int, *args, **kwargs):
        """As the cache's method, for keys and values [rows, heads, 1, head_dim]."""
        rows = torch.tensor(self.rows, device=keys.device)
        whole = (other.index_copy(0, rows, part) for other, part in zip(self.others, (keys, values), strict=True))
        return tuple(part[rows] for part in self.cache.update(*whole, layer_index, *args, **kwargs))
