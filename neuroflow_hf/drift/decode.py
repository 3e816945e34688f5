"""
Many prompts continued at once, greedily or along given tokens, one token at a time through a cache of their own.

Rows are padded on the left. Dense and bypassed runs never share a cache: every call makes its own, and drops it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from ..language.bypass_state import find_state

FILLER = 0  # a token where there is none; masked, or never looked at


@dataclass
class Batch:
    """
    Prompts for one run.

    Args:
        places: which prompts these are, [B].
        ids: int64 [B, T], padded on the left.
        mask: int64 [B, T], 0 for padding.
    """

    places: list[int]
    ids: torch.Tensor
    mask: torch.Tensor


@dataclass
class Decoded:
    """
    What a run gave, of B rows and n new tokens.

    Args:
        tokens: int64 [B, n], on the CPU; rows go on after their end.
        similarity: float32 [B, n - 1] of the gate at the steps that fed tokens 0 to n - 2; None without a bypass.
        bypassed: bool [B, n - 1], whether layers were bypassed then; None without a bypass.
    """

    tokens: torch.Tensor
    similarity: torch.Tensor | None
    bypassed: torch.Tensor | None


def make_batches(rows: Sequence[Sequence[int]], batch_size: int, padding: int = 0) -> list[Batch]:
    """
    Rows of tokens in batches of at most `batch_size`, of like length together, each with at least `padding` positions
    of padding.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    batches = []
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        width = max(len(rows[place]) for place in places) + padding
        ids = torch.full((len(places), width), FILLER)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            count = len(rows[place])
            ids[row, width - count :] = torch.tensor(rows[place])
            mask[row, width - count :] = 1
        batches.append(Batch(places, ids, mask))
    return batches


def pad_right(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Rows of tokens as int64 [B, width], filled up on the right."""
    padded = torch.full((len(rows), width), FILLER)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row[:width], dtype=torch.int64)
    return padded


@torch.inference_mode()
def decode(
    model,
    batch: Batch,
    steps: int,
    bypass: dict | bool = False,
    forced: torch.Tensor | None = None,
    ends: Collection[int] = (),
    on_logits: Callable[[int, torch.Tensor], None] | None = None,
) -> Decoded:
    """
    Feed the prompts, then up to `steps` new tokens one by one; the last of them is not fed.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        batch: the prompts.
        steps: how many new tokens, at least 1.
        bypass: options of [`NeuroFlowBypassConfig`]; False for dense, whatever the configuration says.
        forced: int64 [B, steps], the tokens to feed (teacher forcing); None for the model's first choices.
        ends: tokens that end a text; once all rows have one, no more is fed. Not with `forced`.
        on_logits: called with 0, 1, ... and the logits [B, V] for the new token of that number.
    """
    device = model.device
    mask = batch.mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": batch.ids.to(device), "attention_mask": mask, "position_ids": positions}
    output = model(**inputs, use_cache=True, logits_to_keep=1, bypass=bypass)
    end_ids = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    done = torch.zeros(len(mask), dtype=torch.bool, device=device)
    position, tokens = positions[:, -1:], []
    for step in range(steps):
        logits = output.logits[:, -1]
        if on_logits is not None:
            on_logits(step, logits)
        token = logits.argmax(dim=-1) if forced is None else forced[:, step].to(device)
        tokens.append(token)
        done |= torch.isin(token, end_ids)
        if step + 1 == steps or (forced is None and len(end_ids) and bool(done.all())):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        output = model(
            input_ids=token.unsqueeze(1),
            attention_mask=mask,
            position_ids=position,
            past_key_values=output.past_key_values,
            use_cache=True,
            bypass=bypass,
        )
    similarity = bypassed = None
    state = find_state(output.past_key_values)
    if state is not None:
        statistics = state.statistics()
        first = batch.ids.shape[1]
        similarity = statistics.similarity[:, first:].float().cpu()
        bypassed = statistics.bypassed_mask[:, first:].cpu()
    return Decoded(torch.stack(tokens, dim=1).cpu(), similarity, bypassed)
