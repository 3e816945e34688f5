"""
Fewer image tokens for the language model: of the frames after a clip's first, only the tokens that changed. F is the
number of frames, N of the tokens of a frame.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class ImageTokens:
    """How a kind of model makes image tokens of patches."""

    modality: str  # `"image"`, a row of pixels for each frame, or `"video"`, a row for each clip
    pool: Callable[[Any, torch.Tensor], torch.Tensor]  # the model's own, of features [F, h * w, D] to [F, N, D]
    closing: int = 0  # how many tokens follow those of a row

    @property
    def pixels(self) -> str:
        """The name of the pixels among a processor's outputs."""
        return "pixel_values_videos" if self.modality == "video" else "pixel_values"

    def per_frame(self, model: Any) -> int:
        """N."""
        vision = model.config.vision_config
        return self.pool(model, torch.zeros(1, (vision.image_size // vision.patch_size) ** 2, 1)).shape[1]


def pool_gemma3(model: Any, patches: torch.Tensor) -> torch.Tensor:
    """Averages over squares of patches, before the norm and the projection."""
    projector = model.multi_modal_projector
    grid = patches.mT.unflatten(-1, (projector.patches_per_image, -1))
    return projector.avg_pool(grid).flatten(2).mT


IMAGE_TOKENS = {
    "gemma3": ImageTokens("image", pool_gemma3),
    "paligemma": ImageTokens("image", lambda model, patches: patches),
    "llava_onevision": ImageTokens("video", lambda model, patches: model.apply_pooling(patches), closing=1),
}


def image_tokens_of(model: nn.Module) -> ImageTokens:
    """How this model makes image tokens; ValueError if it is of another kind, or too old for features."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in IMAGE_TOKENS:
        raise ValueError(
            f"Static tokens cannot be dropped for a {type(model).__name__} (model type {kind!r}); expected one of "
            f"{', '.join(map(repr, IMAGE_TOKENS))}."
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ValueError("`drop_static_tokens` needs a version of transformers with `mm_encoder_outputs`, as 5.23.")
    return IMAGE_TOKENS[kind]


def retained_by_gate(model: nn.Module, tokens: ImageTokens, active_mask: torch.Tensor) -> torch.Tensor:
    """Which tokens read a patch that was encoded: bool [F, N], from active masks [F, h, w]."""
    # the model's own pooling has no negative weights: the pooled mask is above 0 where one of the patches is active
    return tokens.pool(model, active_mask.flatten(1).unsqueeze(-1).float()).squeeze(-1) > 0


def changed_since_kept(frames: torch.Tensor, first: list[int], min_change: float) -> torch.Tensor:
    """
    Which tokens of frames [F, N, D] are further than this (1 - cosine) from the last kept one of their place: bool
    [F, N]. All tokens of the `first` frames are kept.
    """
    last, masks = frames[0], []
    for number, frame in enumerate(frames):
        keep = 1 - cosine_similarity(frame, last, dim=-1) > min_change
        masks.append(torch.ones_like(keep) if number in first else keep)
        last = torch.where(masks[-1].unsqueeze(-1), frame, last)
    return torch.stack(masks)


def first_frames(tokens: ImageTokens, num_frames: int, rows: int, in_prompts: torch.Tensor) -> list[int]:
    """The number of each clip's first frame: of a row of a video, of the images of a prompt."""
    if tokens.modality == "video":
        return list(range(0, num_frames, num_frames // rows))
    return (in_prompts.cumsum(0) - in_prompts)[in_prompts > 0].tolist()


def encode(model: nn.Module, tokens: ImageTokens, inputs: Mapping[str, Any]) -> Any:
    """The features of the inputs' pixels."""
    if inputs.get(tokens.pixels) is None:
        raise ValueError(f"There is nothing to drop: the inputs have no `{tokens.pixels}`.")
    with torch.no_grad():
        return getattr(model, f"get_{tokens.modality}_features")(inputs[tokens.pixels], return_dict=True)


def drop_static_tokens(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    min_change: float | None = None,
    retention_mask: torch.Tensor | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """See [`Attachment.drop_static_tokens`]. Returns the new inputs and the retention mask, bool [F * N]."""
    tokens, ids = image_tokens_of(model), inputs.get("input_ids")
    if ids is None:
        raise ValueError("`drop_static_tokens` needs `input_ids`, in which image tokens have their places.")
    encoded = dict(inputs.get("mm_encoder_outputs") or {})
    features = encoded.get(tokens.modality) or encode(model.base_model, tokens, inputs)
    pooled: torch.Tensor = features.pooler_output
    rows, count = len(pooled), pooled.shape[0] * pooled.shape[1]
    is_image = ids == getattr(model.config, f"{tokens.modality}_token_id")
    if is_image.sum() != count:
        raise ValueError(f"The text has {is_image.sum()} {tokens.modality} tokens for {count} features.")
    num_tokens = count - tokens.closing * rows
    if retention_mask is None:
        active_mask = features.get("active_mask")
        if min_change is None and active_mask is None:
            raise ValueError(
                "These frames were encoded densely, so it is not known what changed. Attach the model with "
                '`rows="frames"` and call `eval()`, or pass `min_change`.'
            )
        per_frame = tokens.per_frame(model.base_model)
        first = first_frames(tokens, num_tokens // per_frame, rows, is_image.sum(-1) // per_frame)
        if min_change is None:
            retained = retained_by_gate(model.base_model, tokens, active_mask)
            retained[first] = True
        else:
            frames = pooled[:, : num_tokens // rows].reshape(-1, per_frame, pooled.shape[-1])
            retained = changed_since_kept(frames, first, min_change)
        retention_mask = retained.flatten()
    if retention_mask.dtype != torch.bool or retention_mask.shape != (num_tokens,):
        raise ValueError(
            f"`retention_mask` is {retention_mask.dtype} of shape {tuple(retention_mask.shape)}; expected bool of "
            f"shape ({num_tokens},), one value for each image token of each frame."
        )
    kept = pad(retention_mask.to(pooled.device).view(rows, -1), (0, tokens.closing), value=True)
    # a row for each token, which is what beams and chunks of the prompt can be cut from
    encoded[tokens.modality] = BaseModelOutputWithPooling(pooler_output=pooled[kept].unsqueeze(1))
    stays = torch.ones_like(is_image).masked_scatter(is_image, kept.to(ids.device))
    trimmed = trim(with_positions(inputs), stays, model.config.get_text_config().pad_token_id or 0)
    trimmed.pop(tokens.pixels, None)
    return trimmed | {"mm_encoder_outputs": encoded}, retention_mask


def with_positions(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with the mask and the positions that `generate` would give them, if they have none."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    if positions is None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "attention_mask": mask, "position_ids": positions.expand_as(mask)}


def trim(inputs: dict[str, Any], stays: torch.Tensor, pad_token_id: int) -> dict[str, Any]:
    """
    Take the tokens that stay, bool [B, S], from all inputs of this shape, and pad on the left where prompts keep
    different numbers. Padding that was there is taken out first.
    """
    stays, fill = stays & inputs["attention_mask"].bool(), {"input_ids": pad_token_id, "labels": -100}

    def of(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape != stays.shape:
            return value
        rows = [row[here] for row, here in zip(value, stays, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=fill.get(name, 0), padding_side="left")

    return {name: of(name, value) for name, value in inputs.items()}
