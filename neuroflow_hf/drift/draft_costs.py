"""What drafts cost: the times of verifications by their number of tokens, and of a drafter's token."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import DynamicCache

from ..language.drafter import DrafterState, NeuroFlowDrafter
from ..language.few_tokens import linear_layers, turned

REPEATS = 7  # timings, of which the least counts


def least_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least processor time of a call; on an accelerator, of the clock."""
    cpu, found = device.type == "cpu", []
    clock = time.process_time if cpu else time.perf_counter
    for _ in range(REPEATS):
        begun = clock()
        call()
        if not cpu:
            torch.accelerator.synchronize(device)
        found.append(clock() - begun)
    return min(found)


@torch.inference_mode()
def check_seconds(model: Any, ids: torch.Tensor, counts: Iterable[int], turns: bool = True) -> dict[int, float]:
    """
    Seconds of a dense forward of some tokens after a text.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        ids: int64 [1, T], the text; its last tokens are fed again.
        counts: numbers of tokens.
        turns: whether products may be turned, as in a verification.
    """
    cache, layers = DynamicCache(config=model.config), linear_layers(model) if turns else []
    model(ids, past_key_values=cache, use_cache=True, bypass=False, logits_to_keep=1)
    kept = [dict(vars(layer)) for layer in cache.layers]

    def check(count: int) -> None:
        with turned(layers, count):
            model(ids[:, -count:], past_key_values=cache, use_cache=True, bypass=False)
        for layer, fields in zip(cache.layers, kept, strict=True):  # layers replace their tensors on every write
            vars(layer).update(fields)

    return {count: least_seconds(lambda count=count: check(count), model.device) for count in counts}


@torch.inference_mode()
def draft_seconds(model: Any, drafter: NeuroFlowDrafter, ids: torch.Tensor) -> float:
    """Seconds of a draft token after a text, int64 [1, T]."""
    state = DrafterState(drafter, model)
    state.unread.append(model.model(ids, bypass=False).last_hidden_state[0, :-1])
    tokens = ids[0].tolist()
    state.logits_after(tokens)
    return least_seconds(lambda: state.logits_after(tokens), model.device)
