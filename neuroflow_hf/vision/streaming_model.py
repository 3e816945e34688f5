"""What every NeuroFlow vision model adds to transformers' methods: streams, clips, wrapping of loaded models."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import TransformersKwargs

from .frame import NeuroFlowVisionOutput, encode_frame
from .gate_config import GateOption, NeuroFlowGateConfig
from .stream import NeuroFlowStream
from .tower import VisionTower

HiddenStates = bool | int | list[int] | tuple[int, ...] | None
GATE_FIELDS = ("active_mask", "surprise", "skip_rate", "cost")
Model = TypeVar("Model", bound="StreamingModel")


class StreamingModel:
    """
    To be named first among a model's bases, before [`VisionTower`] and the stock model.

    Modifications:

    - `new_stream`, `stream_frames` and `get_video_features` are added.
    - `set_attn_implementation` also reaches modules shared with a model that was wrapped.
    """

    config: Any

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        False, so that weights are initialised as in transformers' own models: with custom code, transformers leaves
        out modules without parameters of their own, here every attention module.
        """
        return False

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' method. Modules shared with a wrapped model keep that model's config: set it there, too."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]  # transformers' method
        for tower in cast(nn.Module, self).modules():
            if isinstance(tower, VisionTower):
                for layer in tower.encoder_layers():
                    shared_config = layer.parts().attention.config
                    shared_config._attn_implementation_internal = tower.config._attn_implementation  # type: ignore[union-attr]

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
        base, adapter = self.gate_options, getattr(getattr(self, "vision_model", self), "sparse_adapter", None)
        if adapter is not None and not {"mode", "preset"} & gate_options.keys():
            base = adapter.gate.to_dict()
        return NeuroFlowStream(NeuroFlowGateConfig.from_options(base, **gate_options), batch_size)

    def stream_frames(
        self,
        frames: Iterable[torch.Tensor],
        stream: NeuroFlowStream | None = None,
        interpolate_pos_encoding: bool = False,
        **gate_options: GateOption,
    ) -> Iterator[ModelOutput]:
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
        forward: Any = getattr(self, "get_image_features", self)  # the dual model's `forward` also needs a text
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
        interpolate_pos_encoding: bool = False,
        **gate_options: GateOption,
    ) -> ModelOutput:
        """
        The output for B clips of T frames, in the model's output class: each field has T as its second dimension.
        Patches are left out, since they are large; `stream_frames` gives them.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(B, T, C, H, W)`): B clips, each its own stream.
            stream: the streams to continue; by default new ones.
            interpolate_pos_encoding, gate_options: as in `stream_frames`.

        Raises:
            ValueError: if the clips are not 5-dimensional or have no frame.
        """
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[1] == 0:
            raise ValueError(
                f"`pixel_values_videos` has shape {tuple(pixel_values_videos.shape)}; expected (clips, frames, "
                "channels, height, width) with at least one frame."
            )
        collected: dict[str, list[torch.Tensor]] = {}
        frames = pixel_values_videos.unbind(1)
        for output in self.stream_frames(frames, stream, interpolate_pos_encoding, **gate_options):
            for name in ("pooler_output", "logits", *GATE_FIELDS):
                if output.get(name) is not None:
                    collected.setdefault(name, []).append(output[name])
        return type(output)(**{name: torch.stack(tensors, dim=1) for name, tensors in collected.items()})


def forward_frame(
    model: VisionTower,
    pixel_values: torch.Tensor,
    stream: NeuroFlowStream,
    interpolate: bool,
    kwargs: TransformersKwargs,
) -> NeuroFlowVisionOutput | tuple:
    """A tower's forward with a stream; `kwargs` are transformers' keywords."""
    return_dict = pop_return_dict(kwargs, model.config)
    refuse_recording(model.config, kwargs, "output_attentions")
    request = kwargs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False))
    hidden_states = requested_hidden_states(request, model.config.num_hidden_layers)
    output = encode_frame(model, pixel_values, stream, interpolate, hidden_states)
    return output if return_dict else output.to_tuple()


def requested_hidden_states(request: HiddenStates, num_layers: int) -> tuple[int, ...]:
    """
    The hidden states that `output_hidden_states` asks for: 0 is the encoder's input, l the output of its l-th layer.

    Args:
        request: True for all, or, as transformers' video language models pass it, one index or several; negative ones
            count from the last layer.
        num_layers: L.

    Raises:
        ValueError: for an index that no hidden state has.
    """
    if request is None or request is False:
        return ()
    everything = range(num_layers + 1)
    indices = everything if request is True else [request] if isinstance(request, int) else request
    for index in indices:
        if not -len(everything) <= index < len(everything):
            raise ValueError(
                f"`output_hidden_states` asks for hidden state {index}; expected 0 to {num_layers}, or "
                f"-{len(everything)} to -1."
            )
    return tuple(sorted({everything[index] for index in indices}))


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


def empty_wrapper(model_class: type[Model], model: PreTrainedModel, gate: dict) -> Model:
    """A `model_class` with `model`'s configuration and parameters without memory, to put `model`'s modules into."""
    config = cast(Any, model_class).config_class.from_dict(model.config.to_dict())
    config.gate = gate
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        return cast(Any, model_class)(config)


def wrap_tower(model_class: type[Model], model: PreTrainedModel, expected: type, gate: dict) -> Model:
    """
    A tower of `model_class` around a loaded stock one. Modules and parameters are shared, nothing is copied.

    Raises:
        TypeError: if `model` is no `expected`.
    """
    require_model(model, expected)
    wrapper: Any = empty_wrapper(model_class, model, gate)
    for name, module in model.named_children():
        if name != "encoder":
            setattr(wrapper, name, module)
    theirs = wrapper.__class__.encoder_layers(model)
    for layer, shared in zip(wrapper.encoder_layers(), theirs, strict=True):
        share_module(layer, shared)
    # the hooks that record hidden states come along, and are not to be installed twice
    flag = "_output_capturing_hooks_installed"
    for module, shared in ((wrapper, model), (wrapper.encoder, model.encoder)):
        vars(module)[flag] = hasattr(shared, flag)
    return wrapper.train(model.training)
