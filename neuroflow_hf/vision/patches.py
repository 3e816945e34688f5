"""From pixels to the rows that enter the encoder: patch projection and position embeddings."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from .active_set import ActiveSet
from .shortcuts import are_plain


def project_patches(model: nn.Module, pixel_values: torch.Tensor, as_product: bool) -> torch.Tensor:
    """
    [B, C, H, W] to the patch projections [B, N, D], contiguous: patches are gathered by row later.

    Args:
        as_product: whether the convolution may be done as the matrix product that it is, which rounds differently;
            it is done so if `can_project_as_product`.
    """
    projection = model.embeddings.patch_embedding
    pixel_values = pixel_values.to(projection.weight.dtype)
    if as_product and can_project_as_product(projection):
        return project_as_product(projection, pixel_values)
    return projection(pixel_values).flatten(2).transpose(1, 2).contiguous()


def can_project_as_product(projection: nn.Module) -> bool:
    """Whether it is a plain convolution whose windows neither overlap nor leave gaps."""
    return (
        type(projection) is nn.Conv2d
        and projection.stride == projection.kernel_size
        and projection.padding in ("valid", (0, 0))
        and projection.dilation == (1, 1)
        and projection.groups == 1
        and projection.bias is not None
        and are_plain([projection], [projection.weight, projection.bias])
    )


def project_as_product(projection: nn.Conv2d, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    `can_project_as_product`'s convolution, [B, C, H, W] to [B, N, D], as one product of [B * N, C * P * P] with the
    weights: at 12,544 patches on a CPU 1.7 times as fast as the convolution, in bfloat16 7 times. What does not fill a
    patch at the right and the lower edge is left out, as the convolution does.
    """
    rows, columns = projection.kernel_size
    batch_size, channels, height, width = pixel_values.shape
    grid = (height // rows, width // columns)
    whole = pixel_values[:, :, : grid[0] * rows, : grid[1] * columns]
    patches = whole.reshape(batch_size, channels, grid[0], rows, grid[1], columns).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch_size, grid[0] * grid[1], channels * rows * columns)
    return F.linear(patches, projection.weight.flatten(1), projection.bias)


def position_embeddings(
    model: nn.Module, patches: torch.Tensor, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
) -> torch.Tensor:
    """The position embeddings of a frame's patches [B, N, D], the same for all streams: [N, D]."""
    embeddings = model.embeddings
    if interpolate_pos_encoding:
        return embeddings.interpolate_pos_encoding(patches, *pixel_values.shape[2:])[0]
    return embeddings.position_embedding(embeddings.position_ids)[0]


def active_position_embeddings(
    model: nn.Module,
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
    # who overrides it may do something else; a keyframe is as dense is, and the checkpoint's own grid as it is
    stock = SiglipVisionEmbeddings.interpolate_pos_encoding
    is_stock = getattr(embeddings.interpolate_pos_encoding, "__func__", None) is stock
    if interpolate_pos_encoding and is_stock and not active.everything:
        own = embeddings.num_positions
        # measured: the interpolation of one patch takes as long as 256 multiply-adds a feature
        if active.num_patches != own and sum(active.counts) * own < 256 * active.num_patches:
            return interpolate_at(embeddings.position_embedding.weight, active.rows % active.num_patches, grid)
    return active.gather_shared(position_embeddings(model, patches, pixel_values, interpolate_pos_encoding))


def interpolate_at(positions: torch.Tensor, places: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    What SigLIP's bicubic interpolation of the embeddings [S * S, D] to a grid [gh, gw] has at `places` [M] of it:
    [M, D].

    The interpolation is linear in the embeddings and the same along both sides. So the weights of a side are what
    interpolating unit vectors gives, and those of a place are the products of its row's and its column's.
    """
    side = int(len(positions) ** 0.5)
    unit = torch.eye(side, device=positions.device).view(1, side, side, 1)
    by_row, by_column = (
        F.interpolate(unit, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T for size in grid
    )
    places = places.to(positions.device)
    rows = by_row.index_select(0, places.div(grid[1], rounding_mode="floor"))
    columns = by_column.index_select(0, places % grid[1])
    weights = (rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1)  # [M, S * S]
    with torch.autocast(positions.device.type, enabled=False):  # which leaves the interpolation in single precision
        return (weights @ positions.float()).to(positions.dtype)
