"""
Which attention and MLP parts a model can draft without, and whether that pays: the search behind `neuroflow
tune-drafts`.

A part is left out of the forward. Its damage is how much less probable the dense model's own tokens become. Parts of
a kind take the same time, so the knapsack (the least damage that saves so much time, as in KnapSpec) is exact: the
least harmful parts of each kind, for every number of both.

Each token is drafted from keys and values of the dense model, as the first of a draft is. Later ones see those of the
draft and are kept less often, so that the speeds are upper bounds: what does not pay here, does not pay.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ..language.draft_policy import LENGTHS, best_length, expected_speed
from ..language.few_tokens import linear_layers, turned

SAVINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # shares of the time of all parts
LONGEST = 15  # tokens in a draft
REPEATS = 7  # timings, of which the least counts

Parts = tuple[frozenset[int], frozenset[int]]  # layers whose attention is left out, and whose MLP is


@dataclass(frozen=True)
class Drafter:
    """
    A drafter and what it brings.

    Args:
        attention, mlp: layers without this part.
        cost: time of a draft token in dense steps.
        agreement: share of tokens on which it agrees with the dense model.
        needed: agreement from which a draft of one token pays.
        length: draft tokens at a time that would be fastest; 0 if none pays.
        speed: tokens per time in relation to dense, by that length, at most.
    """

    attention: list[int]
    mlp: list[int]
    cost: float
    agreement: float
    needed: float
    length: int
    speed: float


@contextmanager
def leave_out(model: Any, parts: Parts) -> Iterator[None]:
    """Within the context, these parts add nothing and take no time."""
    changed = [(model.model.layers[layer].self_attn, True) for layer in parts[0]]
    changed += [(model.model.layers[layer].mlp, False) for layer in parts[1]]

    def attention_without(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None

    for module, is_attention in changed:
        module.forward = attention_without if is_attention else torch.zeros_like
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward


@contextmanager
def put_back(cache: DynamicCache) -> Iterator[None]:
    """After the context, the cache is as before: layers replace their tensors on every write."""
    kept = [dict(vars(layer)) for layer in cache.layers]
    try:
        yield
    finally:
        for layer, fields in zip(cache.layers, kept, strict=True):
            vars(layer).update(fields)


class Text:
    """
    A prompt and the dense model's greedy text after it, with the keys and values of both.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        prompt: its tokens.
        new_tokens: tokens to generate.
    """

    def __init__(self, model: Any, prompt: Sequence[int], new_tokens: int):
        ids = torch.tensor([prompt], device=model.device)
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, lossless=True
        )
        self.model, self.expected = model, whole[0, len(prompt) :]  # [n]
        self.fed, count = whole[:, len(prompt) - 1 : -1], len(self.expected)
        self.cache = DynamicCache(config=model.config)
        model(whole[:, :-1], past_key_values=self.cache, use_cache=True, bypass=False, logits_to_keep=1)
        self.positions = torch.arange(len(prompt) - 1, len(prompt) - 1 + count, device=model.device).unsqueeze(0)
        # each token sees the dense model's keys before it, and its own
        before = torch.arange(whole.shape[1] - 1, device=model.device) < self.positions[0].unsqueeze(1)
        own = torch.eye(count, dtype=torch.bool, device=model.device)
        self.mask = torch.cat([before, own], dim=1)[None, None]

    def logits(self, parts: Parts) -> torch.Tensor:
        """The drafter's logits for each generated token, [n, V]."""
        with put_back(self.cache), leave_out(self.model, parts):
            return self.model(
                self.fed,
                position_ids=self.positions,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                bypass=False,
            ).logits[0]

    def seconds(self, count: int, parts: Parts = (frozenset(), frozenset())) -> float:
        """The least processor time of a step of `count` tokens after the text; on an accelerator, of the clock."""
        device, found = self.model.device, []
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        ids, layers = self.fed[:, -1:].expand(1, count), linear_layers(self.model)
        for _ in range(REPEATS):
            with put_back(self.cache), leave_out(self.model, parts), turned(layers, count):
                begun = clock()
                self.model(ids, past_key_values=self.cache, use_cache=True, bypass=False)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                found.append(clock() - begun)
        return min(found)


def damage(texts: Sequence[Text], parts: Parts) -> float:
    """Mean negative log-probability of the dense model's tokens without these parts."""
    rows = [
        torch.nn.functional.cross_entropy(text.logits(parts).float(), text.expected, reduction="none")
        for text in texts
    ]
    return torch.cat(rows).mean().item()


