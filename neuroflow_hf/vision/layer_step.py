"""One layer's part in a frame: what a mode's layer function is given, and what it returns."""

from dataclasses import dataclass, field

import torch
from torch import nn

from .active_set import ActiveSet
from .extrapolate import Carrying
from .gate_config import NeuroFlowGateConfig

LayerMemory = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PatchMemory:
    """
    What a mode keeps of every patch in a layer, under one name.

    Args:
        per_head (`bool`, defaults to `False`): whether it is one number a head, [B, N, H], or features, [B, N, D].
        heads_first (`bool`, defaults to `False`):
            Whether features are laid out head by head, [B, H, N, D / H]: attention reads one head at a time.
        dtype (`torch.dtype`, *optional*): its type, where that is not the one that the model's modules return.
    """

    per_head: bool = False
    heads_first: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class LayerOutput:
    """
    What a layer function returns.

    Args:
        hidden: what the mode passes on to the next layer, rows [M, D] of `active` or [B', N, D]; `None` of a frame
            with nothing active, which is not encoded.
        active: the active set that the next layer starts from. It holds all patches of the layer's own, and may hold
            more, of streams that had any.
        multiply_adds: what this layer cost each of the B streams; counted from numbers that the host knows.
    """

    hidden: torch.Tensor | None
    active: ActiveSet
    multiply_adds: list[int]


@dataclass
class LayerStep:
    """
    One layer's part in a frame, passed to the layer as `step`.

    Args:
        gate: the options.
        active: the active set that the layer starts from.
        memory: what is kept for this layer.
        index: the layer's number, from 0.
        num_layers: how many layers there are.
        carryings: what patches that were not encoded learn from those that were (mode `extrapolate`).

    Attributes:
        output: what the mode's layer function returned. The layer leaves it here, and itself returns the hidden
            states alone, for that is what forward hooks of encoder layers expect.
    """

    gate: NeuroFlowGateConfig
    active: ActiveSet
    memory: LayerMemory
    index: int
    num_layers: int
    carryings: list[Carrying] = field(default_factory=list)
    output: LayerOutput | None = None


def widths(layer: nn.Module) -> tuple[int, int]:
    """The features of an encoder layer's rows, and those inside its MLP, whatever was put around its modules."""
    config = layer.self_attn.config
    return config.hidden_size, config.intermediate_size
