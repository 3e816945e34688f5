"""
What a stream remembers from one frame to the next: the names, shapes and meaning of its memories, and what a saved
state must contain.

`stream.memory` holds these tensors; B streams of N patches, T tokens (the patches, and before them those that a tower
adds, such as a CLS token), D features, in the type of the model's features unless another is given.

| name | shape | what it holds |
|---|---|---|
| `output` | [B, T, D] | each token after the final layer norm, as last encoded; not in `eliminate` |
| `hidden_state_l` | [B, T, D] | the same of layer l's output (0: the encoder's input), for those that are asked for |
| `pooled` | [B, D] | the embedding; only if the model pools |
| `pooled_change` | [B], float32 | `1 - cos` of it to the one before, where patches were encoded; with `min_fidelity` |
| `last_update` | [B, N, D] | reference: each patch's signal when it was last encoded |
| `ema`, `slow_ema` | [B, N, D], float32 | references: running means of each patch's signal |
| `age` | [B, N], int64 | how many frames ago each patch was encoded; only with `keeps_age` |
| `summary_output` | [B, K, D] | `output`, averaged over cells; only with `summary_tokens` in `eliminate` |

Those of encoder layer l have `layers.l.` before their names:

| name | shape | what it holds |
|---|---|---|
| `key`, `value` | [B, T, D] in `extrapolate`, [B, H, T, D / H] in `context` | attention's, as last encoded |
| `mlp` | [B, T, D] in `mlp` | the MLP's output, as last encoded |
| `summary_key`, `summary_value` | [B, K, D] | attention's, averaged over cells; only with `summary_tokens` |
"""

import math
from dataclasses import dataclass

import torch

from .gate_config import NeuroFlowGateConfig
from .modes import MODES, layer_name
from .summary import SUMMARY_KEY, SUMMARY_OUTPUT, SUMMARY_VALUE

STATE_FORMAT = 7

# `ema` and `slow_ema` are named by `NeuroFlowGateConfig.mean_rates`.
OUTPUT, POOLED, POOLED_CHANGE = "output", "pooled", "pooled_change"
LAST_UPDATE, AGE = "last_update", "age"


def hidden_state_name(index: int) -> str:
    """The name of a hidden state's memory; 0 is the encoder's input, l the output of its l-th layer."""
    return f"hidden_state_{index}"


@dataclass(frozen=True)
class StreamGeometry:
    """Shape, type and device of a stream's memory; they must not change while it runs."""

    batch_size: int
    grid: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    num_prefix_tokens: int = 0

    @property
    def num_patches(self) -> int:
        """The number of patches, N."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """The number of tokens, T."""
        return self.num_prefix_tokens + self.num_patches

    def differences(self, other: "StreamGeometry") -> str:
        """The fields in which `other` differs, with both values."""
        return "; ".join(
            f"{name.replace('_', ' ')} was {old} and is now {getattr(other, name)}"
            for name, old in vars(self).items()
            if old != getattr(other, name)
        )


def stored_by(gate: NeuroFlowGateConfig) -> dict:
    """The options that decide which memories a stream holds."""
    return {
        "mode": gate.mode,
        "signal": gate.signal,
        "reference": gate.reference,
        "slow_ema_rate set": gate.slow_ema_rate is not None,
        "max_age set": gate.keeps_age,
        "summary_tokens": gate.summary_tokens,
        "min_fidelity set": gate.min_fidelity is not None,
        "keyframe_fraction or keyframe_surprise set": gate.mode == "hold" and gate.has_keyframe_trigger,
    }


def changes_of(theirs: dict, ours: dict) -> str:
    """Where two results of `stored_by` differ, with both values."""
    differing = [name for name in ours if theirs[name] != ours[name]]
    return "; ".join(f"`{name}` was {theirs[name]!r}, here {ours[name]!r}" for name in differing)


def memory_layout(
    gate: NeuroFlowGateConfig, geometry: StreamGeometry | None, hidden_states: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """
    The shape of every memory after the first frame, by name; none before it, when there is no geometry yet. Without
    `pooled`, which only models with a pooling head have.
    """
    if geometry is None:
        return {}
    mode = MODES[gate.mode]
    streams, patches, tokens = geometry.batch_size, geometry.num_patches, geometry.num_tokens
    dim, heads = geometry.hidden_size, geometry.num_heads
    layout: dict[str, tuple[int, ...]] = dict.fromkeys(gate.references, (streams, patches, dim))
    if mode.pools_all_patches:
        layout |= dict.fromkeys((OUTPUT, *map(hidden_state_name, hidden_states)), (streams, tokens, dim))
    if gate.min_fidelity is not None:
        layout[POOLED_CHANGE] = (streams,)
    if gate.keeps_age:
        layout[AGE] = (streams, patches)
    for layer in range(geometry.num_layers):
        for name in mode.layer_memories:
            by_head = (streams, heads, tokens, dim // heads)
            layout[layer_name(layer, name)] = by_head if mode.heads_first else (streams, tokens, dim)
        if gate.summary_tokens:
            for name in (SUMMARY_KEY, SUMMARY_VALUE):
                layout[layer_name(layer, name)] = (streams, gate.summary_tokens, dim)
    if gate.summary_tokens and not mode.pools_all_patches:
        layout[SUMMARY_OUTPUT] = (streams, gate.summary_tokens, dim)
    return layout


def require_complete(state: dict, layout: dict[str, tuple[int, ...]]) -> None:
    """Raise a ValueError unless a state has frames for all streams and its memories are as `layout` says."""
    batch_size, geometry, memory = (state[key] for key in ("batch_size", "geometry", "memory"))
    lists = (state["frames"], state["credit"], state["pace"])
    counts = {*map(len, lists), batch_size if geometry is None else geometry["batch_size"]}
    if not all(isinstance(value, float) and math.isfinite(value) for value in state["credit"]):
        raise ValueError(f"The state's credits are {state['credit']!r}; expected a finite number for each stream.")
    if counts != {batch_size}:
        raise ValueError(
            f"The state is of {batch_size} streams, but its frames, credits, paces or memories are of another number."
        )
    if geometry is not None and POOLED in memory:
        layout = {**layout, POOLED: (batch_size, geometry["hidden_size"])}
    for name in sorted(layout.keys() | memory.keys()):
        found = tuple(memory[name].shape) if name in memory else None
        expected = layout.get(name)
        if found != expected:
            raise ValueError(f"The state's memory `{name}` has shape {found}; expected {expected}.")
