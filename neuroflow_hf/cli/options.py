"""Options that several commands share, each declared once."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

BYPASS = "Bypass (defaults: the model's own, else those named here)"
LABELS = "Labels"
OUTPUT = "Output"


def option(
    help: str, *names: str, default: str | bool = True, panel: str | None = None, metavar: str | None = None
) -> Any:
    """An option of a command; `default` is what its help shows instead of a default None."""
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel, metavar=metavar)


# --- models --------------------------------------------------------------------------------------------------------

VisionModel = Annotated[
    str | None,
    option(
        "Folder or Hub name of a SigLIP or SigLIP 2 checkpoint with its image processor.",
        default="the small SigLIP in the checkout",
    ),
]
LanguageModel = Annotated[
    str | None,
    option(
        "Folder or Hub name of a Phi-3 checkpoint with its tokenizer.",
        default="smollm2: SmolLM2-135M-Instruct, fetched on first use",
    ),
]
Dtype = Annotated[str, option("float32, bfloat16 or float16.")]
Device = Annotated[str, option("cpu, cuda, cuda:1 ...; auto: CUDA if available, else the CPU.")]

# --- videos and labels ---------------------------------------------------------------------------------------------

Resolution = Annotated[int | None, option("Side of the frames in pixels.", default="the model's")]
Stride = Annotated[int, option("Use every Nth frame.", metavar="N")]
MaxFrames = Annotated[int | None, option("Stop after N frames.", metavar="N", default="all")]
Labels = Annotated[
    str | None,
    option(
        "Labels to choose among, separated by commas, such as 'a dog, a cat'; needs a checkpoint with a text tower.",
        default="none",
        panel=LABELS,
    ),
]
Template = Annotated[
    str | None,
    option(
        "Text to compare with the frames; {} stands for the label.",
        default="This is a photo of {}.",
        panel=LABELS,
    ),
]

# --- bypass --------------------------------------------------------------------------------------------------------

GateLayer = Annotated[
    int | None, option("Layer, from 0, whose attention output is compared.", default="1", panel=BYPASS)
]
CacheLayers = Annotated[
    str | None,
    option(
        "Layers that reuse their outputs: 24, or 20,24, or 20-24.",
        default="the one at three quarters of the depth",
        panel=BYPASS,
    ),
]
BypassThreshold = Annotated[
    float | None,
    option("Bypass at this cosine similarity or above. -1: always; above 1: never.", default="0.65", panel=BYPASS),
]
Target = Annotated[str | None, option("Output to reuse: attention, mlp or block.", default="attention", panel=BYPASS)]
MaxConsecutive = Annotated[
    int | None, option("Bypass at most N steps in a row.", metavar="N", default="no limit", panel=BYPASS)
]
GuardEntropy = Annotated[
    float | None,
    option(
        "Bypass only if the entropy of the model's last prediction is at most this, in nats, such as 1.",
        default="no limit",
        panel=BYPASS,
    ),
]

# --- results -------------------------------------------------------------------------------------------------------

Out = Annotated[Path, option("Folder to write to.")]
BootstrapSeed = Annotated[int, option("Random seed of the bootstrap behind the intervals.")]
Fresh = Annotated[bool, option("Ignore earlier results in the output folder.", "--fresh", panel=OUTPUT)]
Debug = Annotated[bool, option("Show errors with their traceback.", "--debug")]


def given(**values: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def parse_layers(text: str | None) -> list[int] | None:
    """
    `"20,24-26"` to `[20, 24, 25, 26]`; None stays None.

    Raises:
        ValueError: for a part that is not a layer or a range of layers.
    """
    if text is None:
        return None
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
