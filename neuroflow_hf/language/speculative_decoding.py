"""
Generation that verifies drafts: one cache, one forward for many tokens, the text of dense generation.

Each token of the text is the most probable one or, with sampling, drawn from the dense model's probabilities by one
call of `torch.multinomial`, and a draft token is kept if it is the same. So a draft token x is kept with probability
p(x), another one takes its place with p without x, and drafts change nothing: the text is the one that dense sampling
draws from the same seed. The bypassed model drafts with the random numbers that the verification will draw with, which
makes both agree about as often as two distributions can (a Gumbel coupling: Daliri et al., 2025).

Without drafts, the same loop is a baseline: it shows how much of a speed-up is due to drafts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import (
    Cache,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    Phi3ForCausalLM,
    StoppingCriteriaList,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import LogitsProcessorList, logits_process
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .bypass_config import NEVER, NeuroFlowBypassConfig
from .draft_policy import Drafts, DraftWithModel
from .few_tokens import linear_layers, turned
from .lossless_config import NeuroFlowLosslessConfig

# these depend on their arguments alone, so drafts are made with them; others would see tokens that are rejected later
STATELESS_PROCESSORS = (
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.MinPLogitsWarper,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
)
Bypass = NeuroFlowBypassConfig | bool  # False for none
Choose = Callable[[torch.Tensor, list[int]], int]  # `(logits [1, V], drafted so far) -> token`


@dataclass
class LosslessCounts:
    """
    What a lossless generation did.

    Args:
        tokens: new tokens.
        checks: dense forwards after the prompt's, each of which gave at least one token.
        drafts: checks with a draft.
        draft_steps: forwards of the bypassed model.
        drafted: draft tokens.
        accepted: draft tokens that verification kept.
    """

    tokens: int = 0
    checks: int = 0
    drafts: int = 0
    draft_steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class NeuroFlowLosslessOutput(GenerateDecoderOnlyOutput):
    """
    Output of a lossless generation: the fields of dense generation, and

    Args:
        lossless ([`LosslessCounts`]): numbers of forwards, draft tokens and accepted draft tokens.
    """

    lossless: LosslessCounts | None = None


class DecodingState:
    """
    One sequence: its tokens, the model's cache of all but the last, and the arguments of the next forward.

    Args:
        model: a `NeuroFlowPhi3ForCausalLM`.
        options: options of the lossless generation.
        input_ids: [1, T], or [1, 0] where the prompt comes as embeddings.
        model_kwargs: arguments for the forward, from `generate`: cache, attention mask, positions, embeddings, others.
    """

    def __init__(
        self,
        model: Phi3ForCausalLM,
        options: NeuroFlowLosslessConfig,
        input_ids: torch.Tensor,
        model_kwargs: dict,
    ):
        self.model, self.options, self.device = model, options, input_ids.device
        self.tokens: list[int] = input_ids[0].tolist()
        self.input_ids = input_ids
        self.cache: Cache = model_kwargs["past_key_values"]
        self.model_kwargs = {name: value for name, value in model_kwargs.items() if name != "past_key_values"}
        self.attention_mask: torch.Tensor | None = None  # [1, cache length after the prompt]; None without padding
        self.first_position: int | None = None  # of the cache's first entry, negative after padding; None: 0
        self.forward_kwargs: dict = {}
        self.draft_bypass: Bypass = False
        self.check_bypass: Bypass = False
        self.linear_layers = linear_layers(model)
        bypass = options.draft_bypass(model.config.num_hidden_layers, model.config.bypass_similarities)
        if options.drafter == "bypass":
            self.draft_bypass = bypass
            self.check_bypass = replace(bypass, threshold=NEVER)  # dense, but records what drafts reuse
        # long RoPE: the number of positions up to which the frequencies are the short ones
        is_long = cast(dict, model.config.rope_parameters)["rope_type"] == "longrope"
        self.switch = model.config.original_max_position_embeddings if is_long else None

    def forward(self, inputs: dict, keep: int, bypass: Bypass) -> torch.Tensor:
        """The logits of the last `keep` tokens fed, [keep, V]."""
        inputs |= {"use_cache": True, "logits_to_keep": keep, "bypass": bypass, "return_dict": True}
        output = self.model(**inputs)
        self.cache = output.past_key_values
        return output.logits[0]

    def feed_prompt(self, next_sequence_length: int | None) -> torch.Tensor:
        """
        Feed the prompt and return the logits after it, [1, V]. `prepare_inputs_for_generation` makes the inputs, as in
        dense generation, since PEFT replaces this method to insert virtual tokens. Later forwards continue from them.

        Args:
            next_sequence_length: number of tokens or embeddings to feed, from the end; None for all.
        """
        inputs = self.model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=True,
            past_key_values=self.cache,
            **self.model_kwargs,
        )
        if inputs.get("past_key_values") is not None:  # Phi-3 drops it for a prompt beyond long RoPE's switch
            require_croppable(inputs["past_key_values"])
        positions, self.attention_mask = inputs.get("position_ids"), inputs.get("attention_mask")
        of_the_prompt = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")
        self.forward_kwargs = {name: value for name, value in inputs.items() if name not in of_the_prompt}
        logits = self.forward(inputs, 1, self.check_bypass)
        if positions is not None:
            self.first_position = int(positions[0, -1]) + 1 - self.cache.get_seq_length()
        return logits

    def feed_again(self) -> torch.Tensor:
        """Feed all tokens into a new cache and return the logits after them, [1, V]."""
        count = len(self.tokens)
        given = self.model_kwargs["position_ids"]
        more = torch.arange(1, count - given.shape[1] + 1, device=self.device) + given[0, -1]
        inputs = {
            "input_ids": torch.tensor([self.tokens], device=self.device),
            "position_ids": torch.cat([given, more.unsqueeze(0)], dim=1),
            "past_key_values": DynamicCache(config=self.model.config),
            **self.mask(count),
            **self.forward_kwargs,
        }
        return self.forward(inputs, 1, self.check_bypass)

    def feed(self, tokens: list[int], keep: int, bypass: Bypass) -> torch.Tensor:
        """Feed tokens that follow those in the cache and return the logits after the last `keep`, [keep, V]."""
        end = self.cache.get_seq_length() + len(tokens)
        inputs = {
            "input_ids": torch.tensor([tokens], device=self.device),
            "past_key_values": self.cache,
            **self.mask(end),
            **self.forward_kwargs,
        }
        if self.first_position is not None:
            positions = torch.arange(end - len(tokens), end, device=self.device) + self.first_position
            inputs["position_ids"] = positions.unsqueeze(0)
        return self.forward(inputs, keep, bypass)

    def mask(self, length: int) -> dict[str, torch.Tensor]:
        """The attention mask of a forward after which the cache has this length, if one is needed."""
        if self.attention_mask is None:
            return {}
        ones = self.attention_mask.new_ones(1, length - self.attention_mask.shape[1])
        return {"attention_mask": torch.cat([self.attention_mask, ones], dim=1)}

    @property
    def must_feed_again(self) -> bool:
        """Whether all tokens must be fed again, as Phi-3 does once when their number passes long RoPE's switch."""
        return self.switch is not None and self.cache.get_seq_length() <= self.switch < len(self.tokens)

    def most_drafted(self, max_length: int) -> int:
        """How many tokens may be drafted: a check gives one more, and all must have the same RoPE frequencies."""
        limit = max_length - len(self.tokens) - 1
        if self.must_feed_again:
            return 0
        if self.switch is not None:
            position = self.cache.get_seq_length() + (self.first_position or 0)  # of the next token to feed
            # the frequencies depend on the last position, `must_feed_again` on the number of tokens: padding tells
            # them apart
            for fed in (position + 1, len(self.tokens)):
                if fed <= self.switch:
                    limit = min(limit, self.switch - fed)
        return limit

    def draft(self, length: int, choose: Choose, ends: set[int]) -> list[int]:
        """
        Up to `length` tokens that the bypassed model generates after the text. The cache is left as it was.

        Args:
            choose: chooses a token by its logits.
            ends: tokens that end a text.
        """
        drafted: list[int] = []
        # layers replace their tensors on every write, so references to the old ones are enough
        kept = [dict(vars(layer)) for layer in self.cache.layers]
        while len(drafted) < length:
            logits = self.feed([*self.tokens, *drafted][-1:], 1, self.draft_bypass)
            drafted.append(choose(logits, drafted))
            probability = logits[0].float().softmax(dim=0)[drafted[-1]].item()
            if probability < self.options.min_confidence or drafted[-1] in ends:
                break
        for layer, fields in zip(self.cache.layers, kept, strict=True):
            if isinstance(layer, CacheLayerMixin):
                vars(layer).update(fields)
            else:
                layer.crop(-len(drafted))  # the bypass's state appends to its lists
        return drafted

    def check(self, drafted: list[int]) -> torch.Tensor:
        """Feed the last token and a draft densely and return the logits after each of them, [1 + drafted, V]."""
        if self.must_feed_again:
            return self.feed_again()
        record_past(self.cache, bool(drafted))
        with turned(self.linear_layers, len(drafted) + 1):
            logits = self.feed([self.tokens[-1], *drafted], len(drafted) + 1, self.check_bypass)
        if self.device.type != "cpu":  # it is timed; without this, the choice of a token would wait for it
            torch.accelerator.synchronize(self.device)
        return logits

    def take_back(self, length: int) -> None:
        """Remove the last positions from the cache, so that it holds all tokens but the last."""
        if length or any(getattr(layer, "record_past", False) for layer in self.cache.layers):
            self.cache.crop(-length)
        record_past(self.cache, False)


