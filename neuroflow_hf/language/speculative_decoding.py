"""
Greedy generation that checks guesses: one cache, one forward for many tokens, the text of dense greedy generation.

The same loop decodes without guesses, so that what guessing brings can be told from what a lean loop brings.
"""

import time
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .bypass_config import NEVER
from .bypass_state import find_state
from .draft_policy import Drafts
from .layer_skip import LayerChanges
from .lossless_config import NeuroFlowLosslessConfig

OVERHEAD = 0.1  # of a step of drafting, over a dense forward's time: embeddings, head, what is kept and put back


@dataclass
class LosslessCounts:
    """
    What a lossless generation did.

    Args:
        tokens: new tokens.
        checks: dense forwards after the prompt's, each of which gave at least one token.
        drafts: checks with a draft.
        draft_steps: bypassed forwards.
        drafted: tokens guessed, by drafter (`"lookup"`, `"bypass"`).
        accepted: draft tokens that verification kept, by drafter.
    """

    tokens: int = 0
    checks: int = 0
    drafts: int = 0
    draft_steps: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, drafted: int, accepted: int):
        """Count a check, and the draft that it checked."""
        self.checks += 1
        if drafted:
            self.drafts += 1
            self.drafted[source] = self.drafted.get(source, 0) + drafted
            self.accepted[source] = self.accepted.get(source, 0) + accepted


@dataclass
class NeuroFlowLosslessOutput(GenerateDecoderOnlyOutput):
    """
    Output of a lossless generation: that of greedy generation, and

    Args:
        lossless ([`LosslessCounts`]): forwards, and guesses made and accepted.
    """

    lossless: LosslessCounts | None = None


