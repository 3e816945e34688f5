"""
Token merging for a SigLIP vision model, with its own weights and without training: a baseline.

Source: D. Bolya, C.-Y. Fu, X. Dai, P. Zhang, C. Feichtenhofer, J. Hoffman, "Token Merging: Your ViT But Faster",
ICLR 2023. In each layer, between attention and MLP, the r most similar pairs of tokens are merged: every other token
proposes its most similar one among the rest (cosine of the keys, mean over heads), and the r best proposals become
averages, weighted by the number of patches that each token stands for, its size (section 3). Proportional attention
adds the logarithm of the size to a token's scores. The paper has a class token; SigLIP's pooling head has a probe, to
whose scores the logarithms are added, too. Schedule `"decreasing"` merges most in the first layers (section 4).

B frames, n tokens, D features, N patches. Importing this module adds the kind `merged` to `make_methods`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuroflow_hf.evaluation.methods import KINDS, EachFrame, MethodSpec, dense_cost, patches_of, sizes_of, tower_of
from neuroflow_hf.vision import cost
from neuroflow_hf.vision.patches import project_patches

# of the patches, in each layer; by schedule
SHARES = {"constant": (0.25, 0.08, 0.04, 0.15), "decreasing": (0.08, 0.04, 0.15)}


def make_schedule(name: str, r: int, num_layers: int) -> list[int]:
    """
    How many pairs each layer merges: r (`"constant"`), or from 2 r in the first layer linearly to none in the last
    (`"decreasing"`). ValueError for another name.
    """
    if name not in ("constant", "decreasing"):
        raise ValueError(f"`schedule` is {name!r}; expected constant or decreasing.")
    if name == "constant" or num_layers == 1:
        return [r] * num_layers
    return [int(2 * r - layer * 2 * r / (num_layers - 1)) for layer in range(num_layers)]


def merges(schedule: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
    """For each layer, its number of tokens, and how many pairs it merges: half of the tokens at most."""
    found = []
    for r in schedule:
        done = min(r, num_tokens // 2)
        found.append((num_tokens, done))
        num_tokens -= done
    return found


def merge_pairs(tokens: Tensor, sizes: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """
    Merge the r most similar pairs of tokens [B, n, D], r at most n / 2, by the cosine of their `metric` [B, n, K].
    `sizes`, float32 [B, n], are the numbers of patches that the tokens stand for.

    Returns:
        Tokens [B, n - r, D] and their sizes [B, n - r]: first the unmerged tokens at even places, then all
        at odd places, averaged with those merged into them.
    """
    unit = functional.normalize(metric, dim=-1)
    similarity, into = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    weighted = torch.cat([tokens.float() * sizes[..., None], sizes[..., None]], dim=-1)
    first, second = weighted[:, ::2], weighted[:, 1::2]

    def rows(places: Tensor) -> Tensor:
        return places[..., None].expand(-1, -1, weighted.shape[-1])

    merged, kept = (first.gather(1, rows(places)) for places in (order[:, :r], order[:, r:]))
    second = second.scatter_add(1, rows(into.gather(1, order[:, :r])), merged)
    joined = torch.cat([kept, second], dim=1)
    sizes = joined[..., -1]
    return (joined[..., :-1] / sizes[..., None]).to(tokens.dtype), sizes


def attend(attention: nn.Module, hidden: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """
    Proportional attention of a `SiglipAttention` over tokens [B, n, D] of sizes [B, n]: its output [B, n, D], and the
    keys' mean over heads, float32 [B, n, D / H].
    """

    def by_head(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    query, key, value = (by_head(part(hidden)) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    bias = sizes.log().to(hidden.dtype)[:, None, None]
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scale)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2)), key.float().mean(dim=1)


def encoder_layer(layer: nn.Module, hidden: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A `SiglipEncoderLayer` that merges r pairs between attention and MLP; tokens and sizes as in `merge_pairs`."""
    attended, metric = attend(layer.self_attn, layer.layer_norm1(hidden), sizes)
    hidden = hidden + attended
    if r:
        hidden, sizes = merge_pairs(hidden, sizes, metric, r)
    return hidden + layer.mlp(layer.layer_norm2(hidden)), sizes


