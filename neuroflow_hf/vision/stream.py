"""The temporal state of B camera streams, in an object that the caller owns."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from .controller import Pace
from .gate_config import NeuroFlowGateConfig
from .modes import MODES
from .selection import refreshed_per_frame
from .stream_state import (
    STATE_FORMAT,
    StreamGeometry,
    changes_of,
    memory_layout,
    require_complete,
    stored_by,
)
from .whole_file import whole_file


class NeuroFlowStream:
    """
    The memory of B independent streams (cameras), one frame of each per call. Made by `model.new_stream()`, passed to
    the model with every frame and never kept by it, so streams that share a model do not affect each other.

    Args:
        gate ([`NeuroFlowGateConfig`]): the options of the gate. They may be changed between frames, except those that
            decide what is stored: `mode`, `signal`, `reference`, and whether `slow_ema_rate`, `max_age` and, in
            `hold`, `keyframe_fraction` or `keyframe_surprise` are set. To change these, reset the stream.
        batch_size (`int`, defaults to 1): B.

    Attributes:
        frames (`list[int]`): how many frames each stream has seen since it was made or last reset.
        credit (`list[float]`):
            What each stream has saved under a `cost_budget`, in dense frames. At 0 or less, only what costs little is
            encoded until it is above 0 again.
        pace (`list[Pace]`): what the controller remembers of each stream under a `cost_budget`.
        hidden_states (`tuple[int, ...]`): the hidden states that are kept, as the first frame asked for them.
        memory (`dict[str, torch.Tensor]`): what is remembered of the last frames, by the names of `stream_state.py`.
    """

    def __init__(self, gate: NeuroFlowGateConfig, batch_size: int = 1):
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}; expected the number of streams, at least 1.")
        self.gate = gate
        self.batch_size = batch_size
        self.forget()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_size={self.batch_size}, mode={self.gate.mode!r}, frames={self.frames}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def forget(self) -> None:
        """Drop all memory; the next frame may have another shape, and is a keyframe of every stream."""
        self.frames = [0] * self.batch_size
        self.credit = [float(self.gate.cost_reserve)] * self.batch_size
        self.pace = [Pace()] * self.batch_size
        self.geometry: StreamGeometry | None = None
        self.stores: dict | None = None
        self.hidden_states: tuple[int, ...] = ()
        self.memory: dict[str, torch.Tensor] = {}
        self.frame_in_progress = False

    def reset(self, streams: int | Iterable[int] | None = None) -> None:
        """
        Restart streams: their next frame is a keyframe, and their credit is the reserve again.

        Args:
            streams: indices of the streams, one or several; by default all, and then all memory is freed.

        Raises:
            IndexError: for a stream that does not exist; nothing is reset then.
            TypeError: for entries that are not indices, such as those of a mask; nothing is reset then.
        """
        if streams is None:
            self.forget()
            return
        for index in self._indices(streams):
            self.frames[index], self.credit[index], self.pace[index] = 0, float(self.gate.cost_reserve), Pace()

    def keep(self, streams: int | Iterable[int]) -> None:
        """
        Drop all other streams and their memory. Those that are kept go on as if they had always been alone.

        Args:
            streams: indices of the streams to keep, one or several, in the order that they will have.

        Raises:
            ValueError: for no stream, or one that is named twice; nothing is dropped then.
            IndexError, TypeError: as in `reset`; nothing is dropped then.
        """
        indices = self._indices(streams)
        if not indices or len(set(indices)) < len(indices):
            raise ValueError(f"`streams` is {indices}; expected at least one stream, and each once.")
        whole = self._whole()
        self.frames = [whole.frames[index] for index in indices]
        self.credit = [whole.credit[index] for index in indices]
        self.pace = [whole.pace[index] for index in indices]
        self.geometry = whole.geometry and replace(whole.geometry, batch_size=len(indices))
        self.memory = {name: tensor[indices] for name, tensor in whole.memory.items()}
        self.batch_size, self.stores, self.frame_in_progress = len(indices), whole.stores, False

    @classmethod
    def join(cls, streams: Sequence["NeuroFlowStream"]) -> "NeuroFlowStream":
        """
        A new object with the streams of several, in their order; the counterpart of `keep`. Each stream goes on as if
        it had stayed alone, and the objects that they come from stay as they are.

        Args:
            streams: at least one, all with the same options of the gate.

        Raises:
            ValueError: for no stream, and for streams that saw frames of different shapes or store different things.
        """
        if not streams:
            raise ValueError("`streams` is empty; expected at least one stream.")
        wholes = [stream._whole() for stream in streams]
        joined = cls(wholes[0].gate, sum(whole.batch_size for whole in wholes))
        joined.frames = [frames for whole in wholes for frames in whole.frames]
        joined.credit = [credit for whole in wholes for credit in whole.credit]
        joined.pace = [pace for whole in wholes for pace in whole.pace]
        begun = [(whole, whole.geometry) for whole in wholes if whole.geometry is not None]
        if not begun:
            return joined
        first, geometry = begun[0][0], replace(begun[0][1], batch_size=joined.batch_size)
        joined.geometry = geometry
        for whole, own in begun:
            changes = geometry.differences(replace(own, batch_size=joined.batch_size))
            if changes or (whole.stores, whole.hidden_states) != (first.stores, first.hidden_states):
                raise ValueError(
                    f"These streams cannot be joined: {changes or 'they store different things'}. Join streams of one "
                    "model with the same options, which saw frames of the same shape."
                )
        joined.stores, joined.hidden_states = first.stores, first.hidden_states
        for name, like in first.memory.items():  # nothing is read of streams that saw no frame yet
            shape = like.shape[1:]
            parts = [
                whole.memory[name] if whole.memory else like.new_zeros(whole.batch_size, *shape) for whole in wholes
            ]
            joined.memory[name] = torch.cat(parts)
        return joined

    def _indices(self, streams: int | Iterable[int]) -> list[int]:
        """The indices of streams as a list, after the checks that `reset` describes."""
        streams = streams.tolist() if hasattr(streams, "tolist") else streams  # NumPy and torch
        indices = [streams] if isinstance(streams, int) else list(streams)
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool):
                raise TypeError(f"`streams` holds {index!r}; expected indices of streams, not a mask.")
            if not 0 <= index < self.batch_size:
                raise IndexError(f"There is no stream {index}; this object holds streams 0 to {self.batch_size - 1}.")
        return indices

    @property
    def nbytes(self) -> int:
        """Bytes held by all memories."""
        return sum(tensor.nbytes for tensor in self.memory.values())

    def to(self, device: torch.device | str) -> "NeuroFlowStream":
        """Move all memory to `device`, in place; returns itself."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        self.memory = {name: tensor.to(device) for name, tensor in self.memory.items()}
        if self.geometry is not None:
            self.geometry = replace(self.geometry, device=device)
        return self

    @contextmanager
    def unchanged_by_errors(self) -> Iterator[None]:
        """Restore the stream's attributes if the code inside raises."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def begin_frame(self, geometry: StreamGeometry, hidden_states: tuple[int, ...] = ()) -> None:
        """
        Prepare for a frame of this geometry that asks for these hidden states. If the last frame was interrupted (an
        error, Ctrl-C, out of memory), some memories may be written and others not: every stream then restarts with a
        keyframe.

        Raises:
            ValueError: if the geometry differs from the stream's and `on_change` is `"error"`; if an option of the
                gate is out of range; if an option that decides what is stored was changed; if `max_age` needs more
                patches per frame than `token_budget` allows; if a hidden state is asked for that is not kept.
        """
        self.gate.check()
        if self.geometry is None and geometry.batch_size != self.batch_size:
            before = replace(geometry, batch_size=self.batch_size)
        else:
            before = self.geometry or geometry
        changes = before.differences(geometry)
        if changes and self.gate.on_change == "error":
            raise ValueError(
                f"This frame does not match its stream: {changes}. Call `stream.reset()` to restart it, make another "
                'stream for it with `model.new_stream()`, or make the stream with `on_change="keyframe"`.'
            )
        everything_or_nothing = self.gate.everything_active or self.gate.mode == "hold"
        if self.gate.max_age is not None and self.gate.token_budget is not None and not everything_or_nothing:
            needed = refreshed_per_frame(geometry.num_patches, self.gate.max_age)
            if needed > self.gate.token_budget:
                raise ValueError(
                    f"`max_age={self.gate.max_age}` needs {needed} of {geometry.num_patches} patches encoded on every "
                    f"frame, and `token_budget={self.gate.token_budget}` allows fewer. Raise one of them."
                )
        if changes:
            self.batch_size = geometry.batch_size
            self.forget()
        elif self.frame_in_progress:
            self.reset()
        if self.stores is not None and self.stores != stored_by(self.gate):
            raise ValueError(
                "Gate options that decide what the stream stores were changed: "
                f"{changes_of(self.stores, stored_by(self.gate))}. Call `stream.reset()`, or make another stream with "
                "`model.new_stream()`."
            )
        if self.geometry is None:
            self.hidden_states = hidden_states
        if hidden_states and not MODES[self.gate.mode].pools_all_patches:
            raise ValueError(
                "`output_hidden_states` is not supported in mode `eliminate`, which keeps no outputs; make the stream "
                "with another mode."
            )
        missing = sorted(set(hidden_states) - set(self.hidden_states))
        if missing:
            raise ValueError(
                f"`output_hidden_states` asks for hidden states {missing}, and this stream keeps "
                f"{list(self.hidden_states)}: its first frame decides. Ask for the same ones on every frame, or call "
                "`stream.reset()`."
            )
        self.geometry, self.stores = geometry, stored_by(self.gate)

    def due_keyframes(self) -> list[bool]:
        """For each stream, whether its next frame is a keyframe by number, whatever it shows and has been spent."""
        interval = None if self.gate.is_paced else self.gate.keyframe_interval
        return [
            self.gate.everything_active or frame == 0 or (interval is not None and frame % interval == 0)
            for frame in self.frames
        ]

    def state_dict(self) -> dict:
        """
        A copy of everything needed to continue in another process: plain values, and tensors under `"memory"`.
        Load it into a stream of a model with the same weights by `load_state_dict`.
        """
        whole = self._whole()
        return {**whole._header(), "memory": {name: tensor.clone() for name, tensor in whole.memory.items()}}

    def load_state_dict(self, state: dict) -> None:
        """
        Continue from `state_dict()`'s result; tensors keep the device they come with (see `to`).

        Raises:
            ValueError: if it is something else, is incomplete, or comes from a stream that stores other things.
                Nothing is changed then.
        """
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            found = state.get("format") if isinstance(state, dict) else None
            raise ValueError(
                f"This is not the state of a stream in format {STATE_FORMAT} (found: {found}); expected what "
                "`state_dict()` of this version returns. Start a new stream instead."
            )
        missing = {"batch_size", "frames", "credit", "pace", "geometry", "gate", "memory"} - state.keys()
        if missing:
            raise ValueError(f"The state lacks {', '.join(sorted(missing))}; expected what `state_dict()` returned.")
        theirs, ours = stored_by(NeuroFlowGateConfig.from_options(state["gate"])), stored_by(self.gate)
        if theirs != ours:
            raise ValueError(
                f"The state comes from a stream that stores other things: {changes_of(theirs, ours)}. Make the stream "
                "with the same options: `model.new_stream(**state['gate'])`."
            )
        geometry = None
        if state["geometry"] is not None:
            device = next((tensor.device for tensor in state["memory"].values()), torch.device("cpu"))
            stored = state["geometry"]
            geometry = StreamGeometry(
                **{**stored, "grid": tuple(stored["grid"]), "dtype": getattr(torch, stored["dtype"]), "device": device}
            )
        hidden_states = tuple(state.get("hidden_states", ()))
        require_complete(state, memory_layout(self.gate, geometry, hidden_states))
        paces = [Pace.from_dict(pace) for pace in state["pace"]]
        memory = {name: tensor.clone() for name, tensor in state["memory"].items()}
        self.batch_size, self.geometry = state["batch_size"], geometry
        self.frames, self.credit, self.pace = list(state["frames"]), list(state["credit"]), paces
        self.memory = memory
        self.stores, self.hidden_states = None if geometry is None else ours, hidden_states
        self.frame_in_progress = False

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a safetensors file, whole or not at all."""
        whole = self._whole()
        tensors = {name: tensor.contiguous() for name, tensor in whole.memory.items()}
        with whole_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"neuroflow_stream": json.dumps(whole._header())})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> "NeuroFlowStream":
        """
        A stream from a file that `save` wrote, with the gate that it had, on `device`.

        Raises:
            ValueError: if the file is safetensors but holds no stream.
        """
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get("neuroflow_stream")
            if header is None:
                raise ValueError(f"{path} holds no stream; expected a file written by `stream.save()`.")
            state = {**json.loads(header), "memory": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        gate = NeuroFlowGateConfig.from_options(state["gate"])
        gate.preset_budget = state.get("preset_budget")
        stream = cls(gate, state["batch_size"])
        stream.load_state_dict(state)
        return stream

    def _whole(self) -> "NeuroFlowStream":
        """The stream, or a fresh one if its last frame was interrupted: its memory is then incomplete."""
        return NeuroFlowStream(self.gate, self.batch_size) if self.frame_in_progress else self

    def _header(self) -> dict:
        geometry = None
        if self.geometry is not None:
            geometry = {key: value for key, value in vars(self.geometry).items() if key != "device"}
            geometry["dtype"] = str(self.geometry.dtype).removeprefix("torch.")
            geometry["grid"] = list(self.geometry.grid)
        return {
            "format": STATE_FORMAT,
            "batch_size": self.batch_size,
            "frames": list(self.frames),
            "credit": list(self.credit),
            "pace": [asdict(pace) for pace in self.pace],
            "geometry": geometry,
            "hidden_states": list(self.hidden_states),
            "gate": self.gate.to_dict(),
            "preset_budget": self.gate.preset_budget,
        }


def refuse_export(stream: NeuroFlowStream) -> NoReturn:
    """Say what to export instead. Only `torch.export` asks for the paths of its inputs."""
    raise TypeError(
        "`torch.export` cannot take a stream, whose memory changes with every frame. Export functions of its memory: "
        "`neuroflow_hf.export_stream(model, folder, token_budget=...)`."
    )


# To code that maps a function over all inputs, a stream is a container without tensors, and stays itself.
pytree.register_pytree_node(
    NeuroFlowStream, lambda stream: ([], stream), lambda _, stream: stream, flatten_with_keys_fn=refuse_export
)
