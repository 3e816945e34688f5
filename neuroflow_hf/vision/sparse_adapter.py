"""
Sparse adapters: low-rank weights that apply on sparse frames, and to nothing else.

`neuroflow distill` trains one for a checkpoint and a mode (Hu et al., "LoRA", 2021). On a keyframe, and without a
stream, the model computes what it computed before, to the bit. A sparse frame's changes are scaled by the share of its
patches that are not encoded: where nearly everything is encoded, little is to be made up for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .active_set import ActiveSet
from .gate_config import NeuroFlowGateConfig
from .tower import VisionTower

TARGETS = {
    name: f"{part}.{name}"
    for part, names in (("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")), ("mlp", ("fc1", "fc2")))
    for name in names
}
DISTILLABLE_MODES = ("eliminate", "reconstruct", "context", "extrapolate")


class LowRank(nn.Module):
    """
    A change of a linear layer: `strength * scaling * up(down(x))`, [..., in] to [..., out].

    Args:
        inner, outer: the linear layer's numbers of inputs and outputs.
        rank: r, of the change.
        scaling: a factor, LoRA's alpha / r.

    Attributes:
        down, up: [r, in] and [out, r]. `up` starts as zeros, so that an untrained change is none.
    """

    def __init__(self, inner: int, outer: int, rank: int, scaling: float):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.empty(rank, inner)), nn.Parameter(torch.zeros(outer, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scaling = scaling

    def forward(self, features: torch.Tensor, strength: torch.Tensor | float = 1.0) -> torch.Tensor:
        """The change for features [..., in]: [..., out]. `strength` is a number, or one for each row [M, 1]."""
        return F.linear(F.linear(features, self.down) * (strength * self.scaling), self.up)

    @property
    def multiply_adds(self) -> int:
        """Of one row."""
        return self.down.numel() + self.up.numel()


@dataclass(frozen=True, eq=False)
class LayerAdapter:
    """
    The part of an adapter that belongs to one encoder layer, on one frame.

    Args:
        changes: by the module's name in the layer, such as `self_attn.q_proj`.
        strength: of the changes; one number, or one for each row [M, 1].
    """

    changes: Mapping[str, LowRank] = field(default_factory=dict)
    strength: torch.Tensor | float = 1.0

    def linear(self, name: str, module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What `module`, called `name` in the layer, gives for rows [M, in], changed on sparse frames: [M, out]."""
        output = module(rows)
        if name not in self.changes:
            return output
        return output + self.changes[name](rows, self.strength)

    def mlp(self, mlp: Any, rows: torch.Tensor) -> torch.Tensor:
        """The layer's MLP for rows [M, D], changed on sparse frames: [M, D]."""
        if "mlp.fc1" not in self.changes and "mlp.fc2" not in self.changes:
            return mlp(rows)
        return self.linear("mlp.fc2", mlp.fc2, mlp.activation_fn(self.linear("mlp.fc1", mlp.fc1, rows)))

    def multiply_adds(self, count: int, num_patches: int) -> int:
        """What the changes cost a stream with `count` active patches."""
        return 0 if count == num_patches else count * sum(change.multiply_adds for change in self.changes.values())


NO_ADAPTER = LayerAdapter()


class SparseAdapter(nn.Module):
    """
    Low-rank changes of the encoder layers' linear maps, for sparse frames.

    Args:
        tower: the vision model that they are for.
        gate: the options of the streams that it is for, of [`NeuroFlowGateConfig`]; its mode is one of
            `eliminate`, `reconstruct`, `context`, `extrapolate`.
        rank: r. 8 to 32; the adapter's size and cost grow with it.
        alpha: LoRA's alpha; changes are scaled by alpha / r.
        targets: which of `q_proj`, `k_proj`, `v_proj`, `out_proj`, `fc1`, `fc2` are changed, in every layer.
        base: the checkpoint's name, for messages.

    Raises:
        ValueError: for a mode, a target or a rank that does not fit.
    """

    def __init__(
        self,
        tower: VisionTower,
        gate: NeuroFlowGateConfig,
        rank: int = 16,
        alpha: float = 16,
        targets: Sequence[str] = tuple(TARGETS),
        base: str | None = None,
    ):
        super().__init__()
        require_distillable(gate.mode)
        unknown = [name for name in targets if name not in TARGETS]
        if unknown or not targets:
            raise ValueError(f"Targets are {list(targets)}; expected some of {', '.join(TARGETS)}.")
        if rank < 1:
            raise ValueError(f"The rank is {rank}; expected at least 1.")
        dim, inner = tower.config.hidden_size, tower.config.intermediate_size
        widths = {"fc1": (dim, inner), "fc2": (inner, dim)}
        self.gate, self.rank, self.alpha, self.base = gate, rank, alpha, base
        self.targets = tuple(name for name in TARGETS if name in targets)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: LowRank(*widths.get(name, (dim, dim)), rank, alpha / rank) for name in self.targets})
            for _ in range(tower.config.num_hidden_layers)
        )

    def of_layers(self, active: ActiveSet) -> list[LayerAdapter]:
        """Each layer's part on a frame. Streams with every patch active compute what the model does without it."""
        strengths = [1 - count / active.num_tokens for count in active.counts]
        if not any(strengths):
            return [NO_ADAPTER] * len(self.layers)
        strength: torch.Tensor | float = strengths[0]
        if len(set(strengths)) > 1:
            rows = torch.tensor(strengths, dtype=next(self.parameters()).dtype)
            rows = rows.repeat_interleave(torch.tensor(active.counts)).unsqueeze(1)
            strength = rows.to(active.mask.device, non_blocking=True)
        return [
            LayerAdapter({TARGETS[name]: change for name, change in layer.items()}, strength)  # type: ignore[union-attr, operator]
            for layer in self.layers
        ]

    def check(self, gate: NeuroFlowGateConfig) -> None:
        """Raise a ValueError if a stream's sparse frames are encoded otherwise than those that this was trained on."""
        for name in ("mode", "summary_tokens"):
            ours, theirs = getattr(self.gate, name), getattr(gate, name)
            if ours != theirs and not (gate.everything_active or gate.mode == "hold"):
                raise ValueError(
                    f"The model's sparse adapter was distilled for {name} {ours!r}, and this stream has {theirs!r}. "
                    f"Make the stream with `{name}={ours!r}`, or take the adapter out: `model.sparse_adapter = None`."
                )


def require_distillable(mode: str) -> None:
    """Raise a ValueError for a mode whose sparse frames have nothing to learn."""
    if mode not in DISTILLABLE_MODES:
        why = {"dense": "it encodes every patch", "hold": "it encodes all patches or none"}
        raise ValueError(
            f"Mode `{mode}` cannot be distilled: {why.get(mode, 'its layers see all patches already')}. Choose one of "
            f"{', '.join(DISTILLABLE_MODES)}."
        )