class DecodingState:
    """
    One sequence: its tokens, the model's cache of all but the last, and what a forward over more needs.

    Args:
        model: a `NeuroFlowPhi3ForCausalLM`.
        options: of the lossless generation.
        input_ids: [1, T], or [1, 0] where the prompt comes as embeddings.
        model_kwargs: of `generate`: cache, attention mask, positions, embeddings.
    """

    def __init__(self, model, options: NeuroFlowLosslessConfig, input_ids: torch.Tensor, model_kwargs: dict):
        self.model, self.options, self.device = model, options, input_ids.device
        self.tokens: list[int] = input_ids[0].tolist()
        self.cache = model_kwargs["past_key_values"]
        self.embeds = model_kwargs.get("inputs_embeds")
        mask = model_kwargs.get("attention_mask")  # transformers 5.17 passes one where nothing is padded, too
        self.attention_mask = None if mask is None or mask.all() else mask
        self.position_ids = model_kwargs.get("position_ids")
        self.first_position = 0  # of the cache's first entry; negative with padding on the left
        self.draft_bypass = self.check_bypass = False
        self.changes, self.drafting_share = None, 1.0
        if options.bypasses:
            bypass = options.draft_bypass(model.config.num_hidden_layers)
            if bypass.passes_over_layers:
                self.changes = LayerChanges(bypass.cache_layers, options.reuse)
                self.drafting_share -= len(bypass.cache_layers) / model.config.num_hidden_layers
            else:
                self.draft_bypass = bypass
                self.check_bypass = replace(bypass, threshold=NEVER)  # remembers what drafts will reuse
        # Phi-3 with long RoPE turns all keys anew once a text gets longer than this
        turns = model.config.rope_parameters["rope_type"] == "longrope" and self.embeds is None
        self.reprefill_after = model.config.original_max_position_embeddings if turns else None

    def forward(self, inputs: dict, keep: int, bypass) -> torch.Tensor:
        """The logits of the last `keep` tokens fed, [keep, V]."""
        if self.changes is not None:
            self.changes.begin()
            inputs["bypass_step"] = self.changes
        output = self.model(
            past_key_values=self.cache, use_cache=True, logits_to_keep=keep, bypass=bypass, return_dict=True, **inputs
        )
        return output.logits[0]

    def feed_prompt(self, is_whole: bool) -> torch.Tensor:
        """
        Feed the prompt; the logits after it, [1, V].

        Args:
            is_whole: whether the tokens or embeddings include what a continued cache holds already.
        """
        held = self.cache.get_seq_length()
        start = held if is_whole else 0
        if held > start:
            self.reprefill_after = None  # what the cache holds cannot be fed anew
        if self.embeds is None:
            inputs = {"input_ids": torch.tensor([self.tokens[start:]], device=self.device)}
            count = len(self.tokens) - start
        else:
            inputs = {"inputs_embeds": self.embeds[:, start:]}
            count = inputs["inputs_embeds"].shape[1]
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids[:, -count:]
            self.first_position = int(self.position_ids[0, -1]) - (held + count - 1)
        return self.forward(inputs, 1, self.check_bypass)

    def feed(self, tokens: list[int], keep: int, bypass) -> torch.Tensor:
        """Feed tokens after what the cache holds; the logits after the last `keep` of them, [keep, V]."""
        start, count = self.cache.get_seq_length(), len(tokens)
        inputs = {"input_ids": torch.tensor([tokens], device=self.device)}
        if self.first_position:
            positions = torch.arange(start, start + count, device=self.device) + self.first_position
            inputs["position_ids"] = positions.clamp(min=0).unsqueeze(0)
        if self.attention_mask is not None:
            ones = self.attention_mask.new_ones(1, start + count - self.attention_mask.shape[1])
            inputs["attention_mask"] = torch.cat([self.attention_mask, ones], dim=1)
        return self.forward(inputs, keep, bypass)

    @property
    def needs_reprefill(self) -> bool:
        """Whether the next forward has to begin anew, with all tokens."""
        if self.reprefill_after is None:
            return False
        return self.cache.get_seq_length() <= self.reprefill_after < len(self.tokens)

    def most_drafted(self, max_length: int) -> int:
        """How many tokens may be drafted: one more comes by itself, and all are turned alike."""
        limit = max_length - len(self.tokens) - 1
        if self.needs_reprefill:
            return 0
        if self.reprefill_after is not None and len(self.tokens) <= self.reprefill_after:
            limit = min(limit, self.reprefill_after - len(self.tokens))
        return limit

    def draft(self, token: int, length: int, choose, ends: set[int]) -> list[int]:
        """
        Up to `length` tokens that the bypassed model would have follow `token`. The cache is left as it was.

        Args:
            choose: `(logits [1, V], drafted so far) -> token`.
            ends: tokens after which nothing follows.
        """
        drafted: list[int] = []
        # layers write by putting new tensors in the place of old ones, so the old ones are all there is to keep
        kept = [dict(vars(layer)) for layer in self.cache.layers]
        if self.changes is not None:
            self.changes.is_drafting = True
        while len(drafted) < length:
            logits = self.feed([token], 1, self.draft_bypass)
            token = choose(logits, drafted)
            drafted.append(token)
            unsure = logits[0].float().softmax(dim=0)[token].item() < self.options.min_confidence
            if unsure or token in ends:
                break
        state = find_state(self.cache)
        for layer, fields in zip(self.cache.layers, kept, strict=True):
            if layer is not state:
                vars(layer).update(fields)
        if self.changes is not None:
            self.changes.is_drafting = False
        else:
            state.crop(-len(drafted))
        return drafted

    def check(self, drafted: list[int]) -> torch.Tensor:
        """Feed the last token and a draft densely; the logits after each of them, [1 + drafted, V]."""
        if self.needs_reprefill:
            self.cache = DynamicCache(config=self.model.config)
            return self.feed(self.tokens, 1, self.check_bypass)
        record_past(self.cache, bool(drafted))
        return self.feed([self.tokens[-1], *drafted], len(drafted) + 1, self.check_bypass)

    def take_back(self, length: int):
        """Remove the last positions from the cache, so that it holds all tokens but the last."""
        if self.changes is not None:
            self.changes.last = -1 - length
        if length or any(getattr(layer, "record_past", False) for layer in self.cache.layers):
            self.cache.crop(-length)
        record_past(self.cache, False)


class Stop:
    """
    Where a text ends. The usual criteria are asked without tensors, others as they expect it.

    Args:
        criteria: a `StoppingCriteriaList`.
        device: for the others.
    """

    def __init__(self, criteria, device: torch.device):
        self.device = device
        self.max_length = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
        self.ends: set[int] = set()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.ends |= set(criterion.eos_token_id.flatten().tolist())
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def is_after(self, tokens: list[int]) -> bool:
        """Whether nothing follows these tokens."""
        if len(tokens) >= self.max_length or tokens[-1] in self.ends:
            return True
        if not self.others:
            return False
        ids = torch.tensor([tokens], device=self.device)
        return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self.others)


def record_past(cache, wanted: bool):
    """Make sliding-window layers keep more than their window, to be cropped; or no longer."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = wanted


def score(logits: torch.Tensor, processors, tokens: list[int], drafted: list[int]) -> torch.Tensor:
    """Logits [n, V], processed: row i's as those after `tokens` and the first i of `drafted`."""
    if not processors:
        return logits
    rows = []
    for index, row in enumerate(logits):
        ids = torch.tensor([tokens + drafted[:index]], device=logits.device)
        rows.append(processors(ids, row.to(torch.float32, copy=True).unsqueeze(0)))
    return torch.cat(rows)


