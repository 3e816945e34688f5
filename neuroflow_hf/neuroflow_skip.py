"""
Drafting without some layers: they are passed over, and what they changed last is changed again.

A bypass that fires on every step reuses the outputs of whole layers, and nobody reads the keys and values that they
write before the draft is taken back. So a draft need not write them, and passing over a layer costs an addition.
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
        self.is_drafting = False
        self.count = 1  # how many positions are to be remembered of the next forward
        self.last = -1  # among those remembered, the last one that was not taken back
        self.seen: dict[int, torch.Tensor] = {}  # by layer, [1, count, D]

    def concerns(self, layer: int) -> bool:
        """Whether this layer is one of those."""
        return layer in self.layers if self.reuse else self.is_drafting and layer in self.layers

    def run(self, layer, compute, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        """The output [1, n, D] of a decoder layer for `hidden` [1, n, D]; `compute` is its usual forward."""
        index = layer.self_attn.layer_idx
        if self.is_drafting:
            return hidden + self.seen[index][:, self.last].unsqueeze(1) if self.reuse else hidden
        output = compute(hidden, **kwargs)
        self.seen[index] = output[:, -self.count :] - hidden[:, -self.count :]
        return output
