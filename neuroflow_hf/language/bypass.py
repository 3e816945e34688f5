"""
One step of a language model with a bypass: the gate's decision, and what the cache layers do with it.

Shapes: B sequences, n new tokens each, D the model's width. Only steps of one token are bypassed. Rows
decide for themselves; where some rows of a batch need a part of a layer, it is computed for all.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, apply_rotary_pos_emb

from .bypass_config import ALWAYS, NeuroFlowBypassConfig
from .bypass_state import BYPASSED, COMPUTED, DENSE, BypassState, find_state
from .plain import are_plain


def similarity_of(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Cosine of two gate outputs, [..., D] each, in float32: [...], within [-1, 1]; NaN if either has NaNs."""
    return F.cosine_similarity(now.float(), before.float(), dim=-1).clamp(-1, 1)


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """Entropy, in nats, of the distribution of logits [..., V]: [...], float32."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).nan_to_num(0.0).sum(dim=-1)


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
        fired (`torch.Tensor`, *optional*): bool [B], the rows that bypass the cache layers; None: none does.
        all_fired (`bool`): whether all do.
        is_decided (`bool`): whether the gate has decided, which is the case after the gate layer.
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
        self.fired: torch.Tensor | None = None
        self.all_fired = False
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
        return ["similarity", "outcome", self.gate_name, *names, *(["entropy"] if options.is_guarded else [])]

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
        if options.guard_entropy is not None:
            fires = fires & (state.last("entropy")[:, 0] <= options.guard_entropy)
        self.records["similarity"] = similarity.unsqueeze(1)
        self.records["outcome"] = torch.where(fires, BYPASSED, COMPUTED).to(torch.uint8).unsqueeze(1)
        self.is_decided = True
        if options.threshold == ALWAYS and options.max_consecutive is None and not options.is_guarded:
            self.fired, self.all_fired = fires, True
        elif options.threshold <= 1:
            count = int(fires.sum())  # the only time that the host waits for the device
            self.fired, self.all_fired = fires if count else None, count == self.shape[0]
            state.count(self.shape[0], count, options.threshold)

    def observe_gate(self, output: torch.Tensor) -> None:
        """Record the gate layer's attention output [B, n, D], and decide by it unless the decision is made."""
        if not self.is_decided:
            self.decide(similarity_of(output[:, 0], self.state.last(self.gate_name)[:, 0]))
        if self.token_mask is not None:  # padding is similar to no token
            output = output.masked_fill(~self.token_mask.unsqueeze(-1), torch.nan)
        if self.options.gate_layer in self.cache_layers and self.options.skips_attention and self.fired is not None:
            # a bypassed gate layer repeats its output, which would stay similar to itself for ever: store NaN
            output = output.masked_fill(self.fired.to(output.device)[:, None, None], torch.nan)
        self.records[self.gate_name] = output

    def compute(self, name: str, part: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """The output [B, n, D] of a part of a cache layer for `inputs`; the last output for the rows that fired."""
        output = self.state.last(name) if self.all_fired else part(inputs)
        if self.fired is not None and not self.all_fired:
            output = torch.where(self.fired.to(output.device)[:, None, None], self.state.last(name), output)
        self.records[name] = output
        return output

    def finish(self, cache: Cache) -> None:
        """Record the step in the cache, whose own layers exist by now."""
        if self.state.first_layer is None:
            self.state.first_layer = cache.layers[0]  # type: ignore[assignment]  # transformers has narrower classes
            cache.layers.append(self.state)  # type: ignore[arg-type]
        if self.options.is_guarded:  # the head overwrites it later
            self.records["entropy"] = torch.full(self.shape, torch.nan, device=self.device)
        self.state.append(self.records)
        self.state.end = cache.get_seq_length()


def record_entropy(state: BypassState, logits: torch.Tensor, logits_to_keep: int | torch.Tensor) -> None:
    """
    Record for the guard the entropy of the head's logits [B, kept, V] of the last step. Positions without logits stay
    NaN; the step after them is computed.
    """
    entropy = state.records["entropy"][-1]
    kept: torch.Tensor | tuple[slice | torch.Tensor, ...]
    if isinstance(logits_to_keep, int):
        kept = (slice(None), slice(-logits_to_keep, None))
    elif logits_to_keep.ndim == 1:
        kept = (slice(None), logits_to_keep)
    elif logits_to_keep.dtype == torch.bool:
        kept = logits_to_keep
    else:
        kept = (torch.arange(len(entropy), device=logits_to_keep.device).unsqueeze(1), logits_to_keep)
    entropy[kept] = entropy_of(logits).to(entropy.device)


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
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: Cache,
    **kwargs: Any,
) -> torch.Tensor:
    """
    Run a Phi-3 decoder layer, [B, n, D] to [B, n, D], as the gate layer, a cache layer, or both.

    Args:
        position_embeddings: cosines and sines, [B or 1, n, head_dim] each.
        kwargs: what the attention takes, too.
    """
    index, options = layer_index(layer), step.options
    is_cache_layer = index in step.cache_layers

    def attend(inputs: torch.Tensor) -> torch.Tensor:
        more = {"position_embeddings": position_embeddings, "past_key_values": past_key_values, **kwargs}
        return layer.self_attn(hidden_states=inputs, **more)[0]

    normed = layer.input_layernorm(hidden)
    if is_cache_layer and options.skips_attention:
        if step.all_fired:
            past_key_values.update(*keys_and_values(layer.self_attn, normed, position_embeddings), index)
        attended = step.compute(f"attention.{index}", attend, normed)
    else:
        attended = attend(normed)
    if index == options.gate_layer:
        step.observe_gate(attended)
    hidden = hidden + layer.resid_attn_dropout(attended)

    normed = layer.post_attention_layernorm(hidden)
    skips_mlp = is_cache_layer and options.skips_mlp
    output = step.compute(f"mlp.{index}", layer.mlp, normed) if skips_mlp else layer.mlp(normed)
    return hidden + layer.resid_mlp_dropout(output)


def layer_index(layer: Phi3DecoderLayer) -> int:
    """A decoder layer's place in the model, which attention modules know (transformers' annotation allows None)."""
    return cast(int, layer.self_attn.layer_idx)


def keys_and_values(
    attention: Phi3Attention, inputs: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keys, rotated by their positions, and values of a Phi-3 attention, [B, heads, 1, head_dim] each, from inputs
    [B, 1, D].
    """
    projection = attention.qkv_proj
    query_size = attention.config.num_attention_heads * attention.head_dim
    # a plain projection can leave the queries out; adapters and quantised layers compute all
    if type(projection) is nn.Linear and are_plain([projection], [projection.weight]):
        projected = F.linear(inputs, projection.weight[query_size:])
    else:
        projected = projection(inputs)[..., query_size:]
    keys, values = projected.unflatten(-1, (2, -1, attention.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    # transformers' function rotates queries and keys: pass the keys as both
    return apply_rotary_pos_emb(keys, keys, *position_embeddings)[1], values
