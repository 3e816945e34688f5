"""`neuroflow convert`: a Llama's checkpoint as one that the other commands load."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import one_line_errors
from .options import option
from .output import print_written
from .progress import CommandProgress


def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub name of a Llama checkpoint with its tokenizer, or a GGUF file.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    gguf: Annotated[
        str | None, option("GGUF file in SOURCE to read instead of the checkpoint.", metavar="FILE", default="none")
    ] = None,
    dtype: Annotated[
        str | None,
        option("float32, bfloat16 or float16.", default="the checkpoint's own; float32 for a GGUF file"),
    ] = None,
    debug: options.Debug = False,
):
    """
    Convert a Llama checkpoint to Phi-3's form, with the same logits, for `generate` and `drift`.

    Biases, RoPE scaling and head sizes that do not follow from the width are refused: Phi-3 lacks them.
    """
    with one_line_errors(debug, nothing_done="nothing was written."):
        from ..conversion.checkpoint import convert as convert_checkpoint
        from ..loading import dtype_named

        weights_dtype = None if dtype is None else dtype_named(dtype)
        with CommandProgress("") as progress:
            files = convert_checkpoint(source, out, gguf, weights_dtype, progress.show)
    print_written(out, files)
