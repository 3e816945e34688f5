import pytest
import torch

from eval.vision.masks import mask_iou, patch_mask


def test_masks_of_pixels_and_patches():
    mask = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    pixels = mask.repeat_interleave(4, dim=-2).repeat_interleave(4, dim=-1)
    for least_share in (0.0, 0.5, 0.99):
        assert torch.equal(patch_mask(pixels, (5, 6), least_share), mask)
    pixels = torch.zeros(8, 8, dtype=torch.bool)
    pixels[3:5, 0:4] = True  # in two patches, half a row of pixels in each
    assert patch_mask(pixels, (2, 2)).tolist() == [[True, False], [True, False]]
    assert not patch_mask(pixels, (2, 2), 0.25).any()
    with pytest.raises(ValueError, match="8x8 pixels; expected multiples of the grid, 3x2"):
        patch_mask(pixels, (3, 2))


def test_intersection_over_union():
    one = torch.tensor([[True, True, False]])
    other = torch.tensor([[False, True, True]])
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert mask_iou(one, other).item() == pytest.approx(1 / 3)
    assert mask_iou(torch.stack((one, nothing, one)), torch.stack((one, nothing, nothing))).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="expected one shape"):
        mask_iou(one, torch.zeros(2, 3, dtype=torch.bool))