def agreement(texts: Sequence[Text], parts: Parts) -> float:
    """Share of the dense model's tokens that the model without these parts would draft."""
    rows = [text.logits(parts).argmax(dim=-1) == text.expected for text in texts]
    return torch.cat(rows).float().mean().item()


def least_harmful(
    attention: Sequence[float], mlp: Sequence[float], attention_seconds: float, mlp_seconds: float, saving: float
) -> Parts:
    """
    The knapsack: parts whose summed damage is least, among those that save a share of the time of all parts.

    Args:
        attention, mlp: damage of each layer's part.
        attention_seconds, mlp_seconds: time of a part.
        saving: the share.
    """
    by_attention = sorted(range(len(attention)), key=attention.__getitem__)
    by_mlp = sorted(range(len(mlp)), key=mlp.__getitem__)
    wanted = saving * (len(attention) * attention_seconds + len(mlp) * mlp_seconds) * (1 - 1e-9)
    found = []
    for some in range(len(attention) + 1):
        for others in range(len(mlp) + 1):
            if some * attention_seconds + others * mlp_seconds >= wanted:
                total = sum(attention[i] for i in by_attention[:some]) + sum(mlp[i] for i in by_mlp[:others])
                found.append((total, some, others))
                break  # one more only harms
    _, some, others = min(found)
    return frozenset(by_attention[:some]), frozenset(by_mlp[:others])


def judge(texts: Sequence[Text], parts: Parts, checks: dict[int, float]) -> Drafter:
    """
    What a drafter brings on some texts.

    Args:
        checks: seconds of a dense forward by its number of draft tokens; of 0: a dense step.
    """
    steps = {n: seconds / checks[0] for n, seconds in checks.items()}  # in units of a dense step
    draft, agrees = texts[0].seconds(1, parts) / checks[0], agreement(texts, parts)
    length = best_length(agrees, draft, steps.__getitem__, [n for n in steps if n])
    return Drafter(
        attention=sorted(parts[0]),
        mlp=sorted(parts[1]),
        cost=draft,
        agreement=agrees,
        needed=draft + steps[1] - 1,
        length=length,
        speed=expected_speed(agrees, draft, steps.__getitem__, length),
    )


@torch.inference_mode()
def search_drafters(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    on_step: Callable[[str, int, int], object] = lambda *_: None,
) -> dict:
    """
    Search drafters on every other prompt, and judge the fastest on the rest.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        prompts: token ids of at least two prompts.
        new_tokens: how many tokens of each text to draft.
        on_step: called with what is done, how much of it, and the total.

    Returns:
        The measured times, the drafters by the share of time that they save, and the fastest on held-out prompts.

    Raises:
        ValueError: for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise ValueError(f"The file has {len(prompts)} prompt; expected at least two, to hold out half of them.")
    texts = []
    for number, prompt in enumerate(prompts, start=1):
        texts.append(Text(model, prompt, new_tokens))
        on_step("texts", number, len(prompts))
    seen, held_out = texts[::2], texts[1::2]
    layers = range(len(model.model.layers))
    everything = frozenset(layers)
    checks = {count: seen[0].seconds(count + 1) for count in (0, *LENGTHS) if count <= LONGEST}
    none: frozenset[int] = frozenset()
    part_seconds = [
        max(checks[0] - seen[0].seconds(1, parts), 0.0) / len(layers)
        for parts in ((everything, none), (none, everything))
    ]
    harm: list[list[float]] = [[], []]
    for layer in layers:
        harm[0].append(damage(seen, (frozenset([layer]), none)))
        harm[1].append(damage(seen, (none, frozenset([layer]))))
        on_step("parts", layer + 1, len(layers))
    base = damage(seen, (none, none))
    harm = [[value - base for value in values] for values in harm]
    found = []
    for saving in SAVINGS:
        found.append(judge(seen, least_harmful(*harm, *part_seconds, saving), checks))
        on_step("drafters", len(found), len(SAVINGS))
    best = max(found, key=lambda drafter: (drafter.speed, drafter.agreement - drafter.needed))
    last = judge(held_out, (frozenset(best.attention), frozenset(best.mlp)), checks)
    return {
        "seconds": {"dense": checks[0], "attention": part_seconds[0], "mlp": part_seconds[1]},
        "check": {str(count): seconds / checks[0] for count, seconds in checks.items()},
        "damage": {"attention": harm[0], "mlp": harm[1]},
        "drafters": [asdict(drafter) for drafter in found],
        "held_out": asdict(last),
    }
