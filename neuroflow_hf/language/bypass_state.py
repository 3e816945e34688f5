"""What a bypass stores of one generation: one more layer in the KV cache, cropped and reordered with the others."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

WARN_AFTER, MAX_RATE = 64, 0.9  # warn of a threshold that bypasses more of at least this many steps
DENSE, COMPUTED, BYPASSED = 0, 1, 2  # outcomes of a position: in a step of several tokens; in a step of one; bypassed


@dataclass
class BypassStatistics:
    """
    What the gate did in one generation, of B sequences of T positions.

    Args:
        steps (`torch.LongTensor` of shape `(B,)`): number of steps of one new token; only these can be bypassed.
        bypassed (`torch.LongTensor` of shape `(B,)`): number of bypassed steps.
        similarity (`torch.FloatTensor` of shape `(B, T)`):
            The gate layer's similarity at each position; NaN in the prompt and where the gate had nothing to compare.
        bypassed_mask (`torch.BoolTensor` of shape `(B, T)`): the positions at which layers were bypassed.
    """

    steps: torch.Tensor
    bypassed: torch.Tensor
    similarity: torch.Tensor
    bypassed_mask: torch.Tensor

    @property
    def rate(self) -> torch.Tensor:
        """The share of bypassed steps, [B]; 0 without steps."""
        return self.bypassed / self.steps.clamp(min=1)

    def percentiles(self, *shares: float) -> list[float]:
        """Percentiles of the similarity over all sequences and steps, such as `percentiles(0.1, 0.5, 0.9)`."""
        values = self.similarity[~self.similarity.isnan()]
        return [values.quantile(share).item() if len(values) else math.nan for share in shares]


def too_low(threshold: float) -> str:
    """The warning about a threshold that the similarities hardly ever miss."""
    return (
        f"The threshold {threshold:g} bypassed more than {MAX_RATE:.0%} of the steps: it is too low for this "
        "checkpoint. Choose one by its own similarities: with a `rate`, such as 0.2, in place of the threshold."
    )


class BypassState:
    """
    Records of every position, in a place among the layers of a [`~transformers.Cache`], after the model's own.

    Each record is a list of tensors [B, n, ...] whose n add up to the number of positions, so it can be cropped,
    reordered and repeated like keys and values. A bypassed step appends the tensor of the step before, without a copy.
    `bypass.py` names the records.

    Memory: at most B * T * D * (1 + parts * cache layers) numbers of the model's dtype, for B sequences of T positions
    and width D: the gate's output, and of each cache layer one part (`attention` or `mlp`) or two (`block`). The KV
    cache takes B * T * 2 * kv_width per layer, so one cache layer with `block` takes as much again as its keys and
    values, and more with grouped heads. Bypassed steps take next to nothing until rows are reordered. All positions
    are kept because the cache may be cropped to any length, and the next step reuses the output of the last position
    that is left.
    """

    is_bypass_state = True  # instead of `isinstance`: code loaded from the Hub has a class of its own
    # what `Cache` reads of its layers
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    is_initialized = True
    keys = values = None

    def __init__(self) -> None:
        self.first_layer: CacheLayerMixin | None = None  # of the cache, once this is in one
        self.records: dict[str, list[torch.Tensor]] = {}
        self.end = 0  # the cache's length after the last record
        self.decisions = self.bypasses = 0  # of the gate, also at positions that were cropped

    def __repr__(self) -> str:
        return f"{type(self).__name__}(positions={self.positions})"

    @property
    def positions(self) -> int:
        """Number of positions recorded, the last ones before `end`."""
        return sum(chunk.shape[1] for chunk in next(iter(self.records.values()), []))

    @property
    def batch_rows(self) -> int | None:
        """Number of sequences recorded; None if there is no record. (`Cache` would read a `batch_size`.)"""
        return next((chunks[-1].shape[0] for chunks in self.records.values() if chunks), None)

    def prepare(self, names: Iterable[str], cache_length: int) -> None:
        """
        Prepare for a step that starts at `cache_length` and makes records of these names. Earlier records are dropped
        if a name is missing or they do not reach `cache_length`: the cache grew without a bypass, or with another.
        """
        names = set(names)
        if not names <= set(self.records) or self.end != cache_length:
            self.records = {name: [] for name in names}
        self.records = {name: chunks for name, chunks in self.records.items() if name in names}

    def append(self, records: dict[str, torch.Tensor]) -> None:
        """Add a step's records, [B, n, ...] each, of all names given to `prepare`."""
        for name, chunks in self.records.items():
            chunks.append(records[name])

    def count(self, decisions: int, bypasses: int, threshold: float) -> None:
        """Count the gate's decisions at a step, and warn of a threshold that the gate hardly ever misses."""
        self.decisions += decisions
        self.bypasses += bypasses
        if self.decisions >= WARN_AFTER and self.bypasses > MAX_RATE * self.decisions:
            warnings.warn(too_low(threshold), stacklevel=2)

    def last(self, name: str) -> torch.Tensor:
        """The last position of a record, [B, 1, ...]."""
        return self.records[name][-1][:, -1:]

    def last_few(self, name: str, count: int) -> torch.Tensor | None:
        """The last `count` positions of a record, [B, count, ...]; None if there are fewer."""
        found: list[torch.Tensor] = []
        missing = count
        for chunk in reversed(self.records[name]):
            found.insert(0, chunk[:, -missing:])
            missing -= found[0].shape[1]
            if missing == 0:
                return torch.cat(found, dim=1)
        return None

    def whole(self, name: str) -> torch.Tensor:
        """All positions of a record in one tensor, [B, T, ...], which replaces its chunks."""
        chunks = self.records[name]
        if len(chunks) > 1:
            self.records[name] = chunks = [torch.cat(chunks, dim=1)]
        return chunks[0]

    def statistics(self, since: int = 0) -> BypassStatistics:
        """Counts and similarities of all recorded positions from `since`, a position in the cache."""
        if self.batch_rows is None:
            raise ValueError("The cache holds no steps with a bypass; generate with `bypass` options first.")
        first = max(0, since - (self.end - self.positions))
        outcome = self.whole("outcome")[:, first:]
        return BypassStatistics(
            steps=(outcome != DENSE).sum(dim=1),
            bypassed=(outcome == BYPASSED).sum(dim=1),
            similarity=self.whole("similarity")[:, first:],
            bypassed_mask=outcome == BYPASSED,
        )

    # --- as a layer of the cache --------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove `-tokens_to_remove` positions. A positive number is the length to keep, as in transformers 5.17."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.end - tokens_to_remove)
        for chunks in self.records.values():
            missing = remove
            while missing and chunks:
                chunk = chunks.pop()
                if chunk.shape[1] > missing:
                    chunks.append(chunk[:, :-missing])
                missing -= min(missing, chunk.shape[1])
        self.end -= remove

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row b by row `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        for name, chunks in self.records.items():
            if chunks:
                whole = self.whole(name)
                self.records[name] = [whole[torch.as_tensor(indices, device=whole.device)]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for name, chunks in self.records.items():
            self.records[name] = [chunk.repeat_interleave(repeats, dim=0) for chunk in chunks]

    def reset(self) -> None:
        """Forget all records."""
        self.records = {}
        self.end = 0

    def get_max_length(self) -> int:
        """-1, for no maximum."""
        return -1

    def offload(self) -> None:
        """Do nothing: records stay on the device that needs them."""

    def prefetch(self) -> None:
        """Prefetch the first layer: the last layer of the model asks for the layer after it, which is this one."""
        if self.first_layer is not None:
            self.first_layer.prefetch()


def find_state(cache: Cache) -> BypassState | None:
    """The bypass's state in a cache, if it has one."""
    found = next((layer for layer in cache.layers if hasattr(layer, "is_bypass_state")), None)
    return cast(BypassState | None, found)
