"""
SigLIP whose vision tower can follow a video: patches that did not change since the last frame are not encoded again.

What differs from transformers' SigLIP: every forward takes a `stream`. Without one, it is SigLIP, bit for bit.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, SiglipModel, SiglipVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoder,
    SiglipEncoderLayer,
    SiglipForImageClassification,
    SiglipMultiheadAttentionPoolingHead,
    SiglipPreTrainedModel,
    SiglipTextModel,
    SiglipVisionEmbeddings,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adapter_files import read_adapter, write_adapter
from .configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig, as_config
from .frame import NeuroFlowSiglipVisionOutput, encode_frame
from .gate_config import GateOption, NeuroFlowGateConfig
from .hidden_states import requested_hidden_states
from .layer_step import LayerStep, layers_of
from .sparse_adapter import SparseAdapter
from .stream import NeuroFlowStream


@dataclass
class NeuroFlowSiglipImageClassifierOutput(ImageClassifierOutput):
    """Output of the classifier for one frame of B streams: logits, and the gate's fields as in the vision output."""

    active_mask: torch.Tensor | None = None
    surprise: torch.Tensor | None = None
    skip_rate: torch.Tensor | None = None
    cost: torch.Tensor | None = None


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
GATE_FIELDS = ("active_mask", "surprise", "skip_rate", "cost")
Model = TypeVar("Model", bound="NeuroFlowSiglipPreTrainedModel")


class NeuroFlowSiglipEncoderLayer(SiglipEncoderLayer):
    """
    Modifications:

    - `forward` takes a `step`; with one, the layer runs the layer function of the stream's mode.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        step: LayerStep | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`hidden_states` [B, N, D] without a step; with one, what the mode passes through its layers."""
        if step is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return step.mode.layer(self, hidden_states, step)


