"""Continue a text with a language model, and describe the result in words."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ..language.bypass_config import ALWAYS
from ..language.bypass_state import MAX_RATE, BypassStatistics, too_low
from ..language.calibration import end_tokens
from ..language.speculative_decoding import LosslessCounts
from ..loading import quiet_transformers
from .metrics import first_divergence, position_drift

ENOUGH_STEPS = 8  # of a text, to warn of a threshold that bypassed nearly all


@dataclass(frozen=True)
class Decoding:
    """
    How tokens are chosen, and how layers are bypassed meanwhile.

    Args:
        max_new_tokens: maximum number of tokens to generate; fewer if the model has less room.
        temperature: 0 for greedy decoding; above 0 for sampling.
        top_p: sample among the most probable tokens that have this probability together.
        bypass: options of [`NeuroFlowBypassConfig`]; False for none, None for the model configuration's.
        lossless: options of [`NeuroFlowLosslessConfig`]; True for the defaults, None for none.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    bypass: dict | bool | None = False
    lossless: dict | bool | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}; expected a whole number of at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` is {self.temperature:g}; expected 0 (no sampling) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p:g}; expected a probability above 0, at most 1.")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("`top_p` has no effect without sampling; give a `temperature` above 0, too.")


@dataclass
class Continuation:
    """A generated text."""

    tokens: list[int]  # the new ones
    seconds: float  # including the prompt
    cache: Cache  # of all tokens but the last
    is_ended: bool  # by an end token
    is_cut: bool  # at the maximum number of tokens
    statistics: BypassStatistics | None = None  # None without a bypass
    lossless: LosslessCounts | None = None  # None without lossless generation


def continue_tokens(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    decoding: Decoding,
    cache: Cache | None = None,
    streamer: Any = None,
    is_stopped: Callable[[], bool] | None = None,
) -> Continuation:
    """
    Continue a text up to its end token.

    Args:
        model, tokenizer: a [`NeuroFlowPhi3ForCausalLM`], and its tokenizer.
        prompt: token ids.
        cache: of the first tokens of the prompt, which are not computed again.
        streamer: receives the tokens as they are generated.
        is_stopped: asked after each token; the text ends where it returns True.

    Raises:
        ValueError: for bypass or lossless options out of range, and a prompt that is too long.
    """
    room = model.config.max_position_embeddings
    new_tokens = min(decoding.max_new_tokens, room - len(prompt))
    if new_tokens < 1:
        raise ValueError(f"The prompt has {len(prompt)} tokens; the model has room for {room}, with the new ones.")
    ids = torch.tensor([list(prompt)], device=model.device)
    ends = {*end_tokens(model), tokenizer.eos_token_id} - {None}
    is_dense = bool(decoding.lossless) or model.bypass_options(decoding.bypass) is None
    how: dict[str, Any] = {"bypass": decoding.bypass, "lossless": decoding.lossless}
    if decoding.temperature > 0:
        how |= {"temperature": float(decoding.temperature), "top_p": float(decoding.top_p), "top_k": 0}
    if is_stopped is not None:
        how["stopping_criteria"] = [lambda ids, *_, **__: torch.full((len(ids),), is_stopped(), device=ids.device)]
    started = time.perf_counter()
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The threshold .* bypassed")  # `notes_in_words` says it
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            eos_token_id=sorted(ends) or None,
            past_key_values=cache,
            streamer=streamer,
            do_sample=decoding.temperature > 0,
            num_beams=1,
            return_dict_in_generate=True,
            **how,
        )
    tokens = output.sequences[0, len(prompt) :].tolist()
    return Continuation(
        tokens=tokens,
        seconds=time.perf_counter() - started,
        cache=output.past_key_values,
        is_ended=tokens[-1] in ends,
        is_cut=tokens[-1] not in ends and len(tokens) == new_tokens,
        statistics=None if is_dense else model.bypass_statistics(output.past_key_values, since=len(prompt)),
        lossless=getattr(output, "lossless", None),
    )


def figures_in_words(model: Any, found: Continuation, decoding: Decoding) -> list[str]:
    """Describe a generation in sentences."""
    count = len(found.tokens)
    speed = f"{count} token{'s' * (count > 1)} in {found.seconds:.2f} s ({count / found.seconds:.1f} a second)."
    return [speed, *notes_in_words(model, found, decoding)]


def notes_in_words(model: Any, found: Continuation, decoding: Decoding) -> list[str]:
    """Describe in sentences how a text ended, what was bypassed and what was drafted."""
    count, lines = len(found.tokens), []
    if found.is_ended and count == 1:
        lines.append("The model ended the text at once.")
    if found.is_cut:
        lines.append(f"The text is cut at {count}, the most tokens that you allowed or that have room.")
    if found.statistics is not None:
        options, statistics = model.bypass_options(decoding.bypass), found.statistics
        steps, rate, layers = statistics.steps.item(), statistics.rate.item(), ", ".join(map(str, options.layers))
        low, middle, high = statistics.percentiles(0.1, 0.5, 0.9)
        similarity = f"; similarity P10 {low:.3f}, P50 {middle:.3f}, P90 {high:.3f}" if low == low else ""
        lines.append(
            f"Bypassed {rate:.1%} of {steps} steps (gate layer {options.gate_layer}, reusing the {options.target} of "
            f"layer {layers}, threshold {options.threshold:g}){similarity}."
        )
        if options.threshold > ALWAYS and steps >= ENOUGH_STEPS and rate > MAX_RATE:
            lines.append(f"Warning: {too_low(options.threshold)}")
    if found.lossless is not None:
        counts = found.lossless
        lines.append(
            f"Lossless: {counts.accepted} of {counts.drafted} draft tokens accepted; after the prompt, "
            f"{counts.checks} dense forwards and {counts.draft_steps} to draft."
        )
    return lines


def comparison_in_words(dense: Continuation, found: Continuation) -> str:
    """Describe in a sentence how far a text is from the dense one."""
    first = first_divergence(dense.tokens, found.tokens)
    if first is None:
        return f"Against dense: the same {len(dense.tokens)} tokens."
    positions = max(len(dense.tokens), len(found.tokens))
    drift = position_drift(dense.tokens, found.tokens)
    return f"Against dense: drift {drift:.1%} of {positions} positions; first other token at position {first}, from 0."
