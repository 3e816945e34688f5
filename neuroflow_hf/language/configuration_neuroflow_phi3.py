"""Configuration of the NeuroFlow Phi-3 models: Phi-3's own, and the options of the bypass."""

import os
from dataclasses import fields
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import Phi3Config

from .bypass_config import NeuroFlowBypassConfig
from .lossless_config import NeuroFlowLosslessConfig


@strict
class NeuroFlowPhi3Config(Phi3Config):
    r"""
    Configuration of [`NeuroFlowPhi3Model`] and [`NeuroFlowPhi3ForCausalLM`]: all fields of
    [`~transformers.Phi3Config`], and

    Args:
        bypass (`dict`, *optional*):
            Options of [`NeuroFlowBypassConfig`] that differ from its defaults, such as
            `{"gate_layer": 1, "cache_layers": [24], "threshold": 0.65}`; `{}` for all defaults. None, the default: the
            model is Phi-3. They are saved with the model; a call can override them, `generate(..., bypass={...})`.
        bypass_similarities (`dict`, *optional*):
            By gate layer, such as `"1"`, the percentiles of the similarities that the gate sees on this checkpoint, as
            `calibrate_bypass` of the model stores them. The option `rate` of a bypass needs them.
        lossless (`dict`, *optional*):
            Options of [`NeuroFlowLosslessConfig`] that differ from its defaults, such as the layers that drafts skip:
            `{"bypass": {"cache_layers": [8, 9, 10]}}`. Used by `generate(..., lossless=True)`; a call can override
            them, `generate(..., lossless={...})`.

    Raises:
        ValueError: for a bypass or lossless option that does not exist or is out of range, and for a layer that does
            not exist.
    """

    model_type = "neuroflow_phi3"

    bypass: dict | None = None
    bypass_similarities: dict | None = None
    lossless: dict | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """As transformers' method, but with NeuroFlow's model type for Phi-3's, and without code that it may name."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config_dict = dict(config_dict)
        if config_dict.get("model_type") == Phi3Config.model_type:
            config_dict["model_type"] = cls.model_type
            config_dict.pop("auto_map", None)  # early Phi-3 checkpoints have modeling files of their own
        return config_dict, kwargs

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHECKS and value is not None:
            value = CHECKS[name](value, self.num_hidden_layers)
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs: Any) -> None:
        for name in {field.name for field in fields(NeuroFlowBypassConfig)} & kwargs.keys():  # would have no effect
            raise ValueError(f"`{name}` is an option of the bypass; pass `bypass={{{name!r}: {kwargs[name]!r}}}`.")
        super().__post_init__(**kwargs)


def checked_bypass(options: dict, num_layers: int) -> dict:
    """A copy of the bypass's options. Raises a ValueError unless all are known and in range."""
    resolved = NeuroFlowBypassConfig.from_options(options).resolve_layers(num_layers)
    return {name: getattr(resolved, name) for name in options}


def checked_similarities(similarities: dict, num_layers: int) -> dict:
    """A copy of the percentiles by gate layer. Raises a ValueError for other keys and values."""
    for layer, values in similarities.items():
        if layer not in map(str, range(num_layers)):
            raise ValueError(f"`bypass_similarities` names layer {layer!r}; the model has {num_layers}, '0' and on.")
        if not isinstance(values, list) or not values or not all(isinstance(value, float | int) for value in values):
            raise ValueError(f"`bypass_similarities` of layer {layer} are {values!r}; expected a list of numbers.")
    return dict(similarities)


def checked_lossless(options: dict, num_layers: int) -> dict:
    """A copy of the options of lossless generation. Raises a ValueError unless all are known and in range."""
    resolved = NeuroFlowLosslessConfig.from_options(options)
    resolved.draft_options(num_layers).resolve_layers(num_layers)
    return {name: getattr(resolved, name) for name in options}


CHECKS = {"bypass": checked_bypass, "bypass_similarities": checked_similarities, "lossless": checked_lossless}


def adopt_phi3_config(config: Phi3Config) -> NeuroFlowPhi3Config:
    """`config` itself if it is NeuroFlow's, else one made from a stock Phi-3 configuration."""
    if config.model_type == NeuroFlowPhi3Config.model_type:  # classes differ if one is loaded from the Hub
        return cast(NeuroFlowPhi3Config, config)
    if config.model_type != Phi3Config.model_type:
        raise ValueError(f"This is a configuration of `{config.model_type}`; expected `phi3` or `neuroflow_phi3`.")
    options = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    adopted = NeuroFlowPhi3Config(**options)
    adopted._attn_implementation = config._attn_implementation
    return adopted


NeuroFlowPhi3Config.register_for_auto_class()

__all__ = ["NeuroFlowPhi3Config"]
