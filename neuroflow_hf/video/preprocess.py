"""Pixel values out of frames: what a SigLIP image processor does, in torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's numbers for its filters, and the names torchvision gives the same filters.
_RESAMPLE_MODES = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}


@dataclass(frozen=True)
class Preprocessor:
    """
    Resizes RGB frames to a square, rescales and normalises them, as Hugging Face's image processor with the same
    settings, without PIL. Because torch keeps filter weights in fewer bits, a few values in a thousand (2 in 100 for
    some bilinear ratios) are off by one grey level. Unchanged input pixels give unchanged pixel values.
    """

    resolution: int  # R, side of the output in pixels. As in SigLIP, the frame's aspect ratio is not kept
    resample: str = "bicubic"  # "bicubic" or "bilinear", both antialiased
    rescale_factor: float = 1 / 255  # what a grey level 0..255 is multiplied with first; 1.0 for no rescaling
    # image_mean, image_std: per channel, subtracted and divided by after that; zeros and ones for no normalisation
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if isinstance(self.resolution, bool) or not isinstance(self.resolution, int) or self.resolution < 1:
            raise ValueError(f"`resolution` is {self.resolution!r}; expected a whole number of pixels, 1 or more.")
        if self.resample not in _RESAMPLE_MODES:
            raise ValueError(f"`resample` is {self.resample!r}; expected 'bicubic' or 'bilinear'.")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                f"`image_mean` is {self.image_mean}, `image_std` {self.image_std}; expected three values each, and no "
                "zero in `image_std`."
            )

    @classmethod
    def from_image_processor(cls, processor: Any, resolution: int | None = None) -> "Preprocessor":
        """
        The settings of a Hugging Face image processor, or of a processor that holds one as `.image_processor`. A
        `resolution` replaces the processor's size. ValueError if it does more than resize to a square, rescale and
        normalise.
        """
        processor = getattr(processor, "image_processor", processor)
        for step in ("do_center_crop", "do_pad"):
            if getattr(processor, step, False):
                raise ValueError(f"{step} is set; expected only resizing to a square, rescaling and normalising.")
        if not getattr(processor, "do_resize", True):
            raise ValueError("The image processor has do_resize=False; expected one that resizes.")
        size = {key: value for key, value in dict(processor.size).items() if value is not None}
        if set(size) != {"height", "width"} or size["height"] != size["width"]:
            raise ValueError(f"The size is {size}; expected a square such as {{'height': 224, 'width': 224}}.")
        # PIL and torchvision enums carry the number or the name; without a choice Hugging Face takes bilinear.
        chosen = processor.resample
        resample = "bilinear" if chosen is None else _RESAMPLE_MODES.get(getattr(chosen, "value", chosen))
        if resample is None:
            raise ValueError(f"`resample` is {chosen!r}; expected 2 (bilinear) or 3 (bicubic).")
        mean = processor.image_mean if processor.do_normalize else 0.0
        std = processor.image_std if processor.do_normalize else 1.0
        return cls(
            resolution=int(size["height"]) if resolution is None else resolution,
            resample=resample,
            rescale_factor=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            image_mean=tuple(np.broadcast_to(mean, 3).tolist()),
            image_std=tuple(np.broadcast_to(std, 3).tolist()),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, resolution: int | None = None) -> "Preprocessor":
        """
        The settings saved with a model, in a folder or by its name on the Hub; OSError if there are none. CLIP's and
        DINOv2's image processors cut out the centre, which would hide the sides of a video: the whole frame is resized
        to the size of what they cut out. `resolution` and errors are those of `from_image_processor`.
        """
        # by its class: the auto class asks for torchvision in transformers 5.17
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        settings, _ = SiglipImageProcessorPil.get_image_processor_dict(folder)
        kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
        if kind.startswith(("Bit", "CLIP")) and settings.get("do_center_crop"):
            side = settings["crop_size"]  # a number in old files
            size = {"height": side, "width": side} if isinstance(side, int) else side
            settings = {**settings, "do_center_crop": False, "size": size}
        return cls.from_image_processor(SiglipImageProcessorPil.from_dict(settings), resolution)

    def patches_per_side(self, patch_size: int) -> int:
        """The number of patches in a row or column of a frame; ValueError if not even one fits."""
        if self.resolution < patch_size:
            raise ValueError(f"The resolution is {self.resolution}; expected at least one patch, {patch_size} pixels.")
        return self.resolution // patch_size

    def __call__(
        self,
        image: "np.ndarray | torch.Tensor | Image",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """
        Pixel values of one frame, `dtype` [1, 3, R, R], contiguous, computed in float32.

        Args:
            image: uint8 RGB [H, W, 3], or a PIL image in mode RGB; ValueError for another shape or dtype.
            dtype: of the result.
            device: of the result; None is the CPU. The resize runs on the CPU and bytes are what is copied.
        """
        return self.normalise(self.resize(image), dtype, device)

    def normalise(
        self,
        resized: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """The second step alone: uint8 [1, 3, R, R] from `resize` to `dtype` [1, 3, R, R] on `device`, contiguous."""
        resized = resized.to(device or "cpu")
        # (level * factor - mean) / std as one product and one sum
        scale = [self.rescale_factor / std for std in self.image_std]
        offset = [-mean / std for mean, std in zip(self.image_mean, self.image_std, strict=True)]
        pixels = resized.contiguous().float()
        scale = pixels.new_tensor(scale).view(1, 3, 1, 1)
        offset = pixels.new_tensor(offset).view(1, 3, 1, 1)
        return torch.addcmul(offset, pixels, scale, out=pixels).to(dtype)

    def resize(self, image: "np.ndarray | torch.Tensor | Image") -> torch.Tensor:
        """The first step alone: uint8 RGB [H, W, 3] to uint8 [1, 3, R, R] on the CPU, in any memory layout."""
        if not isinstance(image, torch.Tensor):
            # from_numpy takes neither negative strides nor read-only memory
            image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"The image is {image.dtype} {list(image.shape)}; expected a uint8 RGB frame [H, W, 3].")
        # On uint8 input torch rounds after the horizontal and again after the vertical pass, as torchvision and Pillow
        # up to 12 do; Pillow 13 begins with the vertical one in tall frames. A float resize rounded once differs in 5
        # to 20% of the values.
        side = (self.resolution, self.resolution)
        return F.interpolate(image.cpu().permute(2, 0, 1)[None], size=side, mode=self.resample, antialias=True)
