"""Models with their preprocessing or tokenizer, from a folder or the Hub. Errors say what to do."""

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging

from .language.configuration_neuroflow_phi3 import NeuroFlowPhi3Config
from .language.modeling_neuroflow_phi3 import NeuroFlowPhi3ForCausalLM
from .utils.files import one_line
from .video.labels import TEMPLATE, Labels, check_labels, embed_labels
from .video.preprocess import Preprocessor
from .vision.configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig
from .vision.gate_config import NeuroFlowGateConfig
from .vision.modeling_neuroflow_clip import NeuroFlowCLIPVisionModel
from .vision.modeling_neuroflow_dinov2 import NeuroFlowDinov2Model
from .vision.modeling_neuroflow_dinov2_with_registers import NeuroFlowDinov2WithRegistersModel
from .vision.modeling_neuroflow_siglip import NeuroFlowSiglipModel, NeuroFlowSiglipVisionModel
from .vision.tower import VisionTower

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVERT = "Convert it once: `neuroflow convert {} OUT`."
NOT_HERE = " There is no folder of that name here, so it was looked for on the Hub."
SAVE_ONE = " Save one beside the model: `{}.from_pretrained(...).save_pretrained(folder)`."
NEED_TEXT = "Labels need a model that reads text: name a whole SigLIP or SigLIP 2 checkpoint, with its tokenizer."

# by the model types of their checkpoints; all others are taken for SigLIP
OTHER_TOWERS: dict[str, type] = {"clip": NeuroFlowCLIPVisionModel} | {
    kind: tower
    for tower in (NeuroFlowCLIPVisionModel, NeuroFlowDinov2Model, NeuroFlowDinov2WithRegistersModel)
    for kind in (tower.config_class.stock_model_type, tower.config_class.model_type)
}

CHECKOUT = Path(__file__).resolve().parents[1]
EMBEDDED_MODEL = CHECKOUT / "models" / "neuroflow-siglip-small"
EMBEDDED_PROMPTS = CHECKOUT / "eval" / "prompts" / "prompts.jsonl"


class ModelLoadError(ValueError):
    """The model cannot be loaded. The message names it and says what to do."""


class NoTextTowerError(ModelLoadError):
    """The checkpoint has no complete text tower, and labels need one."""


# --- what lies in the checkout -------------------------------------------------------------------------------------


def default_model() -> Path:
    """The small SigLIP in the checkout; ModelLoadError in an installed package."""
    return in_checkout(EMBEDDED_MODEL, "Name a SigLIP checkpoint with --model, a folder or a name on the Hub.")


def default_prompts() -> Path:
    """Prompts of four tasks in the checkout; ModelLoadError in an installed package."""
    return in_checkout(EMBEDDED_PROMPTS, "Name a file of prompts with --prompts.")


def in_checkout(path: Path, advice: str) -> Path:
    """`path`, if it exists; else a ModelLoadError with advice."""
    if not path.exists():
        raise ModelLoadError(f"{path.name} lies in the checkout of this package, and is not at {path}. {advice}")
    return path


# --- models --------------------------------------------------------------------------------------------------------


def load_model(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    resolution: int | None = None,
    model_class: type = NeuroFlowSiglipVisionModel,
) -> tuple[Any, Preprocessor]:
    """
    A vision model in evaluation mode, and its preprocessing.

    Args:
        source: folder or Hub name of a fixed-resolution SigLIP or SigLIP 2 checkpoint, with or without its text tower,
            or of one of this package's; with its image processor.
        dtype: of the weights.
        device: `"auto"` is CUDA if available, else the CPU.
        resolution: side of the frames in pixels; default: the image processor's.
        model_class: of the model; `load_tower` finds it.

    Raises:
        ModelLoadError: if the checkpoint does not exist, is damaged, lacks weights, or has no image processor.
        ValueError: for a device that is not available, and a resolution below 1.
    """
    usable, what = usable_device(device), model_class.__name__.removeprefix("NeuroFlow")
    with quiet_transformers():
        model = read_model(model_class, what, source, dtype)
        preprocess = load_preprocess(source, resolution)
    require_head(model, source)
    return model.eval().to(usable), preprocess


