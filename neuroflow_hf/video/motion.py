"""
What moves, as the gate sees it: masks of patches and their connected regions.

    output = model(pixel_values=frame, stream=stream)
    moving = motion_mask(output, stream.gate)  # [B, grid_h, grid_w]

Pure functions of a model's output and the gate's options.
"""

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..vision.gate_config import NeuroFlowGateConfig
from ..vision.selection import without_global_motion


def motion_mask(
    output: Any, gate: NeuroFlowGateConfig, *, threshold: float | None = None, least_patches: int = 2
) -> Tensor:
    """
    The patches that changed, by the gate's surprise.

    It differs from `active_mask`, which also has patches encoded for other reasons (keyframes, sentinels, refreshing
    by age, neighbours of changed patches), and lacks patches beyond a budget.

    What counts as changed depends on the gate's `reference`. With `last_update` (the default): patches that differ
    from when they were last encoded, also those that an object has just left. With `ema`: patches that differ from the
    usual background; an object that stops stays in the mask until it has become background.

    Args:
        output: of a model with a stream, for B streams; or of `get_video_features`, for B clips of T frames.
        gate: the stream's options, `stream.gate`.
        threshold (`float`, defaults to the gate's): a patch moves if its surprise is above this. Raise it if noise or
            flicker shows up in the mask.
        least_patches (`int`, defaults to 2): leave out connected regions of fewer patches; 1 keeps all. Most single
            patches are noise, but objects smaller than two patches are lost too.

    Returns:
        bool [B, grid_h, grid_w], or [B, T, grid_h, grid_w]; all False on a stream's first frame, which has no
        reference.

    Raises:
        ValueError: for an output without surprise (mode `dense`, and `hold` without a trigger), a threshold of -1 or
            less, and `least_patches` below 1.
    """
    surprise = output.surprise
    if surprise is None:
        raise ValueError(
            f"The output has no `surprise`: mode {gate.mode!r} did not compare the frame. Use another mode, or give "
            "`hold` a keyframe trigger, such as `keyframe_fraction`."
        )
    threshold = gate.threshold if threshold is None else threshold
    if not threshold > -1:
        raise ValueError(f"The threshold is {threshold}, so everything moves; pass `threshold`, such as 0.01.")
    flat = surprise.flatten(-2)
    first_frame = (flat == 1).all(-1, keepdim=True)  # the gate's surprise of patches without a reference
    if gate.global_motion_norm:
        flat = without_global_motion(flat)
    moving = ((flat > threshold) & ~first_frame).view(surprise.shape)
    return without_small_regions(moving, least_patches)


def without_small_regions(mask: Tensor, least_patches: int) -> Tensor:
    """
    A mask, bool [..., grid_h, grid_w], without connected regions of fewer than `least_patches` patches, at least 1.
    Patches that touch at a corner are connected.
    """
    if least_patches < 1:
        raise ValueError(f"`least_patches` is {least_patches}; expected a number of patches, at least 1.")
    if least_patches == 1:
        return mask
    neighbours = np.zeros((3, 3, 3))
    neighbours[1] = 1  # none in other grids
    regions, _ = ndimage.label(mask.reshape(-1, *mask.shape[-2:]).cpu(), neighbours)
    large = np.bincount(regions.ravel()) >= least_patches
    return mask & torch.from_numpy(large[regions]).view(mask.shape).to(mask.device)
