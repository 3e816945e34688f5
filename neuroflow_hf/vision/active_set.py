"""The active set of one frame: which patches of which stream are encoded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Owner = TypeVar("Owner")
Value = TypeVar("Value")


class computed_once(Generic[Owner, Value]):
    """`functools.cached_property` without its lock, which torch.compile cannot trace in Python 3.11."""

    def __init__(self, compute: Callable[[Owner], Value]):
        self.compute = compute

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Owner, owner: type[Owner]) -> Value:
        if self.name not in instance.__dict__:
            instance.__dict__[self.name] = self.compute(instance)
        return instance.__dict__[self.name]


@dataclass(frozen=True)
class ActiveSet:
    """
    The tokens of B streams that are encoded on one frame. Active tokens travel through the layers as rows [M, D],
    those of stream 0 first; M is the number of active tokens of all streams. The gate chooses among N patches;
    `with_prefix` adds the R tokens before them, so that there are T = R + N.

    Args:
        mask (`torch.BoolTensor` of shape `(B, T)`): the active tokens.
        counts (`list[int]`): how many each stream has; known on the host, which skips a wait for the device.
        keyframes (`list[bool]`): whether this frame is a keyframe of the stream (then all its tokens are active).
        changed (`torch.BoolTensor` of shape `(B, T)`):
            The patches that are above the threshold themselves, encoded or not; all False without a surprise.
        changed_counts (`list[tuple[int, int]]`): how many of them each stream has, and how many of those are active.
        num_prefix (`int`): how many of the tokens come before the patches, R.
    """

    mask: torch.Tensor
    counts: list[int]
    keyframes: list[bool]
    changed: torch.Tensor
    changed_counts: list[tuple[int, int]]
    num_prefix: int = 0

    def with_prefix(self, num_prefix: int) -> "ActiveSet":
        """The same active patches, with tokens before them that are active wherever a patch is."""
        if not num_prefix:
            return self
        live = torch.tensor([count > 0 for count in self.counts]).to(self.mask.device, non_blocking=True)
        prefix = live.unsqueeze(1).expand(-1, num_prefix)
        return ActiveSet(
            torch.cat([prefix, self.mask], dim=1),
            [count + num_prefix if count else 0 for count in self.counts],
            self.keyframes,
            torch.cat([torch.zeros_like(prefix), self.changed], dim=1),
            self.changed_counts,
            num_prefix,
        )

    @property
    def num_tokens(self) -> int:
        """The number of tokens, T."""
        return self.mask.shape[1]

    @computed_once
    def everything(self) -> bool:
        """Whether every token of every stream is active."""
        return sum(self.counts) == self.mask.numel()

    @computed_once
    def live(self) -> list[int]:
        """The streams with at least one active token."""
        return [stream for stream, count in enumerate(self.counts) if count]

    @computed_once
    def rows(self) -> torch.Tensor:
        """int64 [M]: the active tokens' places in memories laid out as [B * T, D], ascending."""
        mask, size = self.mask.flatten(), sum(self.counts)
        if torch.compiler.is_exporting():  # ONNX has no operator for the other
            return torch.arange(len(mask), 0, -1, device=mask.device).masked_fill(~mask, 0).topk(size).indices
        return torch.nonzero_static(mask, size=size).squeeze(1)

    @computed_once
    def among_live(self) -> "ActiveSet":
        """The same active patches, in a numbering that leaves out streams with none."""
        if len(self.live) == len(self.counts):
            return self
        return ActiveSet(
            self.mask[self.live],
            [self.counts[stream] for stream in self.live],
            [self.keyframes[stream] for stream in self.live],
            self.changed[self.live],
            [self.changed_counts[stream] for stream in self.live],
            self.num_prefix,
        )

    def of_live(self, features: torch.Tensor) -> torch.Tensor:
        """The entries of streams with an active patch: [B, ...] to [B', ...]."""
        return features if len(self.live) == len(self.counts) else features[self.live]

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """The active rows of [B, T, D]: [M, D], a view if everything is active."""
        rows = features.reshape(-1, features.shape[-1])
        return rows if self.everything else rows.index_select(0, self.rows.to(rows.device))

    def gather_shared(self, features: torch.Tensor) -> torch.Tensor:
        """The active tokens' entries of features [T, D] that all streams share: [M, D]."""
        return features.index_select(0, self.rows.to(features.device) % self.num_tokens)

    def remember(self, memory: dict[str, torch.Tensor], name: str, fresh: torch.Tensor) -> torch.Tensor:
        """Write fresh rows [M, D] into `memory[name]` and return all of it, [B, T, D]. See `write_memory`."""
        if self.everything:
            return write_memory(memory, name, None, fresh.view(*self.mask.shape, -1))
        return write_memory(memory, name, self.rows, fresh)

    def remember_by_head(
        self, memory: dict[str, torch.Tensor], name: str, fresh: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """As `remember`, for a memory stored head by head, [B, H, T, D / H]: each row is written in H pieces."""
        streams, tokens = self.mask.shape
        if self.everything:
            return write_memory(memory, name, None, fresh.view(streams, tokens, heads, -1).transpose(1, 2))
        stream = self.rows.div(tokens, rounding_mode="floor")
        in_first_head = self.rows + stream * (heads - 1) * tokens
        places = in_first_head.unsqueeze(1) + tokens * torch.arange(heads, device=stream.device)
        return write_memory(memory, name, places.flatten(), fresh.view(places.numel(), -1))

    def remember_streams(self, memory: dict[str, torch.Tensor], name: str, fresh: torch.Tensor) -> torch.Tensor:
        """Write the live streams' entries [B', ...] into `memory[name]` and return all of it, [B, ...]."""
        all_live = len(self.live) == len(self.counts)
        return write_memory(memory, name, None if all_live else torch.tensor(self.live), fresh)


def write_memory(
    memory: dict[str, torch.Tensor], name: str, places: torch.Tensor | None, fresh: torch.Tensor
) -> torch.Tensor:
    """
    Write `fresh` into `memory[name]`, at `places` along its leading dimensions or, with `None`, all of it; return
    what it holds now, with the gradient of `fresh`.

    Later frames write memories in place, so a memory never shares a tensor with other code: not with a module's
    output, which hooks may have kept, nor, with gradients enabled, with the result, which autograd may have kept.
    """
    if places is None:
        current = fresh
    else:
        stored = memory[name]
        flat, places = stored.view(-1, *fresh.shape[1:]), places.to(stored.device, non_blocking=True)
        if may_write_in_place(stored):
            flat.index_copy_(0, places, fresh)
            return stored
        current = flat.index_copy(0, places, fresh).view_as(stored)
    memory[name] = current.detach().clone(memory_format=torch.contiguous_format)
    return current


def add_to_memory(
    memory: dict[str, torch.Tensor], name: str, stream: int, weights: torch.Tensor, change: torch.Tensor
) -> None:
    """Add `weights` [T, S] times `change` [S, D] to one stream's entries of `memory[name]`, [B, T, D]."""
    stored = memory[name]
    weights, change = weights.to(stored.dtype), change.detach().to(stored.dtype)
    if may_write_in_place(stored):
        stored[stream].addmm_(weights, change)
        return
    current = stored.clone()
    current[stream] += weights @ change
    memory[name] = current


def may_write_in_place(stored: torch.Tensor) -> bool:
    """Whether a memory may be written in place: with no graph that needs its old values, and if torch allows it."""
    if torch.compiler.is_compiling():  # a graph cannot ask for the inference mode
        return not torch.is_grad_enabled()
    return not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not stored.is_inference())
