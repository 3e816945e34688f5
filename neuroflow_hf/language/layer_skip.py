"""
Drafting without some layers: they are passed over, and what they changed last is changed again.

A bypass that fires on every step reuses the outputs of whole layers, and nobody reads the keys and values that they
write before the draft is taken back. So a draft need not write them, and passing over neighbouring layers, however
many, costs one addition.
"""

import torch


class LayerChanges:
    """
    What layers changed in the hidden states when they were last computed, and what drafts do with it. The model takes
    it as `bypass_step`; it lives beside the cache, for one sequence.

    Args:
        layers: those that drafts pass over; not the first, which knows the cache's length.
        reuse: whether drafts change by as much; else they go past these layers as if there were none.
    """

    def __init__(self, layers: list[int], reuse: bool = True):
        self.layers, self.reuse = frozenset(layers), reuse
        self.firsts = {layer for layer in self.layers if layer - 1 not in self.layers}  # of neighbouring ones
        self.lasts = {layer for layer in self.layers if layer + 1 not in self.layers}
        self.is_drafting = False
        self.last = -1  # of the positions fed last, the last one that was not taken back
        self.before: list[torch.Tensor] = []  # hidden states before and after each run of neighbouring layers, in
        self.after: list[torch.Tensor] = []  # the last dense forward, [1, n, D]
        self.passed = 0  # such runs, in this forward

    def applies_to(self, layer: int) -> bool:
        """Whether this layer is passed over, or its hidden states are to be remembered."""
        if self.is_drafting:
            return layer in self.layers
        return self.reuse and (layer in self.firsts or layer in self.lasts)

    def run(self, layer, compute, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        """The output [1, n, D] of a decoder layer for `hidden` [1, n, D]; `compute` is its usual forward."""
        index = layer.self_attn.layer_idx
        if self.is_drafting:
            return hidden + self.change() if self.reuse and index in self.firsts else hidden
        if index in self.firsts:
            self.before.append(hidden)
        output = compute(hidden, **kwargs)
        if index in self.lasts:
            self.after.append(output)
        return output

    def begin(self):
        """To be called before every forward."""
        self.passed = 0
        if not self.is_drafting:
            self.before, self.after = [], []

    def change(self) -> torch.Tensor:
        """What the next run of layers changed at the last position, [1, 1, D]."""
        before, after = self.before[self.passed], self.after[self.passed]
        self.passed += 1
        return (after[:, self.last] - before[:, self.last]).unsqueeze(1)
