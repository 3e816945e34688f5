"""DINOv2 over video. The CLS token, and registers if there are any, are always active."""

from typing import Any

import torch
from torch import nn
from transformers import Dinov2Model, conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings, Dinov2Layer, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_neuroflow_dinov2 import NeuroFlowDinov2Config
from .frame import NeuroFlowVisionOutput
from .gate_config import GateOption
from .pooling import Pooling
from .stream import NeuroFlowStream
from .streaming_config import as_config
from .streaming_model import StreamingModel, forward_frame, wrap_tower
from .tower import LayerParts, TowerLayer, VisionTower


def mlp_width(config: Any) -> int:
    """The width in an MLP. SwiGLU keeps two thirds of it, a multiple of 8, in three products: half again as much."""
    width = int(config.hidden_size * config.mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 * 3 // 2 if config.use_swiglu_ffn else width


class Dinov2TowerLayer(TowerLayer):
    """A [`TowerLayer`] with DINOv2's names."""

    def parts(self: Any) -> LayerParts:
        attention = self.attention
        return LayerParts(
            norm1=self.norm1,
            attention=attention,
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            output=attention.o_proj,
            norm2=self.norm2,
            mlp=self.mlp,
            eager=eager_attention_forward,
            num_heads=attention.num_attention_heads,
            scaling=attention.scaling,
            dropout=attention.attention_dropout,
            dim=attention.config.hidden_size,
            inner=mlp_width(attention.config),
            scale1=self.layer_scale1,
            scale2=self.layer_scale2,
        )


class NeuroFlowDinov2Layer(Dinov2TowerLayer, Dinov2Layer):
    """See [`TowerLayer`]."""


class Dinov2Tower(StreamingModel, VisionTower):
    """
    What models with and without registers share. Modifications: those of [`StreamingModel`]; `forward` takes a
    `stream`, and then returns [`NeuroFlowVisionOutput`]; `from_dinov2` wraps a loaded model.
    """

    config_class: Any
    stock_class: type
    layer_class: type
    embeddings: Any

    def __init__(self, config: Any):
        super().__init__(as_config(self.config_class, config))
        for layer in self.encoder_layers():
            layer.__class__ = self.layer_class
            assert hasattr(layer.attention, "q_proj"), "DINOv2 with streams needs a newer transformers, such as 5.23"
        self.num_prefix_tokens = 1 + getattr(self.config, "num_register_tokens", 0)

    @classmethod
    def adopt_checkpoints(cls) -> None:
        """Register the class for `AutoModel`, and for checkpoints, whose weights have other names than the modules."""
        cls.register_for_auto_class("AutoModel")  # type: ignore[attr-defined]
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(cls.stock_class.__name__) or []
        conversion_mapping.register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)

    @classmethod
    def from_dinov2(cls, model: Any, **gate_options: GateOption) -> Any:
        """Wrap a loaded DINOv2, as [`NeuroFlowSiglipVisionModel.from_siglip`]."""
        return wrap_tower(cls, model, cls.stock_class, gate_options)

    def patch_projection(self) -> nn.Conv2d:
        return self.embeddings.patch_embeddings.projection

    def positions(self) -> torch.Tensor:
        return self.embeddings.position_embeddings[0, 1:]

    def prefix_tokens(self) -> torch.Tensor:
        cls_token = self.embeddings.cls_token[0] + self.embeddings.position_embeddings[0, :1]
        registers = getattr(self.embeddings, "register_tokens", None)
        return cls_token if registers is None else torch.cat([cls_token, registers[0]])

    def before_layers(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embeddings.dropout(tokens)

    def encoder_layers(self: Any) -> list[TowerLayer]:
        return list(self.encoder.layer)

    def final_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.layernorm(hidden)

    def pooling(self, exact: bool) -> Pooling:
        return Pooling()

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        stream: NeuroFlowStream | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | NeuroFlowVisionOutput | tuple:
        """As [`NeuroFlowSiglipVisionModel.forward`], but DINOv2 always interpolates positions where it must."""
        if stream is None:
            return super().forward(pixel_values, bool_masked_pos, attention_mask, **kwargs)
        if bool_masked_pos is not None or attention_mask is not None:
            raise ValueError("Masks are not supported with a stream, which encodes what changed. Leave one out.")
        if self.training and self.config.drop_path_rate:
            raise ValueError("Stochastic depth drops whole images; call `model.eval()`, or set `drop_path_rate` to 0.")
        return forward_frame(self, pixel_values, stream, True, kwargs)


class NeuroFlowDinov2Model(Dinov2Tower, Dinov2Model):
    """DINOv2 over video. Loads any stock checkpoint, no training needed. Modifications: see [`Dinov2Tower`]."""

    config: NeuroFlowDinov2Config
    config_class = NeuroFlowDinov2Config
    stock_class, layer_class, bicubic_embeddings = Dinov2Model, NeuroFlowDinov2Layer, Dinov2Embeddings
    _no_split_modules = ["Dinov2Embeddings", "NeuroFlowDinov2Layer"]
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]


NeuroFlowDinov2Model.adopt_checkpoints()

__all__ = ["NeuroFlowDinov2Model"]
