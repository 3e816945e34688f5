"""What a bypass remembers of one generation. It lives in the KV cache, as one more layer, and goes where that goes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

DENSE, COMPUTED, BYPASSED = 0, 1, 2  # outcomes: in a step of several tokens; in a step of one; one that was bypassed


@dataclass
class BypassStatistics:
    """
    What the gate did in one generation, of B sequences of T positions.

    Args:
        steps (`torch.LongTensor` of shape `(B,)`): steps of one new token, the ones that could be bypassed.
        bypassed (`torch.LongTensor` of shape `(B,)`): those that were.
        similarity (`torch.FloatTensor` of shape `(B, T)`):
            The gate layer's similarity at each position; NaN where there was none (in the prompt, and after it where
            the gate had nothing to compare with).
        bypassed_mask (`torch.BoolTensor` of shape `(B, T)`): the positions at which layers were bypassed.
    """

    steps: torch.Tensor
    bypassed: torch.Tensor
    similarity: torch.Tensor
    bypassed_mask: torch.Tensor

    @property
    def rate(self) -> torch.Tensor:
        """The share of the steps that was bypassed, [B]; 0 without steps."""
        return self.bypassed / self.steps.clamp(min=1)

    def percentiles(self, *shares: float) -> list[float]:
        """Percentiles of the similarity over all sequences and steps, such as `percentiles(0.1, 0.5, 0.9)`."""
        values = self.similarity[~self.similarity.isnan()]
        return [values.quantile(share).item() if len(values) else math.nan for share in shares]


class BypassState:
    """
    Records per position, in a place among the layers of a [`~transformers.Cache`], after the model's own.

    Each record is a list of tensors [B, n, ...] whose n add up to the positions recorded, so that it can be cropped,
    reordered and repeated as keys and values are. Appending copies nothing: a bypassed step's output *is* that of the
    step before. `bypass.py` decides what is recorded, and names it.

    Memory: at most B * T * D * (1 + parts * cache layers) numbers of the model's dtype, for B sequences of T positions
    and width D: the gate's output, and of each cache layer one part (`attention` or `mlp`) or two (`block`). The KV
    cache takes B * T * 2 * kv_width per layer, so one cache layer with `block` takes as much again as its keys and
    values, and more with grouped heads. Bypassed steps share their tensors with the step before and take next to
    nothing until rows are reordered. It cannot be less without breaking the promise that a cache cropped to *any*
    length goes on as if it had never been longer: what a step reuses was last computed at a position that may be the
    last one kept. Lossless drafts that skip whole layers keep none (`layer_skip.py`).

    Args:
        first_layer: the cache's first layer; with offloading, the one to be fetched after this.
    """

    is_bypass_state = True  # to be known by; remote code may bring a second copy of this class
    # what a `Cache` asks of its layers
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    is_initialized = True
    keys = values = None

    def __init__(self, first_layer):
        self.first_layer = first_layer
        self.records: dict[str, list[torch.Tensor]] = {}
        self.end = 0  # the cache's length as of the last record

    def __repr__(self):
        return f"{type(self).__name__}(positions={self.positions})"

    @property
    def positions(self) -> int:
        """How many positions are recorded, up to `end`."""
        return sum(chunk.shape[1] for chunk in next(iter(self.records.values()), []))

    @property
    def batch_rows(self) -> int | None:
        """How many sequences are recorded; None if nothing is. (A `batch_size` would be asked of by `Cache`.)"""
        return next((chunks[-1].shape[0] for chunks in self.records.values() if chunks), None)

    def forget(self):
        """Forget all records."""
        self.records = {}
        self.end = 0

    def prepare(self, names: Iterable[str], cache_length: int):
        """
        Make ready for a step with records of these names that starts at `cache_length`. What is recorded is kept only
        if it is of these names and reaches up to there: the cache may have grown without a bypass, or with another.
        """
        names = set(names)
        if not names <= set(self.records) or self.end != cache_length:
            self.records = {name: [] for name in names}
        self.records = {name: chunks for name, chunks in self.records.items() if name in names}

    def append(self, records: dict[str, torch.Tensor]):
        """Add a step's records, [B, n, ...] each, all that `prepare` was told."""
        for name, chunks in self.records.items():
            chunks.append(records[name])

    def last(self, name: str, count: int = 1) -> torch.Tensor | None:
        """The last `count` positions of a record, [B, count, ...]; None if there are fewer."""
        chunks = self.records.get(name, ())
        if count == 1:
            return chunks[-1][:, -1:] if chunks else None
        found, missing = [], count
        for chunk in reversed(chunks):
            found.insert(0, chunk[:, -missing:])
            missing -= found[0].shape[1]
            if missing == 0:
                return torch.cat(found, dim=1)
        return None

    def whole(self, name: str) -> torch.Tensor:
        """All positions of a record in one tensor, [B, T, ...]; kept so, for the next time."""
        chunks = self.records[name]
        if len(chunks) > 1:
            self.records[name] = chunks = [torch.cat(chunks, dim=1)]
        return chunks[0]

    def statistics(self) -> BypassStatistics:
        """Counts and similarities of what is recorded."""
        if self.batch_rows is None:
            raise ValueError("The cache holds no steps with a bypass; generate with `bypass` options first.")
        outcome = self.whole("outcome")
        return BypassStatistics(
            steps=(outcome != DENSE).sum(dim=1),
            bypassed=(outcome == BYPASSED).sum(dim=1),
            similarity=self.whole("similarity"),
            bypassed_mask=outcome == BYPASSED,
        )

    # --- as a layer of the cache --------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int):
        """Remove as many positions as a negative number says; transformers 5.17 also knows the length to keep."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.end - tokens_to_remove)
        for chunks in self.records.values():
            missing = remove
            while missing and chunks:
                chunk = chunks.pop()
                if chunk.shape[1] > missing:
                    chunks.append(chunk[:, :-missing])
                missing -= min(missing, chunk.shape[1])
        self.end -= remove

    def reorder_cache(self, beam_idx: torch.LongTensor):
        """Row b becomes what row `beam_idx[b]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        """Keep these rows, in this order."""
        for name, chunks in self.records.items():
            if chunks:
                whole = self.whole(name)
                self.records[name] = [whole[torch.as_tensor(indices, device=whole.device)]]

    def batch_repeat_interleave(self, repeats: int):
        """Every row `repeats` times."""
        for name, chunks in self.records.items():
            self.records[name] = [chunk.repeat_interleave(repeats, dim=0) for chunk in chunks]

    def reset(self):
        """Forget all records."""
        self.forget()

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def offload(self):
        """Nothing to do: records stay on the device that they are needed on."""

    def prefetch(self):
        """With offloading, this is called where the model's last layer asks for the next one: the first."""
        self.first_layer.prefetch()


def find_state(cache) -> BypassState | None:
    """The bypass's state in a cache, if it has one."""
    return next((layer for layer in cache.layers if getattr(layer, "is_bypass_state", False)), None)
