"""Streams for the SigLIP tower inside a larger model: a video language model, a robot policy."""

from .attach import attach
from .session import Attachment, StreamSession

__all__ = ["Attachment", "StreamSession", "attach"]