def load_tower(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "auto", resolution: int | None = None
) -> tuple[Any, Preprocessor]:
    """As `load_model`, and also of DINOv2 checkpoints, with or without registers, and of CLIP's."""
    with quiet_transformers():
        kind = read_config(NeuroFlowSiglipVisionConfig, "vision model", source).get("model_type")
    return load_model(source, dtype, device, resolution, OTHER_TOWERS.get(kind, NeuroFlowSiglipVisionModel))


def load_text_model(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "auto", resolution: int | None = None
) -> tuple[NeuroFlowSiglipModel, Preprocessor, Any]:
    """
    A model with its text tower, in evaluation mode, its preprocessing and its tokenizer. Arguments and errors are as
    in `load_model`; also raises a ModelLoadError if there is no text tower or no tokenizer.
    """
    usable = usable_device(device)
    with quiet_transformers():
        kind = read_config(NeuroFlowSiglipConfig, "SigLIP model", source).get("model_type")
        if kind in OTHER_TOWERS:
            raise NoTextTowerError(f"{source} holds a `{kind}` model. {NEED_TEXT}")
        if kind == NeuroFlowSiglipVisionConfig.model_type:
            # transformers would add a random text tower of the default size
            raise NoTextTowerError(f"{source} holds a vision tower alone. {NEED_TEXT}")
        model = read_model(NeuroFlowSiglipModel, "SigLIP model", source, dtype)
        preprocess = load_preprocess(source, resolution)
        tokenizer = load_tokenizer(source)
    require_head(model.vision_model, source)
    model.vision_model.config.name_or_path = model.config.name_or_path  # for runs, which get the vision tower alone
    return model.eval().to(usable), preprocess, tokenizer


def load_model_with_labels(
    source: str | Path,
    names: Sequence[str] | None,
    template: str = TEMPLATE,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    resolution: int | None = None,
) -> tuple[NeuroFlowSiglipVisionModel, Preprocessor, Labels | None]:
    """
    As `load_model`, with labels that the checkpoint's text tower embedded; without names as `load_tower`, with None.
    The text tower is not kept. Arguments and errors are those of `load_text_model` and `embed_labels`.
    """
    if names is None:
        return *load_tower(source, dtype, device, resolution), None
    check_labels(names, template)
    model, preprocess, tokenizer = load_text_model(source, dtype, device, resolution)
    return model.vision_model, preprocess, embed_labels(model, tokenizer, names, template)


def load_language_model(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "auto"
) -> tuple[NeuroFlowPhi3ForCausalLM, Any]:
    """
    A language model in evaluation mode, and its tokenizer.

    Args:
        source: folder or Hub name of a Phi-3 checkpoint, or of one of this package's, with its tokenizer.
        dtype, device: as in `load_model`.

    Raises:
        ModelLoadError: if the checkpoint does not exist, is damaged, is not a Phi-3, or lacks weights or a tokenizer.
        ValueError: for a device that is not available.
    """
    usable, path = usable_device(device), Path(source)
    files = [path] if path.is_file() and path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise ModelLoadError(f"{files[0]} is a GGUF file. {CONVERT.format(shlex.quote(str(files[0])))}")
    with quiet_transformers():
        kind = read_config(NeuroFlowPhi3Config, "Phi-3 model", source).get("model_type")
        if kind == "llama":
            raise ModelLoadError(f"{source} holds a Llama. {CONVERT.format(shlex.quote(str(source)))}")
        if kind not in ("phi3", NeuroFlowPhi3Config.model_type):
            raise ModelLoadError(f"{source} holds a model of type {kind!r}; expected a Phi-3 checkpoint (`phi3`).")
        model = read_model(NeuroFlowPhi3ForCausalLM, "Phi-3 model", source, dtype)
        tokenizer = load_tokenizer(source)
    return model.eval().to(usable), tokenizer


# --- parts of a checkpoint -----------------------------------------------------------------------------------------


