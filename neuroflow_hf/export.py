"""
Export of streams for runtimes without Python: ONNX Runtime, OpenVINO, `torch.export`.

A stream becomes two functions of tensors. The keyframe program encodes all patches of a frame and returns what is
remembered of it; the sparse program takes that beside the next frame, encodes a fixed number of patches and returns
what is remembered then. Who runs them decides which one a frame is given to. Both are traced from the model and its
engine, so that what a stream does is written down once.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .vision.gate_config import GateOption, NeuroFlowGateConfig
from .vision.modes import MODES
from .vision.stream import NeuroFlowStream
from .vision.stream_state import POOLED
from .vision.tower import VisionTower

FORMATS = ("onnx", "openvino", "dynamo")
# why a gate option cannot be exported
DECIDED_BY_CALLER = "whoever runs the programs decides on keyframes: give the frame to the keyframe program"
REFUSED_OPTIONS = {
    "keyframe_interval": DECIDED_BY_CALLER,
    "keyframe_fraction": f"{DECIDED_BY_CALLER}; both programs return the surprise",
    "keyframe_surprise": f"{DECIDED_BY_CALLER}; both programs return the surprise",
    "cost_budget": "a sparse frame costs the same every time, as `token_budget` says",
    "min_fidelity": "a sparse frame costs the same every time, as `token_budget` says",
}
REFUSED_MODES = {
    "dense": "it remembers nothing: export the model itself, without a stream",
    "hold": "it encodes nothing between keyframes: export the model itself, and keep its last output",
}


class StreamProgram(nn.Module):
    """A frame of B streams as a function of tensors."""

    def __init__(self, tower: VisionTower, gate: NeuroFlowGateConfig, batch_size: int):
        super().__init__()
        self.tower, self.gate, self.batch_size = tower, gate, batch_size

    def encode(self, pixel_values: torch.Tensor, stream: NeuroFlowStream) -> dict[str, Any]:
        """The model's outputs for a frame, and what the stream remembers after it."""
        output: Any = self.tower(pixel_values, stream=stream, return_dict=True)
        names = ("pooler_output", "last_hidden_state", "surprise", "active_mask")
        outputs = {name: output[name] for name in names if output.get(name) is not None}
        return outputs | {"new_state": memory_of(stream)}


