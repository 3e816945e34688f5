"""Pixel values out of frames: what a SigLIP image processor does, in torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preprocessor"]

# Pillow's numbers for its filters, and the names torchvision gives the same filters.
_RESAMPLE_MODES = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}


@dataclass(frozen=True)
class Preprocessor:
    """Turns RGB frames into SigLIP pixel values: resize, rescale, normalise.

    The result is that of Hugging Face's image processor with the same settings, without PIL. The resized image is
    rounded to whole grey levels as in PIL. A few values in a thousand (2 in 100 for some bilinear ratios) round to
    another level, because torch keeps its filter weights in fewer bits. Unchanged input pixels give unchanged pixel
    values.

    The horizontal pass comes first, as in torchvision and Pillow up to 12. Pillow 13 starts with the vertical pass
    where the height shrinks more (tall frames), which rounds differently around hard edges.

    Attributes:
        resolution: R, side of the square output in pixels. The frame's aspect ratio is not kept, as in SigLIP.
        resample: "bicubic" or "bilinear", both antialiased.
        rescale_factor: what a grey level 0..255 is multiplied with first; 1.0 for no rescaling.
        image_mean, image_std: per channel, subtracted and divided by after that; zeros and ones for no normalisation.
    """

    resolution: int
    resample: str = "bicubic"
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        """Refuse settings that cannot be computed."""
        if isinstance(self.resolution, bool) or not isinstance(self.resolution, int) or self.resolution < 1:
            raise ValueError(f"resolution must be a whole number of pixels, 1 or more, got {self.resolution!r}")
        if self.resample not in ("bicubic", "bilinear"):
            raise ValueError(f"resample must be 'bicubic' or 'bilinear', got {self.resample!r}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                f"image_mean and image_std must have three values and image_std no zero, "
                f"got {self.image_mean} and {self.image_std}"
            )

    @classmethod
    def from_image_processor(cls, processor: Any, resolution: int | None = None) -> "Preprocessor":
        """Take over the settings of a Hugging Face image processor.

        Args:
            processor: a SigLIP image processor, or a processor that holds one as `.image_processor`.
            resolution: R; None takes the processor's size. Give it to run a model at another resolution than it was
                saved with.

        Raises:
            ValueError: the processor does something other than resize to a square, rescale and normalise.
        """
        processor = getattr(processor, "image_processor", processor)
        _refuse_other_steps(vars(processor))
        if not getattr(processor, "do_resize", True):
            raise ValueError("do_resize=False is not supported: frames are always resized to the model's resolution")
        side = _square_side(processor.size)
        # PIL and torchvision enums carry the number or the name; without a choice Hugging Face takes bilinear.
        chosen = processor.resample
        resample = "bilinear" if chosen is None else _RESAMPLE_MODES.get(getattr(chosen, "value", chosen))
        if resample is None:
            raise ValueError(f"resample={chosen!r} is not supported, only 2 (bilinear) and 3 (bicubic)")
        return cls(
            resolution=side if resolution is None else resolution,
            resample=resample,
            rescale_factor=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            image_mean=_per_channel(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            image_std=_per_channel(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, resolution: int | None = None) -> "Preprocessor":
        """Take over the settings saved next to a model.

        CLIP's and DINOv2's image processors cut out the centre, which would hide the sides of a video: the whole frame
        is resized to the size of what they cut out.

        Args:
            folder: what an image processor's `from_pretrained` takes: a folder with `preprocessor_config.json`, or a
                name on the Hub.
            resolution: as in `from_image_processor`.

        Raises:
            OSError: no image processor is saved there.
            ValueError: as in `from_image_processor`.
        """
        # by its class: the auto class asks for torchvision in transformers 5.17
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        settings, _ = SiglipImageProcessorPil.get_image_processor_dict(folder)
        kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
        if kind.startswith(("Bit", "CLIP")) and settings.get("do_center_crop"):
            side = settings["crop_size"]  # a number in old files
            size = {"height": side, "width": side} if isinstance(side, int) else side
            settings = {**settings, "do_center_crop": False, "size": size}
        _refuse_other_steps(settings)
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
        """Pixel values of one frame.

        Args:
            image: uint8 RGB [H, W, 3], or a PIL image in mode RGB.
            dtype: of the result; the arithmetic is float32 before.
            device: of the result; None is the CPU. The resize runs on the CPU and bytes are what is copied.

        Returns:
            `dtype` [1, 3, R, R], contiguous.

        Raises:
            ValueError: `image` has another shape or dtype.
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
            raise ValueError(f"expected a uint8 RGB frame [H, W, 3], got {image.dtype} {list(image.shape)}")
        # On uint8 input torch rounds after the horizontal and again after the vertical pass, as PIL does; a float
        # resize rounded once at the end differs in 5 to 20 % of the values, by up to 20 levels at overshoots.
        side = (self.resolution, self.resolution)
        return F.interpolate(image.cpu().permute(2, 0, 1)[None], size=side, mode=self.resample, antialias=True)


def _refuse_other_steps(settings: dict):
    """ValueError if an image processor's settings ask for steps that SigLIP does not have."""
    for step in ("do_center_crop", "do_pad"):
        if settings.get(step):
            raise ValueError(f"{step}=True is not supported, only resizing to a square, rescaling and normalising")


def _square_side(size: Any) -> int:
    """Side in pixels of a Hugging Face image size; ValueError unless it is a square given by height and width."""
    given = {key: value for key, value in dict(size).items() if value is not None}
    if set(given) != {"height", "width"} or given["height"] != given["width"]:
        raise ValueError(f"size={given} is not supported, only a square such as {{'height': 224, 'width': 224}}")
    return int(given["height"])


def _per_channel(value: Any) -> tuple[float, float, float]:
    """One number for all channels, or one for each, as three floats."""
    values = (value,) * 3 if isinstance(value, int | float) else value
    return tuple(float(v) for v in values)
