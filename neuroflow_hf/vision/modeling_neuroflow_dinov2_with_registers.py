"""DINOv2 with registers over video."""

from transformers import Dinov2WithRegistersModel
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer

from .configuration_neuroflow_dinov2 import NeuroFlowDinov2WithRegistersConfig
from .modeling_neuroflow_dinov2 import Dinov2Tower, Dinov2TowerLayer


class NeuroFlowDinov2WithRegistersLayer(Dinov2TowerLayer, Dinov2WithRegistersLayer):
    """See [`TowerLayer`]."""


class NeuroFlowDinov2WithRegistersModel(Dinov2Tower, Dinov2WithRegistersModel):
    """DINOv2 with registers over video, as [`NeuroFlowDinov2Model`]."""

    config: NeuroFlowDinov2WithRegistersConfig
    config_class = NeuroFlowDinov2WithRegistersConfig
    stock_class, layer_class = Dinov2WithRegistersModel, NeuroFlowDinov2WithRegistersLayer
    _no_split_modules = ["Dinov2WithRegistersEmbeddings", "NeuroFlowDinov2WithRegistersLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]


NeuroFlowDinov2WithRegistersModel.adopt_checkpoints()

__all__ = ["NeuroFlowDinov2WithRegistersModel"]
