"""
Decode batches of prompts token by token, and compare a bypass with the dense model on them.

Rows are padded on the left. Dense and bypassed runs never share a cache: every call of `decode` makes its own.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..language.bypass_config import NeuroFlowBypassConfig
from ..language.bypass_state import find_state
from ..language.calibration import PADDING, cut_at_end, gate_similarities
from ..utils.jobs import timed
from .metrics import (
    PromptRecord,
    compare_steps,
    first_divergence,
    negative_log_likelihood,
    position_drift,
)


@dataclass
class Batch:
    """Prompts that are decoded together."""

    indices: list[int]  # of the prompts, [B]
    ids: torch.Tensor  # int64 [B, T], padded on the left
    mask: torch.Tensor  # int64 [B, T], 0 for padding


@dataclass
class Decoded:
    """What a batch was decoded to: B rows of n new tokens, on the CPU."""

    tokens: torch.Tensor  # int64 [B, n]; rows continue past their end token
    similarity: torch.Tensor  # float32 [B, n - 1], the gate's, at the steps that fed tokens 0 to n - 2; NaN if dense
    bypassed: torch.Tensor  # bool [B, n - 1], whether layers were bypassed at these steps
    kept: torch.Tensor | None  # [B, n, ...], what `keep` returned


def make_batches(rows: Sequence[Sequence[int]], batch_size: int, padding: int = 0) -> list[Batch]:
    """Batches of at most `batch_size` rows of similar length, each row with at least `padding` padded positions."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = []
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        texts = [torch.tensor(rows[index]) for index in indices]
        ids, mask = (
            pad(pad_sequence(part, True, value, padding_side="left"), (padding, 0), value=value)
            for part, value in ((texts, PADDING), ([torch.ones_like(text) for text in texts], 0))
        )
        batches.append(Batch(indices, ids, mask))
    return batches


