"""The options of the bypass: which layers of a language model reuse their last output, and when."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from huggingface_hub.dataclasses import strict

from .options import make_options

# thresholds: a cosine is from -1 to 1
ALWAYS = -1
NEVER = 2


def threshold_for_rate(similarity: Sequence[float], rate: float) -> float:
    """
    The threshold that a share `rate`, above 0 and at most 1, of the similarities reaches, rounded to 6 digits; for a
    rate of 1, -1 (always). Percentiles of similarities give about the same as the similarities.

    Raises:
        ValueError: if there are no similarities.
    """
    if rate >= 1:
        return ALWAYS
    if not len(similarity):
        raise ValueError("No step has a similarity to derive a threshold from; generate at least 2 new tokens.")
    return round(torch.as_tensor(similarity, dtype=torch.float64).quantile(1 - rate).item(), 6)


@strict
@dataclass(kw_only=True)
class NeuroFlowBypassConfig:
    """
    Options of the similarity-gated bypass of a decoder's layers. They live under `bypass` in the model's configuration
    and can be overridden, one by one, in a call: `model.generate(..., bypass={"threshold": 0.7})`.

    On each decode step of a sequence, the gate compares the gate layer's attention output (after the output
    projection) with that of the token before: r = cos(a(t), a(t-1)). If r >= `threshold`, the cache layers return the
    output that they computed last. Steps of more than one new token, such as the prompt, are dense. Keys and values
    are written on every step, bypassed or not.

    Source: Y. Schmitt, "EMA-Gated Temporal Sequence Compression in Vision Transformers" (2026), section on language.

    Args:
        gate_layer (`int`, defaults to 1):
            The layer, counted from 0, whose attention output is compared. Choose an early one, so that most layers
            come after it, but not layer 0, which sees little but the token itself.
        cache_layers (`int` or `list[int]`, *optional*):
            The layers that reuse their outputs, all after the gate layer. By default the one at three quarters of the
            depth, as layer 24 of Phi-3-mini's 32. Late layers change the text less than early ones, except for the
            last one; more layers save more and drift more. If none is after the gate layer, the gate is inverted, for
            comparison: the similarity of the step before decides, since that of this step is not known yet.
        threshold (`float`, defaults to 0.65):
            Bypass at this similarity or above. 0.60 to 0.70 bypasses about a fifth of Phi-3-mini's steps. Good values
            depend on the checkpoint, so look at its similarities first (`model.bypass_statistics`). Above 1: never.
            -1: on every step that has an output to reuse, whatever the similarity.
        rate (`float`, *optional*):
            Instead of `threshold`: choose it so that this share of the steps, above 0 and at most 1, reaches it, by
            the similarities that `model.calibrate_bypass` or `neuroflow calibrate` stored in the model's
            configuration. `max_consecutive` and `guard_entropy` bypass fewer steps than that.
        target (`str`, defaults to `"attention"`):
            What is skipped in a cache layer. `"attention"`: query, attention and output projection; keys and values
            are still projected. `"mlp"`: the MLP, which has about two thirds of a layer's weights. `"block"`: both.
        max_consecutive (`int`, *optional*):
            After this many bypassed steps in a row the next one computes everything, which limits the age of a reused
            output. 1 or 2 are good values.
        guard_entropy (`float`, *optional*):
            Bypass only if the model was sure when it predicted the token that is fed now: if the entropy of that
            prediction, in nats, was at most this. Most drift comes from steps at which it was not. 1 is a good start.
            Needs the language-model head.

    Raises:
        ValueError: for an unknown option (with the nearest known one), or a value outside its range.
    """

    gate_layer: int = 1
    cache_layers: int | list[int] | None = None
    threshold: float | int = 0.65
    rate: float | int | None = None
    target: Literal["attention", "mlp", "block"] = "attention"
    max_consecutive: int | None = None
    guard_entropy: float | int | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError for a value outside its range; layers are checked by `resolve`."""

        def require(name: str, holds: Callable[[float], bool], expected: str) -> None:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"Bypass option `{name}` is {value!r}; expected {expected}.")

        require(
            "threshold", lambda value: ALWAYS <= value < math.inf, "a finite cosine of at least -1 (above 1: never)"
        )
        require("rate", lambda value: 0 < value <= 1, "a share of the steps, above 0 and at most 1, or None")
        require("max_consecutive", lambda value: value >= 1, "a whole number of at least 1, or None for no cap")
        require("guard_entropy", lambda value: 0 <= value < math.inf, "a finite number of at least 0, or None")

    @classmethod
    def from_options(cls, base: dict | None = None, **options: Any) -> "NeuroFlowBypassConfig":
        """
        The options of `base`, overridden by `options`; of `threshold` and `rate`, either one replaces the other.

        Raises:
            ValueError: for an option that does not exist, a value of the wrong type or outside its range, and for a
                threshold together with a rate.
        """
        merged = {**(base or {}), **options}
        for name, other in (("threshold", "rate"), ("rate", "threshold")):
            if options.get(name) is not None and options.get(other) is None:
                merged.pop(other, None)
        if merged.get("threshold") is not None and merged.get("rate") is not None:
            raise ValueError("Bypass options `threshold` and `rate` both say when to bypass; give one of them.")
        if isinstance(merged.get("cache_layers"), (tuple, range)):
            merged["cache_layers"] = list(merged["cache_layers"])
        return make_options(cls, "bypass", merged)

    def resolve(self, num_layers: int, similarities: dict | None = None) -> "NeuroFlowBypassConfig":
        """
        The options for a model: layers as in `resolve_layers`, and a threshold instead of a rate.

        Args:
            num_layers: the model's depth.
            similarities: the configuration's `bypass_similarities`.

        Raises:
            ValueError: as `resolve_layers`, and for a rate without similarities of the gate layer.
        """
        resolved = self.resolve_layers(num_layers)
        if self.rate is None:
            return resolved
        found = (similarities or {}).get(str(self.gate_layer))
        if found is None:
            raise ValueError(
                f"Bypass option `rate` needs this model's similarities at gate layer {self.gate_layer}, which its "
                "configuration lacks. Measure them: `neuroflow calibrate --model MODEL --out OUT`, or "
                "`model.calibrate_bypass(prompts)`. Or give a `threshold`."
            )
        return replace(resolved, rate=None, threshold=threshold_for_rate(found, self.rate))

    def resolve_layers(self, num_layers: int) -> "NeuroFlowBypassConfig":
        """
        The options with `cache_layers` as a sorted list without repetitions, for a model of `num_layers` layers.

        Raises:
            ValueError: for a layer that the model does not have, for no cache layer, and for cache layers on both
                sides of the gate layer.
        """
        chosen = self.cache_layers
        if chosen is None:
            chosen = max(3 * num_layers // 4, min(self.gate_layer + 1, num_layers - 1))
        layers = sorted({chosen} if isinstance(chosen, int) else set(chosen))
        if not layers:
            raise ValueError("Bypass option `cache_layers` is empty; name at least one layer, or set `bypass=False`.")
        for name, index in [("gate_layer", self.gate_layer), *(("cache_layers", index) for index in layers)]:
            if not 0 <= index < num_layers:
                raise ValueError(
                    f"Bypass option `{name}` names layer {index}; the model has {num_layers} layers, 0 to "
                    f"{num_layers - 1}."
                )
        if layers[0] <= self.gate_layer < layers[-1]:
            raise ValueError(
                f"Bypass option `cache_layers` {layers} has layers on both sides of `gate_layer` {self.gate_layer}: "
                "expected all of them after it, or none (which inverts the gate)."
            )
        return replace(self, cache_layers=layers)

    @property
    def layers(self) -> list[int]:
        """`cache_layers` of resolved options."""
        return cast(list[int], self.cache_layers)

    @property
    def skips_attention(self) -> bool:
        """Whether a bypass skips the cache layers' attention."""
        return self.target != "mlp"

    @property
    def skips_mlp(self) -> bool:
        """Whether a bypass skips the cache layers' MLPs."""
        return self.target != "attention"

    @property
    def is_guarded(self) -> bool:
        """Whether the logits of the language-model head decide, too."""
        return self.guard_entropy is not None

    @property
    def is_inverted(self) -> bool:
        """Whether, in resolved options, no cache layer comes after the gate layer."""
        return self.layers[-1] <= self.gate_layer
