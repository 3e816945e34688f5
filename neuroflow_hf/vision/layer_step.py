"""How a mode encodes: its specification, what its layer function is given, and what that returns."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from .active_set import ActiveSet
from .extrapolate import Correction

LayerMemory = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PatchMemory:
    """
    Features that a mode keeps of every patch in a layer, under one name, in the type that the model's modules return.

    Args:
        heads_first (`bool`, defaults to `False`):
            Whether they are laid out head by head, [B, H, N, D / H], rather than [B, N, D]: attention reads one head
            at a time.
    """

    heads_first: bool = False


@dataclass(frozen=True)
class LayerOutput:
    """
    What a layer function returns.

    Args:
        hidden: what the mode passes on to the next layer, rows [M, D] of the active patches or [B', N, D]; `None` of a
            frame with nothing active, which is not encoded.
        multiply_adds: what this layer cost each of the B streams; counted from numbers that the host knows.
    """

    hidden: torch.Tensor | None
    multiply_adds: list[int]


@dataclass(frozen=True)
class ModeSpec:
    """
    How one mode encodes its active set.

    Args:
        layer: what is done in an encoder layer, `(layer, hidden, step) -> LayerOutput`.
        encodes_all_patches: whether all patches of a stream with an active one pass through the layers, [B', N, D],
            or only the active rows, [M, D].
        pools_all_patches: whether the head sees all N patches, or the active ones.
        layer_memories: what is kept for every layer, by name.
        corrects_stale: whether patches that were not encoded learn from those that were.
    """

    layer: Callable[[SiglipEncoderLayer, torch.Tensor, "LayerStep"], LayerOutput]
    encodes_all_patches: bool = False
    pools_all_patches: bool = True
    layer_memories: dict[str, PatchMemory] = field(default_factory=dict)
    corrects_stale: bool = False


@dataclass
class LayerStep:
    """
    One layer's part in a frame, passed to the layer as `step`.

    Args:
        mode: how the stream encodes its active set.
        active: the active set.
        memory: what is kept for this layer.
        corrections: what patches that were not encoded learn from those that were (mode `extrapolate`).

    Attributes:
        output: what the mode's layer function returned. The layer leaves it here, and itself returns the hidden
            states alone, for that is what forward hooks of encoder layers expect.
    """

    mode: ModeSpec
    active: ActiveSet
    memory: LayerMemory
    corrections: list[Correction] = field(default_factory=list)
    output: LayerOutput | None = None


def widths(layer: SiglipEncoderLayer) -> tuple[int, int]:
    """The features of an encoder layer's rows, and those inside its MLP, whatever was put around its modules."""
    config = layer.self_attn.config
    return config.hidden_size, config.intermediate_size
