"""The options of lossless generation: how tokens are drafted before the dense model verifies them."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from .bypass_config import ALWAYS, NeuroFlowBypassConfig
from .options import make_options


@strict
@dataclass(kw_only=True)
class NeuroFlowLosslessConfig:
    """
    Options of lossless generation, `model.generate(..., lossless={...})`. A drafter proposes the next tokens. One
    dense forward over all of them keeps those that it chooses itself, and the rest is removed from the cache. The text
    is that of dense generation, greedy or sampled; only its speed depends on these options.

    Args:
        drafter (`str`, defaults to `"lookup"`):
            `"lookup"` drafts what followed the last few tokens when they occurred before, in the prompt or in the text
            so far. `"bypass"` drafts with the model itself, with layers bypassed; try it on a checkpoint that was
            trained for that. `"none"` drafts nothing: dense decoding in the same loop, as a baseline.
        bypass (`dict`, *optional*):
            What the drafter `"bypass"` skips: options of [`NeuroFlowBypassConfig`] that override
            `{"target": "block", "threshold": -1}` and, as `cache_layers`, the second half of the layers but the last.
            More layers make a draft cheaper and worse. A `rate` needs the model's similarities, as in
            [`NeuroFlowBypassConfig`], by default those of layer 1. The configuration's own `bypass` is not used here.
        draft_length (`int`, *optional*):
            Always draft this many tokens. By default, the length that pays best is chosen, or none, by the running
            acceptance rate and the times of dense steps, drafts and verifications in this generation.
        max_draft (`int`, defaults to 15): the most tokens to draft at once.
        max_ngram (`int`, defaults to 4): a lookup searches for this many last tokens, then for fewer.
        min_confidence (`float`, defaults to 0.3):
            A draft by the bypassed model ends with the first token to which it gives a lower probability. 0: never.

    Raises:
        ValueError: for an unknown option (with the nearest known one), or a value outside its range.
    """

    drafter: Literal["lookup", "bypass", "none"] = "lookup"
    bypass: dict | None = None
    draft_length: int | None = None
    max_draft: int = 15
    max_ngram: int = 4
    min_confidence: float | int = 0.3

    def __post_init__(self) -> None:
        for name, least in {"draft_length": 1, "max_draft": 1, "max_ngram": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"Lossless option `{name}` is {value!r}; expected a whole number of at least {least}."
                )
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(
                f"Lossless option `min_confidence` is {self.min_confidence!r}; expected a probability, 0 to 1."
            )

    @classmethod
    def from_options(cls, options: dict | bool, own: dict | None = None) -> "NeuroFlowLosslessConfig":
        """
        A checkpoint's `own` options, overridden by those of a call; True for the checkpoint's alone.

        Raises:
            ValueError: for an option that does not exist, a value of the wrong type or outside its range.
            TypeError: for something but a dict or True.
        """
        if options is True:
            options = {}
        if not isinstance(options, dict):
            raise TypeError(f"`lossless` is {options!r}; expected a dict of options, or True.")
        return make_options(cls, "lossless", {**(own or {}), **options})

    def draft_bypass(self, num_layers: int, similarities: dict | None = None) -> NeuroFlowBypassConfig:
        """What the drafter `"bypass"` skips in a model; arguments and errors as of `NeuroFlowBypassConfig.resolve`."""
        return self.draft_options(num_layers).resolve(num_layers, similarities)

    def draft_options(self, num_layers: int) -> NeuroFlowBypassConfig:
        """The same before a threshold is found for a rate."""
        given = self.bypass or {}
        defaults = {"target": "block", "threshold": ALWAYS, "gate_layer": 1 if given.get("rate") else 0}
        defaults["cache_layers"] = list(range(num_layers // 2, max(num_layers - 1, num_layers // 2 + 1)))
        return NeuroFlowBypassConfig.from_options(defaults, **given)
