"""CLIP's vision tower over video. The CLS token is always active."""

import torch
from transformers import CLIPVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_neuroflow_clip import NeuroFlowCLIPVisionConfig
from .frame import NeuroFlowVisionOutput
from .gate_config import GateOption
from .pooling import Pooling
from .stream import NeuroFlowStream
from .streaming_config import as_config
from .streaming_model import StreamingModel, forward_frame, wrap_tower
from .tower import TowerLayer, VisionTower


class NeuroFlowCLIPEncoderLayer(TowerLayer, CLIPEncoderLayer):
    """See [`TowerLayer`]."""

    eager = staticmethod(eager_attention_forward)


class NeuroFlowCLIPVisionModel(StreamingModel, VisionTower, CLIPVisionModel):
    """
    CLIP's vision tower over video. Loads stock checkpoints, with or without their text tower. As in transformers'
    class, `pooler_output` is the CLS token before CLIP's projection.

    Modifications:

    - those of [`StreamingModel`].
    - `forward` takes a `stream`; with one, it encodes only active patches and the CLS token, and returns
      [`NeuroFlowVisionOutput`].
    - the layers are [`TowerLayer`]s; names and shapes of parameters stay.
    - `from_clip` wraps a loaded model.
    """

    config: NeuroFlowCLIPVisionConfig
    config_class = NeuroFlowCLIPVisionConfig
    num_prefix_tokens, bicubic_embeddings = 1, CLIPVisionEmbeddings
    _no_split_modules = ["CLIPVisionEmbeddings", "NeuroFlowCLIPEncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^(text|visual)_projection\.", r"^logit_scale", r"^classifier\."]

    def __init__(self, config: NeuroFlowCLIPVisionConfig):
        super().__init__(as_config(NeuroFlowCLIPVisionConfig, config))
        for layer in self.encoder.layers:
            layer.__class__ = NeuroFlowCLIPEncoderLayer

    @classmethod
    def from_clip(cls, model: CLIPVisionModel, **gate_options: GateOption) -> "NeuroFlowCLIPVisionModel":
        """
        Wrap a loaded `CLIPVisionModel`, as [`NeuroFlowSiglipVisionModel.from_siglip`].

        Raises:
            TypeError: if `model` is something else.
        """
        return wrap_tower(cls, model, CLIPVisionModel, gate_options)

    def prefix_tokens(self) -> torch.Tensor:
        embeddings = self.embeddings
        return embeddings.class_embedding + embeddings.position_embedding(embeddings.position_ids[:, :1])[0]

    def before_layers(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.pre_layrnorm(tokens)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden  # only the pooled token is normed

    def pooling(self, exact: bool) -> Pooling:
        return Pooling(self.post_layernorm)

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        stream: NeuroFlowStream | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | NeuroFlowVisionOutput | tuple:
        """As [`NeuroFlowSiglipVisionModel.forward`]. Without a stream, this is CLIP."""
        if stream is None:
            return super().forward(pixel_values, interpolate_pos_encoding, **kwargs)
        return forward_frame(self, pixel_values, stream, interpolate_pos_encoding, kwargs)


NeuroFlowCLIPVisionModel.register_for_auto_class("AutoModel")

# A vision tower's files have this prefix, as transformers' own.
register_checkpoint_conversion_mapping(
    "NeuroFlowCLIPVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)

__all__ = ["NeuroFlowCLIPVisionModel"]
