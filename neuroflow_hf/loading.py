"""A model and what makes its pixel values, from a folder or a name on the Hub, or an error that says what to do."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from .configuration_neuroflow_gate import NeuroFlowGateConfig
from .modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .preprocess import Preprocessor
from .tower_weights import quiet_transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelLoadError(ValueError):
    """No streamed vision model can be made of what was named. The message names it, and what to do."""


def load_model(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "auto", resolution: int | None = None
) -> tuple[NeuroFlowSiglipVisionModel, Preprocessor]:
    """
    A vision model in evaluation mode, and what makes its pixel values.

    Args:
        source: a folder or a name on the Hub, holding a fixed-resolution SigLIP or SigLIP 2 checkpoint (with or
            without its text tower) or one of this package, and its image processor.
        dtype: of weights and pixel values.
        device: `"auto"` takes CUDA where there is one, else the CPU.
        resolution: side of the frames in pixels; None takes the image processor's.

    Raises:
        ModelLoadError: if it does not exist, is damaged, lacks weights, or has no image processor.
        ValueError: for a device that is not there, and a resolution that is no whole number of pixels.
    """
    # Anything else that is not there is a mistyped path, and should not be looked for on the Hub.
    if not Path(source).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise ModelLoadError(f"There is no model folder {source}.")
    device = usable_device(device)
    with quiet_transformers(), quiet_loading():
        try:
            model, info = NeuroFlowSiglipVisionModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
        except Exception as error:  # damaged files raise whatever their reader raises
            if isinstance(error, SafetensorError):
                advice = ". A weights file is damaged or cut short; copy or download it again."
            elif not Path(source).exists():
                advice = " There is no folder of that name here, so it was looked for on the Hub."
            else:
                advice = ""
            message = f"Cannot load a SigLIP vision model from {source}: {one_line(error)}{advice}"
            raise ModelLoadError(message) from error
        if info["missing_keys"]:
            names = sorted(info["missing_keys"])
            raise ModelLoadError(
                f"{source} is no complete SigLIP vision model: {len(names)} of its weights are missing, such as "
                f"{names[0]}. They would be random; name a SigLIP or SigLIP 2 checkpoint."
            )
        try:
            preprocess = Preprocessor.from_pretrained(source, resolution)
        except (OSError, TypeError, KeyError) as error:
            raise ModelLoadError(
                f"Cannot load an image processor from {source}: {one_line(error)} Save one beside the model: "
                "`AutoImageProcessor.from_pretrained(...).save_pretrained(folder)`."
            ) from error
    if not model.use_head:
        raise ModelLoadError(f"The model in {source} has no pooling head, so a frame has no embedding.")
    return model.eval().to(device), preprocess


def load_gate(path: str | Path) -> dict:
    """
    All options of the gate that a NeuroFlow configuration holds, such as `neuroflow tune` writes.

    Args:
        path: the `config.json`, or the folder that it lies in.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, holds no gate, or one with unknown options or values out of range.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}; expected a configuration that `neuroflow tune` wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no configuration: it is not JSON ({one_line(error)}).") from error
    parts = [config, config.get("vision_config")] if isinstance(config, dict) else []
    gates = [part["gate"] for part in parts if isinstance(part, dict) and isinstance(part.get("gate"), dict)]
    if not gates:
        raise ValueError(
            f"{file} holds no gate options; expected a NeuroFlow configuration, such as `neuroflow tune` writes."
        )
    try:
        return NeuroFlowGateConfig.from_options(gates[0]).to_dict()
    except ValueError as error:
        raise ValueError(f"The gate in {file} cannot be used: {one_line(error)}") from error


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hold back what transformers says while it loads: what matters of it becomes an error."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def usable_device(name: str) -> torch.device:
    """The device of that name (`"auto"`: CUDA, else the CPU), tried out; ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"Device {name!r} cannot be used: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, shortened to 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
