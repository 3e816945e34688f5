"""
Exact fast paths: they compute what calling a module would from its weights, faster. `are_plain` says whether a module
allows it.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead


def are_plain(modules: Iterable[nn.Module], weights: Iterable[torch.Tensor | None]) -> bool:
    """
    Whether reading the weights does what calling the modules does: the modules are not hooked, offloaded, parametrised
    or given another `forward`; the weights are all there, floating point, and plain tensors.

    The caller checks the modules' classes: adapters and quantised layers have classes of their own.
    """
    return all(
        weight is not None
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        for weight in weights
    ) and not any(
        hasattr(module, "_hf_hook")
        or "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or parametrize.is_parametrized(module)
        for module in modules
    )


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
    The convolution, [B, C, H, W] to [B, N, D], as one product of [B * N, C * P * P] with the weights. On a CPU, at
    12,544 patches, it is 1.7 times as fast, in bfloat16 7 times. Pixels at the right and the lower edge that do not
    fill a patch are left out, as by the convolution.
    """
    rows, columns = projection.kernel_size
    batch_size, channels, height, width = pixel_values.shape
    grid = (height // rows, width // columns)
    whole = pixel_values[:, :, : grid[0] * rows, : grid[1] * columns]
    patches = whole.reshape(batch_size, channels, grid[0], rows, grid[1], columns).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch_size, grid[0] * grid[1], channels * rows * columns)
    return F.linear(patches, projection.weight.flatten(1), projection.bias)


def interpolate_at(positions: torch.Tensor, places: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    SigLIP's bicubic interpolation of the embeddings [S * S, D] to a grid [gh, gw], at the places [M] only: [M, D].

    The interpolation is linear and works along rows and columns separately. Interpolating unit vectors gives the
    weights of each row and column; the weights of a place are the products of those of its row and its column.
    """
    side = int(len(positions) ** 0.5)
    dtype = torch.promote_types(positions.dtype, torch.float32)
    unit = torch.eye(side, dtype=dtype, device=positions.device).view(1, side, side, 1)
    by_row, by_column = (
        F.interpolate(unit, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T for size in grid
    )
    places = places.to(positions.device)
    rows = by_row.index_select(0, places.div(grid[1], rounding_mode="floor"))
    columns = by_column.index_select(0, places % grid[1])
    weights = (rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1)  # [M, S * S]
    with torch.autocast(positions.device.type, enabled=False):  # it does not lower the precision of interpolation
        return (weights @ positions.to(dtype)).to(positions.dtype)


# The classes that `nn.MultiheadAttention` itself uses for `out_proj`. It reads the weights of that module and never
# calls it, so an adapter around it has no effect without a stream, and must have none with one.
PLAIN_OUTPUT_PROJECTIONS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def can_fold_probe(head: SiglipMultiheadAttentionPoolingHead) -> bool:
    """Whether `pool_with_folded_probe` may read the head's weights: see `are_plain`."""
    attention = getattr(head, "attention", None)
    if type(attention) is not nn.MultiheadAttention or type(attention.out_proj) not in PLAIN_OUTPUT_PROJECTIONS:
        return False
    weights = (head.probe, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight)
    return are_plain((head, attention, attention.out_proj), weights)


def pool_with_folded_probe(head: SiglipMultiheadAttentionPoolingHead, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    SigLIP's attention pooling of [B, N, D] to [B, D], with the probe folded into the key projection.

    The probe is the only query, so `score_i = q . (W_k x_i)` is `(W_k^T q) . x_i`: one vector for each of H heads
    instead of a projection of every patch. Likewise `sum_i p_i (W_v x_i)` is `W_v (sum_i p_i x_i)`. That is 2 N H D
    multiply-adds instead of 2 N D^2. The key's bias adds the same to all scores, which the softmax ignores.
    """
    attention = head.attention
    batch_size, _, dim = hidden_states.shape
    num_heads, head_dim = attention.num_heads, attention.head_dim
    query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)

    query = F.linear(head.probe.view(1, dim), query_weight, query_bias).view(num_heads, 1, head_dim)
    folded = (query @ key_weight.view(num_heads, head_dim, dim)).view(num_heads, dim) * head_dim**-0.5
    scores = folded @ hidden_states.transpose(1, 2)  # [B, H, N]
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(hidden_states.dtype)
    means = weights @ hidden_states  # [B, H, D]
    values = torch.einsum("bhd,hed->bhe", means, value_weight.view(num_heads, head_dim, dim))
    pooled = attention.out_proj(values.reshape(batch_size, 1, dim) + value_bias)
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
