"""
`attach` gives a model's SigLIP tower and its encoder layers other classes, in place, and `detach` gives them back
their own. Modules, parameters, hooks and flags are the same throughout, and so is the model's own API.
"""

import warnings
from functools import partial, update_wrapper
from typing import cast, get_args

from torch import nn
from transformers import SiglipVisionModel

from ..vision.gate_config import GateOption, NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipEncoderLayer, NeuroFlowSiglipVisionModel
from ..vision.streaming_model import empty_wrapper
from .session import STOCK, VIDEO_METHOD, Attachment, Rows, change_classes, with_classes
from .tower import StreamingTower, call_with_clips


def attach(model: nn.Module, preset: str = "faithful", rows: Rows = "auto", **gate_options: GateOption) -> Attachment:
    """
    Let every SigLIP tower in a loaded model follow video. The model's own API is used as before.

    Args:
        model: a model of transformers with a `SiglipVisionModel` anywhere in it: Gemma 3, PaliGemma, LLaVA-OneVision,
            Aya Vision, Command A Vision, DeepSeek-VL, T5Gemma 2, pi0. It is changed in place, until `detach`. In
            training mode the tower is encoded densely, as without this.
        preset (`str`, defaults to `"faithful"`): of the gate, as in `new_stream`.
        rows (`str`, defaults to `"auto"`): what the rows of `pixel_values` are, as the tower gets them.

            - `"frames"`: consecutive frames of one video. In `get_video_features`, frames of B videos, each a stream
              of its own. The streams end with the call.
            - `"cameras"`: row i is the next frame of camera i, whose stream continues over calls. In
              `get_video_features`, the next frames of B cameras.
            - `"images"`: unrelated images, encoded densely.
            - `"auto"`: `"frames"` in `get_video_features`, `"images"` elsewhere.
        gate_options: options of [`NeuroFlowGateConfig`] that override the preset's.

    Returns:
        [`Attachment`]: its `stream` can be read, reset and saved, and `detach` undoes everything.

    Raises:
        ValueError: if the model has no SigLIP tower, or one that is attached already or not transformers' own; for
            options that are unknown or of no use here. Nothing is changed then.
    """
    if rows not in get_args(Rows):
        raise ValueError(f"`rows` is {rows!r}; expected one of {', '.join(map(repr, get_args(Rows)))}.")
    attachment = Attachment(model, rows, {"preset": preset, **gate_options})
    if NeuroFlowGateConfig.from_options(attachment.gate_options).mode == "eliminate":
        raise ValueError("Mode `eliminate` returns active patches only, and these models read all; choose another.")
    towers = find_towers(model)
    for name, tower in towers.items():
        empty_wrapper(StreamingTower, tower, gate={})  # transformers learns what a class records when one is made
        change_classes(tower, (StreamingTower, NeuroFlowSiglipEncoderLayer))
        attachment.towers[name] = streaming = cast(StreamingTower, tower)
        streaming.attachment, streaming.name_in_model = attachment, name
        owner = video_model_around(model, name)
        if owner is not None and owner not in attachment.video_models:
            method = getattr(owner, VIDEO_METHOD)
            setattr(owner, VIDEO_METHOD, update_wrapper(partial(call_with_clips, method), method))
            attachment.video_models.append(owner)
    if rows == "auto" and not attachment.video_models:
        warnings.warn(
            f'{type(model).__name__} has no `{VIDEO_METHOD}`, so with `rows="auto"` every image is encoded densely. '
            'Pass `rows="frames"` if the images of a call are a video, `rows="cameras"` if calls follow cameras.',
            stacklevel=2,
        )
    return attachment


def find_towers(model: nn.Module) -> dict[str, SiglipVisionModel]:
    """The SigLIP towers in a model by name; ValueError if there are none, or others than transformers' own."""
    towers = {name: module for name, module in model.named_modules() if isinstance(module, SiglipVisionModel)}
    if not towers:
        raise ValueError(
            f"There is no `SiglipVisionModel` in this {type(model).__name__}; expected a model whose vision tower is "
            "a fixed-resolution SigLIP or SigLIP 2. CLIP and NaFlex towers (`Siglip2VisionModel`) are not supported."
        )
    for name, tower in towers.items():
        if isinstance(tower, NeuroFlowSiglipVisionModel):
            raise ValueError(f"`{name}` is a {type(tower).__name__} and has streams already; call `detach()` first.")
        for module, own in with_classes(tower, STOCK):
            forward = vars(module).get("_old_forward", vars(module).get("forward"))  # left there by accelerate's hooks
            if type(module) is not own or (forward and getattr(forward, "__func__", None) is not own.forward):
                raise ValueError(
                    f"The tower `{name}` has a {type(module).__name__} with another `forward` than transformers' "
                    f"{own.__name__}; attach before the model is compiled, sharded or patched."
                )
    return towers


def video_model_around(model: nn.Module, tower: str) -> nn.Module | None:
    """The innermost module around a tower that has a method for video, if there is one."""
    parts = tower.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in reversed(range(len(parts))))
    return next((module for module in around if hasattr(module, VIDEO_METHOD)), None) if tower else None
