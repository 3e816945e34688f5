"""
What moves, as the gate sees it: masks of patches, and their connected regions.

    output = model(pixel_values=frame, stream=stream)
    moving = motion_mask(output, stream.gate)  # [B, grid_h, grid_w]

Pure functions. They read a model's output and the gate's options; no stream is changed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..vision.gate_config import NeuroFlowGateConfig
from ..vision.selection import without_global_motion


def motion_mask(
    output: Any, gate: NeuroFlowGateConfig, *, threshold: float | None = None, least_patches: int = 2
) -> Tensor:
    """
    The patches that changed, from the surprise by which the gate chose what to encode.

    It is not `active_mask`, which also holds patches encoded for other reasons: all of them on keyframes, sentinels,
    those whose turn it was, neighbours of changed ones; and which a budget cuts off.

    What *changed* depends on the gate's `reference`. Against `last_update` (the default), a patch that a thing has
    just left is among them, as is one that changed on an earlier frame and was not encoded since; against `ema`, what
    differs from the usual background: a thing that stands still stays in the mask until it belongs to the background.

    Args:
        output: of a model with a stream, for B streams; or of `get_video_features`, for B clips of T frames.
        gate: the stream's options, `stream.gate`.
        threshold (`float`, defaults to the gate's): a patch moves if its surprise is above this. Raise it where noise
            or flicker shows up in the mask.
        least_patches (`int`, defaults to 2): regions of fewer patches, neighbours and diagonal ones together, are
            left out; 1 keeps all. Most single patches are noise; things smaller than two patches are lost with them.

    Returns:
        bool [B, grid_h, grid_w], or [B, T, grid_h, grid_w]. All False on a stream's first frame, which has nothing to
        compare with.

    Raises:
        ValueError: if the frame was not looked at (mode `dense`, and `hold` by the clock); if there is no usable
            threshold; if `least_patches` is below 1.
    """
    surprise = output.surprise
    if surprise is None:
        raise ValueError(
            f"The output has no `surprise`: mode {gate.mode!r} did not look at the frame. Use another mode, or give "
            "`hold` a keyframe trigger, such as `keyframe_fraction`."
        )
    threshold = gate.threshold if threshold is None else threshold
    if not threshold > -1:
        raise ValueError(f"The threshold is {threshold}, by which everything moves; pass `threshold`, such as 0.01.")
    flat = surprise.flatten(-2)
    first_frame = (flat == 1).all(-1, keepdim=True)  # exactly 1 is what the gate says of patches without a reference
    if gate.global_motion_norm:
        flat = without_global_motion(flat)
    moving = ((flat > threshold) & ~first_frame).view(surprise.shape)
    return without_small_regions(moving, least_patches)


def connected_regions(mask: Tensor) -> Tensor:
    """
    Numbers the connected regions of masks; patches that touch, at a corner too, are of one region.

    Every patch takes the first place among its neighbours', and then the one that the patch at that place has taken,
    until nothing changes; the second step leaps, so that long regions take few rounds.

    Args:
        mask: bool [..., grid_h, grid_w].

    Returns:
        int64 of the same shape: 0 outside, and 1, 2, ... in each grid by its own, in reading order of the regions'
        first patches.
    """
    if not mask.numel():
        return torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    grids = mask.reshape(-1, *mask.shape[-2:])
    patches = grids[0].numel()
    inside = grids.flatten(1)
    # the first place is the largest number, and 0 is outside; float32 holds whole numbers up to 2^24
    ranks = (patches - torch.arange(patches, device=mask.device)).expand(len(grids), -1) * inside
    while True:
        pooled = functional.max_pool2d(ranks.view_as(grids).unsqueeze(1).float(), 3, stride=1, padding=1)
        spread = pooled.flatten(1).long() * inside
        spread = spread.gather(1, (patches - spread).clamp(max=patches - 1)) * inside
        if torch.equal(spread, ranks):
            break
        ranks = spread
    places = patches - ranks  # of each patch's region, that of its first patch; outside, `patches`
    is_first = inside & (places == torch.arange(patches, device=mask.device))
    numbers = is_first.cumsum(1)
    numbered = numbers.gather(1, places.clamp(max=patches - 1)) * inside
    return numbered.view(mask.shape)


def without_small_regions(mask: Tensor, least_patches: int) -> Tensor:
    """
    `mask`, bool [..., grid_h, grid_w], without connected regions of fewer patches than `least_patches`.

    Raises:
        ValueError: if `least_patches` is below 1.
    """
    if least_patches < 1:
        raise ValueError(f"`least_patches` is {least_patches}; expected a number of patches, at least 1.")
    if least_patches == 1:
        return mask
    regions = connected_regions(mask).reshape(-1, mask.shape[-2] * mask.shape[-1])
    sizes = torch.zeros(len(regions), regions.shape[1] + 1, dtype=torch.int64, device=mask.device)
    sizes.scatter_add_(1, regions, torch.ones_like(regions))
    return mask & (sizes.gather(1, regions) >= least_patches).view(mask.shape)
