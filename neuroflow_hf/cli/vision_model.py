"""What commands that run a vision model over videos share: model, labels, gate options."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import options
from .option_groups import Group

VISION: Group = {
    "model": (options.VisionModel, None),
    "resolution": (options.Resolution, None),
    "dtype": (options.Dtype, "float32"),
    "device": (options.Device, "auto"),
    "labels": (options.Labels, None),
    "template": (options.Template, None),
    "preset": (options.Preset, None),
    "config": (options.GateFile, None),
    "gate": (options.GateOptions, None),
}


def check_vision(how: dict, gate_options: dict | None = None) -> tuple[dict, Callable[[], tuple]]:
    """
    Check the values of the options `VISION`, which takes no time, before the model is loaded.

    Returns:
        All gate options; and a function that loads the model, its preprocessing, and its labels (None without).

    Raises:
        ValueError: for a value that cannot be used.
    """
    from ..loading import default_model, dtype_named, load_model_with_labels, usable_device
    from ..video.labels import TEMPLATE
    from ..vision.gate_config import NeuroFlowGateConfig

    dtype, names = dtype_named(how["dtype"]), given_labels(how["labels"], how["template"])
    usable_device(how["device"])
    gate_options = given_gate(how["preset"], how["config"]) | (gate_options or {}) | parse_gate(how["gate"] or [])
    if how["model"] is None:  # the default model has no gate options of its own
        NeuroFlowGateConfig.from_options(**gate_options)

    def load() -> tuple:
        source, template = how["model"] or default_model(), how["template"] or TEMPLATE
        return load_model_with_labels(source, names, template, dtype, how["device"], how["resolution"])

    return gate_options, load


def parse_gate(settings: list[str]) -> dict[str, Any]:
    """`["dilate=1", "max_age=none"]` to `{"dilate": 1, "max_age": None}`; ValueError without a `=`."""
    parsed = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--gate {setting!r} has no value; expected NAME=VALUE, such as dilate=1.")
        try:
            value = None if text.lower() == "none" else json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            value = text
        parsed[name.strip().replace("-", "_")] = value
    return parsed


def given_gate(preset: str | None, config: Path | None) -> dict:
    """The gate options of `--preset` or `--config`; ValueError for both, and for a configuration without a gate."""
    from ..loading import load_gate

    if config is None:
        return options.given(preset=preset)
    if preset is not None:
        raise ValueError("Give --config or --preset: each is a whole set of gate options.")
    return load_gate(config)


def given_labels(labels: str | None, template: str | None) -> list[str] | None:
    """The labels in an option's text; None without. ValueError for a template without labels, and for wrong ones."""
    from ..video.labels import TEMPLATE, check_labels, parse_labels

    if labels is None:
        if template is not None:
            raise ValueError("--template goes with --labels; name some.")
        return None
    names = parse_labels(labels)
    check_labels(names, TEMPLATE if template is None else template)
    return names
