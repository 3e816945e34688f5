"""A model and what makes its pixel values, from a folder or a name on the Hub, or an error that says what to do."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from .language.configuration_neuroflow_phi3 import NeuroFlowPhi3Config
from .language.modeling_neuroflow_phi3 import NeuroFlowPhi3ForCausalLM
from .video.labels import TEMPLATE, Labels, check_labels, embed_labels
from .video.preprocess import Preprocessor
from .vision.configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig
from .vision.gate_config import NeuroFlowGateConfig
from .vision.modeling_neuroflow_siglip import NeuroFlowSiglipModel, NeuroFlowSiglipVisionModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEED_TEXT = "Labels need a model that reads text: name a whole SigLIP or SigLIP 2 checkpoint, with its tokenizer."


EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "neuroflow-siglip-small"

NANO = "models/neuroflow-phi3-nano"  # in the checkout
NANO_PROMPTS = "eval/prompts/phi3_nano.jsonl"
MODEL_TYPES = ("phi3", NeuroFlowPhi3Config.model_type)


class ModelLoadError(ValueError):
    """No streamed vision model can be made of what was named. The message names it, and what to do."""


class NoTextTowerError(ModelLoadError):
    """What was named has no text tower, or no complete one, and labels need it."""


def default_model() -> Path:
    """
    The small SigLIP that lies in the checkout of this package.

    Raises:
        ModelLoadError: if it is not there, as in an installed package.
    """
    if not (EMBEDDED_MODEL / "model.safetensors").is_file():
        raise ModelLoadError(
            f"There is no {EMBEDDED_MODEL.name} here: it lies in the checkout of this package. Name a SigLIP "
            "checkpoint with --model, a folder or a name on the Hub."
        )
    return EMBEDDED_MODEL


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
    require_place(source)
    device = usable_device(device)
    with quiet_transformers(), quiet_loading():
        with load_errors("SigLIP vision model", source):
            model, info = NeuroFlowSiglipVisionModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
        require_weights("SigLIP vision model", source, info["missing_keys"])
        preprocess = load_preprocess(source, resolution)
    require_head(model, source)
    return model.eval().to(device), preprocess


def load_text_model(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "auto", resolution: int | None = None
) -> tuple[NeuroFlowSiglipModel, Preprocessor, Any]:
    """
    A whole model, text tower included, in evaluation mode; what makes its pixel values; and its tokenizer.

    Args:
        source, dtype, device, resolution: as in `load_model`; the checkpoint is one with text tower and tokenizer.

    Raises:
        ModelLoadError: as in `load_model`, and if it has no text tower or no tokenizer.
        ValueError: as in `load_model`.
    """
    require_place(source)
    device = usable_device(device)
    with quiet_transformers(), quiet_loading():
        with load_errors("SigLIP model", source):
            settings, _ = NeuroFlowSiglipConfig.get_config_dict(source)
        if settings.get("model_type") == NeuroFlowSiglipVisionConfig.model_type:
            # its configuration says nothing of a text tower, and one of the default size would be made
            raise NoTextTowerError(f"{source} holds a vision tower alone. {NEED_TEXT}")
        with load_errors("SigLIP model", source):
            model, info = NeuroFlowSiglipModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing and all(name.startswith(("text_model.", "logit_")) for name in missing):
            raise NoTextTowerError(
                f"{source} has no complete text tower: {len(missing)} of its weights are missing, such as "
                f"{missing[0]}. {NEED_TEXT}"
            )
        require_weights("SigLIP model", source, missing)
        preprocess = load_preprocess(source, resolution)
        tokenizer = load_tokenizer(source)
    require_head(model.vision_model, source)
    model.vision_model.config.name_or_path = model.config.name_or_path  # for runs, which are given the tower alone
    return model.eval().to(device), preprocess, tokenizer


def load_model_with_labels(
    source: str | Path,
    names: Sequence[str],
    template: str = TEMPLATE,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    resolution: int | None = None,
) -> tuple[NeuroFlowSiglipVisionModel, Preprocessor, Labels]:
    """
    What `load_model` gives, and labels as the checkpoint's text tower embeds them. The text tower is not kept.

    Args:
        source, dtype, device, resolution: as in `load_text_model`.
        names, template: as in `embed_labels`.

    Raises:
        ModelLoadError, ValueError: as in `load_text_model` and `embed_labels`.
    """
    check_labels(names, template)
    model, preprocess, tokenizer = load_text_model(source, dtype, device, resolution)
    return model.vision_model, preprocess, embed_labels(model, tokenizer, names, template)


def require_place(source: str | Path):
    """
    Raise a ModelLoadError for what is neither a folder nor like a name on the Hub: it is a mistyped path, and should
    not be looked for there.
    """
    if not Path(source).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise ModelLoadError(f"There is no model folder {source}.")


@contextlib.contextmanager
def load_errors(what: str, source: str | Path) -> Iterator[None]:
    """Whatever is raised while `what` is read from `source` becomes a ModelLoadError that says so, and what to do."""
    try:
        yield
    except Exception as error:  # damaged files raise whatever their reader raises
        if isinstance(error, SafetensorError):
            advice = ". A weights file is damaged or cut short; copy or download it again."
        elif not Path(source).exists():
            advice = " There is no folder of that name here, so it was looked for on the Hub."
        else:
            advice = ""
        raise ModelLoadError(f"Cannot load a {what} from {source}: {one_line(error)}{advice}") from error


def require_weights(what: str, source: str | Path, missing: Iterable[str]):
    """Raise a ModelLoadError if weights are missing."""
    names = sorted(missing)
    if names:
        raise ModelLoadError(
            f"{source} is no complete {what}: {len(names)} of its weights are missing, such as "
            f"{names[0]}. They would be random; name a SigLIP or SigLIP 2 checkpoint."
        )


def require_head(model: NeuroFlowSiglipVisionModel, source: str | Path):
    """Raise a ModelLoadError for a vision tower without pooling head."""
    if not model.use_head:
        raise ModelLoadError(f"The model in {source} has no pooling head, so a frame has no embedding.")


def load_preprocess(source: str | Path, resolution: int | None) -> Preprocessor:
    """What makes pixel values, from the image processor in `source`; ModelLoadError if there is none."""
    try:
        return Preprocessor.from_pretrained(source, resolution)
    except (OSError, TypeError, KeyError) as error:
        raise ModelLoadError(
            f"Cannot load an image processor from {source}: {one_line(error)} Save one beside the model: "
            "`AutoImageProcessor.from_pretrained(...).save_pretrained(folder)`."
        ) from error


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer in `source`; ModelLoadError if there is none, or none that can be used."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as for the model, and ImportError where it needs a package that is not there
        raise ModelLoadError(
            f"Cannot load a tokenizer from {source}, and labels need one. Save it beside the model: "
            f"`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`. What transformers says: {one_line(error)}"
        ) from error


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
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' own progress bars inside the block: they would break into ours."""
    import transformers

    showing = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if showing:
            transformers.utils.logging.enable_progress_bar()


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


