"""Configurations of the NeuroFlow SigLIP models: SigLIP's own, and the options of the gate."""

import copy
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.dataclasses import strict
from transformers import SiglipConfig, SiglipTextConfig, SiglipVisionConfig

from .streaming_config import AdoptsStock, TowerConfig, as_config, refuse_flat_gate_options

SIGLIP_MODEL_TYPES = {"siglip": "neuroflow_siglip", "siglip_vision_model": "neuroflow_siglip_vision_model"}


class AdoptsSiglip(AdoptsStock):
    """Configuration classes that read SigLIP's `config.json` as their own; NaFlex is refused."""

    @classmethod
    def adopt_model_type(cls, model_type: str | None) -> str | None:
        """
        The NeuroFlow model type that takes checkpoints of `model_type`; other types are returned as they are.

        Raises:
            ValueError: for SigLIP 2 in its NaFlex variant, which packs patches of several images at native resolution.
        """
        if model_type is None:
            return None
        if model_type.startswith("siglip2"):
            raise ValueError(
                f"This checkpoint's model type is `{model_type}`, SigLIP 2 in its NaFlex variant (patches of varying "
                "resolution, packed). NeuroFlow needs a fixed patch grid: use a fixed-resolution SigLIP or SigLIP 2 "
                "checkpoint, whose model type is `siglip` (for example one named `siglip2-...-patch16-256`)."
            )
        return SIGLIP_MODEL_TYPES.get(model_type, model_type)


@strict
class NeuroFlowSiglipVisionConfig(AdoptsSiglip, TowerConfig, SiglipVisionConfig):
    r"""
    Configuration of [`NeuroFlowSiglipVisionModel`]: all fields of [`~transformers.SiglipVisionConfig`], and

    Args:
        gate (`dict`, *optional*):
            Options of [`NeuroFlowGateConfig`] that differ from its defaults, such as `{"threshold": 0.02}`.
            `new_stream()` starts from them, and they are saved with the model.

    Raises:
        ValueError: for a gate option that does not exist or is out of range, and for NaFlex checkpoints.
    """

    model_type = "neuroflow_siglip_vision_model"
    base_config_key = "vision_config"

    gate: dict | None = None


@strict
class NeuroFlowSiglipTextConfig(SiglipTextConfig):
    """
    SigLIP's text configuration, without its default special tokens: they lie outside of its default vocabulary, which
    transformers would warn about on every load. SigLIP's text tower reads neither.
    """

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


@strict
class NeuroFlowSiglipConfig(AdoptsSiglip, SiglipConfig):
    r"""
    Configuration of [`NeuroFlowSiglipModel`] and [`NeuroFlowSiglipForImageClassification`]: all fields of
    [`~transformers.SiglipConfig`]. `config.gate` reads and sets `config.vision_config.gate`.

    Raises:
        ValueError: for a gate option that does not exist or is out of range, and for NaFlex checkpoints.
    """

    model_type = "neuroflow_siglip"
    if TYPE_CHECKING:  # what `__post_init__` makes of transformers' fields, which also take dicts and None
        vision_config: NeuroFlowSiglipVisionConfig
        text_config: SiglipTextConfig

    # transformers 5.17 reads `sub_configs`, 5.23 `sub_configs_defaults`
    sub_configs_defaults = {
        "vision_config": NeuroFlowSiglipVisionConfig,  # type: ignore[dict-item]  # transformers resolves classes
        "text_config": NeuroFlowSiglipTextConfig,  # type: ignore[dict-item]
    }
    sub_configs = {"vision_config": NeuroFlowSiglipVisionConfig, "text_config": NeuroFlowSiglipTextConfig}

    def __post_init__(self, **kwargs: Any) -> None:
        self.adopt_model_type(kwargs.pop("model_type", None))
        gate = kwargs.pop("gate", None)
        refuse_flat_gate_options(kwargs)
        self.vision_config = as_config(NeuroFlowSiglipVisionConfig, self.vision_config)
        self.text_config = as_config(NeuroFlowSiglipTextConfig, self.text_config)
        if gate is not None:
            self.vision_config = copy.deepcopy(self.vision_config)  # it may be the caller's
            self.gate = gate
        super().__post_init__(**kwargs)

    @property
    def gate(self) -> dict:
        """The gate's options, those of the vision configuration."""
        return cast(dict, self.vision_config.gate)  # setting None stores an empty dict

    @gate.setter
    def gate(self, options: dict | None) -> None:
        self.vision_config.gate = options


NeuroFlowSiglipConfig.register_for_auto_class()
NeuroFlowSiglipVisionConfig.register_for_auto_class()

__all__ = ["NeuroFlowSiglipConfig", "NeuroFlowSiglipVisionConfig"]