class NeuroFlowSiglipEncoder(SiglipEncoder):
    """
    Modifications:

    - the layers are [`NeuroFlowSiglipEncoderLayer`]s.
    """

    def __init__(self, config: NeuroFlowSiglipVisionConfig):
        nn.Module.__init__(self)
        self.config = config  # type: ignore[assignment]  # transformers' own vision tower passes it a vision config, too
        self.layers = nn.ModuleList([NeuroFlowSiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False


class NeuroFlowSiglipPreTrainedModel(SiglipPreTrainedModel):
    """
    Modifications:

    - `new_stream`, `stream_frames` and `get_video_features` are added.
    - `from_pretrained` takes a `sparse_adapter`, and `save_sparse_adapter` is added.
    - `save_pretrained` names the classes for every auto class in the configuration, and leaves a sparse adapter out.
    - `set_attn_implementation` also reaches modules shared with a model that was wrapped.
    """

    config: NeuroFlowSiglipConfig
    config_class: type[NeuroFlowSiglipConfig | NeuroFlowSiglipVisionConfig]
    _no_split_modules = [*SiglipPreTrainedModel._no_split_modules, "NeuroFlowSiglipEncoderLayer"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        False, so that weights are initialised as in transformers' own models: with custom code, transformers leaves
        out modules without parameters of their own, here every attention module.
        """
        return False

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

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' method. Modules shared with a wrapped model keep that model's config: set it there, too."""
        super().set_attn_implementation(*args, **kwargs)
        for tower in self.modules():
            if isinstance(tower, NeuroFlowSiglipVisionModel):
                for layer in layers_of(tower.encoder):
                    layer.self_attn.config._attn_implementation_internal = tower.config._attn_implementation

    @property
    def gate_options(self) -> dict:
        """The options that a new stream starts from: `gate` in the vision configuration."""
        return getattr(self.config, "vision_config", self.config).gate

    def new_stream(self, batch_size: int = 1, **gate_options: GateOption) -> NeuroFlowStream:
        """
        The memory of `batch_size` independent streams, to be passed as `stream=` with every frame.

        Args:
            batch_size (`int`, defaults to 1): B, the number of streams (cameras), one frame of each per call.
            gate_options: options of [`NeuroFlowGateConfig`], such as `threshold=`. They override the model's; with a
                sparse adapter, those that it was trained for, unless `mode` or `preset` is given.

        Raises:
            ValueError: for an option that does not exist or is out of range.
        """
        base, adapter = self.gate_options, vision_tower(self).sparse_adapter
        if adapter is not None and not {"mode", "preset"} & gate_options.keys():
            base = adapter.gate.to_dict()
        return NeuroFlowStream(NeuroFlowGateConfig.from_options(base, **gate_options), batch_size)

    def stream_frames(
        self,
        frames: Iterable[torch.Tensor],
        stream: NeuroFlowStream | None = None,
        interpolate_pos_encoding: bool = False,
        **gate_options: GateOption,
    ) -> Iterator[NeuroFlowSiglipVisionOutput | NeuroFlowSiglipImageClassifierOutput]:
        """
        Run the model on one frame after the other.

        Args:
            frames: pixel values, `(B, C, H, W)` each, or `(C, H, W)` for one stream.
            stream: the stream to continue; by default a new one of the first frame's batch size.
            interpolate_pos_encoding (`bool`, defaults to `False`): for resolutions other than the checkpoint's.
            gate_options: options of the gate for the new stream.

        Yields:
            The model's output for every frame, never as a tuple.
        """
        if stream is not None and gate_options:
            raise ValueError(
                f"Gate options ({', '.join(gate_options)}) go with a new stream; the one passed has its own, "
                "`stream.gate`."
            )
        forward = getattr(self, "get_image_features", self)  # the dual model's `forward` also needs a text
        for frame in frames:
            pixel_values = frame.unsqueeze(0) if frame.ndim == 3 else frame
            if stream is None:
                stream = self.new_stream(batch_size=len(pixel_values), **gate_options)
            yield forward(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, stream=stream, return_dict=True
            )

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        stream: NeuroFlowStream | None = None,
        return_patches: bool = False,
        interpolate_pos_encoding: bool = False,
        **gate_options: GateOption,
    ) -> NeuroFlowSiglipVisionOutput | NeuroFlowSiglipImageClassifierOutput:
        """
        The output for B clips of T frames, in the model's output class: each field has T as its second dimension.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(B, T, C, H, W)`): B clips, each its own stream.
            stream: the streams to continue; by default new ones.
            return_patches (`bool`, defaults to `False`):
                Also return `last_hidden_state` `(B, T, N, D)`, which is large; not in mode `eliminate`, where the
                number of patches differs from frame to frame.
            interpolate_pos_encoding, gate_options: as in `stream_frames`.

        Raises:
            ValueError: if the clips are not 5-dimensional or have no frame.
        """
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[1] == 0:
            raise ValueError(
                f"`pixel_values_videos` has shape {tuple(pixel_values_videos.shape)}; expected (clips, frames, "
                "channels, height, width) with at least one frame."
            )
        names = ("pooler_output", "logits", *GATE_FIELDS, *(("last_hidden_state",) if return_patches else ()))
        collected: dict[str, list[torch.Tensor]] = {}
        frames = pixel_values_videos.unbind(1)
        for output in self.stream_frames(frames, stream, interpolate_pos_encoding, **gate_options):
            if return_patches and output.get("token_mask") is not None:
                raise ValueError("Mode `eliminate` has no fixed set of patches to stack; use `return_patches=False`.")
            for name in names:
                if output.get(name) is not None:
                    collected.setdefault(name, []).append(output[name])
        stacked = {name: torch.stack(tensors, dim=1) for name, tensors in collected.items()}
        return type(output)(**stacked)  # type: ignore[arg-type]  # other fields are tuples, none of these


class NeuroFlowSiglipVisionModel(NeuroFlowSiglipPreTrainedModel, SiglipVisionModel):
    """
    SigLIP's vision tower over video. Loads any fixed-resolution SigLIP or SigLIP 2 checkpoint, no training needed.

    Modifications:

    - `forward` takes a `stream`; with one, it encodes only active patches and returns [`NeuroFlowSiglipVisionOutput`].
    - the encoder is a [`NeuroFlowSiglipEncoder`]; names and shapes of parameters stay.
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
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^logit_(scale|bias)$", r"^classifier\."]

    def __init__(self, config: NeuroFlowSiglipVisionConfig):
        config = as_config(NeuroFlowSiglipVisionConfig, config)
        SiglipPreTrainedModel.__init__(self, config)
        self.config = config
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = NeuroFlowSiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.use_head = getattr(config, "vision_use_head", True)  # transformers 5.17 has no such field
        if self.use_head:
            self.head = SiglipMultiheadAttentionPoolingHead(config)
        self.sparse_adapter: SparseAdapter | None = None
        self.post_init()

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
        require_model(model, SiglipVisionModel)
        wrapper = empty_wrapper(cls, model, gate=gate_options)
        for name in ("embeddings", "post_layernorm", *(("head",) if wrapper.use_head else ())):
            setattr(wrapper, name, getattr(model, name))
        for layer, shared in zip(wrapper.encoder.layers, model.encoder.layers, strict=True):
            share_module(layer, shared)
        # the hooks that record hidden states come along, and are not to be installed twice
        vars(wrapper)["_output_capturing_hooks_installed"] = hasattr(model, "_output_capturing_hooks_installed")
        return wrapper.train(model.training)

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        stream: NeuroFlowStream | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | NeuroFlowSiglipVisionOutput | tuple:
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
        return_dict = pop_return_dict(kwargs, self.config)
        refuse_recording(self.config, kwargs, "output_attentions")
        request = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        hidden_states = requested_hidden_states(request, self.config.num_hidden_layers)
        output = encode_frame(self, pixel_values, stream, interpolate_pos_encoding, hidden_states)
        return output if return_dict else output.to_tuple()


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
    ) -> BaseModelOutputWithPooling | NeuroFlowSiglipVisionOutput | tuple:
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


def pop_return_dict(kwargs: TransformersKwargs, config: PreTrainedConfig) -> bool:
    """Take `return_dict` out of the keywords; by default the configuration's, as in transformers."""
    return_dict = kwargs.pop("return_dict", None)  # type: ignore[typeddict-item]  # transformers' class lacks it
    return bool(config.return_dict if return_dict is None else return_dict)


def refuse_recording(config: PreTrainedConfig, kwargs: TransformersKwargs, *names: str) -> None:
    """Raise if one of these outputs is asked for, by keyword or by the configuration."""
    for name in names:
        if kwargs.get(name, getattr(config, name, False)):
            raise ValueError(
                f"`{name}` is not supported with a stream: the layers see only the active patches, which differ from "
                "frame to frame. Leave the stream out to record a dense forward."
            )


def require_model(model: nn.Module, expected: type) -> None:
    """Raise a TypeError unless `model` is an `expected`."""
    if not isinstance(model, expected):
        raise TypeError(f"Cannot wrap a {type(model).__name__}; expected a loaded transformers `{expected.__name__}`.")


def share_module(module: nn.Module, shared: nn.Module) -> None:
    """
    Make `module` share the children, parameters, hooks and flags of `shared`, but not its `forward`: accelerate
    replaces it in models that it spreads over devices, so its hook is attached again.
    """
    forwards = {"forward", "_old_forward", "_hf_hook"}
    vars(module).update({name: value for name, value in vars(shared).items() if name not in forwards})
    if hasattr(shared, "_hf_hook"):
        try:  # an import outside of `try` would make accelerate a requirement of saved models
            from accelerate.hooks import add_hook_to_module
        except ImportError as error:
            raise ImportError("A model that carries accelerate's hooks cannot be wrapped without it.") from error
        add_hook_to_module(module, shared._hf_hook)


def empty_wrapper(model_class: type[Model], model: SiglipPreTrainedModel, gate: dict) -> Model:
    """A `model_class` with `model`'s configuration and parameters without memory, to put `model`'s modules into."""
    config = model_class.config_class.from_dict(model.config.to_dict())
    config.gate = gate
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        return model_class(config)


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
    "NeuroFlowSiglipVisionOutput",
]
