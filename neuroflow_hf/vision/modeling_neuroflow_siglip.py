"""
SigLIP whose vision tower can follow a video: patches that did not change since the last frame are not encoded again.

What differs from transformers' SigLIP: every forward takes a `stream`. Without one, it is SigLIP, bit for bit.
"""

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import SiglipModel, SiglipVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoderLayer,
    SiglipForImageClassification,
    SiglipPreTrainedModel,
    SiglipTextModel,
    SiglipVisionEmbeddings,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adapter_files import read_adapter, write_adapter
from .configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig
from .frame import NeuroFlowVisionOutput
from .gate_config import GateOption
from .pooling import ProbePooling
from .sparse_adapter import SparseAdapter
from .stream import NeuroFlowStream
from .streaming_config import as_config
from .streaming_model import (
    GATE_FIELDS,
    StreamingModel,
    empty_wrapper,
    forward_frame,
    pop_return_dict,
    refuse_recording,
    require_model,
    wrap_tower,
)
from .tower import TowerLayer, VisionTower


@dataclass
class NeuroFlowSiglipImageClassifierOutput(ImageClassifierOutput):
    """Output of the classifier for one frame of B streams: logits, and the gate's fields as in the vision output."""

    active_mask: torch.Tensor | None = None
    surprise: torch.Tensor | None = None
    skip_rate: torch.Tensor | None = None
    cost: torch.Tensor | None = None


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")


class NeuroFlowSiglipEncoderLayer(TowerLayer, SiglipEncoderLayer):
    """
    Modifications:

    - `forward` takes a `step`; with one, the layer runs the layer function of the stream's mode.
    """

    eager = staticmethod(eager_attention_forward)


class NeuroFlowSiglipPreTrainedModel(StreamingModel, SiglipPreTrainedModel):
    """
    Modifications:

    - those of [`StreamingModel`].
    - `from_pretrained` takes a `sparse_adapter`, and `save_sparse_adapter` is added.
    - `save_pretrained` names the classes for every auto class in the configuration, and leaves a sparse adapter out.
    """

    config: NeuroFlowSiglipConfig
    config_class: type[NeuroFlowSiglipConfig | NeuroFlowSiglipVisionConfig]
    _no_split_modules = [*SiglipPreTrainedModel._no_split_modules, "NeuroFlowSiglipEncoderLayer"]

    @classmethod
    def from_pretrained(cls, *args: Any, sparse_adapter: str | os.PathLike | None = None, **kwargs: Any) -> Any:
        """
        As transformers' method.

        Args:
            sparse_adapter (`str` or `os.PathLike`, *optional*):
                Folder or Hub repository of an adapter that `neuroflow distill` wrote for this checkpoint. It changes
                what is computed on sparse frames, and `new_stream` then starts from the options it was trained for.

        Raises:
            OSError: if there is no adapter.
            ValueError: if it is damaged, or was trained for another checkpoint.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        if sparse_adapter is not None:
            tower = vision_tower(loaded[0] if isinstance(loaded, tuple) else loaded)
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            tower.sparse_adapter = read_adapter(sparse_adapter, tower, **hub_options)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        As transformers' method; the configuration also names the classes for every auto class. A sparse adapter is
        not saved, see `save_sparse_adapter`.
        """
        self.config.auto_map = dict(AUTO_MAPS[self.config.model_type])
        if vision_tower(self).sparse_adapter is not None and kwargs.get("state_dict") is None:
            state = self.state_dict()
            kwargs["state_dict"] = {name: state[name] for name in state if "sparse_adapter." not in name}
        super().save_pretrained(*args, **kwargs)

    def save_sparse_adapter(self, folder: str | os.PathLike) -> None:
        """
        Write the model's sparse adapter to a folder, which `from_pretrained(..., sparse_adapter=folder)` reads.

        Raises:
            ValueError: if the model has none.
        """
        tower = vision_tower(self)
        if tower.sparse_adapter is None:
            raise ValueError(
                "The model has no sparse adapter to save; `from_pretrained` takes one as `sparse_adapter=`."
            )
        write_adapter(tower.sparse_adapter, tower, folder)


