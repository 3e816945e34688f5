"""Make complete Hub repositories out of the folders under `models/`: weights, configuration, code, card, licence.

Command: `python -m neuroflow_hf.hub [--models DIR] [--output DIR]`
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from .configuration_neuroflow_siglip import NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig, adopt_model_type
from .modeling_neuroflow_siglip import (
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionModel,
)
from .tower import build_tower, default_tower_dir

CONFIG, CARD, LICENCE, PROCESSOR = "config.json", "README.md", "LICENSE", "processor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
NEEDED = {
    "a configuration": (CONFIG,),
    "weights": WEIGHTS,
    "a preprocessor": ("preprocessor_config.json", PROCESSOR),
}
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")

# Weights that are too large to keep under models/: by the folder's name, what makes (or finds) a folder with them.
RECIPES: dict[str, Callable[[], Path]] = {
    "neuroflow-siglip-dinov2-small": lambda: build_tower(default_tower_dir()),
}


def build_hub_repository(source: Path, output: Path) -> Path:
    """
    Write a complete Hub repository: one that `AutoModel.from_pretrained(output, trust_remote_code=True)` loads where
    this package is not installed, and that can be uploaded as it is (`hf upload NAME FOLDER`).

    Args:
        source: Folder of the model, with its card `README.md`. Weights (safetensors), `config.json` and preprocessor
            or processor files, of SigLIP or of NeuroFlow, lie in it or, where its name is in `RECIPES`, come from
            there; with a model that reads text, its tokenizer's too. A file in `source` goes before one of the same
            name from the recipe: a `config.json` with other options under `gate`, for example. All other files that
            lie directly in it are taken along; a `LICENSE` is taken from the checkout if it has none.
        output: Folder to write. A repository that is there already is replaced, once the new one is whole.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: if something is missing; the message names all of it.
        FileExistsError: if there is something at `output` that is not a repository of this kind.
        ValueError: if the checkpoint is no SigLIP, or lacks weights that the model needs.
    """
    source, output = Path(source), Path(output)
    if output.exists() and not may_be_replaced(output):
        raise FileExistsError(
            f"{output} exists, and is no Hub repository of a NeuroFlow model (no {CONFIG} with an `auto_map`). Delete "
            "it, or name another folder."
        )
    checkout = Path(__file__).resolve().parent.parent
    general = [checkout] if (checkout / "pyproject.toml").is_file() else []  # else this is where packages lie
    require({"a card": (CARD,)}, [source])  # first of all: a recipe may take minutes
    require({"a licence": (LICENCE,)}, [source, *general])
    folders = [source]
    if source.name in RECIPES and not find(WEIGHTS, folders):
        folders.append(Path(RECIPES[source.name]()))
    require(NEEDED, folders)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        repository = Path(temporary) / "repository"
        model = load_model(find((CONFIG,), folders), find(WEIGHTS, folders))
        model.save_pretrained(repository)
        others = [path for folder in folders for path in sorted(folder.iterdir()) if not left_out(path)]
        others += [folder / name for folder in general for name in (LICENCE, "THIRD_PARTY_NOTICES.md")]
        for path in others:
            # what was saved goes first, and in particular this version's code before any that lies with the weights
            if path.is_file() and not (repository / path.name).exists():
                shutil.copyfile(path, repository / path.name)
        if isinstance(model, NeuroFlowSiglipModel) and find(TOKENIZER, [repository]):
            name_processor(repository / PROCESSOR)
        put_in_place(repository, output, aside=Path(temporary) / "previous")
    return output


def find(names: tuple[str, ...], folders: list[Path]) -> Path | None:
    """The first file of one of these names, by folder and then by name."""
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def require(needed: dict[str, tuple[str, ...]], folders: list[Path]):
    """Raise a FileNotFoundError that names everything in `needed` that none of the folders has."""
    missing = [f"{what} ({' or '.join(names)})" for what, names in needed.items() if not find(names, folders)]
    if missing:
        raise FileNotFoundError(
            f"A Hub repository needs {', '.join(missing)}, and there is none in {' or '.join(map(str, folders))}. "
            f"Weights and what goes with them are made by recipe only for: {', '.join(RECIPES)}."
        )


def load_model(config_file: Path, weights_file: Path):
    """
    The NeuroFlow model for a checkpoint of SigLIP or NeuroFlow.

    Raises:
        ValueError: for other model types, and for a checkpoint that would leave weights of the model at random.
    """
    stored = json.loads(config_file.read_text(encoding="utf-8"))
    model_type = adopt_model_type(stored.get("model_type"))
    is_classifier = any(name.endswith("ForImageClassification") for name in stored.get("architectures") or [])
    if model_type == NeuroFlowSiglipVisionConfig.model_type:
        model_class = NeuroFlowSiglipVisionModel
    elif model_type == NeuroFlowSiglipConfig.model_type:
        model_class = NeuroFlowSiglipForImageClassification if is_classifier else NeuroFlowSiglipModel
    else:
        raise ValueError(
            f"{config_file} has `model_type` {stored.get('model_type')!r}; expected SigLIP or NeuroFlow SigLIP."
        )
    config = model_class.config_class.from_pretrained(config_file.parent)
    model, loading = model_class.from_pretrained(weights_file.parent, config=config, output_loading_info=True)
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(
            f"{weights_file} lacks {len(loading['missing_keys'])} weights of {model_class.__name__}, for example "
            f"{missing}. They would be published as random numbers."
        )
    return model


def name_processor(file: Path):
    """
    Write a `processor_config.json` that names SigLIP's processor, unless there is one. For `AutoProcessor`: by the
    model type alone, transformers knows which it is for SigLIP, and for ours only where this package is installed.
    """
    if not file.exists():
        file.write_text(json.dumps({"processor_class": "SiglipProcessor"}, indent=2) + "\n", encoding="utf-8")


def left_out(path: Path) -> bool:
    """Whether a file stays behind: hidden ones, and weights, which were saved anew."""
    return path.name.startswith((".", "model.safetensors")) or path.suffix in (".safetensors", ".bin")


def may_be_replaced(folder: Path) -> bool:
    """Whether this is an empty folder, or the repository of a model with code, made by an earlier run."""
    if not folder.is_dir():
        return False
    try:
        return "auto_map" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(folder.iterdir())


def put_in_place(repository: Path, output: Path, aside: Path):
    """Give the finished repository its name. One that had it is moved aside, and back if that fails."""
    replaces = output.exists()
    if replaces:
        output.rename(aside)
    try:
        repository.rename(output)
    except OSError:
        if replaces:
            aside.rename(output)
        raise


def main(
    models: Annotated[Path, typer.Option(help="Folder with one folder per model.")] = Path("models"),
    output: Annotated[Path, typer.Option(help="Folder for the repositories, one per model.")] = Path("dist/hub"),
) -> None:
    """Write a complete Hub repository for every model, and print what is in it."""
    logging.disable_progress_bar()
    try:
        sources = sorted(path for path in models.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not sources:
            raise FileNotFoundError(f"There is no model in {models}; expected a folder for each.")
        for source in sources:
            repository = build_hub_repository(source, output / source.name)
            typer.echo(repository)
            for path in sorted(repository.iterdir()):
                typer.echo(f"  {path.stat().st_size / 2**10:10.1f} KiB  {path.name}")
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
