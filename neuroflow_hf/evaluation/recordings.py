"""Recordings: what methods gave for videos, stored once under keys of all that it depends on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ..utils.files import write_whole
from ..utils.provenance import fingerprint, key_of, model_version
from ..video.preprocess import Preprocessor
from ..vision.gate_config import NeuroFlowGateConfig
from .methods import MethodSpec, tower_of

# beside the model's, the code and the libraries that every recording depends on
CODE = ("evaluation/methods.py", "evaluation/token_merging.py", "video/preprocess.py")
LIBRARIES = ("torch", "transformers", "pillow")


class RecordingStore:
    """
    Where the recordings of one model lie, a file for each method and video or batch of videos.

    Args:
        folder: of the files; made when the first one is written.
        model: in evaluation mode, with or without a text tower; recordings depend on its weights, dtype and device.
        preprocess: the checkpoint's.
        code, libraries: further files of the package, and further libraries, that recordings depend on.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        preprocess: Preprocessor,
        code: Sequence[str] = (),
        libraries: Sequence[str] = (),
    ):
        self.folder, self.tower, self.preprocess = Path(folder), tower_of(model), preprocess
        self.code = (*CODE, *code)
        self.libraries = {library: version(library) for library in (*LIBRARIES, *libraries)}
        self.weights = fingerprint(self.tower)

    def path(self, name: str, spec: MethodSpec, **depends) -> Path:
        """Where the recording of a method lies or will lie; `depends` is what else it depends on, such as frames."""
        options = spec.options
        if spec.kind == "stream":
            options = NeuroFlowGateConfig.from_options({}, **options).to_dict()
        key = key_of(
            weights=self.weights,
            dtype=str(self.tower.dtype),
            device=self.tower.device.type,
            code=model_version(*self.code),
            libraries=self.libraries,
            preprocess=asdict(self.preprocess),
            method=[spec.kind, options],
            **depends,
        )
        return self.folder / f"{name}-{key}.safetensors"


def passes_of(specs: Sequence[MethodSpec]) -> list[list[MethodSpec]]:
    """Which methods to record together: all that share dense frames; each other one alone, so that each is saved."""
    together = [spec for spec in specs if spec.shares_dense]
    return [*([together] if together else []), *([spec] for spec in specs if not spec.shares_dense)]


@dataclass(frozen=True, eq=False)
class VideoRecording:
    """One method over one video of T frames."""

    embeddings: torch.Tensor  # float32 [T, D]; [T, 0] of methods that hold dense embeddings, see `embeddings_of`
    cost: torch.Tensor  # float32 [T]
    skip: torch.Tensor  # float32 [T], share of patches not encoded; NaN where that means nothing
    milliseconds: torch.Tensor  # float32 [T]; NaN where the method was not timed

    @classmethod
    def read(cls, path: Path) -> "VideoRecording | None":
        """A recording from its file; None if there is none that can be read."""
        try:
            return cls(**load_file(path))
        except (FileNotFoundError, SafetensorError, TypeError):
            return None

    def write(self, path: Path):
        """Write the recording, whole or not at all."""
        write_whole(path, save({name: value.contiguous() for name, value in vars(self).items()}))

    def embeddings_of(self, dense: "VideoRecording") -> torch.Tensor:
        """The embeddings, float32 [T, D]: its own, or dense's of the frame that was encoded last."""
        if self.embeddings.shape[-1]:
            return self.embeddings
        places = torch.arange(len(self.skip))
        return dense.embeddings[torch.where(self.skip == 0, places, 0).cummax(0).values]
