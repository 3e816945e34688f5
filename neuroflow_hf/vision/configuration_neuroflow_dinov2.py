"""Configurations of the NeuroFlow DINOv2 models: DINOv2's own, and the options of the gate."""

from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config, Dinov2WithRegistersConfig

from .streaming_config import TowerConfig


@strict
class NeuroFlowDinov2Config(TowerConfig, Dinov2Config):
    r"""
    Configuration of [`NeuroFlowDinov2Model`]: all fields of [`~transformers.Dinov2Config`], and

    Args:
        gate (`dict`, *optional*): as in [`NeuroFlowSiglipVisionConfig`].
    """

    model_type = "neuroflow_dinov2"
    stock_model_type = "dinov2"

    gate: dict | None = None


@strict
class NeuroFlowDinov2WithRegistersConfig(TowerConfig, Dinov2WithRegistersConfig):
    r"""
    Configuration of [`NeuroFlowDinov2WithRegistersModel`]: those of [`~transformers.Dinov2WithRegistersConfig`], and

    Args:
        gate (`dict`, *optional*): as in [`NeuroFlowSiglipVisionConfig`].
    """

    model_type = "neuroflow_dinov2_with_registers"
    stock_model_type = "dinov2_with_registers"

    gate: dict | None = None


NeuroFlowDinov2Config.register_for_auto_class()
NeuroFlowDinov2WithRegistersConfig.register_for_auto_class()

__all__ = ["NeuroFlowDinov2Config", "NeuroFlowDinov2WithRegistersConfig"]
