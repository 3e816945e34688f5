"""What is remembered from call to call: by one request, and by an attached model; and how classes are changed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from ..vision.gate_config import GateOption
from ..vision.stream import NeuroFlowStream
from .static_tokens import drop_static_tokens, image_tokens_of

VIDEO_METHOD = "get_video_features"
Classes = tuple[type[nn.Module], type[nn.Module]]  # of a tower and of its layers
STOCK: Classes = (SiglipVisionModel, SiglipEncoderLayer)
Rows = Literal["auto", "frames", "cameras", "images"]
# what `Attachment.using` set; outside of the attachments, since a model that holds a ContextVar cannot be copied
SESSIONS: ContextVar[dict["Attachment", "StreamSession"] | None] = ContextVar("sessions", default=None)


class StreamSession:
    """
    The memory of one request whose rows are cameras. It belongs to the caller: requests with a session each do not
    meet.

    Attributes:
        streams (`dict[str, NeuroFlowStream]`): by the tower's name in the model, filled by the first call.
        cost (`torch.FloatTensor` of shape `(rows,)`, *optional*):
            Multiply-adds of the tower for each row of the last call, over those of a dense one; None if it was dense.
        retention_mask (`torch.BoolTensor` of shape `(image tokens,)`, *optional*):
            Which image tokens the last `drop_static_tokens` kept, flattened over clips, frames, rows and columns.
    """

    def __init__(self) -> None:
        self.streams: dict[str, NeuroFlowStream] = {}
        self.cost: torch.Tensor | None = None
        self.retention_mask: torch.Tensor | None = None

    def stream_of(self, tower: str, cameras: int) -> NeuroFlowStream | None:
        """
        The stream that a tower's call continues, None if it is the first.

        Raises:
            ValueError: if the stream has another number of cameras.
        """
        stream = self.streams.get(tower)
        if stream is not None and stream.batch_size != cameras:
            raise ValueError(
                f"The call has images of {cameras} cameras, and the stream that it would continue has "
                f"{stream.batch_size}. Pass the same cameras on every call, call `attached.reset()`, or give this "
                "request a session of its own: `with attached.using() as session`."
            )
        return stream


class Attachment:
    """
    The streams of the SigLIP towers in a model, made by [`attach`].

    Attributes:
        towers (`dict[str, SiglipVisionModel]`): by their names in the model; empty after `detach`.
        rows (`str`): what the rows of a call are, see [`attach`]. May be changed between calls.
        gate_options (`dict`): the options of new streams. May be changed between calls.
    """

    def __init__(self, model: nn.Module, rows: Rows, gate_options: dict[str, GateOption]):
        self.model, self.rows, self.gate_options = model, rows, gate_options
        self.towers: dict[str, SiglipVisionModel] = {}
        self.video_models: list[nn.Module] = []
        self.own_session = StreamSession()

    @property
    def session(self) -> StreamSession:
        """The session that calls continue: that of `using`, elsewhere the attachment's own."""
        return (SESSIONS.get() or {}).get(self, self.own_session)

    @contextmanager
    def using(self, session: StreamSession | None = None) -> Iterator[StreamSession]:
        """Let the calls inside, of this thread or task, continue a session; without one, a new one."""
        session = session or StreamSession()
        token = SESSIONS.set({**(SESSIONS.get() or {}), self: session})
        try:
            yield session
        finally:
            SESSIONS.reset(token)

    @property
    def stream(self) -> NeuroFlowStream | None:
        """
        The stream that calls continue with `rows="cameras"`, None before the first. Assign one to continue it:
        `attached.stream = NeuroFlowStream.load(path)`.

        Raises:
            ValueError: if the model has several towers; `session.streams` has a stream of each.
        """
        return self.session.streams.get(self._only_tower())

    @stream.setter
    def stream(self, stream: NeuroFlowStream) -> None:
        self.session.streams[self._only_tower()] = stream

    @property
    def cost(self) -> torch.Tensor | None:
        """Of the session's last call, see [`StreamSession`]."""
        return self.session.cost

    @property
    def share_kept(self) -> float | None:
        """The share of the image tokens that the session's last `drop_static_tokens` kept."""
        mask = self.session.retention_mask
        return None if mask is None else mask.float().mean().item()

    def drop_static_tokens(
        self,
        inputs: Mapping[str, Any],
        min_change: float | None = None,
        retention_mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """
        Encode the frames of a prompt, and leave out the image tokens that repeat earlier frames:
        `model.generate(**attached.drop_static_tokens(inputs))`.

        A clip's first frame keeps all of its tokens; later ones keep those that read a patch that was encoded. Tokens
        keep their positions, and the answer's positions follow the last of them. For Gemma 3 and PaliGemma, whose
        frames are images of the prompt (`rows="frames"`), and videos of LLaVA-OneVision.

        Args:
            inputs: of the processor. Features that were computed before are taken from `mm_encoder_outputs`; the
                images of a prompt must then be consecutive frames of one stream.
            min_change (`float`, *optional*):
                Keep the tokens whose features are further than this, as `1 - cosine`, from those of the last token
                that was kept at their place, instead of the gate's choice. Also for frames that were encoded densely.
            retention_mask (`torch.BoolTensor` of shape `(image tokens,)`, *optional*):
                Which tokens to keep, instead of the gate's choice: one value for each image token, flattened over
                clips, frames, rows and columns. vLLM's EVS and VideoLLaMA 3 make masks of this shape.

        Returns:
            `dict`: inputs with features in place of pixels, fewer tokens, and `position_ids`. Prompts that keep
            different numbers are padded on the left. The share is in `share_kept`, the mask in the session.

        Raises:
            ValueError: for other models, for frames that were encoded densely or are of different cameras, and if text
                and features do not fit.
        """
        images = image_tokens_of(self.model).modality == "image"
        if images and self.rows == "cameras" and not inputs.get("mm_encoder_outputs"):
            raise ValueError(
                'With `rows="cameras"`, the images of a prompt are of different cameras, and what they repeat is not '
                'in the prompt. Use `rows="frames"`, or pass the frames\' features in `mm_encoder_outputs`.'
            )
        model = cast(PreTrainedModel, self.model)
        trimmed, self.session.retention_mask = drop_static_tokens(model, inputs, min_change, retention_mask)
        return trimmed

    def reset(self) -> None:
        """Forget the session's streams: the next call starts new ones, of any number of cameras."""
        self.session.streams.clear()

    def detach(self) -> None:
        """Give the model its own classes and methods back; it computes what it did before."""
        for tower in self.towers.values():
            del tower.attachment, tower.name_in_model
            change_classes(tower, STOCK)
        for owner in self.video_models:
            delattr(owner, VIDEO_METHOD)
        self.towers, self.video_models = {}, []

    def _only_tower(self) -> str:
        if len(self.towers) != 1:
            raise ValueError(f"The model has {len(self.towers)} SigLIP towers; use `session.streams[name]`.")
        return next(iter(self.towers))


def with_classes(tower: SiglipVisionModel, classes: Classes) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The tower with the first class, its layers with the second."""
    return [(tower, classes[0]), *((layer, classes[1]) for layer in tower.encoder.layers)]


def change_classes(tower: SiglipVisionModel, classes: Classes) -> None:
    """Give a tower and its layers other classes, also where accelerate's hooks keep a `forward` in the module."""
    for module, new in with_classes(tower, classes):
        for name in ("forward", "_old_forward"):
            if isinstance(vars(module).get(name), MethodType):
                setattr(module, name, MethodType(new.forward, module))
        module.__class__ = new
