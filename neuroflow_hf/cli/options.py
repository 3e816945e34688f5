"""Options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated, Any

import typer

BYPASS = "Bypass (defaults: the checkpoint's own, else those named here)"
GATE = "Gate (defaults: the model's own, else those named here)"
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
GateOptions = Annotated[
    list[str] | None, option("Any other gate option; may be repeated.", metavar="NAME=VALUE", panel=GATE)
]
Preset = Annotated[
    str | None,
    option("faithful, balanced or thrifty; other options override it.", default="balanced", panel=GATE),
]
GateFile = Annotated[
    Path | None,
    option(
        "Configuration (file or folder) with gate options, such as `neuroflow tune` writes; others override it.",
        default="none",
        panel=GATE,
    ),
]
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
        "Text to compare with the frames; {} is replaced by the label.",
        default="This is a photo of {}.",
        panel=LABELS,
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
