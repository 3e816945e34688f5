"""How a mode encodes: its specification, and what its layer function is given."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .active_set import ActiveSet
from .extrapolate import Correction
from .sparse_adapter import NO_ADAPTER, LayerAdapter
from .summary import SummaryGrid
from .tower import LayerParts

LayerMemory = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModeSpec:
    """
    How one mode encodes its active set.

    Args:
        layer: what is done in an encoder layer, `(parts, hidden, step) -> hidden`; what it cost is left in the step.
        encodes_all_patches: whether all tokens of a stream with an active one pass through the layers, [B', T, D],
            or only the active rows, [M, D].
        pools_all_patches: whether the head sees all tokens, or the active ones.
        layer_memories: names of the features that every layer keeps of all tokens.
        heads_first: whether they are stored head by head, [B, H, T, D / H], as attention reads them; else [B, T, D].
        corrects_stale: whether what is stored of patches that were not encoded is corrected by those that were.
    """

    layer: Callable[[LayerParts, torch.Tensor, "LayerStep"], torch.Tensor]
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
