"""
Summary tokens: what active patches know of the others in `eliminate` and `reconstruct`.

Where every patch of a stream is active, each layer's keys and values are averaged over the cells of a coarse grid and
stored. On other frames, active patches attend to these averages beside each other. The average of n patches stands for
all of them: log n is added to its attention score, as in proportional attention (Bolya et al., "Token Merging", 2023).
So n equal patches and their average get the same weight. The layers' work depends on the numbers of active patches and
summary tokens, not on the number of patches.
"""

import math

import torch
from torch.nn import functional as F

from .active_set import ActiveSet, computed_once, write_memory
from .attention import attend_batch
from .tower import LayerParts

SUMMARY_KEY, SUMMARY_VALUE, SUMMARY_OUTPUT = "summary_key", "summary_value", "summary_output"


class SummaryGrid:
    """
    The cells of one frame geometry. Cell (i, j) holds rows from `floor(i * rows / s)` to `ceil((i + 1) * rows / s)`,
    and columns likewise; where sizes do not divide, neighbouring cells share a row or column.

    Args:
        grid: rows and columns of patches.
        tokens: number of cells, K = s * s.
        dtype, device: of the features.
    """

    def __init__(self, grid: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device):
        self.grid, self.tokens, self.side = grid, tokens, math.isqrt(tokens)
        self.dtype, self.device = dtype, device

    @computed_once
    def log_counts(self) -> torch.Tensor:
        """[K]: the logarithm of each cell's number of patches; copied to the device once a frame."""
        rows, columns = (
            torch.tensor([-(-(cell + 1) * size // self.side) - cell * size // self.side for cell in range(self.side)])
            for size in self.grid
        )
        counts = torch.outer(rows, columns).flatten().double()
        return counts.log().to(self.device, self.dtype, non_blocking=True)

    def average(self, features: torch.Tensor) -> torch.Tensor:
        """The cells' averages [B, K, D] of features of all tokens, [B, T, D]; those before the patches are in none."""
        patches = features[:, features.shape[1] - self.grid[0] * self.grid[1] :]
        planes = patches.transpose(1, 2).unflatten(-1, self.grid)
        return F.adaptive_avg_pool2d(planes, self.side).flatten(2).transpose(1, 2)

    def bias(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """[1, 1, 1, count + K]: what is added to the scores of `count` active tokens and the summary tokens."""
        return F.pad(self.log_counts.to(like), (count, 0)).view(1, 1, 1, -1)


def whole_streams(active: ActiveSet) -> list[int]:
    """The streams with every token active."""
    return [stream for stream, count in enumerate(active.counts) if count == active.num_tokens]


def remember_summary(
    memory: dict[str, torch.Tensor], name: str, fresh: torch.Tensor, active: ActiveSet, summary: SummaryGrid
) -> None:
    """Store the averages of rows [M, D] in `memory[name]`, [B, K, D], for the streams with every token active."""
    whole = whole_streams(active)
    if not whole:
        return
    if len(whole) == len(active.counts):
        write_memory(memory, name, None, summary.average(fresh.view(*active.mask.shape, -1)))
    else:
        rows = fresh.split(active.counts)
        averages = summary.average(torch.stack([rows[stream] for stream in whole]))
        write_memory(memory, name, torch.tensor(whole), averages)


def attend_with_summary(
    parts: LayerParts,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    active: ActiveSet,
    summary: SummaryGrid,
    memory: dict[str, torch.Tensor],
    names: list[str],
) -> torch.Tensor:
    """
    Active patches attend to the same stream's active patches and summary tokens; where every patch is active, to those
    alone, and their averages are the new summary tokens, in the memories of these two names. Rows [M, D] to [M, D].
    """
    for name, fresh in zip(names, (key, value), strict=True):
        remember_summary(memory, name, fresh, active, summary)
    counts, whole = active.counts, set(whole_streams(active))
    if len(set(counts)) == 1 and not whole:
        keys, values = (
            torch.cat([rows.view(len(counts), -1, rows.shape[-1]), memory[name]], dim=1).flatten(0, 1)
            for rows, name in zip((key, value), names, strict=True)
        )
        return attend_batch(parts, query, keys, values, len(counts), summary.bias(counts[0], query))
    attended = []
    for stream, rows in enumerate(zip(query.split(counts), key.split(counts), value.split(counts), strict=True)):
        queries, keys, values = rows
        if stream in whole:
            attended.append(attend_batch(parts, queries, keys, values, 1))
        elif counts[stream]:
            keys = torch.cat([keys, memory[names[0]][stream]])
            values = torch.cat([values, memory[names[1]][stream]])
            attended.append(attend_batch(parts, queries, keys, values, 1, summary.bias(counts[stream], query)))
    return torch.cat(attended)
