"""The active set of one frame: which patches of which stream are encoded."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ActiveSet:
    """
    The patches of B streams that are encoded on one frame. Active patches travel through the layers as rows [M, D],
    those of stream 0 first; M is the number of active patches of all streams.

    Args:
        mask (`torch.BoolTensor` of shape `(B, N)`): the active patches.
        counts (`list[int]`): how many each stream has; known on the host, so that nothing has to wait for the device.
        keyframes (`list[bool]`): whether this frame is a keyframe of the stream (then all its patches are active).
    """

    mask: torch.Tensor
    counts: list[int]
    keyframes: list[bool]

    @property
    def num_patches(self) -> int:
        """N."""
        return self.mask.shape[1]

    @cached_property
    def everything(self) -> bool:
        """Whether every patch of every stream is active."""
        return sum(self.counts) == self.mask.numel()

    @cached_property
    def live(self) -> list[int]:
        """The streams with at least one active patch."""
        return [stream for stream, count in enumerate(self.counts) if count]

    @cached_property
    def rows(self) -> torch.Tensor:
        """int64 [M]: the active patches' places in memories laid out as [B * N, D], ascending."""
        return torch.nonzero_static(self.mask.flatten(), size=sum(self.counts)).squeeze(1)

    @cached_property
    def among_live(self) -> "ActiveSet":
        """The same active patches, in a numbering that leaves out streams with none."""
        if len(self.live) == len(self.counts):
            return self
        return ActiveSet(
            self.mask[self.live],
            [self.counts[stream] for stream in self.live],
            [self.keyframes[stream] for stream in self.live],
        )

    def of_live(self, features: torch.Tensor) -> torch.Tensor:
        """[B, ...] to [B', ...]: the entries of streams with an active patch; a view if that is all."""
        return features if len(self.live) == len(self.counts) else features[self.live]

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """The active rows of [B, N, D]: [M, D], a view if everything is active."""
        rows = features.reshape(-1, features.shape[-1])
        return rows if self.everything else rows.index_select(0, self.rows.to(rows.device))

    def gather_shared(self, features: torch.Tensor) -> torch.Tensor:
        """The active patches' entries of features [N, D] that all streams share: [M, D]."""
        return features.index_select(0, self.rows.to(features.device) % self.num_patches)

    def remember(self, memory: dict[str, torch.Tensor], name: str, fresh: torch.Tensor) -> torch.Tensor:
        """
        Write fresh rows [M, D] into `memory[name]` and return all N patches of it, [B, N, D].

        With everything active the fresh tensor becomes the memory. Under autograd the returned tensor carries the
        fresh rows' gradient while the memory, which later frames will overwrite, holds no graph.
        """
        if self.everything:
            current = fresh.view(*self.mask.shape, -1)
        else:
            stored = memory[name]
            current = write_rows(stored.flatten(0, 1), self.rows.to(stored.device), fresh).view_as(stored)
        memory[name] = current.detach()
        return current


def write_rows(stored: torch.Tensor, rows: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """
    `stored` [K, ...] with `fresh` [M, ...] at places `rows` [M]; in place unless autograd needs the old values, or
    `stored` was made in inference mode and this call is not, where torch forbids it.
    """
    if fresh.requires_grad or (stored.is_inference() and not torch.is_inference_mode_enabled()):
        return stored.index_copy(0, rows, fresh)
    return stored.index_copy_(0, rows, fresh)
