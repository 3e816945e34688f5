"""Configuration of the NeuroFlow Phi-3 models: Phi-3's own, and the options of the bypass."""

from dataclasses import fields

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
            model is Phi-3. A stored model keeps them; a call can lay others over them, `generate(..., bypass={...})`.
        lossless (`dict`, *optional*):
            Options of [`NeuroFlowLosslessConfig`] that differ from its defaults, above all which layers this
            checkpoint's drafts do without: `{"bypass": {"cache_layers": [8, 9, 10]}}`. Used by
            `generate(..., lossless=True)`; a call can lay others over them, `generate(..., lossless={...})`.

    Raises:
        ValueError: for a bypass or lossless option that does not exist or is out of range, and for a layer that does
            not exist.
    """

    model_type = "neuroflow_phi3"

    bypass: dict | None = None
    lossless: dict | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers' method; model type `phi3` comes back as NeuroFlow's, without the code it may name."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config_dict = dict(config_dict)
        if config_dict.get("model_type") == Phi3Config.model_type:
            config_dict["model_type"] = cls.model_type
            config_dict.pop("auto_map", None)  # early Phi-3 checkpoints brought modeling files of their own
        return config_dict, kwargs

    def __setattr__(self, name, value):
        if name == "bypass":
            value = checked_bypass(value, self.num_hidden_layers)
        if name == "lossless":
            value = checked_lossless(value, self.num_hidden_layers)
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        refuse_flat_bypass_options(kwargs)
        super().__post_init__(**kwargs)


def checked_bypass(options: dict | None, num_layers: int) -> dict | None:
    """A copy of the bypass's options, all known and in range; what is no dict is left to the type check."""
    if not isinstance(options, dict):
        return options
    resolved = NeuroFlowBypassConfig.from_options(options).resolve(num_layers)
    return {name: getattr(resolved, name) for name in options}


def checked_lossless(options: dict | None, num_layers: int) -> dict | None:
    """A copy of the options of lossless generation, all known and in range; what is no dict is left to the check."""
    if not isinstance(options, dict):
        return options
    resolved = NeuroFlowLosslessConfig.from_options(options)
    resolved.draft_bypass(num_layers)
    return {name: getattr(resolved, name) for name in options}


def refuse_flat_bypass_options(kwargs: dict):
    """Raise for a bypass option that stands outside `bypass`, where it would have no effect."""
    for field in fields(NeuroFlowBypassConfig):
        if field.name in kwargs:
            raise ValueError(
                f"`{field.name}` is an option of the bypass; pass `bypass={{{field.name!r}: {kwargs[field.name]!r}}}`."
            )


def adopt_phi3_config(config: Phi3Config) -> Phi3Config:
    """`config` if it is NeuroFlow's by its model type, else one made from a stock Phi-3 configuration."""
    if config.model_type == NeuroFlowPhi3Config.model_type:
        return config
    if config.model_type != Phi3Config.model_type:
        raise ValueError(f"This is a configuration of `{config.model_type}`; expected `phi3` or `neuroflow_phi3`.")
    options = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    adopted = NeuroFlowPhi3Config(**options)
    adopted._attn_implementation = config._attn_implementation
    return adopted


NeuroFlowPhi3Config.register_for_auto_class()

__all__ = ["NeuroFlowPhi3Config"]
