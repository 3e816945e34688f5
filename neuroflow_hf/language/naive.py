"""
The bypass in plain loops: one sequence, one token and one attention head at a time. Slow, and what the fast path is
tested against. And the length of a draft, outcome by outcome.

Reading this file is the shortest way to learn what the bypass does.
"""

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3ForCausalLM

from .bypass_config import NeuroFlowBypassConfig


def naive_similarity(now: torch.Tensor | None, before: torch.Tensor | None) -> float:
    """Cosine of two gate outputs [D]; NaN if one is missing."""
    if now is None or before is None:
        return math.nan
    dot = sum(a * b for a, b in zip(now.tolist(), before.tolist(), strict=True))
    norms = math.sqrt(sum(a * a for a in now.tolist())) * math.sqrt(sum(b * b for b in before.tolist()))
    return max(-1.0, min(1.0, dot / norms))


def naive_turn(vector: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """A head's query or key [head_dim], rotated by its position: its first entries, as many as there are angles."""
    turned, half = vector.clone(), len(cosines) // 2
    for i in range(half):
        a, b = vector[i], vector[i + half]
        turned[i] = a * cosines[i] - b * sines[i]
        turned[i + half] = b * cosines[i + half] + a * sines[i + half]
    return turned


def naive_best_length(
    acceptance: float, draft_seconds: float, check_seconds: Callable[[int], float], lengths: Iterable[int]
) -> int:
    """`best_length` of the draft policy, by the probability of every number of kept draft tokens."""
    best, most = 0, 1 / check_seconds(0)
    for length in lengths:
        tokens = 0.0
        for kept in range(length + 1):
            rejects_next = 1 if kept == length else 1 - acceptance
            tokens += (kept + 1) * acceptance**kept * rejects_next
        speed = tokens / (length * draft_seconds + check_seconds(length))
        if speed > most:
            best, most = length, speed
    return best


class NaiveBypass:
    """
    One sequence through a language model with a bypass.

    Args:
        model: the model, whose layers are called one by one.
        options: resolved.
    """

    def __init__(self, model: Phi3ForCausalLM, options: NeuroFlowBypassConfig):
        self.model, self.options = model, options
        self.layers = cast(list[Phi3DecoderLayer], list(model.model.layers))
        num_layers = len(self.layers)
        # all of these have one entry per position
        self.keys: list[list[list[torch.Tensor]]] = [[] for _ in range(num_layers)]  # by layer, position, head
        self.values: list[list[list[torch.Tensor]]] = [[] for _ in range(num_layers)]
        self.gate: list[torch.Tensor | None] = []
        self.similarity: list[float] = []
        self.bypassed: list[bool] = []
        self.entropy: list[float] = []  # of the head's prediction
        self.stored: dict[str, list[torch.Tensor]] = {}

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Feed new tokens and return the logits after each of them, [n, V]."""
        start, options = len(self.gate), self.options
        may_bypass = len(tokens) == 1 and start > 0
        similarity, bypasses = math.nan, False
        if may_bypass and options.is_inverted:
            similarity = naive_similarity(self.gate[-1], self.gate[-2] if start > 1 else None)
            bypasses = self.decides(similarity)
        hidden = [self.model.model.embed_tokens.weight[token] for token in tokens]
        for index, layer in enumerate(self.layers):
            is_cache_layer = index in options.layers
            after = []
            for offset, vector in enumerate(hidden):
                reuses = bypasses and is_cache_layer and options.skips_attention
                computed = self.attend(index, layer.input_layernorm(vector), start + offset, reuses)
                attended = self.keep(f"attention.{index}", computed)
                if index == options.gate_layer:
                    if may_bypass and not options.is_inverted:
                        similarity = naive_similarity(attended, self.gate[-1])
                        bypasses = self.decides(similarity)
                    self.gate.append(None if reuses else attended)
                vector = vector + attended
                computed = None
                if not (bypasses and is_cache_layer and options.skips_mlp):
                    computed = layer.mlp(layer.post_attention_layernorm(vector))
                after.append(vector + self.keep(f"mlp.{index}", computed))
            hidden = after
        logits = [self.model.lm_head(self.model.model.norm(vector)) for vector in hidden]
        self.similarity += [similarity] * len(tokens)
        self.bypassed += [bypasses] * len(tokens)
        for scores in logits:
            probabilities = scores.softmax(dim=0).tolist()
            self.entropy.append(-sum(p * math.log(p) for p in probabilities if p > 0))
        return torch.stack(logits)

    def decides(self, similarity: float) -> bool:
        """Whether the step that is being computed bypasses the cache layers."""
        options = self.options
        fires = options.threshold == -1 or similarity >= options.threshold  # False for NaN
        if options.max_consecutive is not None:
            recent = self.bypassed[-options.max_consecutive :]
            fires = fires and not (len(recent) == options.max_consecutive and all(recent))
        if options.guard_entropy is not None:
            fires = fires and self.entropy[-1] <= options.guard_entropy
        return fires

    def keep(self, name: str, output: torch.Tensor | None) -> torch.Tensor:
        """Store and return an output; if it was not computed, that of the position before."""
        positions = self.stored.setdefault(name, [])
        positions.append(positions[-1] if output is None else output)
        return positions[-1]

    def attend(self, index: int, vector: torch.Tensor, position: int, reuses: bool) -> torch.Tensor | None:
        """A position's attention output [D]; None if a stored one is reused. Key and value are written in any case."""
        attention, config = self.layers[index].self_attn, self.model.config
        size, num_heads = attention.head_dim, config.num_attention_heads
        num_keys = config.num_key_value_heads or num_heads
        cosines, sines = self.model.model.rotary_emb(vector.view(1, 1, -1), torch.tensor([[position]]))
        projected = attention.qkv_proj(vector).view(-1, size)
        queries, keys, values = projected.split([num_heads, num_keys, num_keys])
        self.keys[index].append([naive_turn(key, cosines[0, 0], sines[0, 0]) for key in keys])
        self.values[index].append(list(values))
        if reuses:
            return None
        window = config.sliding_window or position + 1
        seen = range(max(0, position + 1 - window), position + 1)
        heads = []
        for head in range(num_heads):
            query = naive_turn(queries[head], cosines[0, 0], sines[0, 0])
            group = head // (num_heads // num_keys)
            scores = torch.stack([query @ self.keys[index][other][group] * attention.scaling for other in seen])
            weights = scores.softmax(dim=0)
            heads.append(
                sum(weight * self.values[index][other][group] for weight, other in zip(weights, seen, strict=True))
            )
        return attention.o_proj(torch.cat(heads))

    def crop(self, length: int) -> None:
        """Forget all positions from `length` on."""
        by_position: list[list] = [*self.keys, *self.values, *self.stored.values()]
        for positions in (*by_position, self.gate, self.similarity, self.bypassed, self.entropy):
            del positions[length:]
