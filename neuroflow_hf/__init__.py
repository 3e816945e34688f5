"""SigLIP over video, and Phi-3 over text, without computing again what did not change."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    SiglipProcessor,
)

from .attachment import Attachment, StreamSession, attach
from .export import export_stream
from .language.bypass_config import NeuroFlowBypassConfig
from .language.bypass_state import BypassStatistics
from .language.configuration_neuroflow_phi3 import NeuroFlowPhi3Config
from .language.lossless_config import NeuroFlowLosslessConfig
from .language.modeling_neuroflow_phi3 import NeuroFlowPhi3ForCausalLM, NeuroFlowPhi3Model
from .language.speculative_decoding import LosslessCounts, NeuroFlowLosslessOutput
from .vision.configuration_neuroflow_clip import NeuroFlowCLIPVisionConfig
from .vision.configuration_neuroflow_dinov2 import NeuroFlowDinov2Config, NeuroFlowDinov2WithRegistersConfig
from .vision.configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig
from .vision.frame import NeuroFlowVisionOutput
from .vision.gate_config import PRESETS, NeuroFlowGateConfig
from .vision.modeling_neuroflow_clip import NeuroFlowCLIPVisionModel
from .vision.modeling_neuroflow_dinov2 import NeuroFlowDinov2Model
from .vision.modeling_neuroflow_dinov2_with_registers import NeuroFlowDinov2WithRegistersModel
from .vision.modeling_neuroflow_siglip import (
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipImageClassifierOutput,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionModel,
)
from .vision.stream import NeuroFlowStream

__version__ = "0.1.0"

AutoConfig.register(NeuroFlowSiglipConfig.model_type, NeuroFlowSiglipConfig)
AutoConfig.register(NeuroFlowSiglipVisionConfig.model_type, NeuroFlowSiglipVisionConfig)
AutoModel.register(NeuroFlowSiglipConfig, NeuroFlowSiglipModel)
AutoModel.register(NeuroFlowSiglipVisionConfig, NeuroFlowSiglipVisionModel)
AutoModelForZeroShotImageClassification.register(NeuroFlowSiglipConfig, NeuroFlowSiglipModel)
AutoModelForImageClassification.register(NeuroFlowSiglipConfig, NeuroFlowSiglipForImageClassification)
AutoProcessor.register(NeuroFlowSiglipConfig, SiglipProcessor)
for tower_config, tower_class in (
    (NeuroFlowDinov2Config, NeuroFlowDinov2Model),
    (NeuroFlowDinov2WithRegistersConfig, NeuroFlowDinov2WithRegistersModel),
    (NeuroFlowCLIPVisionConfig, NeuroFlowCLIPVisionModel),
):
    AutoConfig.register(tower_config.model_type, tower_config)
    AutoModel.register(tower_config, tower_class)
AutoConfig.register(NeuroFlowPhi3Config.model_type, NeuroFlowPhi3Config)
AutoModel.register(NeuroFlowPhi3Config, NeuroFlowPhi3Model)
AutoModelForCausalLM.register(NeuroFlowPhi3Config, NeuroFlowPhi3ForCausalLM)

__all__ = [
    "PRESETS",
    "Attachment",
    "BypassStatistics",
    "LosslessCounts",
    "NeuroFlowBypassConfig",
    "NeuroFlowCLIPVisionConfig",
    "NeuroFlowCLIPVisionModel",
    "NeuroFlowDinov2Config",
    "NeuroFlowDinov2Model",
    "NeuroFlowDinov2WithRegistersConfig",
    "NeuroFlowDinov2WithRegistersModel",
    "NeuroFlowGateConfig",
    "NeuroFlowLosslessConfig",
    "NeuroFlowLosslessOutput",
    "NeuroFlowPhi3Config",
    "NeuroFlowPhi3ForCausalLM",
    "NeuroFlowPhi3Model",
    "NeuroFlowSiglipConfig",
    "NeuroFlowSiglipForImageClassification",
    "NeuroFlowSiglipImageClassifierOutput",
    "NeuroFlowSiglipModel",
    "NeuroFlowSiglipVisionConfig",
    "NeuroFlowSiglipVisionModel",
    "NeuroFlowStream",
    "NeuroFlowVisionOutput",
    "StreamSession",
    "attach",
    "export_stream",
]
