"""
Drafting without some layers: each run of neighbouring layers is replaced by adding what it added last, or left out.

Adding equals a bypass of whole layers on every step, except that a draft writes no keys and values in these layers:
they would be removed from the cache with the draft, before anything reads them.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

Compute = Callable[..., torch.Tensor]  # a decoder layer's forward


def layer_index(layer: Phi3DecoderLayer) -> int:
    """A decoder layer's place in the model, which attention modules know (transformers' annotation allows None)."""
    return cast(int, layer.self_attn.layer_idx)


class LayerChanges:
    """
    What layers added to the hidden states of one sequence when they were last computed, for drafts to add again. The
    model takes it as `bypass_step`.

    Args:
        layers: the layers that drafts skip; not the first, by which the cache knows its length.
        reuse: whether drafts add what the layers added last; else they leave the layers out.
    """

    def __init__(self, layers: list[int], reuse: bool = True):
        self.layers, self.reuse = frozenset(layers), reuse
        # of each run of neighbouring layers
        self.firsts = {layer for layer in self.layers if layer - 1 not in self.layers}
        self.lasts = {layer for layer in self.layers if layer + 1 not in self.layers}
        # hidden states [1, n, D] before and after each run, in the last dense forward
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []
        self.is_drafting = False
        self.last = -1  # index of the last position of that forward that was kept
        self.passed = 0  # number of runs skipped in this forward

    def applies_to(self, layer: int) -> bool:
        """Whether this layer is skipped, or its hidden states are stored."""
        if self.is_drafting:
            return layer in self.layers
        return self.reuse and (layer in self.firsts or layer in self.lasts)

    def run(self, layer: Phi3DecoderLayer, compute: Compute, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The output [1, n, D] of a decoder layer for `hidden` [1, n, D]; `compute` is its usual forward."""
        index = layer_index(layer)
        if self.is_drafting:
            return hidden + self.change() if self.reuse and index in self.firsts else hidden
        if index in self.firsts:
            self.before.append(hidden)
        output = compute(hidden, **kwargs)
        if index in self.lasts:
            self.after.append(output)
        return output

    def begin(self) -> None:
        """Prepare for a forward."""
        self.passed = 0
        if not self.is_drafting:
            self.before, self.after = [], []

    def change(self) -> torch.Tensor:
        """What the next run of layers added at the last position, [1, 1, D]."""
        before, after = self.before[self.passed], self.after[self.passed]
        self.passed += 1
        return (after[:, self.last] - before[:, self.last]).unsqueeze(1)
