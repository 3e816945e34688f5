"""Token merging: against a loop over pairs, and against dense where nothing is merged."""

import pytest
import torch

from eval.vision import token_merging as tome
from neuroflow_hf.evaluation.methods import dense_cost, make_methods, sizes_of
from neuroflow_hf.vision import cost as cost
from tests.conftest import IMAGE_SIZE, NUM_PATCHES, assert_close_in_norm

FLOAT32_MERGED = 1e-6  # tokens are merged in float32

LAYERS = 3


def pictures(count=2, seed=0, size=IMAGE_SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def merged_by_loops(tokens, sizes, metric, r):
    """One frame: tokens [n, D], sizes [n], metric [n, K]."""
    first, second = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
    proposals = []
    for one in first:
        cosines = [torch.cosine_similarity(metric[one], metric[other], dim=0).item() for other in second]
        best = max(range(len(second)), key=cosines.__getitem__)
        proposals.append((cosines[best], one, best))
    proposals.sort(key=lambda proposal: -proposal[0])
    sums = [tokens[other] * sizes[other] for other in second]
    counts = [sizes[other].clone() for other in second]
    for _, one, best in proposals[:r]:
        sums[best] = sums[best] + tokens[one] * sizes[one]
        counts[best] = counts[best] + sizes[one]
    kept = [one for _, one, _ in proposals[r:]]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    return torch.stack([*(tokens[one] for one in kept), *means]), torch.stack([*(sizes[one] for one in kept), *counts])


@pytest.mark.parametrize(("count", "r"), [(10, 0), (10, 3), (11, 4), (10, 5)])
def test_merging_is_what_loops_give(count, r):
    generator = torch.Generator().manual_seed(count)
    tokens, metric = (torch.randn(2, count, dim, generator=generator) for dim in (8, 4))
    sizes = torch.randint(1, 5, (2, count), generator=generator).float()
    found, found_sizes = tome.merge_pairs(tokens, sizes, metric, r)
    for frame in range(2):
        expected, expected_sizes = merged_by_loops(tokens[frame], sizes[frame], metric[frame], r)
        assert_close_in_norm(found[frame], expected, FLOAT32_MERGED)
        assert torch.equal(found_sizes[frame], expected_sizes)
    assert torch.equal(found_sizes.sum(1), sizes.sum(1))


@torch.inference_mode()
def test_without_merges_it_is_dense(vision64):
    pixels = pictures()
    dense = vision64(pixel_values=pixels)
    embeddings, tokens, sizes = tome.encode(vision64, pixels, [0] * LAYERS)
    assert_close_in_norm(embeddings, dense.pooler_output)
    assert_close_in_norm(tokens, dense.last_hidden_state)
    assert torch.equal(sizes, torch.ones(2, NUM_PATCHES))


@torch.inference_mode()
def test_a_token_counts_as_often_as_it_stands_for_patches(vision64):
    """Attention and the pooling head over merged copies are those over the copies."""
    tokens = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).double()
    counts = torch.tensor([1, 2, 3, 1, 1, 4])
    repeated = tokens.repeat_interleave(counts, dim=1)
    sizes = counts.double().expand(2, -1)
    attention = vision64.encoder.layers[0].self_attn
    found, _ = tome.attend(attention, tokens, sizes)
    whole, _ = attention(repeated)
    assert_close_in_norm(found.repeat_interleave(counts, dim=1), whole)
    assert_close_in_norm(tome.pool(vision64.head, tokens, sizes), vision64.head(repeated))
    unlike = tome.pool(vision64.head, tokens, torch.ones(2, 6))
    assert not torch.allclose(unlike, vision64.head(repeated), atol=1e-3)


@torch.inference_mode()
def test_tokens_become_fewer_and_stand_for_all_patches(vision64):
    schedule = [10, 8, 6]
    embeddings, tokens, sizes = tome.encode(vision64, pictures(), schedule)
    assert tokens.shape == (2, NUM_PATCHES - sum(schedule), 32)
    torch.testing.assert_close(sizes.sum(1), torch.full((2,), float(NUM_PATCHES)))
    assert torch.isfinite(embeddings).all()
    alone = tome.encode(vision64, pictures()[1:], schedule)[0]
    assert_close_in_norm(alone, embeddings[1:], FLOAT32_MERGED)
    smaller = tome.encode(vision64, pictures(size=16), [2, 2, 2])
    assert smaller[1].shape == (2, 16 - 6, 32)


def test_schedules():
    assert tome.make_schedule("constant", 8, 3) == [8, 8, 8]
    assert tome.make_schedule("decreasing", 8, 5) == [16, 12, 8, 4, 0]
    assert tome.make_schedule("decreasing", 8, 1) == [8]
    assert tome.merges([40, 3, 40], 20) == [(20, 10), (10, 3), (7, 3)]


def test_what_is_counted(vision):
    sizes = sizes_of(vision)
    assert tome.frame_cost([0] * LAYERS, NUM_PATCHES, **sizes) == dense_cost(vision, NUM_PATCHES)
    costs = [tome.frame_cost([r] * LAYERS, NUM_PATCHES, **sizes) for r in (2, 4, 8, 16)]
    assert costs == sorted(costs, reverse=True)
    # two layers without merges, in which all patches are tokens; the third one by hand
    dim, inner, heads = sizes["dim"], sizes["inner"], sizes["num_heads"]
    plain = cost.attention(36, 36, 36, dim) + cost.mlp(36, dim, inner)
    merging = 36 * dim + 2 * 36 * (dim // heads) + 18 * 18 * (dim // heads) + 36 * dim + 30 * dim
    expected = cost.patch_projection(36, dim, sizes["patch_features"]) + 2 * plain
    expected += cost.attention(36, 36, 36, dim) + merging + cost.mlp(30, dim, inner)
    expected += cost.pooling_head(30, dim, inner, heads, folded=False)
    assert tome.frame_cost([0, 0, 6], NUM_PATCHES, **sizes) == expected


@pytest.mark.parametrize("schedule", [[1, 1], [1, -1, 1]])
def test_a_schedule_that_does_not_fit_is_refused(vision, schedule):
    with pytest.raises(ValueError, match="for each of 3"):
        tome.encode(vision, pictures(), schedule)


def test_the_baselines_merge_shares_of_the_patches(vision):
    specs = tome.merging_baselines(vision, few=True)
    options = [{"r": 9, "schedule": "constant"}, {"r": 3, "schedule": "decreasing"}]
    assert [spec.options for spec in specs] == options and all(spec.control for spec in specs)
    assert len(tome.merging_baselines(vision)) > 4
    for method in make_methods(vision, specs):
        with torch.inference_mode():
            step = method.step(pictures())
        assert step.embeddings.shape == (2, 32) and (step.cost < 1).all() and step.skip_rate.isnan().all()