class Stop:
    """
    Where a text ends. Maximum length and end tokens are compared on the host, other criteria are called.

    Args:
        criteria: those of `generate`.
        device: the device of the tensors for other criteria.
    """

    def __init__(self, criteria: StoppingCriteriaList, device: torch.device):
        self.device = device
        self.max_length = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
        self.ends: set[int] = set()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.ends |= set(criterion.eos_token_id.flatten().tolist())
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def is_after(self, tokens: list[int], scores: list[torch.Tensor] | None) -> bool:
        """Whether the text ends after these tokens; `scores`: [1, V] for each new token, if they were asked for."""
        ends = len(tokens) >= self.max_length or tokens[-1] in self.ends
        if not self.others:
            return ends
        ids = torch.tensor([tokens], device=self.device)
        given = None if scores is None else tuple(scores)
        # all are called, as in dense generation: some keep state
        found = [bool(torch.as_tensor(criterion(ids, given)).all()) for criterion in self.others]
        return ends or any(found)


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """A context after which the host and `device` draw the random numbers that they would have drawn before it."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type)


def record_past(cache: Cache, wanted: bool) -> None:
    """Choose whether sliding-window layers keep more than their window, so that they can be cropped."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = wanted


def decode_losslessly(
    model: Phi3ForCausalLM,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    options: NeuroFlowLosslessConfig,
    streamer: BaseStreamer | None = None,
    make_drafts: Callable[[NeuroFlowLosslessConfig, DraftWithModel], Drafts] = Drafts,
    **model_kwargs: Any,
) -> torch.Tensor | NeuroFlowLosslessOutput:
    """
    The decoding method of `generate(..., lossless=...)`; arguments as those of transformers' own, and

    Args:
        options: the drafter and its options.
        make_drafts: makes a [`Drafts`] from the options and the bypassed model's `length -> tokens`.

    Logits processors and stopping criteria are called once for every token that is kept, in the order of the text, as
    in dense generation. They may keep state, such as a grammar or a cache.

    Raises:
        ValueError: for what is not supported, with what to do instead.
    """
    refuse_unsupported(input_ids, generation_config, model_kwargs)
    sequence = DecodingState(model, options, input_ids, model_kwargs)
    stop, counts = Stop(stopping_criteria, input_ids.device), LosslessCounts()
    tokens = sequence.tokens
    stateless = LogitsProcessorList([p for p in logits_processor if type(p) in STATELESS_PROCESSORS])
    samples = bool(generation_config.do_sample)

    def choose(logits: torch.Tensor, drafted: list[int]) -> int:
        return next_token(score(logits, stateless, tokens + drafted), samples)

    def draft_with_model(length: int) -> list[int]:
        # the verification draws with the same random numbers
        with fork_rng(input_ids.device) if samples else nullcontext():
            drafted = sequence.draft(length, choose, stop.ends)
        counts.draft_steps += len(drafted)
        return drafted

    drafts = make_drafts(options, draft_with_model)
    wants = generation_config.return_dict_in_generate
    kept_scores: list[torch.Tensor] | None = [] if wants and generation_config.output_scores else None
    kept_logits: list[torch.Tensor] | None = [] if wants and generation_config.output_logits else None
    logits = sequence.feed_prompt(length_to_feed(input_ids, generation_config, model_kwargs))
    drafted: list[int] = []
    while True:
        choices = None if logits_processor or samples else logits.argmax(dim=-1).tolist()
        new, accepted, ended = 0, 0, False
        while accepted == new <= len(drafted) and not ended:  # row `new` is that of a kept token
            scores = score(logits[new : new + 1], logits_processor, tokens)
            tokens.append(next_token(scores, samples) if choices is None else choices[new])
            if kept_scores is not None:
                kept_scores.append(scores.float())
            if kept_logits is not None:
                kept_logits.append(logits[new : new + 1].float())
            if streamer is not None:
                streamer.put(torch.tensor(tokens[-1:]))
            accepted += new < len(drafted) and tokens[-1] == drafted[new]
            new += 1
            ended = stop.is_after(tokens, kept_scores)
        sequence.take_back(len(drafted) + 1 - new)
        counts.tokens += new
        counts.drafts += bool(drafted)
        counts.drafted += len(drafted)
        counts.accepted += accepted
        if ended:
            break
        drafted = drafts.next(tokens, sequence.most_drafted(stop.max_length))
        logits = sequence.check(drafted)
        drafts.record_check(len(drafted))
        counts.checks += 1

    if streamer is not None:
        streamer.end()
    sequences = torch.tensor([tokens], device=input_ids.device)
    if not wants:
        return sequences
    return NeuroFlowLosslessOutput(
        sequences=sequences,  # type: ignore[arg-type]  # transformers' annotations: no tensor is a `LongTensor`,
        scores=None if kept_scores is None else tuple(kept_scores),  # type: ignore[arg-type]  # and one score a text
        logits=None if kept_logits is None else tuple(kept_logits),  # type: ignore[arg-type]
        past_key_values=sequence.cache,
        lossless=counts,
    )


