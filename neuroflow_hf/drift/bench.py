"""Prompts that a dense model has answered, and what a bypass makes of them."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..language.bypass_config import NEVER, NeuroFlowBypassConfig
from .decode import Batch, Decoded, decode, make_batches, pad_right
from .metrics import compare_steps, cut_at_end, first_divergence, negative_log_likelihood, position_drift
from .records import PromptRecord


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
