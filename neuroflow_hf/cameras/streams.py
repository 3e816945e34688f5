"""One stream for each camera, joined for a call with any of them."""

from copy import copy

from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from ..vision.stream import NeuroFlowStream


class CameraStreams:
    """
    The streams of cameras of which some have a new picture at a time. They stay joined as long as the same cameras
    have one: to join and part them copies their memory.
    """

    def __init__(self, model: NeuroFlowSiglipVisionModel, options: dict):
        self.model, self.options = model, options
        self.parted: dict[str, NeuroFlowStream] = {}
        self.names: list[str] = []
        self.joined: NeuroFlowStream | None = None  # of `names`

    def of(self, names: list[str]) -> NeuroFlowStream:
        """One stream whose rows are these cameras, for the next call. Those that are new begin with a keyframe."""
        if names != self.names:
            self._part()
            fresh = [self.parted.pop(name, None) or self.model.new_stream(**self.options) for name in names]
            self.joined, self.names = NeuroFlowStream.join(fresh), names
        return self.joined

    def restart(self, name: str):
        """Begin anew with a keyframe, if there is a stream of this camera."""
        if name in self.names:
            self.joined.reset(self.names.index(name))
        self.parted.pop(name, None)

    def _part(self):
        for row, name in enumerate(self.names):
            self.parted[name] = copy(self.joined)
            self.parted[name].keep(row)
        self.names, self.joined = [], None