def decode_losslessly(
    model,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    options: NeuroFlowLosslessConfig,
    streamer=None,
    make_drafts=Drafts,
    **model_kwargs,
) -> torch.Tensor | NeuroFlowLosslessOutput:
    """
    The decoding method of `generate(..., lossless=...)`; arguments as those of transformers' own, and

    Args:
        options: who drafts, and how.
        make_drafts: from the options, the bypassed model's `(token, length) -> tokens`, and how long a step of it may
            take, over a dense one's, to what chooses drafts.

    Raises:
        ValueError: for what it cannot do, with what to do instead.
    """
    refuse_unsupported(input_ids, generation_config, model_kwargs)
    sequence = DecodingState(model, options, input_ids, model_kwargs)
    stop, counts = Stop(stopping_criteria, input_ids.device), LosslessCounts()
    tokens, processors = sequence.tokens, logits_processor

    def choose(logits: torch.Tensor, drafted: list[int]) -> int:
        return score(logits, processors, tokens + drafted, []).argmax(dim=-1).item()

    def draft_with_bypass(token: int, length: int) -> list[int]:
        drafted = sequence.draft(token, length, choose, stop.ends)
        counts.draft_steps += len(drafted)
        return drafted

    drafts = make_drafts(options, draft_with_bypass, OVERHEAD + sequence.drafting_share)
    mask = model_kwargs.get("attention_mask")
    mask_length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    is_whole = sequence.embeds is not None or mask_length == input_ids.shape[1]
    logits, drafted, draft = sequence.feed_prompt(is_whole), [], None
    kept_scores, kept_logits, begun = [], [], 0.0
    while True:
        scores = score(logits, processors, tokens, drafted)
        choices = scores.argmax(dim=-1).tolist()
        accepted = next((i for i, token in enumerate(drafted) if token != choices[i]), len(drafted))
        if draft is not None:
            counts.add(draft.source, len(drafted), accepted)
            drafts.learn(draft, accepted, time.perf_counter() - begun)
        new, ended = 0, False
        while new <= accepted and not ended:
            tokens.append(choices[new])
            new += 1
            ended = stop.is_after(tokens)
        sequence.take_back(len(drafted) + 1 - new)
        if generation_config.return_dict_in_generate and generation_config.output_scores:
            kept_scores += scores[:new].float().split(1)
        if generation_config.return_dict_in_generate and generation_config.output_logits:
            kept_logits += logits[:new].float().split(1)
        counts.tokens += new
        if streamer is not None:
            for token in tokens[-new:]:
                streamer.put(torch.tensor([token]))
        if ended:
            break
        draft = drafts.next(tokens, sequence.most_drafted(stop.max_length))
        drafted = draft.tokens
        begun = time.perf_counter()
        logits = sequence.check(drafted)

    if streamer is not None:
        streamer.end()
    sequences = torch.tensor([tokens], device=input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    return NeuroFlowLosslessOutput(
        sequences=sequences,
        scores=tuple(kept_scores) or None,
        logits=tuple(kept_logits) or None,
        past_key_values=sequence.cache,
        lossless=counts,
    )


def refuse_unsupported(input_ids: torch.Tensor, generation_config, model_kwargs: dict):
    """Raise a ValueError that says what to do instead for what lossless generation cannot do."""
    cache = model_kwargs.get("past_key_values")
    if generation_config.do_sample:
        raise ValueError(
            "Lossless generation is greedy, and `do_sample` is True. Set it to False, or drop `lossless`."
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"Lossless generation is greedy, and `num_beams` is {generation_config.num_beams}; set it to 1."
        )
    if len(input_ids) > 1:
        raise ValueError(f"Lossless generation takes one sequence at a time, and the input has {len(input_ids)}.")
    if getattr(generation_config, "prompt_lookup_num_tokens", None):
        raise ValueError(
            "`prompt_lookup_num_tokens` is for transformers' own loop; here, "
            'lookups are `lossless={"drafter": "lookup"}`.'
        )
    if model_kwargs.get("bypass") is not None:
        raise ValueError(
            'Lossless generation has a bypass of its own; pass its options as `lossless={"bypass": {...}}`.'
        )
    if generation_config.return_dict_in_generate:
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, name):
                raise ValueError(f"`{name}` is not supported in lossless generation; a dense forward gives them.")
    if cache is None:
        raise ValueError("Lossless generation needs the KV cache; leave `use_cache` at True.")
    taken_back = (DynamicLayer, DynamicSlidingWindowLayer)
    if cache.offloading or not all(type(c) in taken_back or hasattr(c, "is_bypass_state") for c in cache.layers):
        raise ValueError(
            "Lossless generation takes positions back from the cache, and can do so with a `DynamicCache` that is not "
            'offloaded. Leave `cache_implementation` at its default, or set it to "dynamic".'
        )
