"""Mode `extrapolate`: what is carried over, from whom to whom, and that it is the estimate it claims to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.vision.active_set import ActiveSet
from neuroflow_hf.vision.extrapolate import (
    COMMON_SHARE,
    NOISE,
    build_corrections,
    correction_weights,
    inverse_by_products,
    likeness,
)
from tests.conftest import NUM_PATCHES, assert_close_in_norm, random_video


def picture(seed, changed, encoded, num_patches=12, dim=8):
    """Features [N, D] and two masks [N]."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_patches, dim, generator=generator)
    masks = [torch.zeros(num_patches, dtype=torch.bool) for _ in range(2)]
    for mask, patches in zip(masks, (changed, encoded), strict=True):
        mask[list(patches)] = True
    return features, *masks


def active_set(changed, encoded):
    """The active set of one stream with these two masks [N]."""
    counts = (int(changed.sum()), int((changed & encoded).sum()))
    return ActiveSet(encoded.unsqueeze(0), [int(encoded.sum())], [False], changed.unsqueeze(0), [counts])


@given(seed=st.integers(0, 1000), encoded=st.sets(st.integers(0, 11), min_size=1, max_size=11))
@settings(deadline=None, max_examples=40)
def test_weights_are_those_of_a_gaussian_process(seed, encoded):
    features, changed, encoded = picture(seed, (), encoded)
    sources = encoded.nonzero().flatten()
    features = features.double()
    weights = correction_weights(features, sources, changed, encoded)
    unit = torch.nn.functional.normalize(features, dim=-1)
    covariance = likeness(unit, unit)
    for patch in range(12):
        if encoded[patch]:
            assert weights[patch].eq(0).all()
            continue
        among = covariance[sources][:, sources] + NOISE * torch.eye(len(sources), dtype=torch.float64)
        expected = torch.linalg.solve(among, covariance[sources, patch])
        assert_close_in_norm(weights[patch], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sources", [1, 7, 100])
def test_the_inverse_of_exported_programs_is_as_exact_as_its_type(sources, alike, dtype):
    unit = torch.eye(sources, dtype=torch.float64) * (1 - alike) + alike * torch.eye(sources, dtype=torch.float64)[0]
    unit = torch.nn.functional.normalize(unit, dim=-1)
    matrix = likeness(unit, unit) + NOISE * torch.eye(sources, dtype=torch.float64)
    inverse = inverse_by_products(matrix.to(dtype), NOISE, sources + NOISE)
    assert_close_in_norm(inverse, torch.linalg.inv(matrix).to(dtype), 200 * torch.finfo(dtype).eps)


def test_patches_learn_more_from_those_like_them():
    features = torch.eye(4)[[0, 0, 1, 1]] + 0.01 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    encoded = torch.tensor([True, False, True, False])
    weights = correction_weights(features, torch.tensor([0, 2]), torch.zeros(4, dtype=torch.bool), encoded)
    assert weights[1, 0] > 5 * weights[1, 1] > 0
    assert weights[3, 1] > 5 * weights[3, 0] > 0


def test_what_more_sentinels_agree_on_is_believed_more():
    features, still = torch.ones(9, 4), torch.zeros(9, dtype=torch.bool)
    shares = []
    for count in (1, 4, 8):
        encoded = torch.arange(9) < count
        shares.append(correction_weights(features, torch.arange(count), still, encoded)[8].sum().item())
    assert 0.5 < shares[0] < shares[1] < shares[2] < 1


def test_nothing_passes_between_changed_patches_and_still_ones():
    features, changed, encoded = picture(1, changed=range(6), encoded=(0, 1, 8, 9))
    (correction,) = build_corrections(features.unsqueeze(0), active_set(changed, encoded))
    assert correction.places.tolist() == [0, 1, 8, 9]
    assert correction.sources.tolist() == [0, 1, 2, 3]
    assert correction.weights[2:6, 2:].eq(0).all()
    assert correction.weights[[6, 7, 10, 11], :2].eq(0).all()
    assert correction.weights[2:6, :2].ne(0).all()
    assert correction.weights[[6, 7, 10, 11], 2:].ne(0).all()


def test_where_all_that_changed_is_encoded_only_sentinels_are_asked():
    features, changed, encoded = picture(2, changed=range(3), encoded=(0, 1, 2, 7, 9))
    (correction,) = build_corrections(features.unsqueeze(0), active_set(changed, encoded))
    assert correction.places.tolist() == [7, 9]
    assert correction.sources.tolist() == [3, 4]


def test_without_sentinels_there_is_nothing_to_carry():
    features, changed, encoded = picture(3, changed=range(3), encoded=range(3))
    assert build_corrections(features.unsqueeze(0), active_set(changed, encoded)) == []


def test_no_sentinel_extrapolates_as_context_does(vision):
    frames = random_video(4, changed=0.2)
    streams = [vision.new_stream(mode="extrapolate", sentinels=0), vision.new_stream(mode="context")]
    with torch.no_grad():
        for frame in frames:
            ours, context = (vision(pixel_values=frame, stream=stream) for stream in streams)
            assert torch.equal(ours.pooler_output, context.pooler_output)


def test_sentinels_are_as_many_as_changed_and_take_turns(vision):
    stream = vision.new_stream(mode="extrapolate", sentinels=0.1)
    frame = random_video(1)[0]
    seen = torch.zeros(NUM_PATCHES, dtype=torch.int64)
    with torch.no_grad():
        vision(pixel_values=frame, stream=stream)
        assert not vision(pixel_values=frame, stream=stream).active_mask.any()  # nothing changed, nothing to learn
        for step in range(12):
            frame = frame.clone()
            frame[..., :4, :4] = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            active = vision(pixel_values=frame, stream=stream).active_mask.flatten()
            assert active[0] and active.sum() == 2  # the changed one and one sentinel
            seen += active
    assert seen[0] == 12
    assert seen[1:].max() == 1  # nobody twice before everybody's turn


def test_in_a_still_scene_a_shift_common_to_all_is_carried_over(vision):
    """All outputs of the dense model move by the same vector: the sentinels see it, and all others follow."""
    stream = vision.new_stream(mode="extrapolate", sentinels=0.25, threshold=0.001)
    frames = random_video(2, changed=0.3)
    moved = NeuroFlowSiglipVisionModel.from_siglip(vision)
    with torch.no_grad():
        before = vision(pixel_values=frames[0], stream=stream).last_hidden_state
        shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
        handle = moved.post_layernorm.register_forward_hook(lambda module, args, output: output + shift)
        try:
            output = vision(pixel_values=frames[1], stream=stream)
        finally:
            handle.remove()
    still = ~(output.surprise > 0.001).flatten()
    left = still & ~output.active_mask.flatten()
    followed = (output.last_hidden_state - before)[0, left] @ shift / shift.square().sum()
    assert left.any()
    # random patches are unlike each other: what is left is the share common to all, believed as far as nine say so
    expected = 9 * COMMON_SHARE / (9 * COMMON_SHARE + (1 - COMMON_SHARE) + NOISE)
    assert followed.mean().item() == pytest.approx(expected, rel=0.1)


def test_half_precision_stays_finite(vision):
    half = NeuroFlowSiglipVisionModel(vision.config).bfloat16().eval()
    stream = half.new_stream(mode="extrapolate", sentinels=0.2)
    with torch.no_grad():
        for frame in random_video(8):
            output = half(pixel_values=frame.bfloat16(), stream=stream)
            assert output.pooler_output.isfinite().all()
