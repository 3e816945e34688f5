"""
Continue batches of prompts, and compare a bypass with the dense model on them.

Rows are padded on the left. Each row of a batch bypasses on its own, so its text is the same as alone, up to rounding.
Do not take times from batches: a layer's weights are read as soon as one row needs them.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache

from ..language.bypass import entropy_of
from ..language.bypass_config import NeuroFlowBypassConfig
from ..language.bypass_state import find_state
from ..language.calibration import PADDING, cut_at_end, gate_similarities, padded_left
from .metrics import PromptRecord, compare_steps, first_divergence, negative_log_likelihood, position_drift

FED_WITH_BYPASS = 2  # prompt tokens: a step of several is dense, and the gate compares the next one with its last


@dataclass
class Batch:
    """Prompts that are decoded together."""

    indices: list[int]  # of the prompts, [B]
    ids: torch.Tensor  # int64 [B, T], padded on the left
    mask: torch.Tensor  # int64 [B, T], 0 for padding
    cache: Cache | None = None  # of the first positions, fed densely; copied by each run
    opening: "Batch | None" = None  # the prompts without the tokens that are scored


@dataclass
class Decoded:
    """What a batch was decoded to: B rows of n new tokens, on the CPU."""

    tokens: torch.Tensor  # int64 [B, n]; what follows a row's end token is padding
    bypassed: torch.Tensor  # bool [B, n - 1], whether layers were bypassed at the steps that fed tokens 0 to n - 2


def make_batches(
    rows: Sequence[Sequence[int]],
    batch_size: int,
    padding: int = 0,
    indices: Iterable[int] | None = None,
    scored: int = 0,
) -> list[Batch]:
    """
    Batches of at most `batch_size` rows of similar length (of all rows, or those at `indices`), each row with at least
    `padding` padded positions. Their openings are without the last `scored` tokens and the one before them, which is
    predicted by the part that is fed densely.
    """
    order = sorted(range(len(rows)) if indices is None else indices, key=lambda index: len(rows[index]))
    batches = []
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        ids, mask = padded_left([rows[index] for index in chosen])
        ids, mask = pad(ids, (padding, 0), value=PADDING), pad(mask, (padding, 0))
        opening = Batch(chosen, ids[:, : -1 - scored], mask[:, : -1 - scored])
        batches.append(Batch(chosen, ids, mask, opening=opening))
    return batches


def decode(
    model: Any,
    batch: Batch,
    steps: int,
    bypass: dict | bool = False,
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ends: Collection[int] = (),
) -> Decoded:
    """
    Continue the prompts by up to `steps` tokens, one by one, the most probable ones. The last token is not fed.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`]. Its own bypass options are not used.
        steps: number of new tokens, at least 1.
        bypass: options of [`NeuroFlowBypassConfig`]; False for dense.
        processor: a logits processor, which sees the logits of every step and may change them.
        ends: end tokens; decoding stops once every row has one.
    """
    if bypass is not False:
        bypass = NeuroFlowBypassConfig.from_options(bypass).resolve(model.config.num_hidden_layers)
    output = model.generate(
        batch.ids.to(model.device),
        attention_mask=batch.mask.to(model.device),
        past_key_values=copy.deepcopy(batch.cache),
        max_new_tokens=steps,
        logits_processor=[] if processor is None else [processor],
        eos_token_id=sorted(ends) or [model.config.vocab_size],  # which no token is
        pad_token_id=PADDING,
        do_sample=False,
        num_beams=1,
        bypass=bypass,
        return_dict_in_generate=True,
    )
    tokens, state = output.sequences[:, batch.ids.shape[1] :].cpu(), find_state(output.past_key_values)
    bypassed = torch.zeros(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)
    if state is not None and bypassed.numel():
        bypassed = state.statistics().bypassed_mask[:, -bypassed.shape[1] :].cpu()
    return Decoded(tokens, bypassed)


@torch.inference_mode()
def feed_densely(model: Any, batch: Batch):
    """Store in a batch and its opening the cache of the positions that every run feeds densely, to continue from."""
    cache, first = None, 0
    positions = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
    for part in (batch.opening, batch):
        last = part.ids.shape[1] - FED_WITH_BYPASS
        if last > first:
            ids, mask, places = batch.ids[:, first:last], batch.mask[:, :last], positions[:, first:last]
            how = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1, "bypass": False}
            ids, mask, places = (tensor.to(model.device) for tensor in (ids, mask, places))
            cache = model(input_ids=ids, attention_mask=mask, position_ids=places, **how).past_key_values
            part.cache, first = copy.deepcopy(cache), last


def keep_confidence(steps: list[torch.Tensor], ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Append margin and entropy, [B, 2], of a step's logits [B, V] to `steps`; returns the logits."""
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    steps.append(torch.stack([first - second, entropy_of(logits)], dim=-1).cpu())
    return logits


@dataclass
class DenseAnswer:
    """The dense model's answer to a prompt."""

    tokens: list[int]  # its greedy text, including the end token
    margins: list[float]  # between the two highest logits, for each of these tokens
    entropies: list[float]  # of the distribution, in nats, for each of these tokens
    logits: torch.Tensor  # [n, V], float32 on the CPU, for the prompt's last n tokens


class DriftBench:
    """
    Prompts, the dense model's answers to them, and measurements against these answers.

    A measurement decodes twice: greedily after the whole prompt, and along the prompt's last tokens (teacher forcing),
    for perplexity and divergence. The tokens before these are fed once, densely; every run continues from a copy of
    the cache.

    Memory has to hold the dense cache of all prompts twice, and the dense logits of the scored tokens,
    `forced_tokens * V` floats for each prompt.

    Args:
        rows: token ids of each prompt, at least one.
        forced_tokens: how many tokens at the end of each prompt are scored; every prompt has to have 2 more. 0: none.
        ends: end tokens.
        on_prompts: called after each batch with the number of prompts finished, here and in `measure`.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Sequence[int]],
        tasks: Sequence[str],
        new_tokens: int,
        forced_tokens: int,
        batch_size: int,
        ends: Collection[int] = (),
        on_prompts: Callable[[int], object] = lambda done: None,
    ):
        self.model, self.rows, self.tasks = model, rows, tasks
        self.new_tokens, self.forced_tokens, self.batch_size, self.ends = new_tokens, forced_tokens, batch_size, ends
        self.batches = make_batches(rows, batch_size, scored=forced_tokens)
        self.dense: dict[int, DenseAnswer] = {}  # by the index of the prompt
        for batch in self.batches:
            feed_densely(model, batch)
            confidence: list[torch.Tensor] = []  # margin and entropy, [B, 2] for each step
            free = decode(model, batch, new_tokens, False, functools.partial(keep_confidence, confidence), ends)
            logits = self.force(model, batch, False)
            for row, index in enumerate(batch.indices):
                tokens = cut_at_end(free.tokens[row].tolist(), ends)
                margins, entropies = torch.stack(confidence[: len(tokens)])[:, row].T.tolist()
                self.dense[index] = DenseAnswer(tokens, margins, entropies, logits[row])
            on_prompts(len(self.dense))

    def force(self, model, batch: Batch, bypass: dict | bool) -> torch.Tensor:
        """The logits [B, n, V] that predict the n scored tokens, each after the true ones (teacher forcing)."""
        if not self.forced_tokens:
            return torch.zeros(len(batch.indices), 0, 1)
        tokens = batch.ids[:, batch.opening.ids.shape[1] :]
        steps: list[torch.Tensor] = []  # float32 [B, V] each, on the CPU

        def choose(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            token = tokens[:, len(steps), None].to(logits.device)
            steps.append(logits.cpu())
            return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

        decode(model, batch.opening, tokens.shape[1], bypass, choose)
        return torch.stack(steps, dim=1)[:, 1:]

    def measure(
        self,
        bypass: dict | bool,
        model=None,
        batches: Sequence[Batch] | None = None,
        on_prompts: Callable[[int], object] = lambda done: None,
    ) -> list[PromptRecord]:
        """
        Compare one configuration, options of [`NeuroFlowBypassConfig`] or False for dense, with dense on each prompt,
        in their order. `model` may be a copy in another dtype, and `batches`, of `make_batches`, of another size or of
        some prompts.
        """
        model, records = model or self.model, {}
        for batch in self.batches if batches is None else batches:
            free = decode(model, batch, self.new_tokens, bypass, ends=self.ends)
            logits = self.force(model, batch, bypass)
            for row, index in enumerate(batch.indices):
                records[index] = self.compare(index, row, free, logits[row])
            on_prompts(len(records))
        return [records[index] for index in sorted(records)]

    def compare(self, index: int, row: int, free: Decoded, logits: torch.Tensor) -> PromptRecord:
        """Compare a prompt with dense, from its row in a greedy run, and logits [n, V] along the prompt's end."""
        dense, labels = self.dense[index], torch.tensor(self.rows[index][len(self.rows[index]) - len(logits) :])
        tokens = cut_at_end(free.tokens[row].tolist(), self.ends)
        first = first_divergence(dense.tokens, tokens)
        steps = len(tokens) - 1  # the last token is not fed
        differs, kl = compare_steps(dense.logits, logits)
        return PromptRecord(
            self.tasks[index],
            drift=position_drift(dense.tokens, tokens),
            first_divergence=first,
            # always inside the dense text, because both texts end with an end token or are full
            margin=None if first is None else dense.margins[first],
            forced_steps=len(logits),
            forced_divergent=int(differs.sum()),
            kl=kl.tolist(),
            dense_nll=negative_log_likelihood(dense.logits, labels).sum().item(),
            nll=negative_log_likelihood(logits, labels).sum().item(),
            steps=steps,
            bypassed=int(free.bypassed[row, :steps].sum()),
        )

    def similarity(self, gate_layer: int, indices: Sequence[int]) -> list[tuple[float, float]]:
        """
        The gate's similarity at a layer at each step along the dense texts of some prompts, with nothing bypassed, and
        the entropy of the distribution that the fed token was chosen from, which a guard compares.
        """
        values: list[float] = []
        for begin in range(0, len(indices), self.batch_size):
            chosen = indices[begin : begin + self.batch_size]
            fed = [self.dense[index].tokens[:-1] for index in chosen]  # the last token is not
            rows = [[*self.rows[index], *tokens] for index, tokens in zip(chosen, fed, strict=True)]
            values += gate_similarities(self.model, rows, list(map(len, fed)), gate_layer)
        entropies = [entropy for index in indices for entropy in self.dense[index].entropies[:-1]]
        return list(zip(values, entropies, strict=True))
