"""Recordings: what methods gave for videos, stored under keys of everything that it depends on."""

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

# code (except that of the models) and libraries that all recordings depend on
CODE = ("evaluation/methods.py", "video/preprocess.py")
LIBRARIES = ("torch", "transformers", "pillow")


class RecordingStore:
    """
    Paths in `folder` of the recordings of one model, a file for each method and video or batch of videos. They depend
    on the model's weights, dtype and device, on `preprocess`, and on files of the package (`code`) and libraries:
    those that all recordings depend on, and those given.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        preprocess: Preprocessor,
        code: Sequence[str] = (),
        libraries: Sequence[str] = (),
    ):
        self.folder, self.tower, self.preprocess = folder, tower_of(model), preprocess
        self.code = (*CODE, *code)
        self.libraries = {library: version(library) for library in (*LIBRARIES, *libraries)}
        self.weights = fingerprint(self.tower)

    def path(self, name: str, spec: MethodSpec, **depends) -> Path:
        """The path of a method's recording, whether it exists or not; `depends` are further parts of its key."""
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
    """Methods to record in one pass: all that share dense embeddings; any other alone, so that it is saved at once."""
    together = [spec for spec in specs if spec.shares_dense]
    return [*([together] if together else []), *([spec] for spec in specs if not spec.shares_dense)]


@dataclass(frozen=True, eq=False)
class VideoRecording:
    """What one method gave for one video of T frames."""

    embeddings: torch.Tensor  # float32 [T, D]; [T, 0] for methods that hold dense embeddings, see `embeddings_of`
    cost: torch.Tensor  # float32 [T]
    skip: torch.Tensor  # float32 [T], share of patches not encoded; NaN if the method has no such share
    milliseconds: torch.Tensor  # float32 [T]; NaN if the method was not timed

    @classmethod
    def read(cls, path: Path) -> "VideoRecording | None":
        """Read a recording; None if the file is missing or damaged."""
        try:
            return cls(**load_file(path))
        except (FileNotFoundError, SafetensorError, TypeError):
            return None

    def write(self, path: Path):
        """Write the recording, whole or not at all."""
        write_whole(path, save({name: value.contiguous() for name, value in vars(self).items()}))

    def embeddings_of(self, dense: "VideoRecording") -> torch.Tensor:
        """The embeddings, float32 [T, D]: the method's own, or dense's of the last keyframe."""
        if self.embeddings.shape[-1]:
            return self.embeddings
        places = torch.arange(len(self.skip))
        return dense.embeddings[torch.where(self.skip == 0, places, 0).cummax(0).values]