def pool(head: nn.Module, tokens: Tensor, sizes: Tensor) -> Tensor:
    """SigLIP's pooling head with proportional attention over tokens [B, n, D] of sizes [B, n]: [B, D]."""
    attention = head.attention
    bias = sizes.log().to(tokens.dtype)[:, None].repeat_interleave(attention.num_heads, dim=0)
    probe = head.probe.expand(len(tokens), -1, -1)
    pooled = attention(probe, tokens, tokens, attn_mask=bias, need_weights=False)[0]
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


def encode(model: nn.Module, pixel_values: Tensor, schedule: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """
    Encode frames [B, C, H, W] with a SigLIP vision model that merges tokens and has a pooling head.

    Returns:
        Embeddings [B, D]; tokens after the last layer norm [B, n, D]; their sizes [B, n].

    Raises:
        ValueError: if `schedule` does not have the number of pairs that each layer merges, 0 or more.
    """
    layers = model.encoder.layers
    if len(schedule) != len(layers) or min(schedule, default=0) < 0:
        raise ValueError(f"The schedule is {list(schedule)}; expected a number, 0 or more, for each of {len(layers)}.")
    patches = project_patches(model, pixel_values, as_product=False)
    hidden = patches + model.patch_positions(patches, pixel_values, interpolate=True)
    sizes = torch.ones(hidden.shape[:2], device=hidden.device)
    for layer, (_, r) in zip(layers, merges(schedule, hidden.shape[1]), strict=True):
        hidden, sizes = encoder_layer(layer, hidden, sizes, r)
    tokens = model.post_layernorm(hidden)
    return pool(model.head, tokens, sizes), tokens, sizes


def matching_cost(tokens: int, r: int, dim: int, num_heads: int) -> int:
    """
    Multiply-adds of merging r pairs: mean over heads, norms and similarities of the keys, weighting by sizes, and
    dividing by them. Sorting and adding take no multiplications.
    """
    if not r:
        return 0
    metric = dim // num_heads
    similarities = ((tokens + 1) // 2) * (tokens // 2) * metric
    return tokens * dim + 2 * tokens * metric + similarities + tokens * dim + (tokens - r) * dim


def frame_cost(
    schedule: Sequence[int], num_patches: int, dim: int, inner: int, patch_features: int, num_heads: int
) -> int:
    """Multiply-adds of a frame, merging included, counted as in `vision/cost.py`."""
    spent, tokens = cost.patch_projection(num_patches, dim, patch_features), num_patches
    for tokens_before, r in merges(schedule, num_patches):
        tokens = tokens_before - r
        spent += cost.attention(tokens_before, tokens_before, tokens_before, dim)
        spent += matching_cost(tokens_before, r, dim, num_heads) + cost.mlp(tokens, dim, inner)
    return spent + cost.pooling_head(tokens, dim, inner, num_heads, folded=False)


class Merged(EachFrame):
    """Every frame with token merging; `r` and `schedule` are as in `make_schedule`."""

    def __init__(self, model: nn.Module, r: int, schedule: str = "constant"):
        self.tower = tower_of(model)
        self.schedule = make_schedule(schedule, r, len(self.tower.encoder.layers))

    def encode(self, pixel_values: Tensor, rows: Sequence[int]) -> tuple[Tensor, float]:  # noqa: D102  # inherited
        embeddings, _, _ = encode(self.tower, pixel_values[rows], self.schedule)
        patches = patches_of(self.tower, pixel_values)
        return embeddings, frame_cost(self.schedule, patches, **sizes_of(self.tower)) / dense_cost(self.tower, patches)


KINDS["merged"] = Merged


def merging_baselines(model: nn.Module, few: bool = False) -> list[MethodSpec]:
    """Token merging with both schedules at several r; with `few`, at one each."""
    config = tower_of(model).config
    patches = (config.image_size // config.patch_size) ** 2
    settings = dict.fromkeys(
        (max(1, round(share * patches)), schedule)
        for schedule, shares in SHARES.items()
        for share in (shares[:1] if few else shares)
    )
    return [
        MethodSpec(f"ToMe {r}, {schedule}", f"ToMe, {schedule}", "merged", {"r": r, "schedule": schedule}, True)
        for r, schedule in settings
    ]
