"""SigLIP over video without computing again what did not change."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    SiglipProcessor,
)

from .configuration_neuroflow_gate import PRESETS, NeuroFlowGateConfig
from .configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig
from .modeling_neuroflow_siglip import (
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipImageClassifierOutput,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionModel,
    NeuroFlowSiglipVisionOutput,
)
from .neuroflow_stream import NeuroFlowStream

__version__ = "0.1.0"

AutoConfig.register(NeuroFlowSiglipConfig.model_type, NeuroFlowSiglipConfig)
AutoConfig.register(NeuroFlowSiglipVisionConfig.model_type, NeuroFlowSiglipVisionConfig)
AutoModel.register(NeuroFlowSiglipConfig, NeuroFlowSiglipModel)
AutoModel.register(NeuroFlowSiglipVisionConfig, NeuroFlowSiglipVisionModel)
AutoModelForZeroShotImageClassification.register(NeuroFlowSiglipConfig, NeuroFlowSiglipModel)
AutoModelForImageClassification.register(NeuroFlowSiglipConfig, NeuroFlowSiglipForImageClassification)
AutoProcessor.register(NeuroFlowSiglipConfig, SiglipProcessor)

__all__ = [
    "PRESETS",
    "NeuroFlowGateConfig",
    "NeuroFlowSiglipConfig",
    "NeuroFlowSiglipForImageClassification",
    "NeuroFlowSiglipImageClassifierOutput",
    "NeuroFlowSiglipModel",
    "NeuroFlowSiglipVisionConfig",
    "NeuroFlowSiglipVisionModel",
    "NeuroFlowSiglipVisionOutput",
    "NeuroFlowStream",
]
