"""The class of an attached tower, and how it is told what the rows of a call are."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..vision.frame import NeuroFlowVisionOutput
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from ..vision.stream import NeuroFlowStream
from ..vision.streaming_model import pop_return_dict
from .session import VIDEO_METHOD, Attachment

# clips and frames per clip that the running `get_video_features` was given; None outside of it
CLIPS: ContextVar[tuple[int, int] | None] = ContextVar("clips", default=None)


class StreamingTower(NeuroFlowSiglipVisionModel):
    """
    Modifications:

    - `forward` without a `stream` takes those that the attachment has for the rows of the call.
    """

    attachment: Attachment
    name_in_model: str
    sparse_adapter = None

    @property
    def gate_options(self) -> dict:
        """Those of the attachment."""
        return self.attachment.gate_options

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        stream: NeuroFlowStream | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | NeuroFlowVisionOutput | tuple:
        """
        As [`NeuroFlowSiglipVisionModel`]. Images that belong to no video, and everything in training, are encoded
        densely.

        Raises:
            ValueError: if it cannot be told which images belong together.
        """
        session, rows, clips = self.attachment.session, self.attachment.rows, CLIPS.get()
        if rows == "auto":
            rows = "images" if clips is None else "frames"
        if stream is not None or rows == "images" or self.training:
            session.cost = None
            return super().forward(pixel_values, interpolate_pos_encoding, stream, **kwargs)
        if clips is None:
            clips = (1, len(pixel_values)) if rows == "frames" else (len(pixel_values), 1)
        elif clips[0] * clips[1] != len(pixel_values):
            raise ValueError(
                f"`{VIDEO_METHOD}` was given {clips[0]} clips of {clips[1]} frames, and the tower {len(pixel_values)} "
                'images, so it cannot be told which belong together. Set `attached.rows = "images"`.'
            )
        return_dict = pop_return_dict(kwargs, self.config)
        stream = session.stream_of(self.name_in_model, clips[0]) if rows == "cameras" else None
        stream = stream or self.new_stream(clips[0])
        if stream.geometry is not None and stream.geometry.device != pixel_values.device:
            stream.to(pixel_values.device)  # the caller may keep it elsewhere between calls
        encode: Callable[..., Any] = partial(
            super().forward, interpolate_pos_encoding=interpolate_pos_encoding, stream=stream, **kwargs
        )
        output = join_frames([encode(frame, return_dict=True) for frame in pixel_values.unflatten(0, clips).unbind(1)])
        session.cost = output.cost
        if rows == "cameras":
            session.streams[self.name_in_model] = stream
        return output if return_dict else output.to_tuple()


def call_with_clips(method: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a model's `get_video_features`; meanwhile the tower knows how many clips and frames there are."""
    # by dimensions, since versions of transformers name the argument differently
    videos = next((value for value in (*args, *kwargs.values()) if getattr(value, "ndim", 0) == 5), None)
    token = CLIPS.set(None if videos is None else (videos.shape[0], videos.shape[1]))
    try:
        return method(*args, **kwargs)
    finally:
        CLIPS.reset(token)


def join_frames(outputs: list[NeuroFlowVisionOutput]) -> NeuroFlowVisionOutput:
    """The outputs of T frames of B streams, [B, ...] each, as one whose rows are those of the call, [B * T, ...]."""

    def join(values: list | tuple) -> Any:
        if isinstance(values[0], tuple):
            return tuple(map(join, zip(*values, strict=True)))
        return None if values[0] is None else torch.stack(tuple(values), dim=1).flatten(0, 1)

    names = [name for name in outputs[0] if all(name in output for output in outputs)]
    return NeuroFlowVisionOutput(**{name: join([output[name] for output in outputs]) for name in names})
