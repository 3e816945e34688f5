"""Continue a text with a language model, and describe the result in words."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..language.bypass_state import BypassStatistics
from ..language.speculative_decoding import LosslessCounts
from ..loading import quiet_transformers
from .metrics import first_divergence, position_drift


@dataclass
class Continuation:
    """A generated text."""

    tokens: list[int]  # the new ones
    seconds: float  # including the prompt
    statistics: BypassStatistics | None = None  # None without a bypass
    lossless: LosslessCounts | None = None  # None without lossless generation


def continue_text(
    model,
    tokenizer,
    text: str,
    max_new_tokens: int = 128,
    bypass: dict | bool | None = None,
    lossless: dict | bool | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
) -> Continuation:
    """
    Continue a text.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        tokenizer: its tokenizer.
        text: the prompt.
        max_new_tokens: maximum number of tokens to generate.
        bypass: options of [`NeuroFlowBypassConfig`]; False for none, None for the model configuration's.
        lossless: options of [`NeuroFlowLosslessConfig`]; True for the defaults, None for none.
        temperature: 0 for greedy decoding; above 0 for sampling.
        seed: random seed for sampling.
        streamer: receives the tokens as they are generated.

    Raises:
        ValueError: for options out of range, and a prompt that is too long or has no tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {max_new_tokens}; expected a whole number of at least 1.")
    if temperature < 0:
        raise ValueError(f"`temperature` is {temperature:g}; expected 0 (no sampling) or more.")
    inputs = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    count, room = inputs.shape[1], model.config.max_position_embeddings
    if not count:
        raise ValueError("The prompt has no tokens; expected some text.")
    if count + max_new_tokens > room:
        raise ValueError(
            f"The prompt has {count} tokens; with {max_new_tokens} new ones, it does not fit into the model's {room}. "
            "Shorten the prompt, or ask for fewer new tokens."
        )
    how: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        how["temperature"] = float(temperature)
        torch.manual_seed(seed)
    is_dense = bool(lossless) or model.bypass_options(bypass) is None
    started = time.perf_counter()
    with quiet_transformers():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            bypass=bypass,
            lossless=lossless,
            streamer=streamer,
            return_dict_in_generate=True,
            **how,
        )
    return Continuation(
        tokens=output.sequences[0, count:].tolist(),
        seconds=time.perf_counter() - started,
        statistics=None if is_dense else model.bypass_statistics(output.past_key_values),
        lossless=getattr(output, "lossless", None),
    )


def figures_in_words(model, found: Continuation, bypass: dict | bool | None) -> list[str]:
    """Describe a generation in sentences."""
    count = len(found.tokens)
    lines = [f"{count} tokens in {found.seconds:.2f} s ({count / found.seconds:.1f} a second)."]
    if found.statistics is not None:
        options, statistics = model.bypass_options(bypass), found.statistics
        layers = ", ".join(map(str, options.cache_layers))
        low, middle, high = statistics.percentiles(0.1, 0.5, 0.9)
        lines.append(
            f"Bypassed {statistics.rate.item():.1%} of {statistics.steps.item()} steps (gate layer "
            f"{options.gate_layer}, reusing the {options.target} of layer {layers}, threshold {options.threshold:g}); "
            f"similarity P10 {low:.3f}, P50 {middle:.3f}, P90 {high:.3f}."
        )
    if found.lossless is not None:
        counts = found.lossless
        lines.append(
            f"Lossless: {counts.accepted} of {counts.drafted} draft tokens accepted; after the prompt, "
            f"{counts.checks} dense forwards and {counts.draft_steps} bypassed ones."
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
