"""How a mode encodes: its specification, and what its layer function is given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipEncoderLayer

from .active_set import ActiveSet
from .extrapolate import Correction
from .sparse_adapter import NO_ADAPTER, LayerAdapter
from .summary import SummaryGrid

LayerMemory = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModeSpec:
    """
    How one mode encodes its active set.

    Args:
        layer: what is done in an encoder layer, `(layer, hidden, step) -> hidden`; what it cost is left in the step.
        encodes_all_patches: whether all patches of a stream with an active one pass through the layers, [B', N, D],
            or only the active rows, [M, D].
        pools_all_patches: whether the head sees all N patches, or the active ones.
        layer_memories: names of the features that every layer keeps of all patches.
        heads_first: whether they are stored head by head, [B, H, N, D / H], as attention reads them; else [B, N, D].
        corrects_stale: whether what is stored of patches that were not encoded is corrected by those that were.
    """

    layer: Callable[[SiglipEncoderLayer, torch.Tensor, "LayerStep"], torch.Tensor]
    encodes_all_patches: bool = False
    pools_all_patches: bool = True
    layer_memories: tuple[str, ...] = ()
    heads_first: bool = False
    corrects_stale: bool = False


@dataclass
class LayerStep:
    """
    One layer's part in a frame, passed to the layer as `step`.

    Args:
        mode: how the stream encodes its active set.
        active: the active set.
        memory: what is kept for this layer.
        corrections: of the stored keys and values, before they are used (mode `extrapolate`).
        summary: the cells of the summary tokens; None without them.
        adapter: the layer's part of the model's sparse adapter; without one, it changes nothing.

    Attributes:
        multiply_adds: what the layer cost each of the B streams, left here by the layer function: forward hooks of
            encoder layers expect that a layer returns the hidden states and nothing else.
    """

    mode: ModeSpec
    active: ActiveSet
    memory: LayerMemory
    corrections: list[Correction] = field(default_factory=list)
    summary: SummaryGrid | None = None
    adapter: LayerAdapter = NO_ADAPTER
    multiply_adds: list[int] = field(default_factory=list)


def widths(layer: SiglipEncoderLayer) -> tuple[int, int]:
    """D and the width inside the MLP; from the configuration, since adapters may have replaced the modules."""
    config = layer.self_attn.config
    return config.hidden_size, config.intermediate_size


def layers_of(encoder: SiglipEncoder) -> list[SiglipEncoderLayer]:
    """The encoder's layers, typed as what they are: torch's `ModuleList` is a list of any modules."""
    return cast(list[SiglipEncoderLayer], list(encoder.layers))
