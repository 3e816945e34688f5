"""What commands that run a vision model over videos share: gate options, labels, loading."""

import json
from pathlib import Path
from typing import Any


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
        ValueError: for a preset beside the configuration, and for wrong options of the default model.
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
