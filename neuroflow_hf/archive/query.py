"""What a dataset is searched for: a text or a picture, embedded by the dataset's own checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..loading import ModelLoadError, NoTextTowerError, load_text_model, load_tower
from ..utils.provenance import fingerprint
from ..video.labels import TEMPLATE, check_labels, embed_labels
from ..video.preprocess import Preprocessor


@dataclass(frozen=True, eq=False)
class Query:
    """A query."""

    embedding: Tensor  # float32 [D]
    # gives SigLIP's probability for a cosine; None for pictures, for which there is none
    confidence: Callable[[float], float] | None = None


def load_for_texts(metadata: dict, source: str | None = None, device: str = "auto") -> tuple[Any, Any]:
    """
    The dataset's checkpoint with its text tower, and its tokenizer; arguments and errors are those of `text_query`.
    """
    source = checkpoint_of(metadata, source)
    try:
        model, _, tokenizer = load_text_model(source, getattr(torch, metadata["dtype"]), device)
    except NoTextTowerError as error:
        raise NoTextTowerError(
            f"{source} reads no text, so texts cannot be looked for. Search by a picture, with --image, or embed "
            "the videos with a whole SigLIP or SigLIP 2 checkpoint."
        ) from error
    require_same_checkpoint(metadata, model.vision_model, source)
    return model, tokenizer


def text_query(
    metadata: dict,
    text: str,
    template: str = TEMPLATE,
    source: str | None = None,
    device: str = "auto",
    loaded: tuple[Any, Any] | None = None,
) -> Query:
    """
    Embed a text.

    Args:
        metadata: of the dataset.
        text: such as `"a dog"`; for SigLIP 2, in lower case as in its training.
        template: the text around it, with `{}`; `"{}"` for whole sentences.
        source: folder or Hub name of the checkpoint; default: the one that the dataset names.
        device: as in `load_model`.
        loaded: what `load_for_texts` gave for this dataset, to embed several texts.

    Raises:
        ValueError: for an empty text, one that is too long, and another checkpoint than the dataset's.
        NoTextTowerError: if the checkpoint reads no text.
        ModelLoadError: as in `load_text_model`.
    """
    if not text.strip():
        raise ValueError("The text is empty; expected what to look for, such as `a dog`.")
    check_labels([text], template)
    model, tokenizer = loaded or load_for_texts(metadata, source, device)
    labels = embed_labels(model, tokenizer, [text], template)

    def confidence(cosine: float) -> float:
        return torch.tensor(labels.logit_scale * cosine + labels.logit_bias).sigmoid().item()

    return Query(labels.text_embeddings[0], confidence)


def image_query(metadata: dict, image: str | Path, source: str | None = None, device: str = "auto") -> Query:
    """
    Embed a picture file, preprocessed as the dataset's frames were. Arguments and errors are those of `text_query`;
    FileNotFoundError if there is no such file, ValueError if it is no picture.
    """
    picture = read_picture(Path(image))
    source = checkpoint_of(metadata, source)
    model, _ = load_tower(source, getattr(torch, metadata["dtype"]), device)
    require_same_checkpoint(metadata, model, source)
    preprocess = Preprocessor(**metadata["preprocessing"])
    pixel_values = preprocess(picture, model.dtype, model.device)
    with torch.inference_mode():
        output = model(pixel_values=pixel_values, interpolate_pos_encoding=True)
    return Query(output.pooler_output[0].float().cpu())


def read_picture(path: Path) -> np.ndarray:
    """A picture file, upright, as uint8 RGB [H, W, 3]."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no picture {path}.")
    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a picture, or is damaged; expected one such as .jpg or .png.") from error


def checkpoint_of(metadata: dict, source: str | None) -> str:
    """The checkpoint to load; ModelLoadError if neither `source` nor the dataset names one that is there."""
    named = source or metadata.get("model")
    if not named:
        raise ModelLoadError("The dataset does not name its checkpoint; name it with --model.")
    if source is None and Path(named).is_absolute() and not Path(named).exists():
        raise ModelLoadError(f"The dataset's checkpoint, {named}, is no longer there; name it with --model.")
    return named


def require_same_checkpoint(metadata: dict, model: torch.nn.Module, source: str):
    """ValueError if a vision model is not the one that the dataset was embedded with."""
    weights = fingerprint(model)
    if weights != metadata["weights"]:
        raise ValueError(
            f"{source} (weights {weights}) is another checkpoint than the dataset's, "
            f"{metadata.get('model') or 'unnamed'} (weights {metadata['weights']}); their embeddings cannot be "
            "compared. Name the dataset's checkpoint, or embed the videos again."
        )
