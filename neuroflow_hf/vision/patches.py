"""From pixels to the rows that enter the encoder: patch projection, position embeddings, tokens before the patches."""

import torch

from .active_set import ActiveSet
from .shortcuts import can_project_as_product, interpolate_at, project_as_product
from .tower import VisionTower


def project_patches(tower: VisionTower, pixel_values: torch.Tensor, as_product: bool) -> torch.Tensor:
    """
    [B, C, H, W] to the patch projections [B, N, D], contiguous: patches are gathered by row later.

    Args:
        as_product: whether the convolution may be computed as a matrix product: faster, but rounded differently.
    """
    projection = tower.patch_projection()
    pixel_values = pixel_values.to(projection.weight.dtype)
    if as_product and can_project_as_product(projection):
        return project_as_product(projection, pixel_values)
    return projection(pixel_values).flatten(2).transpose(1, 2).contiguous()


def embed_tokens(
    tower: VisionTower,
    patches: torch.Tensor,
    pixel_values: torch.Tensor,
    interpolate: bool,
    active: ActiveSet,
    all_patches: bool,
) -> torch.Tensor:
    """
    The first encoder layer's input, of patch projections [B, N, D].

    Args:
        interpolate: whether position embeddings may be interpolated.
        active: the active patches, without the tokens before them.
        all_patches: whether all tokens of streams with an active patch are returned, [B', T, D], or the active ones,
            as rows [M, D].
    """
    if all_patches:
        hidden = active.of_live(patches) + tower.patch_positions(patches, pixel_values, interpolate)
    else:
        hidden = active.gather(patches) + active_positions(tower, patches, pixel_values, interpolate, active)
    if tower.num_prefix_tokens:
        prefix = tower.prefix_tokens()
        if all_patches:
            hidden = torch.cat([prefix.expand(len(hidden), -1, -1), hidden], dim=1)
        else:
            streams = hidden.split([count for count in active.counts if count])
            hidden = torch.cat([rows for stream in streams for rows in (prefix, stream)])
    return tower.before_layers(hidden)


def active_positions(
    tower: VisionTower, patches: torch.Tensor, pixel_values: torch.Tensor, interpolate: bool, active: ActiveSet
) -> torch.Tensor:
    """
    The position embeddings of the active patches, rows [M, D]. Interpolated for them alone where that is faster: for
    the whole grid it takes longer than the gate.
    """
    # A keyframe, and a frame of the checkpoint's own resolution, must equal dense bit for bit.
    table = tower.position_table() if interpolate and not active.everything else None
    if table is not None:
        num_patches, own = patches.shape[1], len(table)
        # measured: bicubic interpolation takes as long as 256 multiply-adds per patch and feature
        if num_patches != own and sum(active.counts) * own < 256 * num_patches:
            projection = tower.patch_projection()
            height, width = (s // k for s, k in zip(pixel_values.shape[2:], projection.kernel_size, strict=True))
            return interpolate_at(table, active.rows % num_patches, (height, width))
    return active.gather_shared(tower.patch_positions(patches, pixel_values, interpolate))