class NeuroFlowSiglipVisionModel(NeuroFlowSiglipPreTrainedModel, VisionTower, SiglipVisionModel):
    """
    SigLIP's vision tower over video. Loads any fixed-resolution SigLIP or SigLIP 2 checkpoint, no training needed.

    Modifications:

    - `forward` takes a `stream`; with one, it encodes only active patches and returns [`NeuroFlowVisionOutput`].
    - the layers are [`NeuroFlowSiglipEncoderLayer`]s; names and shapes of parameters stay.
    - `from_siglip` wraps a loaded model.

    Example:

    ```python
    model = NeuroFlowSiglipVisionModel.from_pretrained("path/to/siglip")
    stream = model.new_stream(threshold=0.01)
    for pixel_values in frames:  # (1, 3, H, W) each
        output = model(pixel_values=pixel_values, stream=stream)
        output.pooler_output, output.cost
    ```
    """

    config: NeuroFlowSiglipVisionConfig  # type: ignore[assignment]  # as in transformers' own class
    config_class = NeuroFlowSiglipVisionConfig
    bicubic_embeddings = SiglipVisionEmbeddings
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^logit_(scale|bias)$", r"^classifier\."]

    def __init__(self, config: NeuroFlowSiglipVisionConfig):
        super().__init__(as_config(NeuroFlowSiglipVisionConfig, config))
        for layer in self.encoder.layers:
            layer.__class__ = NeuroFlowSiglipEncoderLayer
        self.sparse_adapter: SparseAdapter | None = None

    @classmethod
    def from_siglip(cls, model: SiglipVisionModel, **gate_options: GateOption) -> "NeuroFlowSiglipVisionModel":
        """
        Wrap a loaded SigLIP vision model. Modules and parameters are shared, nothing is copied; adapters and quantised
        layers stay in place.

        Args:
            model: a `SiglipVisionModel`.
            gate_options: options of [`NeuroFlowGateConfig`] for the streams of this model.

        Raises:
            TypeError: if `model` is something else.
        """
        return wrap_tower(cls, model, SiglipVisionModel, gate_options)

    def pooling(self, exact: bool) -> ProbePooling | None:
        return ProbePooling(self.head, self.config, exact) if self.use_head else None

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        stream: NeuroFlowStream | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | NeuroFlowVisionOutput | tuple:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): normalised images; with a stream, the next
                frame of each of its B streams.
            interpolate_pos_encoding (`bool`, defaults to `False`): for resolutions other than the checkpoint's.
            stream ([`NeuroFlowStream`], *optional*): from `new_stream()`. Without one, this is SigLIP.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                As in transformers' class. The first frame of a stream decides which ones it keeps: name the layers
                that you read, since each takes as much memory as `last_hidden_state`.

        Raises:
            ValueError: with a stream, if the frame does not fit it or has pixels that are not finite, if attentions
                are requested, or hidden states that the stream does not keep.
        """
        if stream is None:
            return super().forward(pixel_values, interpolate_pos_encoding, **kwargs)
        return forward_frame(self, pixel_values, stream, interpolate_pos_encoding, kwargs)


class NeuroFlowSiglipModel(NeuroFlowSiglipPreTrainedModel, SiglipModel):
    """
    SigLIP, text and vision, whose vision tower can follow a video; loads any fixed-resolution SigLIP checkpoint.

    Modifications:

    - the vision tower is a [`NeuroFlowSiglipVisionModel`].
    - `get_image_features` takes a `stream`; `forward` passes one on.
    - `from_siglip` wraps a loaded model.

    `get_image_features(pixel_values=..., stream=stream)` gives the frame's embedding in `pooler_output`; `forward`
    compares the frame with texts.
    """

    config: NeuroFlowSiglipConfig
    config_class = NeuroFlowSiglipConfig

    def __init__(self, config: NeuroFlowSiglipConfig):
        config = as_config(NeuroFlowSiglipConfig, config)
        SiglipPreTrainedModel.__init__(self, config)
        self.text_model = SiglipTextModel._from_config(config.text_config)
        self.vision_model = NeuroFlowSiglipVisionModel._from_config(config.vision_config)
        self.logit_scale = nn.Parameter(torch.randn(1))
        self.logit_bias = nn.Parameter(torch.randn(1))
        self.post_init()

    @classmethod
    def from_siglip(cls, model: SiglipModel, **gate_options: GateOption) -> "NeuroFlowSiglipModel":
        """Wrap a loaded `SiglipModel`, as [`NeuroFlowSiglipVisionModel.from_siglip`]."""
        require_model(model, SiglipModel)
        wrapper = empty_wrapper(cls, model, gate=gate_options)
        wrapper.vision_model = NeuroFlowSiglipVisionModel.from_siglip(model.vision_model, **gate_options)
        for name in ("text_model", "logit_scale", "logit_bias"):
            setattr(wrapper, name, getattr(model, name))
        return wrapper.train(model.training)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        stream: NeuroFlowStream | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | NeuroFlowVisionOutput | tuple:
        """The vision tower's output, see [`NeuroFlowSiglipVisionModel.forward`]; the embedding is `pooler_output`."""
        return self.vision_model(pixel_values, interpolate_pos_encoding, stream=stream, return_dict=True, **kwargs)


