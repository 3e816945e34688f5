"""
The folder of a sparse adapter: its weights in PEFT's format, which PEFT's tools read, and `sparse_adapter.json`, which
names the checkpoint and the streams that it was trained for. Reading it does not need PEFT.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .gate_config import NeuroFlowGateConfig
from .sparse_adapter import TARGETS, SparseAdapter
from .tower import VisionTower
from .whole_file import whole_file

ABOUT, CONFIG, WEIGHTS = "sparse_adapter.json", "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
WEIGHT_NAME = re.compile(r"encoder\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.(?:default\.)?weight$")


def write_adapter(adapter: SparseAdapter, tower: VisionTower, folder: str | os.PathLike) -> None:
    """Write an adapter's files to a folder, each whole or not at all, the weights first."""
    plain = NeuroFlowGateConfig.from_options({"mode": adapter.gate.mode}).to_dict()
    about = {
        "format": FORMAT,
        "base_model": adapter.base,
        "base_fingerprint": fingerprint(tower),
        "gate": {
            name: value
            for name, value in adapter.gate.to_dict().items()
            if name == "mode" or (value is not None and value != plain[name])
        },
    }
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": rf".*encoder\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(adapter.targets)})",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    weights = {
        f"base_model.model.encoder.layers.{layer}.{TARGETS[name]}.lora_{letter}.weight": matrix.detach().contiguous()
        for layer, changes in enumerate(adapter.layers)
        for name, change in changes.items()  # type: ignore[union-attr, operator]
        for letter, matrix in (("A", change.down), ("B", change.up))
    }
    contents = {
        WEIGHTS: save(weights, metadata={"format": "pt"}),
        CONFIG: json.dumps(config, indent=2).encode(),
        ABOUT: json.dumps(about, indent=2).encode(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with whole_file(folder / name) as path:
            path.write_bytes(content)


def read_adapter(source: str | os.PathLike, tower: VisionTower, **hub_options: Any) -> SparseAdapter:
    """
    The adapter in a folder or Hub repository, with the type and device of `tower`.

    Args:
        source: a folder that `neuroflow distill` wrote, or a repository that holds its files.
        tower: the vision model that it is for.
        hub_options: of `transformers.utils.cached_file`, such as `revision`, `token`, `local_files_only`.

    Raises:
        OSError: if there is no adapter.
        ValueError: if it is damaged, or was trained for another checkpoint.
    """
    files: list[str] = []
    for name in (ABOUT, CONFIG, WEIGHTS):
        found = cached_file(source, name, **hub_options)
        assert found is not None  # it raises where a file is missing
        files.append(found)
    try:
        about, config = (json.loads(Path(path).read_text(encoding="utf-8")) for path in files[:2])
        weights = load_file(files[2])
        gate = NeuroFlowGateConfig.from_options({"mode": about["gate"]["mode"]}, **about["gate"])
        base, rank, alpha = about["base_model"], int(config["r"]), float(config["lora_alpha"])
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"The sparse adapter in {source} is damaged ({error}); distill it again.") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"The sparse adapter in {source} has format {about.get('format')}; expected {FORMAT}.")
    for option in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if config.get(option):
            raise ValueError(f"The sparse adapter in {source} uses LoRA's `{option}`, which is not supported.")
    require_base(about, tower, source)
    parts: dict[tuple[int, str, str], Tensor] = {}
    for name, matrix in weights.items():
        match = WEIGHT_NAME.search(name)
        if match is None or match[2] not in TARGETS.values():
            raise ValueError(f"The sparse adapter in {source} changes `{name}`, which is no part of an encoder layer.")
        parts[int(match[1]), match[2].split(".")[1], match[3]] = matrix
    targets = sorted({target for _, target, _ in parts})
    adapter = SparseAdapter(tower, gate, rank, alpha, targets, base)
    state = {
        f"layers.{layer}.{target}.{'down' if letter == 'A' else 'up'}": matrix
        for (layer, target, letter), matrix in parts.items()
    }
    try:
        adapter.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"The sparse adapter in {source} does not fit this model: {error}") from error
    model = cast(PreTrainedModel, tower)
    return adapter.to(model.device, model.dtype).requires_grad_(False).eval()


def fingerprint(tower: VisionTower) -> list[float]:
    """
    A number for each encoder layer that differs between checkpoints, and hardly between types of the same one: a
    projection of its first layer norm's weights, which quantisation leaves alone.
    """
    weights = norm_weights(tower)
    return (weights * torch.arange(weights.shape[1]).double().cos()).mean(1).tolist()


def norm_weights(tower: VisionTower) -> Tensor:
    """The weights of each layer's first layer norm, float64 [L, D]."""
    return torch.stack([layer.parts().norm1.weight.detach().double().cpu() for layer in tower.encoder_layers()])


def require_base(about: dict, tower: VisionTower, source: str | os.PathLike) -> None:
    """Raise a ValueError if an adapter was trained for another checkpoint than `tower`."""
    theirs, ours = torch.tensor(about.get("base_fingerprint", [])), torch.tensor(fingerprint(tower))
    weights = norm_weights(tower)
    rounding = 0.004 * weights.square().mean().sqrt().item() / math.sqrt(weights.shape[1])  # of bfloat16
    if len(theirs) != len(ours) or (theirs - ours).abs().max() > rounding:
        raise ValueError(
            f"The sparse adapter in {source} was distilled for {about.get('base_model') or 'another checkpoint'}, and "
            f"this model has other weights ({tower.config.name_or_path or 'no name'}). Distill one for it: "
            "`neuroflow distill VIDEOS --model CHECKPOINT`."
        )