def default_language_model() -> Path:
    """
    The small Phi-3 that lies in the checkout.

    Raises:
        ModelLoadError: if it is not there, as in an installed package.
    """
    folder = Path(__file__).parent.parent / NANO
    if not (folder / "config.json").exists():
        raise ModelLoadError(
            f"There is no {NANO} here: it lies in the checkout of this package. Name a Phi-3 checkpoint with --model, "
            "a folder or a name on the Hub."
        )
    return folder


def default_prompts() -> Path:
    """
    The prompts that lie in the checkout: texts that the small Phi-3 was not trained on.

    Raises:
        FileNotFoundError: if they are not there, as in an installed package.
    """
    path = Path(__file__).parent.parent / NANO_PROMPTS
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {NANO_PROMPTS} here: it lies in the checkout of this package. Name a file of prompts with "
            "--prompts."
        )
    return path


def load_language_model(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "auto"
) -> tuple[NeuroFlowPhi3ForCausalLM, Any]:
    """
    A language model in evaluation mode, and its tokenizer.

    Args:
        source: a folder or a name on the Hub, holding a Phi-3 checkpoint, or one of this package, and its tokenizer.
        dtype: of the weights.
        device: `"auto"` takes CUDA where there is one, else the CPU.

    Raises:
        ModelLoadError: if it does not exist, is damaged, is no Phi-3, lacks weights, or has no tokenizer.
        ValueError: for a device that is not there.
    """
    require_place(source)
    device = usable_device(str(device))
    with quiet_transformers(), quiet_loading():
        with load_errors("Phi-3 model", source):
            settings, _ = NeuroFlowPhi3Config.get_config_dict(source)
        if settings.get("model_type") not in MODEL_TYPES:
            raise ModelLoadError(
                f"{source} holds a model of type {settings.get('model_type')!r}; expected a Phi-3 checkpoint (`phi3`)."
            )
        with load_errors("Phi-3 model", source):
            model, info = NeuroFlowPhi3ForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelLoadError(
                f"{source} is no complete Phi-3: {len(missing)} of its weights are missing, such as {missing[0]}. "
                "They would be random; copy or download the checkpoint again."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # whatever the reader of a damaged file raises, and ImportError
            raise ModelLoadError(
                f"Cannot load a tokenizer from {source}. Save it beside the model: "
                f"`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`. What transformers says: "
                f"{one_line(error)}"
            ) from error
    return model.eval().to(device), tokenizer