def score(logits: torch.Tensor, processors: LogitsProcessorList, tokens: list[int]) -> torch.Tensor:
    """Process the logits [1, V] after `tokens`."""
    if not processors:
        return logits
    ids = torch.tensor([tokens], device=logits.device)
    return processors(ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]  # `LongTensor`


def next_token(scores: torch.Tensor, samples: bool) -> int:
    """The most probable token by the scores [1, V], or one drawn by one call, as transformers' own loop draws it."""
    if samples:
        return int(torch.multinomial(scores.float().softmax(dim=-1), num_samples=1))
    return int(scores.argmax(dim=-1))


def length_to_feed(input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict) -> int | None:
    """
    Number of tokens or embeddings of the prompt that are not in the cache yet, from the end; None for all. To continue
    with a cache, `generate` takes the whole text, or the new tokens with a mask for the whole text.
    """
    held, embeds = model_kwargs["past_key_values"].get_seq_length(), model_kwargs.get("inputs_embeds")
    if embeds is not None:
        return embeds.shape[1] - held
    mask = model_kwargs.get("attention_mask")
    mask_length = generation_config._mask_length if mask is None else mask.shape[1]
    return input_ids.shape[1] - held if mask_length == input_ids.shape[1] else None


def refuse_unsupported(input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict) -> None:
    """Raise a ValueError for what lossless generation does not support."""
    if generation_config.prompt_lookup_num_tokens:
        raise ValueError(
            "`prompt_lookup_num_tokens` is an option of transformers' own loop; use "
            '`lossless={"drafter": "lookup"}` instead.'
        )
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"Lossless generation is greedy search or sampling, and the generation options mean {mode.value}. Drop "
            "these options, such as `num_beams`, or `lossless`."
        )
    if len(input_ids) > 1:
        raise ValueError(f"Lossless generation takes one sequence at a time, and the input has {len(input_ids)}.")
    if model_kwargs.get("bypass") not in (None, False):
        raise ValueError(
            'Lossless generation has bypass options of its own; pass them as `lossless={"bypass": {...}}`.'
        )
    if generation_config.return_dict_in_generate:
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, name):
                raise ValueError(f"`{name}` is not supported in lossless generation; a dense forward gives them.")
    if model_kwargs.get("past_key_values") is None:
        raise ValueError("Lossless generation needs the KV cache; leave `use_cache` at True.")
    require_croppable(model_kwargs["past_key_values"])


def require_croppable(cache: Cache) -> None:
    """Raise a ValueError for a cache from which positions cannot be removed."""
    croppable = (DynamicLayer, DynamicSlidingWindowLayer)
    if cache.offloading or not all(type(c) in croppable or hasattr(c, "is_bypass_state") for c in cache.layers):
        raise ValueError(
            "Lossless generation removes rejected draft tokens from the cache, and needs a `DynamicCache` that is not "
            'offloaded. Leave `cache_implementation` at its default, or set it to "dynamic".'
        )
