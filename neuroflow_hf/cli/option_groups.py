"""Groups of options that several commands take: declared once, and passed to the command as a dict."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

from . import options
from .options import BYPASS, GATE, option

Group = dict[str, tuple[Any, Any]]  # by parameter: its annotation and its default


def unset(
    kind: type, help: str, default: str, *names: str, panel: str, metavar: str | None = None
) -> tuple[Any, None]:
    """An option that is None unless it is given; `default` is what its help shows."""
    return Annotated[kind | None, option(help, *names, default=default, panel=panel, metavar=metavar)], None


GENERATION: Group = {
    "model": (options.LanguageModel, None),
    "system": (
        Annotated[
            str | None, option("System message, for checkpoints with a chat template.", default="the chat template's")
        ],
        None,
    ),
    "max_new_tokens": (Annotated[int, option("Generate at most N tokens.", metavar="N")], 512),
    "temperature": (
        Annotated[float, option("0: take the most probable token. Above 0: sample at this temperature.")],
        0.0,
    ),
    "top_p": (
        Annotated[float, option("Sample among the most probable tokens whose probabilities add up to this.")],
        1.0,
    ),
    "seed": (Annotated[int, option("Random seed for sampling.")], 0),
    "dtype": (options.Dtype, "float32"),
    "device": (options.Device, "auto"),
    "bypass": (
        Annotated[
            bool,
            option(
                "Bypass as the checkpoint's configuration says; bypass options imply it.", "--bypass", panel=BYPASS
            ),
        ],
        False,
    ),
    "lossless": (
        Annotated[
            bool,
            option(
                "Generate the dense model's text: draft tokens by lookup, or by the bypass if one is given.",
                "--lossless",
                panel=BYPASS,
            ),
        ],
        False,
    ),
}

bypass = functools.partial(unset, panel=BYPASS)
BYPASS_OPTIONS: Group = {
    "rate": bypass(
        float,
        "Bypass this share of the steps, such as 0.2: the checkpoint's similarities choose the threshold.",
        "none",
    ),
    "threshold": bypass(float, "Bypass at this cosine similarity or above. -1: always; above 1: never.", "0.65"),
    "gate_layer": bypass(int, "Layer, from 0, whose attention output is compared.", "1"),
    "cache_layers": bypass(
        str, "Layers that reuse their outputs: 24, or 20,24, or 20-24.", "the one at three quarters of the depth"
    ),
    "target": bypass(str, "Output to reuse: attention, mlp or block.", "attention"),
    "max_consecutive": bypass(int, "Bypass at most N steps in a row.", "no limit", metavar="N"),
    "guard_entropy": bypass(
        float,
        "Bypass only if the entropy of the model's last prediction is at most this, in nats, such as 1.",
        "no limit",
    ),
}

gate = functools.partial(unset, panel=GATE)
GATE_OPTIONS: Group = {
    "mode": gate(
        str,
        "extrapolate, context, reconstruct, eliminate, mlp, hold or dense; turns off the default preset.",
        "extrapolate",
    ),
    "threshold": gate(float, "Encode patches whose surprise is above this; -1: all.", "0.01"),
    "reference": gate(str, "Compare frames with last_update, ema or both.", "last_update"),
    "signal": gate(str, "Compare patch, or token (with position embeddings).", "patch"),
    "token_budget": gate(int, "Encode exactly N patches; the threshold is ignored.", "none", metavar="N"),
    "dilate": gate(int, "Also encode neighbours up to N patches away.", "0", metavar="N"),
    "max_age": gate(int, "Encode every patch at least once in N frames.", "none", metavar="N"),
    "keyframe_interval": gate(int, "Encode all patches every Nth frame.", "the preset's", metavar="N"),
    "keyframe_fraction": gate(float, "Encode all patches if more than this share changed.", "never"),
    "cost_budget": gate(float, "Keep the mean cost relative to dense below this.", "the preset's"),
    "min_fidelity": gate(float, "Keep the estimated cosine to dense above this, at any cost.", "none"),
    "global_motion_norm": gate(bool, "Subtract a frame's mean surprise first.", "no", "--global-motion-norm"),
    "ema_rate": gate(float, "Rate of the running mean (ema, both).", "0.01"),
}


def with_groups(**groups: Group) -> Callable[[Callable], Callable]:
    """
    A decorator that gives a command the options of some groups. The command takes each group as one parameter, a dict
    of the options' values.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapped(**values: Any) -> Any:
            collected = {group: {name: values.pop(name) for name in members} for group, members in groups.items()}
            return command(**collected, **values)

        signature = inspect.signature(command)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            parameter = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)  # in any order, with defaults or not
            if name not in groups:
                parameters.append(parameter)
            for member, (annotation, default) in groups.get(name, {}).items():
                parameters.append(parameter.replace(name=member, annotation=annotation, default=default))
        # typer reads both
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate


def given_bypass(own: dict) -> dict:
    """The bypass options that were given, as `NeuroFlowBypassConfig` takes them."""
    found = options.given(**own)
    if "cache_layers" in found:
        found["cache_layers"] = parse_layers(found["cache_layers"])
    return found


def parse_layers(text: str) -> list[int]:
    """`"20,24-26"` to `[20, 24, 25, 26]`. ValueError for a part that is not a layer or a range of layers."""
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None:
            raise ValueError(f"--cache-layers {text!r} has no layers; expected 24, or 20,24, or 20-24.")
        begin, end = int(found[1]), int(found[2] or found[1])
        if end < begin:
            raise ValueError(f"--cache-layers {text!r} counts down from {begin} to {end}; write {end}-{begin}.")
        layers += range(begin, end + 1)
    return layers
