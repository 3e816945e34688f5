"""The mathematics of the gate: pure functions of tensors. B streams, N = grid_h * grid_w patches, D features."""

import math

import torch
from torch.nn import functional as F

# On a CPU, this many patches are compared at a time: intermediate results stay in the cache. For large N, that is five
# times faster.
PATCHES_AT_A_TIME = 256
# A surprise below this is rounding in float32. It must not choose patches: an exported stream rounds otherwise.
ROUNDING = 1e-10


def surprise(signal: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    `1 - cos(signal_i, reference_i)`: [B, N, D] and [B, N, D] to [B, N], float32 in [0, 2].

    Computed as half the squared distance of the unit vectors, which is the same number but exactly 0 where the two
    are equal and does not cancel near 0, where thresholds lie.
    """
    if signal.device.type != "cpu":
        return surprise_of_part(signal, reference)
    parts = zip(signal.split(PATCHES_AT_A_TIME, dim=1), reference.split(PATCHES_AT_A_TIME, dim=1), strict=True)
    return torch.cat([surprise_of_part(*part) for part in parts], dim=1)


def surprise_of_part(signal: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`surprise`, all at once."""
    difference = F.normalize(signal.float(), dim=-1) - F.normalize(reference.float(), dim=-1)
    return difference.square().sum(dim=-1) / 2


def running_mean(mean: torch.Tensor, signal: torch.Tensor, rate: float) -> torch.Tensor:
    """`E <- (1 - a) E + a x` for all patches: [B, N, D] each. Kept in float32, where a small `rate` still counts."""
    return torch.lerp(mean, signal.float(), rate)


def without_global_motion(surprise: torch.Tensor) -> torch.Tensor:
    """Each frame's surprise less its mean over the patches: [B, N] to [B, N]."""
    return surprise - surprise.mean(dim=-1, keepdim=True)


def spread_to_neighbours(score: torch.Tensor, grid: tuple[int, int], radius: int) -> torch.Tensor:
    """The highest score within `radius` rows and columns: [B, N] to [B, N], so a threshold on it dilates the mask."""
    if radius == 0:
        return score
    grid_scores = score.unflatten(-1, grid).unsqueeze(1)
    return F.max_pool2d(grid_scores, 2 * radius + 1, stride=1, padding=radius).flatten(1)


def highest(score: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """
    Mask of the `count` highest scores of each stream: [B, N] to bool [B, N]. Ties go to the first. `count` is one
    number, or one for each stream, [B].
    """
    order = score.sort(dim=-1, descending=True, stable=True).indices
    if isinstance(count, int):
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[:, :count], True)
    taken = torch.arange(score.shape[-1], device=score.device) < count.unsqueeze(-1)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, taken)


def refreshed_per_frame(num_patches: int, max_age: int) -> int:
    """How many patches, the oldest first, must be encoded on every frame so that none gets older than `max_age`."""
    return math.ceil(num_patches / max_age)


def turns(grid: tuple[int, int]) -> list[float]:
    """
    The order among patches of equal age: N numbers in [0, 1), the highest first. Consecutive turns are spread evenly
    over the picture (a lattice of two irrational steps, as in dithering masks).
    """
    return [
        (row * 0.7548776662466927 + column * 0.5698402909980532) % 1
        for row in range(grid[0])
        for column in range(grid[1])
    ]


def oldest(
    age: torch.Tensor, grid: tuple[int, int], count: int | torch.Tensor, among: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Mask of the `count` patches of each stream that were encoded longest ago: int64 [B, N] to bool [B, N].

    Taking as many on every frame encodes every patch in turn. Patches of equal age take turns by `turns`. With
    `among` (bool [B, N]) only these are taken, all of them if they are fewer. `count` as in `highest`.
    """
    order = age + torch.tensor(turns(grid), dtype=torch.float64, device=age.device)
    if among is None:
        return highest(order, count)
    return highest(order.masked_fill(~among, -1), count) & among


def has_only_finite(features: torch.Tensor) -> torch.Tensor:
    """Whether a stream's features hold neither NaN nor infinity: [B, ...] to bool [B]."""
    return torch.isfinite(features.flatten(1).sum(dim=-1, dtype=torch.float32))
