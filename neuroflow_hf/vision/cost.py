"""
Multiply-adds of each part of a frame, counted. N patches, D features, I features inside the MLP, H heads.

Matrix products and attention are counted; of the element-wise work only the gate's, since nothing else is done on a
frame with nothing active. An output's `cost` is what a stream spent over what a dense frame spends.
"""


def patch_projection(num_patches: int, dim: int, patch_features: int) -> int:
    """The patch embedding: [N, C * P * P] times [C * P * P, D]."""
    return num_patches * patch_features * dim


def gate(num_patches: int, dim: int, references: int) -> int:
    """Norms, difference and its square, for each reference, and the running means."""
    return references * 4 * num_patches * dim


def attention(queries: int, keys: int, projected_keys: int, dim: int) -> int:
    """Projections of `queries` and `projected_keys`, scores and weighted sums over `keys`, output projection."""
    return 2 * queries * dim * dim + 2 * projected_keys * dim * dim + 2 * queries * keys * dim


def mlp(tokens: int, dim: int, inner: int) -> int:
    """Two products, [n, D] x [D, I] and back."""
    return 2 * tokens * dim * inner


def pooling_head(tokens: int, dim: int, inner: int, num_heads: int, folded: bool) -> int:
    """One probe attending to `tokens` patches, and its MLP; `folded` as in `pool_with_folded_probe`."""
    over_tokens = 2 * tokens * num_heads * dim if folded else 2 * tokens * dim * dim + 2 * tokens * dim
    projections = (4 if folded else 2) * dim * dim
    return over_tokens + projections + mlp(1, dim, inner)


def encoder(tokens: int, num_layers: int, dim: int, inner: int) -> int:
    """All layers, with every token active."""
    return num_layers * (attention(tokens, tokens, tokens, dim) + mlp(tokens, dim, inner))


def dense_frame(
    num_patches: int, num_layers: int, dim: int, inner: int, patch_features: int, num_heads: int, pooled: bool
) -> int:
    """All of a frame without a stream, of a tower of patches alone; `pooled` if it pools by a probe."""
    head = pooling_head(num_patches, dim, inner, num_heads, folded=False) if pooled else 0
    return patch_projection(num_patches, dim, patch_features) + encoder(num_patches, num_layers, dim, inner) + head
