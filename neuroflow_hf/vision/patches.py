"""From pixels to the rows that enter the encoder: patch projection and position embeddings."""

import torch
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings, SiglipVisionModel

from .active_set import ActiveSet
from .shortcuts import can_project_as_product, interpolate_at, project_as_product


def project_patches(model: SiglipVisionModel, pixel_values: torch.Tensor, as_product: bool) -> torch.Tensor:
    """
    [B, C, H, W] to the patch projections [B, N, D], contiguous: patches are gathered by row later.

    Args:
        as_product: whether the convolution may be computed as a matrix product: faster, but rounded differently.
    """
    projection = model.embeddings.patch_embedding
    pixel_values = pixel_values.to(projection.weight.dtype)
    if as_product and can_project_as_product(projection):
        return project_as_product(projection, pixel_values)
    return projection(pixel_values).flatten(2).transpose(1, 2).contiguous()


def position_embeddings(
    model: SiglipVisionModel, patches: torch.Tensor, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
) -> torch.Tensor:
    """The position embeddings of a frame's patches [B, N, D], the same for all streams: [N, D]."""
    embeddings = model.embeddings
    if interpolate_pos_encoding:
        return embeddings.interpolate_pos_encoding(patches, *pixel_values.shape[2:])[0]
    return embeddings.position_embedding(embeddings.position_ids)[0]


def active_position_embeddings(
    model: SiglipVisionModel,
    patches: torch.Tensor,
    pixel_values: torch.Tensor,
    interpolate_pos_encoding: bool,
    active: ActiveSet,
    grid: tuple[int, int],
) -> torch.Tensor:
    """
    The position embeddings of the active patches, rows [M, D]. Interpolated for them alone where that is faster: for
    the whole grid it takes longer than the gate.
    """
    embeddings = model.embeddings
    # An overridden method may do something else, so it is called. A keyframe, and a frame of the checkpoint's own
    # resolution, must equal dense bit for bit.
    stock = SiglipVisionEmbeddings.interpolate_pos_encoding
    is_stock = getattr(embeddings.interpolate_pos_encoding, "__func__", None) is stock
    if interpolate_pos_encoding and is_stock and not active.everything:
        own = embeddings.num_positions
        # measured: bicubic interpolation takes as long as 256 multiply-adds per patch and feature
        if active.num_patches != own and sum(active.counts) * own < 256 * active.num_patches:
            return interpolate_at(embeddings.position_embedding.weight, active.rows % active.num_patches, grid)
    return active.gather_shared(position_embeddings(model, patches, pixel_values, interpolate_pos_encoding))
