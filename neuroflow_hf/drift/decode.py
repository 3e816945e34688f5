"""
Many prompts continued at once, greedily or along given tokens, one token at a time through a cache of their own.

Rows are padded on the left. Dense and bypassed runs never share a cache: every call makes its own, and drops it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from ..language.bypass_config import NEVER, NeuroFlowBypassConfig
from ..language.bypass_state import find_state
from .metrics import (
    PromptRecord,
    compare_steps,
    cut_at_end,
    first_divergence,
    negative_log_likelihood,
    position_drift,
)

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


@dataclass
class DenseAnswer:
    """
    What the dense model made of a prompt.

    Args:
        tokens: its greedy text, the end token included.
        logits: [n, V], float32 on the CPU, for each of them.
        nll: minus the log-probability, in nats, of the tokens of the prompt's second half, together.
    """

    tokens: list[int]
    logits: torch.Tensor
    nll: float = 0.0


class DriftBench:
    """
    Prompts, the dense model's answers to them, and measurements against those.

    Three runs for each measurement, each with caches of its own: free greedy generation; dense's text fed token by
    token (teacher forcing); and the second half of each prompt fed token by token, for perplexity on a text that no
    model wrote. Prompts are fed in one piece and so are dense; what counts is what follows.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        rows: token ids of each prompt, at least one.
        tasks: what each prompt is counted under.
        new_tokens: generated after each prompt.
        batch_size: prompts at once. More is faster; the logits of a batch, `batch_size * new_tokens * V` floats, and
            those of dense for all prompts, have to fit into memory.
        ends: tokens that end a text.
    """

    def __init__(
        self,
        model,
        rows: Sequence[Sequence[int]],
        tasks: Sequence[str],
        new_tokens: int = 64,
        batch_size: int = 64,
        ends: Collection[int] = (),
    ):
        self.model, self.rows, self.tasks = model, rows, tasks
        self.new_tokens, self.batch_size, self.ends = new_tokens, batch_size, ends
        self.dense: list[DenseAnswer] = [None] * len(rows)
        for batch in make_batches(rows, batch_size):
            kept: list[torch.Tensor] = []
            free = decode(model, batch, new_tokens, ends=ends, on_logits=lambda _, x, kept=kept: kept.append(x.cpu()))
            logits = torch.stack(kept, dim=1).float()
            scores = self.score(model, batch.places, False)
            for row, place in enumerate(batch.places):
                tokens = cut_at_end(free.tokens[row].tolist(), ends)
                self.dense[place] = DenseAnswer(tokens, logits[row, : len(tokens)].clone(), scores[row])

    def complete(self, options: dict | bool) -> NeuroFlowBypassConfig | bool:
        """Options that are all of it, so that none of the model's configuration's own come in; False for dense."""
        if options is False:
            return False
        return NeuroFlowBypassConfig.from_options(options).resolve(self.model.config.num_hidden_layers)

    def halves(self, place: int) -> tuple[list[int], list[int]]:
        """A prompt's first half, at least a token, and the rest."""
        row = list(self.rows[place])
        middle = max(1, len(row) // 2)
        return row[:middle], row[middle:]

    def scored_tokens(self, place: int) -> int:
        """How many of a prompt's tokens are predicted by a step that a bypass acts on."""
        return max(0, len(self.halves(place)[1]) - 1)

    def score(self, model, places: Sequence[int], bypass: dict | bool) -> list[float]:
        """
        What the second half of these prompts costs, in nats, fed token by token: its first token excepted, which a
        dense forward of the first half predicts in any case.
        """
        halves = [self.halves(place) for place in places]
        steps = max(len(rest) for _, rest in halves)
        if steps < 2:
            return [0.0] * len(halves)
        (batch,) = make_batches([first for first, _ in halves], len(halves))
        forced = pad_right([halves[place][1] for place in batch.places], steps)
        valid = torch.tensor([len(halves[place][1]) for place in batch.places])
        sums = torch.zeros(len(halves), dtype=torch.float64)

        def add(step: int, logits: torch.Tensor):
            if step:
                costs = negative_log_likelihood(logits, forced[:, step].to(logits.device)).cpu()
                sums.add_(torch.where(step < valid, costs, 0.0))

        decode(model, batch, steps, bypass, forced, on_logits=add)
        found = [0.0] * len(halves)
        for row, place in enumerate(batch.places):
            found[place] = sums[row].item()
        return found

    def force(self, model, batch: Batch, bypass: dict | bool) -> tuple[torch.Tensor, Decoded]:
        """Feed dense's texts: the logits for each token, [B, n, V], float32 on the CPU, and the run."""
        texts = [self.dense[place].tokens for place in batch.places]
        steps = max(map(len, texts))
        kept: list[torch.Tensor] = []
        run = decode(
            model, batch, steps, bypass, pad_right(texts, steps), on_logits=lambda _, x: kept.append(x.float().cpu())
        )
        return torch.stack(kept, dim=1), run

    def measure(
        self, bypass: dict | bool, model=None, batch_size: int | None = None, padding: int = 0
    ) -> list[PromptRecord]:
        """
        One configuration against dense, prompt by prompt.

        Args:
            bypass: options of [`NeuroFlowBypassConfig`]; False for dense, as for the noise floor.
            model: another model than dense's, such as a copy of another dtype.
            batch_size, padding: another shape than dense's: prompts at once, and positions of padding before each.
        """
        model = self.model if model is None else model
        bypass = self.complete(bypass)
        records: list[PromptRecord] = [None] * len(self.rows)
        for batch in make_batches(self.rows, batch_size or self.batch_size, padding):
            free = decode(model, batch, self.new_tokens, bypass, ends=self.ends)
            logits, forced = self.force(model, batch, bypass)
            scores = self.score(model, batch.places, bypass)
            for row, place in enumerate(batch.places):
                record = self.compare_texts(place, row, free)
                self.compare_logits(record, place, row, logits[row], forced)
                record.nll = scores[row]
                records[place] = record
        return records

    def compare_texts(self, place: int, row: int, free: Decoded) -> PromptRecord:
        """The record of a prompt, with what its freely generated text says."""
        dense = self.dense[place]
        tokens = cut_at_end(free.tokens[row].tolist(), self.ends)
        first = first_divergence(dense.tokens, tokens)
        record = PromptRecord(
            self.tasks[place],
            drift=position_drift(dense.tokens, tokens),
            first_divergence=first,
            scored_tokens=self.scored_tokens(place),
            dense_nll=dense.nll,
            steps=len(tokens) - 1,  # the last token is not fed
        )
        if first is not None:  # not past dense's text: texts of one length limit differ inside, or one ended earlier
            leading = dense.logits[first].topk(2).values
            record.margin = (leading[0] - leading[1]).item()
        if free.bypassed is not None:
            record.bypassed = int(free.bypassed[row, : record.steps].sum())
            similarity = free.similarity[row, : record.steps]
            record.similarity = similarity[~similarity.isnan()].tolist()
        return record

    def compare_logits(self, record: PromptRecord, place: int, row: int, logits: torch.Tensor, forced: Decoded):
        """Add to a record what teacher forcing says, from logits [n, V]."""
        dense = self.dense[place].logits
        # the first follows from the prompt, which is fed densely in any case
        found = compare_steps(dense[1:], logits[1 : len(dense)])
        record.forced_steps = len(dense) - 1
        record.forced_divergent = int((~found.same_top1).sum())
        record.kl = found.kl.tolist()
        bypassed = torch.zeros(record.forced_steps, dtype=torch.bool)
        if forced.bypassed is not None:
            bypassed = forced.bypassed[row, : record.forced_steps]
        record.entropy_bypassed = found.entropy[bypassed].tolist()
        record.entropy_computed = found.entropy[~bypassed].tolist()

    def similarity(self, gate_layer: int) -> list[float]:
        """Similarities of a gate layer along dense's texts, with nothing bypassed."""
        layers = self.model.config.num_hidden_layers
        cache_layer = gate_layer + 1 if gate_layer + 1 < layers else 0
        options = self.complete({"gate_layer": gate_layer, "cache_layers": [cache_layer], "threshold": NEVER})
        values: list[float] = []
        for batch in make_batches(self.rows, self.batch_size):
            _, run = self.force(self.model, batch, options)
            for row, place in enumerate(batch.places):
                found = run.similarity[row, : len(self.dense[place].tokens) - 1]
                values += found[~found.isnan()].tolist()
        return values

    def time_steps(self, bypass: dict, prompts: int = 9) -> list[tuple[float, float]]:
        """
        Milliseconds of a token, dense and bypassed in turn, one prompt at a time: a pair for each of the first
        `prompts`, and one before them that is not kept, for warming up.
        """
        pairs, bypass = [], self.complete(bypass)
        for place in [0, *range(min(prompts, len(self.rows)))]:
            (batch,) = make_batches([self.rows[place]], 1)
            times = []
            for options in (False, bypass):
                started = time.perf_counter()
                run = decode(self.model, batch, self.new_tokens, options)
                times.append(1e3 * (time.perf_counter() - started) / run.tokens.shape[1])
            pairs.append(tuple(times))
        return pairs[1:]
