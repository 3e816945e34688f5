"""What the gate of a bypass sees on a checkpoint's own texts, to choose a threshold by."""

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from .bypass import similarity_of
from .bypass_config import NEVER
from .bypass_state import BypassState, find_state

PADDING = 0  # the token at padded positions; masked, or never read


def percentiles(similarity: Sequence[float]) -> list[float]:
    """
    The 101 percentiles of the similarities, from the minimum to the maximum, rounded to 6 digits.

    Raises:
        ValueError: if there are no similarities.
    """
    if not len(similarity):
        raise ValueError(
            "The model ends all of these texts at once, so no step has a similarity. Calibrate on other prompts."
        )
    places = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = torch.as_tensor(similarity, dtype=torch.float64).quantile(places)
    return [round(value, 6) for value in found.tolist()]


@torch.no_grad()
def gate_similarities(
    model: Any, rows: Sequence[Sequence[int]], counts: Sequence[int], gate_layer: int
) -> list[float]:
    """
    The gate's similarities at a layer, along texts in which nothing is bypassed. All texts are fed in one dense
    forward: what the gate compares at a position depends on the text before it alone.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        rows: token ids of each text.
        counts: how many tokens at the end of each text are wanted: those that are fed one by one in a generation.
        gate_layer: the layer.
    """
    ids = pad_sequence([torch.tensor(row) for row in rows], True, PADDING).to(model.device)
    cache_layer = (gate_layer + 1) % model.config.num_hidden_layers
    bypass = {"gate_layer": gate_layer, "cache_layers": [cache_layer], "threshold": NEVER}
    cache = DynamicCache(config=model.config)
    model.base_model(ids, past_key_values=cache, use_cache=True, bypass=bypass)
    outputs = cast(BypassState, find_state(cache)).whole(f"gate.{gate_layer}")
    similarity = similarity_of(outputs[:, 1:], outputs[:, :-1]).tolist()
    return [
        value
        for row, count, values in zip(rows, counts, similarity, strict=True)
        for value in values[max(0, len(row) - 1 - count) : len(row) - 1]
    ]


def end_tokens(model: Any) -> frozenset[int]:
    """The end tokens of the model's generation configuration."""
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def cut_at_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and including the first end token; all of them if there is none."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: end + 1])


def padded_left(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, T] each, of rows that are padded on the left."""
    texts = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(text) for text in texts]
    return pad_sequence(texts, True, PADDING, "left"), pad_sequence(ones, True, 0, "left")


@torch.no_grad()
def continue_densely(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The model's greedy continuation of each prompt (token ids), up to and including its end token."""
    ids, mask = (part.to(model.device) for part in padded_left(prompts))
    how = {"do_sample": False, "num_beams": 1, "pad_token_id": PADDING, "bypass": False}
    output = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **how)
    ends = end_tokens(model)
    return [cut_at_end(tokens, ends) for tokens in output[:, ids.shape[1] :].tolist()]


def dense_similarities(
    model: Any, prompts: Sequence[Sequence[int]], gate_layer: int, max_new_tokens: int
) -> list[float]:
    """The gate's similarities at a layer, along the model's own dense continuations of prompts (token ids)."""
    fed = [tokens[:-1] for tokens in continue_densely(model, prompts, max_new_tokens)]  # the last token is not fed
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, fed, strict=True)]
    return gate_similarities(model, rows, list(map(len, fed)), gate_layer)
