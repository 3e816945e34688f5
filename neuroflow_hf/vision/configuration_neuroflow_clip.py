"""Configuration of the NeuroFlow CLIP vision model: CLIP's own, and the options of the gate."""

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig

from .streaming_config import TowerConfig


@strict
class NeuroFlowCLIPVisionConfig(TowerConfig, CLIPVisionConfig):
    r"""
    Configuration of [`NeuroFlowCLIPVisionModel`]: all fields of [`~transformers.CLIPVisionConfig`], and

    Args:
        gate (`dict`, *optional*): as in [`NeuroFlowSiglipVisionConfig`].
    """

    model_type = "neuroflow_clip_vision_model"
    stock_model_type = "clip_vision_model"

    gate: dict | None = None


NeuroFlowCLIPVisionConfig.register_for_auto_class()

__all__ = ["NeuroFlowCLIPVisionConfig"]
