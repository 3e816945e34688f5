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
    "config": (options.GateFile, None),
    "gate": (options.GateOptions, None),
}


def check_vision(how: dict, gate_options: dict) -> tuple[dict, Callable[[], tuple]]:
    """
    Check the values of the options `VISION`, which takes no time, before the model is loaded.

    Returns:
        The gate options, with those of `--gate` and, beneath them, of `--config`; and a function that loads the model,
        its preprocessing, and its labels (None without).

    Raises:
        ValueError: for a value that cannot be used.
    """
    from ..loading import default_model, dtype_named, load_model_with_labels, usable_device
    from ..video.labels import TEMPLATE

    dtype, names = dtype_named(how["dtype"]), given_labels(how["labels"], how["template"])
    usable_device(how["device"])
    gate_options = with_config(how["config"], gate_options | parse_gate(how["gate"] or []), how["model"])

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


def with_config(config: Path | None, gate_options: dict, model: str | None) -> dict:
    """
    Gate options with those of a configuration beneath them.

    Raises:
        ValueError: for a preset together with a configuration, and for wrong options of the default model.
    """
    from ..loading import load_gate
    from ..vision.gate_config import NeuroFlowGateConfig

    if config is not None:
        if "preset" in gate_options:
            raise ValueError("Give --config or --preset: each is a whole set of gate options.")
        gate_options = load_gate(config) | gate_options
    if model is None:  # the default model has no gate options of its own
        NeuroFlowGateConfig.from_options(**gate_options)
    return gate_options


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
