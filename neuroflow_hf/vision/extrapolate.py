"""
Corrections of stored features by what the encoded patches show (mode `extrapolate`).

When something moves, attention changes the features of all other patches a little, and those of similar patches by
similar amounts. So a few patches that did *not* change, the sentinels, are encoded on every frame as well. The
difference between their new and their stored features, the innovation, is carried over to the patches like them. The
estimate is simple kriging: a Gaussian process whose covariance is the likeness of the patches.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .active_set import ActiveSet, add_to_memory

# Found on recorded footage by eval/vision/vision_policies.py; the results are flat around them.
LIKENESS_WIDTH = 0.05
COMMON_SHARE = 0.1
NOISE = 0.7


def likeness(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    Prior covariance of the changes of patches with the unit features [P, D] and [Q, D]: [P, Q], 1 for equal features.
    A share of every change is common to all patches; the rest falls off with the cosine of their features.
    """
    return COMMON_SHARE + (1 - COMMON_SHARE) * ((a @ b.mT - 1) / LIKENESS_WIDTH).exp()


def correction_weights(
    features: torch.Tensor, sources: torch.Tensor, changed: torch.Tensor, encoded: torch.Tensor
) -> torch.Tensor:
    """
    How much of each source's innovation every patch takes over.

    The features of patches that changed and of patches that did not change for different reasons, so nothing is
    carried over from one group to the other.

    Args:
        features: [N, D], what is stored of the patches; only their directions count.
        sources: int64 [S], the encoded patches whose innovations are used.
        changed: bool [N], patches above the threshold.
        encoded: bool [N], patches that were encoded; they need no correction.

    Returns:
        [N, S], in float32 or the features' type, whichever is wider; rows of encoded patches are 0.
    """
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    source_unit, source_changed = unit[sources], changed[sources]
    to_all = likeness(unit, source_unit) * (changed.unsqueeze(1) == source_changed)
    among = likeness(source_unit, source_unit) * (source_changed.unsqueeze(1) == source_changed)
    among = among + NOISE * torch.eye(len(sources), dtype=among.dtype, device=among.device)
    if torch.compiler.is_exporting():  # ONNX has no operator for the other
        inverse = inverse_by_products(among, NOISE, len(sources) + NOISE)
    else:  # positive definite by the noise: `cholesky_ex` skips the check, which would synchronise with the device
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(among).L)
    return (to_all @ inverse).masked_fill(encoded.unsqueeze(1), 0)


def inverse_by_products(matrix: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """
    The inverse of a symmetric matrix [S, S] whose eigenvalues lie between `least` > 0 and `most`, by Newton's
    iteration. Each step squares the error, `1 - matrix @ inverse`; there are as many as the matrix's precision needs.
    """
    error, precision = (most - least) / (most + least), torch.finfo(matrix.dtype).eps
    twice = 2 * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = twice / (least + most)
    for _ in range(math.ceil(math.log2(math.log(precision) / math.log(error)))):
        inverse = inverse @ (twice - matrix @ inverse)
    return inverse


@dataclass(frozen=True)
class Correction:
    """
    How one stream's stale patches are corrected on one frame, from those that were encoded.

    Args:
        stream: its number.
        weights: [N, S], from `correction_weights`, in the type of the memories.
        sources: int64 [S], the sources' places among all encoded rows [M, D].
        places: int64 [S], their places in the stream.
    """

    stream: int
    weights: torch.Tensor
    sources: torch.Tensor
    places: torch.Tensor

    def apply(self, memory: dict[str, torch.Tensor], name: str, fresh: torch.Tensor) -> None:
        """
        Move the stale patches of `memory[name]`, [B, N, D], by the innovations of fresh rows [M, D]. Encoded patches
        are not written.
        """
        innovation = fresh[self.sources] - memory[name][self.stream, self.places]
        add_to_memory(memory, name, self.stream, self.weights, innovation)

    def multiply_adds(self, dim: int) -> int:
        """Multiply-adds of applying it to one memory."""
        return self.weights.numel() * dim


def build_corrections(features: torch.Tensor, active: ActiveSet) -> list[Correction]:
    """
    One correction for each stream with both encoded and stale patches, either among those that changed or among those
    that did not. A compiled graph, which does not know how many changed, takes all encoded patches as sources: from
    those of a group without stale patches, nothing is carried over.

    Args:
        features: [B, N, D], the stored outputs, before this frame's are written.
    """
    corrections, first_row = [], 0
    for stream, count in enumerate(active.counts):
        from_changed, from_still = count_sources(active, stream)
        if from_changed or from_still:
            rows = active.rows[first_row : first_row + count] - stream * active.num_tokens
            if from_changed + from_still == count - active.num_prefix:
                sources = torch.arange(active.num_prefix, count, device=rows.device)
            else:
                row_changed = active.changed[stream, rows]
                is_source = (row_changed & bool(from_changed)) | (~row_changed & bool(from_still))
                is_source[: active.num_prefix] = False  # they are no patches, and say little about any
                sources = torch.nonzero_static(is_source, size=from_changed + from_still).squeeze(1)
            places = rows[sources]
            weights = correction_weights(features[stream], places, active.changed[stream], active.mask[stream])
            corrections.append(Correction(stream, weights.to(features.dtype), first_row + sources, places))
        first_row += count
    return corrections


def count_sources(active: ActiveSet, stream: int) -> tuple[int, int]:
    """How many encoded patches changed, and how many did not; 0 where no patch of the same group is stale."""
    if active.keyframes[stream]:
        return 0, 0
    changed, changed_encoded = active.changed_counts[stream]
    still = active.num_tokens - active.num_prefix - changed
    still_encoded = max(active.counts[stream] - active.num_prefix, 0) - changed_encoded
    return changed_encoded if changed_encoded < changed else 0, still_encoded if still_encoded < still else 0


def weights_cost(correction: Correction, dim: int) -> int:
    """Multiply-adds of `correction_weights`: the likenesses, the inverse among the sources, and the product."""
    patches, sources = correction.weights.shape
    return (patches + sources) * sources * dim + sources**3 // 2 + patches * sources**2
