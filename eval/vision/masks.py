"""Masks of pixels and of patches, and how well two of them agree."""

from torch import Tensor, where


def patch_mask(pixels: Tensor, grid: tuple[int, int], least_share: float = 0.0) -> Tensor:
    """
    Masks of pixels to those of patches: the patches of which more than `least_share` is covered.

    Args:
        pixels: bool [..., H, W].
        grid: rows and columns of patches; H and W are cut into that many equal parts.
        least_share (`float`, defaults to 0): 0 takes every patch with a pixel in it, as the gate reacts to little; 0.5
            is for comparing outlines.

    Raises:
        ValueError: if H or W is no multiple of the grid's.
    """
    height, width = pixels.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"The mask has {height}x{width} pixels; expected multiples of the grid, {grid[0]}x{grid[1]}.")
    parts = pixels.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1))
    return parts.float().mean(dim=(-3, -1)) > least_share


def mask_iou(mask: Tensor, truth: Tensor) -> Tensor:
    """
    Intersection over union of masks, bool [..., h, w] each: float32 [...], from 0 to 1; 1 where both are empty.

    Raises:
        ValueError: if the two have different shapes.
    """
    if mask.shape != truth.shape:
        raise ValueError(f"The mask is {tuple(mask.shape)} and the truth {tuple(truth.shape)}; expected one shape.")
    both, either = (mask & truth).sum((-2, -1)), (mask | truth).sum((-2, -1))
    return where(either == 0, 1.0, both / either.clamp(min=1))