@torch.inference_mode()
def decode(
    model,
    batch: Batch,
    steps: int,
    bypass: dict | bool = False,
    forced: torch.Tensor | None = None,
    ends: Collection[int] = (),
    keep: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> Decoded:
    """
    Feed the prompts, then up to `steps` new tokens one by one. The last token is not fed.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`]. Its own bypass options play no part.
        batch: the prompts.
        steps: number of new tokens, at least 1.
        bypass: options of [`NeuroFlowBypassConfig`]; False for dense.
        forced: int64 [B, steps], the tokens to feed (teacher forcing); None for greedy decoding.
        ends: end tokens; greedy decoding stops once every row has one.
        keep: from the number of a new token, from 0, and its logits [B, V] to what to keep of them, [B, ...].

    Raises:
        ValueError: for a model with long RoPE, if the lengths of texts are on both sides of its switch.
    """
    if bypass is not False:
        bypass = NeuroFlowBypassConfig.from_options(bypass).resolve(model.config.num_hidden_layers)
    require_one_rope(model.config, batch.mask.sum(dim=1).tolist(), steps)
    device = model.device
    mask = batch.mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": batch.ids.to(device), "attention_mask": mask, "position_ids": positions}
    output = model(**inputs, use_cache=True, logits_to_keep=1, bypass=bypass)
    end_ids = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    done = torch.zeros(len(mask), dtype=torch.bool, device=device)
    position, tokens, kept = positions[:, -1:], [], []
    for step in range(steps):
        logits = output.logits[:, -1]
        if keep is not None:
            kept.append(keep(step, logits))
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
    similarity = torch.full((len(mask), len(tokens) - 1), torch.nan)
    bypassed = torch.zeros(similarity.shape, dtype=torch.bool)
    state = find_state(output.past_key_values)
    if state is not None:
        statistics, first = state.statistics(), batch.ids.shape[1]
        similarity = statistics.similarity[:, first:].float().cpu()
        bypassed = statistics.bypassed_mask[:, first:].cpu()
    return Decoded(torch.stack(tokens, dim=1).cpu(), similarity, bypassed, torch.stack(kept, dim=1) if kept else None)


def keep_logits(step: int, logits: torch.Tensor) -> torch.Tensor:
    """All logits, in float32 on the CPU; for `decode`."""
    return logits.float().cpu()


def require_one_rope(config, lengths: Sequence[int], steps: int):
    """
    Raise a ValueError if long RoPE switches its factors among these prompt lengths and new tokens. At the switch,
    transformers feeds a text again, which a batch of rows that reach it at different steps cannot follow.
    """
    switch = config.original_max_position_embeddings
    is_long = config.rope_parameters["rope_type"] == "longrope"
    longest = max(lengths) + steps - 1  # the last token is not fed
    if is_long and min(lengths) <= switch < longest:
        raise ValueError(
            f"Long RoPE switches its factors after {switch} tokens, and the texts have {min(lengths)} to {longest}. "
            f"Use prompts that stay within {switch} tokens with their new tokens, or prompts that are all longer."
        )


@dataclass
class DenseAnswer:
    """The dense model's answer to a prompt."""

    tokens: list[int]  # its greedy text, including the end token
    logits: torch.Tensor  # [n, V], float32 on the CPU, for each of these tokens
    nll: float  # total negative log-likelihood, in nats, of the prompt's second half


class DriftBench:
    """
    Prompts, the dense model's answers to them, and measurements against these answers.

    A measurement decodes three times: greedily, along the dense text (teacher forcing), and along the second half of
    each prompt, for the perplexity. Prompts are fed in one piece, and so densely: a bypass acts on the steps after
    them.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        rows: token ids of each prompt, at least one.
        tasks: the task of each prompt.
        new_tokens: number of tokens to generate after each prompt.
        batch_size: prompts at once. Memory has to hold the logits of a batch, `batch_size * new_tokens * V` floats,
            and the dense logits of all prompts.
        ends: end tokens.
        on_prompts: called after each batch with the number of prompts finished.
    """

    def __init__(
        self,
        model,
        rows: Sequence[Sequence[int]],
        tasks: Sequence[str],
        new_tokens: int = 64,
        batch_size: int = 64,
        ends: Collection[int] = (),
        on_prompts: Callable[[int], None] = lambda done: None,
    ):
        self.model, self.rows, self.tasks = model, rows, tasks
        self.new_tokens, self.batch_size, self.ends, self.on_prompts = new_tokens, batch_size, ends, on_prompts
        middles = [max(1, len(row) // 2) for row in rows]
        self.halves = [(list(row[:at]), list(row[at:])) for row, at in zip(rows, middles, strict=True)]
        self.dense: list[DenseAnswer] = [None] * len(rows)
        for batch in self.batches():
            free = decode(model, batch, new_tokens, ends=ends, keep=keep_logits)
            scores = self.score(model, batch.indices, False)
            for row, index in enumerate(batch.indices):
                tokens = cut_at_end(free.tokens[row].tolist(), ends)
                self.dense[index] = DenseAnswer(tokens, free.kept[row, : len(tokens)].clone(), scores[row])

    def batches(self, batch_size: int | None = None, padding: int = 0) -> Iterator[Batch]:
        """Yield the prompts in batches, and report each batch as finished when the next one is asked for."""
        done = 0
        for batch in make_batches(self.rows, batch_size or self.batch_size, padding):
            yield batch
            done += len(batch.indices)
            self.on_prompts(done)

    def score(self, model, indices: Sequence[int], bypass: dict | bool) -> list[float]:
        """
        Negative log-likelihood, in nats, of the second halves of a batch's prompts, fed token by token, without their
        first token, which the dense forward of the first half predicts.
        """
        # a batch is in order of length, so `make_batches` keeps its order
        (batch,) = make_batches([self.halves[index][0] for index in indices], len(indices))
        texts = [torch.tensor(self.halves[index][1], dtype=torch.int64) for index in indices]
        forced = pad_sequence(texts, True, PADDING)
        if forced.shape[1] < 2:
            return [0.0] * len(texts)

        def keep(step: int, logits: torch.Tensor) -> torch.Tensor:
            return negative_log_likelihood(logits, forced[:, step].to(logits.device)).cpu()

        run = decode(model, batch, forced.shape[1], bypass, forced, keep=keep)
        return [costs[1 : len(text)].sum().item() for costs, text in zip(run.kept, texts, strict=True)]

    def force(self, model, batch: Batch, bypass: dict | bool) -> Decoded:
        """Decode along the dense texts, and keep the logits."""
        forced = pad_sequence([torch.tensor(self.dense[index].tokens) for index in batch.indices], True, PADDING)
        return decode(model, batch, forced.shape[1], bypass, forced, keep=keep_logits)

    def measure(
        self, bypass: dict | bool, model=None, batch_size: int | None = None, padding: int = 0
    ) -> list[PromptRecord]:
        """
        Compare one configuration with dense on each prompt.

        Args:
            bypass: options of [`NeuroFlowBypassConfig`]; False for dense, to measure the noise floor.
            model: another model, such as a copy in another dtype; default: the dense one.
            batch_size, padding: another batch size, and a number of padded positions before each prompt.
        """
        model = self.model if model is None else model
        records: list[PromptRecord] = [None] * len(self.rows)
        for batch in self.batches(batch_size, padding):
            free = decode(model, batch, self.new_tokens, bypass, ends=self.ends)
            forced = self.force(model, batch, bypass)
            scores = self.score(model, batch.indices, bypass)
            for row, index in enumerate(batch.indices):
                records[index] = self.compare(index, row, free, forced)
                records[index].nll = scores[row]
        return records

    def compare(self, index: int, row: int, free: Decoded, forced: Decoded) -> PromptRecord:
        """Compare a prompt with dense, from its row in a greedy run and in one along the dense text."""
        dense = self.dense[index]
        tokens = cut_at_end(free.tokens[row].tolist(), self.ends)
        first, margin = first_divergence(dense.tokens, tokens), None
        if first is not None:  # always inside the dense text, because both texts end with an end token or are full
            best, second = dense.logits[first].topk(2).values
            margin = (best - second).item()
        steps, forced_steps = len(tokens) - 1, len(dense.tokens) - 1  # the last token is not fed
        # the prompt, fed densely, predicts the first token
        found = compare_steps(dense.logits[1:], forced.kept[row, 1 : len(dense.tokens)])
        similarity, bypassed = free.similarity[row, :steps], forced.bypassed[row, :forced_steps]
        return PromptRecord(
            self.tasks[index],
            drift=position_drift(dense.tokens, tokens),
            first_divergence=first,
            margin=margin,
            forced_steps=forced_steps,
            forced_divergent=int((~found.same_top1).sum()),
            kl=found.kl.tolist(),
            scored_tokens=max(0, len(self.halves[index][1]) - 1),
            dense_nll=dense.nll,
            steps=steps,
            bypassed=int(free.bypassed[row, :steps].sum()),
            similarity=similarity[~similarity.isnan()].tolist(),
            entropy_bypassed=found.entropy[bypassed].tolist(),
            entropy_computed=found.entropy[~bypassed].tolist(),
        )

    def similarity(self, gate_layer: int) -> list[float]:
        """The gate's similarities at a layer along the dense texts, with nothing bypassed."""
        values: list[float] = []
        for batch in self.batches():
            fed = [self.dense[index].tokens[:-1] for index in batch.indices]  # the last token is not
            rows = [[*self.rows[index], *tokens] for index, tokens in zip(batch.indices, fed, strict=True)]
            values += gate_similarities(self.model, rows, list(map(len, fed)), gate_layer)
        return values

    def time_steps(self, bypass: dict, prompts: int = 9) -> list[tuple[float, float]]:
        """Milliseconds per token, dense and bypassed, a pair for each prompt; prompts run alone, after a warm-up."""
        pairs = []
        for index in [0, *range(min(prompts, len(self.rows)))]:
            (batch,) = make_batches([self.rows[index]], 1)
            times = []
            for options in (False, bypass):
                how = (self.model, batch, self.new_tokens, options)
                run, milliseconds = timed(lambda how=how: decode(*how), self.model.device)
                times.append(milliseconds / run.tokens.shape[1])
            pairs.append(tuple(times))
        return pairs[1:]
