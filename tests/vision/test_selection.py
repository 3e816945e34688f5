"""The gate's mathematics, each function against the same rule written as a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from neuroflow_hf.vision import selection as gating
from neuroflow_hf.vision.naive import naive_neighbours, naive_surprise
from tests.conftest import assert_close_in_norm


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10_000), closeness=st.sampled_from([1.0, 1e-2, 1e-4]))
@settings(deadline=None, max_examples=20)
def test_surprise_is_one_minus_cosine(seed, closeness):
    reference = vectors(seed, 2, 5, 8)
    signal = reference + closeness * vectors(seed + 1, 2, 5, 8)
    expected = [[naive_surprise(s.double(), r.double()) for s, r in zip(*rows)] for rows in zip(signal, reference)]  # noqa: B905
    # The unit vectors are float32, and so far apart: rounding moves that by the same at any distance.
    apart, expected_apart = (
        (2 * score.double()).sqrt() for score in (gating.surprise(signal, reference), torch.tensor(expected))
    )
    torch.testing.assert_close(apart, expected_apart, rtol=0, atol=5e-7)


@pytest.mark.parametrize("patches", [1, 255, 256, 257, 700])
def test_surprise_in_parts_is_that_of_the_whole(patches):
    """Bit for bit, or the threshold would fall between patches by where they are in the picture."""
    signal, reference = vectors(7, 2, patches, 48), vectors(8, 2, patches, 48)
    reference[:, ::3] = signal[:, ::3]
    assert torch.equal(gating.surprise(signal, reference), gating.surprise_of_part(signal, reference))
    assert gating.surprise(signal, reference)[:, ::3].eq(0).all()


def test_surprise_of_equal_vectors_is_exactly_zero_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        signal = vectors(0, 1, 64, 384).to(dtype)
        assert gating.surprise(signal, signal.clone()).eq(0).all()


def test_surprise_sees_what_a_cosine_in_single_precision_cannot():
    reference = vectors(0, 1, 1, 64).double()
    signal = reference + 2e-5 * vectors(1, 1, 1, 64).double()
    exact = 1 - F.cosine_similarity(signal, reference, dim=-1)
    torch.testing.assert_close(gating.surprise(signal.float(), reference.float()).double(), exact, rtol=0.02, atol=0)


def test_running_mean_moves_by_its_rate_even_from_half_precision_signals():
    mean, signal = torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.float16)
    for _ in range(100):
        mean = gating.running_mean(mean, signal, 0.01)
    assert_close_in_norm(mean, torch.full_like(mean, 1 - 0.99**100), 1e-5)


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_spread_to_neighbours(radius):
    grid = (4, 7)
    score = vectors(3, 2, 28)
    expected = [[max(row[near] for near in naive_neighbours(i, grid, radius)) for i in range(28)] for row in score]
    assert torch.equal(gating.spread_to_neighbours(score, grid, radius), torch.tensor(expected))


@pytest.mark.parametrize("count", [0, 1, 5, 9, 20])
def test_highest_takes_exactly_so_many(count):
    score = vectors(4, 3, 9)
    mask = gating.highest(score, count)
    assert mask.sum(-1).tolist() == [min(count, 9)] * 3
    for row, taken in zip(score, mask, strict=True):
        if 0 < count < 9:
            assert row[taken].min() >= row[~taken].max()


@given(num_patches=st.integers(1, 40), max_age=st.integers(1, 60), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_refreshing_the_oldest_bounds_every_age_at_a_flat_cost(num_patches, max_age, seed):
    generator = torch.Generator().manual_seed(seed)
    age = torch.zeros(1, num_patches, dtype=torch.int64)
    for _ in range(3 * max_age):
        refreshed = gating.oldest(age, (1, num_patches), gating.refreshed_per_frame(num_patches, max_age))
        assert refreshed.sum() == math.ceil(num_patches / max_age)
        also_active = torch.rand(1, num_patches, generator=generator) < 0.1
        age = (age + 1).masked_fill(refreshed | also_active, 0)
        assert age.max() <= max_age


def test_turns_are_spread_over_the_picture():
    turn = torch.tensor(gating.turns((16, 16)))
    assert len(set(turn.tolist())) == 256
    for first in range(0, 256, 32):  # 32 successive turns: two in every quarter of a quarter, give or take
        places = turn.argsort(descending=True)[first : first + 32]
        blocks = (places // 16 // 4) * 4 + places % 16 // 4
        assert torch.bincount(blocks, minlength=16).min() >= 1
        assert torch.bincount(blocks, minlength=16).max() <= 4


def test_as_many_are_taken_as_each_stream_is_due():
    age = torch.arange(8).repeat(3, 1)
    taken = gating.oldest(age, (2, 4), torch.tensor([0, 2, 5]), among=torch.arange(8) < 4)
    assert taken.nonzero().tolist() == [[1, 2], [1, 3], [2, 0], [2, 1], [2, 2], [2, 3]]


def test_motion_of_the_whole_frame_is_taken_out():
    score = vectors(5, 2, 9).abs().double()
    assert_close_in_norm(gating.without_global_motion(score + 3), gating.without_global_motion(score))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_in_its_stream(bad):
    features = vectors(6, 3, 4, 5)
    features[1, 2, 3] = bad
    assert gating.has_only_finite(features).tolist() == [True, False, True]


def test_large_half_precision_features_are_finite():
    assert gating.has_only_finite(torch.full((1, 300, 300), 60000.0, dtype=torch.float16)).all()
