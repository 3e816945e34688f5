"""What configurations of vision models share: the gate's options, and reading a stock `config.json`."""

import os
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, cast

from transformers import PreTrainedConfig

from .gate_config import NeuroFlowGateConfig

Config = TypeVar("Config", bound=PreTrainedConfig)


class AdoptsStock:
    """Configuration classes that read the stock model's `config.json` as their own."""

    model_type: ClassVar[str]
    stock_model_type: ClassVar[str]  # of the checkpoints that are read

    @classmethod
    def adopt_model_type(cls, model_type: str | None) -> str | None:
        """The NeuroFlow model type that takes checkpoints of `model_type`; other types are returned as they are."""
        return cls.model_type if model_type == cls.stock_model_type else model_type

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """As transformers' method, but with NeuroFlow's model types for the stock ones."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        config_dict = dict(config_dict)
        for part in (config_dict, config_dict.get("vision_config")):
            if isinstance(part, dict) and "model_type" in part:
                part["model_type"] = cls.adopt_model_type(part["model_type"])
        return config_dict, kwargs


class TowerConfig(AdoptsStock):
    """The configuration of a vision tower; it has a field `gate: dict | None = None`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gate":
            NeuroFlowGateConfig.from_options(value)
            value = dict(value or {})
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs: Any) -> None:
        self.adopt_model_type(kwargs.pop("model_type", None))
        refuse_flat_gate_options(kwargs)
        super().__post_init__(**kwargs)  # type: ignore[misc]  # transformers' method


def refuse_flat_gate_options(kwargs: dict) -> None:
    """Raise a ValueError for a gate option outside `gate`, where it would have no effect."""
    for field in fields(NeuroFlowGateConfig):
        if field.name in kwargs:
            raise ValueError(
                f"`{field.name}` is an option of the gate; pass `gate={{{field.name!r}: {kwargs[field.name]!r}}}`."
            )


def as_config(config_class: type[Config], value: dict | PreTrainedConfig | None) -> Config:
    """`value` as a `config_class`: the defaults for `None`, or made from a dict or a stock configuration."""
    if value is None or isinstance(value, dict):
        return config_class(**(value or {}))
    if value.model_type == config_class.model_type:  # classes differ if one is loaded from the Hub
        return cast(Config, value)
    config = config_class(**value.to_dict())
    config._attn_implementation = value._attn_implementation
    return config