class KeyframeProgram(StreamProgram):
    """A keyframe of B streams of a vision model, with options of `gate_for_export`."""

    def forward(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """
        Encode all patches.

        Args:
            pixel_values: [B, C, H, W], normalised and finite.

        Returns:
            `pooler_output` [B, D], if the model pools; `last_hidden_state` [B, T, D]; `surprise` [B, gh, gw], float32;
            `active_mask` [B, gh, gw]; and `new_state`, the memories of `vision/stream_state.py` by name.
        """
        return self.encode(pixel_values, NeuroFlowStream(self.gate, self.batch_size))


class SparseProgram(StreamProgram):
    """
    A frame of which a fixed number of patches is encoded, as a function of tensors.

    Args:
        tower, gate: as of [`KeyframeProgram`].
        pixel_values: an example of a frame. All frames have its shape and type.
    """

    def __init__(self, tower: VisionTower, gate: NeuroFlowGateConfig, pixel_values: torch.Tensor):
        super().__init__(tower, gate, len(pixel_values))
        stream = NeuroFlowStream(gate, len(pixel_values))
        with torch.no_grad():
            tower(pixel_values, stream=stream)
        self.example_state = memory_of(stream)
        self.after_keyframe = {name: value for name, value in stream.state_dict().items() if name != "memory"}

    def forward(self, pixel_values: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """
        Encode the `token_budget` most surprising patches; with sentinels and `max_age`, those come first.

        Args:
            pixel_values: as of the keyframe program.
            state: `new_state` of the frame before.

        Returns:
            The outputs of the keyframe program. In mode `eliminate`, `last_hidden_state` is that of the encoded
            tokens, [B, K, D].
        """
        stream = NeuroFlowStream(self.gate, self.batch_size)
        stream.load_state_dict({**self.after_keyframe, "memory": state})
        return self.encode(pixel_values, stream)


def memory_of(stream: NeuroFlowStream) -> dict[str, torch.Tensor]:
    """Copies of what the next frame needs; the last embedding would be returned if nothing were encoded."""
    return {name: memory.clone() for name, memory in stream.memory.items() if name != POOLED}


def gate_for_export(model: Any, token_budget: int, **gate_options: GateOption) -> NeuroFlowGateConfig:
    """The options of streams that encode a fixed number of patches; ValueError for what cannot be exported."""
    gate = model.new_stream(**{"mode": "extrapolate", **gate_options, "token_budget": token_budget}).gate
    if gate.mode in REFUSED_MODES:
        modes = ", ".join(mode for mode in MODES if mode not in REFUSED_MODES)
        raise ValueError(f"Mode `{gate.mode}` is not exported, since {REFUSED_MODES[gate.mode]}. Expected {modes}.")
    if gate.threshold <= -1:
        raise ValueError(f"With `threshold` {gate.threshold}, every frame is dense: export the model itself instead.")
    for name, reason in REFUSED_OPTIONS.items():
        if getattr(gate, name) is not None:
            raise ValueError(f"Gate option `{name}` is not exported, since {reason}. Leave it at None.")
    return gate


def programs(
    model: Any, token_budget: int, batch_size: int = 1, **gate_options: GateOption
) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """
    The programs of a model's streams, each with an example of its inputs: `"keyframe"` and `"sparse"`. They share the
    model's parameters. For exporters other than those of `export_stream`, and for tests; arguments as there.
    """
    tower = getattr(model, "vision_model", model)
    if not isinstance(tower, VisionTower):
        raise TypeError(f"Cannot export streams of a {type(model).__name__}; expected a NeuroFlow vision model.")
    gate = gate_for_export(model, token_budget, **gate_options)
    config, weight = tower.config, tower.patch_projection().weight
    shape = (batch_size, config.num_channels, config.image_size, config.image_size)
    pixel_values = torch.rand(shape, dtype=weight.dtype, device=weight.device)
    keyframe, sparse = KeyframeProgram(tower, gate, batch_size), SparseProgram(tower, gate, pixel_values)
    inputs: dict[str, Any] = {"pixel_values": pixel_values}
    return {"keyframe": (keyframe, inputs), "sparse": (sparse, inputs | {"state": sparse.example_state})}


def export_stream(
    model: Any,
    folder: str | os.PathLike,
    token_budget: int,
    format: str = "onnx",
    batch_size: int = 1,
    **gate_options: GateOption,
) -> Any:
    """
    Write a model's streams as two programs of fixed shapes, by transformers' exporters.

    Both take `pixel_values`. The sparse program also takes the state of the frame before: its inputs `state.x` are the
    outputs `new_state.x` of either program.

    Args:
        model: a NeuroFlow vision model, or a model with one as its `vision_model`. The programs have its type.
        folder: for `keyframe.onnx` and `sparse.onnx`, or likewise in the other formats, and `export.json`.
        token_budget: how many patches a sparse frame encodes.
        format: `"onnx"`, `"openvino"`, or `"dynamo"` for programs of `torch.export`.
        batch_size: B, the number of streams that advance together.
        gate_options: options of [`NeuroFlowGateConfig`]; the mode is `"extrapolate"` unless another is given.

    Returns:
        transformers' `ExportedModel`: `exported.runners["keyframe"](pixel_values=...)` runs a program, and
        `ExportedModel.from_pretrained(folder)` loads them again.

    Raises:
        ValueError: for a format, a mode, an option or a type that cannot be exported.
        ImportError: without the packages of the extra `export`.
    """
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; expected one of {', '.join(FORMATS)}.")
    try:
        from transformers import exporters
        from transformers.exporters.auto import get_exporter_class

        exporter: Any = get_exporter_class(format)()
    except ImportError as error:
        raise ImportError(f'{error} Install `pip install "neuroflow-hf[export]"`.') from error
    dtype = getattr(getattr(model, "vision_model", model), "dtype", torch.float32)
    if format == "openvino" and dtype != torch.float32:
        raise ValueError(
            f"The model is in {dtype}, and transformers' exporter writes OpenVINO's programs in float32. Load it in "
            "float32; the device's `INFERENCE_PRECISION_HINT` chooses the type that OpenVINO computes in."
        )
    components = {}
    for name, (program, inputs) in programs(model, token_budget, batch_size, **gate_options).items():
        components[name] = exporter.export(program, inputs, exporter.config_class()).components["model"]
    exported = exporters.ExportedModel(components, exporter.export_format)
    exported.save_pretrained(Path(folder))
    return exported