def read_config(config_class: type, what: str, source: str | Path) -> dict:
    """A stored configuration as a dict."""
    require_place(source)
    with load_errors(f"Cannot load a {what} from {source}", advice="" if Path(source).exists() else NOT_HERE):
        return config_class.get_config_dict(source)[0]


def read_model(model_class: type, what: str, source: str | Path, dtype: torch.dtype | str) -> Any:
    """A model with all of its weights; NoTextTowerError if only the text tower's are missing."""
    require_place(source)
    with load_errors(f"Cannot load a {what} from {source}", advice="" if Path(source).exists() else NOT_HERE):
        model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        lacks = f"{len(missing)} of its weights are missing, such as {missing[0]}."
        if all(name.startswith(("text_model.", "logit_")) for name in missing):
            raise NoTextTowerError(f"{source} has no complete text tower: {lacks} {NEED_TEXT}")
        raise ModelLoadError(
            f"{source} is not a complete {what}: {lacks} They would be random; name another checkpoint, or copy or "
            "download this one again."
        )
    return model


@contextlib.contextmanager
def load_errors(what: str, kinds: Any = Exception, advice: str = "") -> Iterator[None]:
    """
    Turn errors inside the block into a ModelLoadError that begins with `what`. Damaged files raise all kinds of
    errors, and missing packages an ImportError.
    """
    try:
        yield
    except ModelLoadError:
        raise
    except kinds as error:
        if isinstance(error, SafetensorError):
            advice = ". A weights file is damaged or cut short; copy or download it again."
        raise ModelLoadError(f"{what}: {one_line(error, 300)}{advice}") from error


def require_place(source: str | Path):
    """Raise a ModelLoadError unless `source` is a folder or could be a Hub name: a mistyped path is not looked up."""
    if not Path(source).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise ModelLoadError(f"There is no model folder {source}.")


def require_head(model: VisionTower, source: str | Path):
    """Raise a ModelLoadError for a vision tower without pooling head."""
    if model.pooling(exact=True) is None:
        raise ModelLoadError(f"The model in {source} has no pooling head, so a frame has no embedding.")


def load_preprocess(source: str | Path, resolution: int | None) -> Preprocessor:
    """The preprocessing of the image processor in `source`; ModelLoadError if there is none."""
    what, kinds = f"Cannot load an image processor from {source}", (OSError, TypeError, KeyError)
    with load_errors(what, kinds, SAVE_ONE.format("AutoImageProcessor")):
        return Preprocessor.from_pretrained(source, resolution)


def load_tokenizer(source: str | Path, tokenizer_class: type = AutoTokenizer) -> Any:
    """The tokenizer in `source`; ModelLoadError if there is none that can be used."""
    with load_errors(f"Cannot load a tokenizer from {source}", advice=SAVE_ONE.format("AutoTokenizer")):
        return tokenizer_class.from_pretrained(source)


def load_gate(path: str | Path) -> dict:
    """
    All gate options in a NeuroFlow configuration, such as `neuroflow tune` writes: a `config.json` or its folder.
    FileNotFoundError if there is none; ValueError if it is not JSON, or holds no gate or a wrong one.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    expected = "expected a NeuroFlow configuration, such as `neuroflow tune` writes."
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}; {expected}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        gate = dict({**config.get("vision_config", {}), **config}["gate"])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} holds no gate options, or is not JSON ({one_line(error)}); {expected}") from error
    try:
        return NeuroFlowGateConfig.from_options(gate).to_dict()
    except ValueError as error:
        raise ValueError(f"The gate in {file} cannot be used: {one_line(error)}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars, which would break into ours, and its warnings."""
    showing, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if showing:
            logging.enable_progress_bar()


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name; ValueError for another than float32, bfloat16 and float16."""
    if name not in DTYPES:
        raise ValueError(f"The dtype is {name!r}; expected {', '.join(DTYPES)}.")
    return DTYPES[name]


def usable_device(name: str) -> torch.device:
    """The device of that name; `"auto"` is CUDA if available, else the CPU. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"Device {name!r} cannot be used: {one_line(error)}") from error