class NeuroFlowSiglipForImageClassification(NeuroFlowSiglipPreTrainedModel, SiglipForImageClassification):
    """
    SigLIP's image classifier (mean of the patches, linear head), whose vision tower can follow a video.

    Modifications:

    - the vision tower is a [`NeuroFlowSiglipVisionModel`].
    - `forward` takes a `stream`; with one, it returns [`NeuroFlowSiglipImageClassifierOutput`].
    """

    config: NeuroFlowSiglipConfig
    config_class = NeuroFlowSiglipConfig
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^logit_(scale|bias)$"]

    def __init__(self, config: NeuroFlowSiglipConfig):
        config = as_config(NeuroFlowSiglipConfig, config)
        SiglipPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0
        self.vision_model = NeuroFlowSiglipVisionModel._from_config(config.vision_config)
        hidden_size = config.vision_config.hidden_size
        self.classifier = nn.Linear(hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        stream: NeuroFlowStream | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput | NeuroFlowSiglipImageClassifierOutput | tuple:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): images, or frames of the stream.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): as in transformers' class.
            interpolate_pos_encoding (`bool`, defaults to `False`): for resolutions other than the checkpoint's.
            stream ([`NeuroFlowStream`], *optional*): from `new_stream()`. Without one, this is SigLIP's classifier.
        """
        if stream is None:
            return super().forward(pixel_values, labels, interpolate_pos_encoding, **kwargs)
        return_dict = pop_return_dict(kwargs, self.config)
        refuse_recording(self.config, kwargs, "output_attentions", "output_hidden_states")
        if stream.gate.mode == "eliminate" and stream.gate.least_active == 0:
            raise ValueError(
                "The classifier averages the active patches, and `min_active_tokens=0` allows for none. Make the "
                "stream with `min_active_tokens` of at least 1."
            )
        vision = self.vision_model(pixel_values, interpolate_pos_encoding, stream=stream, return_dict=True)
        logits = self.classifier(mean_of_tokens(vision.last_hidden_state, vision.token_mask))
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        gate_fields = {name: vision[name] for name in GATE_FIELDS if name in vision}
        output = NeuroFlowSiglipImageClassifierOutput(loss=loss, logits=logits, **gate_fields)
        return output if return_dict else output.to_tuple()


def vision_tower(model: nn.Module) -> NeuroFlowSiglipVisionModel:
    """The vision tower of one of this module's models, or the model itself if it is one."""
    return cast(NeuroFlowSiglipVisionModel, getattr(model, "vision_model", model))


def mean_of_tokens(hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens, [B, A, D] to [B, D]; with a mask [B, A], over those that are real."""
    if token_mask is None:
        return hidden_states.mean(dim=1)
    return (hidden_states * token_mask.unsqueeze(-1)).sum(dim=1) / token_mask.sum(dim=1, keepdim=True)


CONFIGURATION, MODELING = "configuration_neuroflow_siglip", "modeling_neuroflow_siglip"
AUTO_MAPS = {
    "neuroflow_siglip": {
        "AutoConfig": f"{CONFIGURATION}.NeuroFlowSiglipConfig",
        "AutoModel": f"{MODELING}.NeuroFlowSiglipModel",
        "AutoModelForZeroShotImageClassification": f"{MODELING}.NeuroFlowSiglipModel",
        "AutoModelForImageClassification": f"{MODELING}.NeuroFlowSiglipForImageClassification",
    },
    "neuroflow_siglip_vision_model": {
        "AutoConfig": f"{CONFIGURATION}.NeuroFlowSiglipVisionConfig",
        "AutoModel": f"{MODELING}.NeuroFlowSiglipVisionModel",
    },
}

NeuroFlowSiglipModel.register_for_auto_class("AutoModel")
NeuroFlowSiglipVisionModel.register_for_auto_class("AutoModel")
NeuroFlowSiglipForImageClassification.register_for_auto_class("AutoModelForImageClassification")

# A vision tower's files have this prefix, as transformers' own.
register_checkpoint_conversion_mapping(
    "NeuroFlowSiglipVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)

__all__ = [
    "NeuroFlowSiglipForImageClassification",
    "NeuroFlowSiglipImageClassifierOutput",
    "NeuroFlowSiglipModel",
    "NeuroFlowSiglipVisionModel",
]
