"""A language model and its tokenizer, from a folder or a name on the Hub, or an error that says what to do."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .configuration_neuroflow_phi3 import NeuroFlowPhi3Config
from .loading import ModelLoadError, load_errors, one_line, quiet_loading, require_place, usable_device
from .modeling_neuroflow_phi3 import NeuroFlowPhi3ForCausalLM
from .tower_weights import quiet_transformers

NANO = "models/neuroflow-phi3-nano"  # in the checkout
NANO_PROMPTS = "eval/prompts/phi3_nano.jsonl"
MODEL_TYPES = ("phi3", NeuroFlowPhi3Config.model_type)


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
