"""
Make complete Hub repositories out of the folders under `models/`: weights, configuration, code, card, licence. Of the
small SigLIP also a Space, with the page of `neuroflow app`.

Command: `python -m recipes.hub [--models DIR] [--output DIR]`
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.utils import logging

from neuroflow_hf.conversion.smollm2 import smollm2_folder
from neuroflow_hf.language.configuration_neuroflow_phi3 import NeuroFlowPhi3Config
from neuroflow_hf.language.modeling_neuroflow_phi3 import NeuroFlowPhi3ForCausalLM
from neuroflow_hf.utils.files import staging_folder
from neuroflow_hf.vision.adapter_files import ABOUT as ADAPTER
from neuroflow_hf.vision.configuration_neuroflow_siglip import (
    NeuroFlowSiglipConfig,
    NeuroFlowSiglipVisionConfig,
)
from neuroflow_hf.vision.modeling_neuroflow_siglip import (
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionModel,
)
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir
from recipes.space.build import MODEL as SPACE_MODEL
from recipes.space.build import build_space

CONFIG, CARD, LICENCE = "config.json", "README.md", "LICENSE"
PROCESSOR, GENERATION = "processor_config.json", "generation_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model")
# by what it is, the names that a file may have
NEEDED = {"a configuration": (CONFIG,), "weights": WEIGHTS}
SIGLIP_NEEDS = {"a preprocessor": ("preprocessor_config.json", PROCESSOR)}
# the configuration of a tokenizer knows the special tokens
PHI3_NEEDS = {"a tokenizer": TOKENIZER, "a tokenizer's configuration": ("tokenizer_config.json",)}


def choose_class(config_file: Path) -> type:
    """
    The class that a checkpoint is saved as.

    Raises:
        ValueError: for other models than SigLIP and Phi-3, SigLIP 2's NaFlex, and heads that would be lost.
    """
    stored = json.loads(config_file.read_text(encoding="utf-8"))
    kind, heads = NeuroFlowSiglipConfig.adopt_model_type(stored.get("model_type")), stored.get("architectures") or []
    if kind == NeuroFlowSiglipVisionConfig.model_type:
        return NeuroFlowSiglipVisionModel
    if kind == NeuroFlowSiglipConfig.model_type:
        is_classifier = any(name.endswith("ForImageClassification") for name in heads)
        return NeuroFlowSiglipForImageClassification if is_classifier else NeuroFlowSiglipModel
    if kind not in ("phi3", NeuroFlowPhi3Config.model_type):
        raise ValueError(f"{config_file} has `model_type` {kind!r}; expected SigLIP or Phi-3, or NeuroFlow's.")
    others = [name for name in heads if not name.endswith("ForCausalLM")]
    if others:
        raise ValueError(
            f"The configuration's `architectures` are {others}; expected `Phi3ForCausalLM`: only language models are "
            "made into repositories."
        )
    return NeuroFlowPhi3ForCausalLM


def name_processor(repository: Path):
    """
    Where there is a tokenizer, write a `processor_config.json` that names SigLIP's processor, unless there is one. For
    `AutoProcessor`: by the model type alone, transformers knows which it is for SigLIP, and for ours only where this
    package is installed.
    """
    file = repository / PROCESSOR
    if find(("tokenizer_config.json", *TOKENIZER), [repository]) and not file.exists():
        file.write_text(json.dumps({"processor_class": "SiglipProcessor"}, indent=2) + "\n", encoding="utf-8")


# Weights that are too large to keep under models/: by the folder's name, what makes (or finds) a folder with them.
RECIPES: dict[str, Callable[[], Path]] = {
    "neuroflow-siglip-dinov2-small": lambda: build_tower(default_tower_dir()),
    "neuroflow-smollm2-135m-instruct": smollm2_folder,
}


def build_hub_repository(source: Path, output: Path) -> Path:
    """
    Write a complete Hub repository: one that `AutoModel.from_pretrained(output, trust_remote_code=True)` loads where
    this package is not installed, and that can be uploaded as it is (`hf upload NAME FOLDER`).

    Args:
        source: Folder of the model, with its card `README.md`. Weights (safetensors), `config.json` and what else
            the model needs (SigLIP: preprocessor or processor; Phi-3: tokenizer), of the stock model or of NeuroFlow,
            lie in it or, where its name is in `RECIPES`, come from there. A file in `source` goes before one of the
            same name from the recipe: a `config.json` with other options under `gate` or `bypass`, for example. All
            other files that lie directly in it are taken along; a `LICENSE` is taken from the checkout if it has none.
            Weights keep their dtype.
        output: Folder to write. A repository that is there already is replaced, once the new one is whole.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: if something is missing; the message names all of it.
        FileExistsError: if there is something at `output` that is not a repository of this kind.
        ValueError: as in `choose_class`, and if the checkpoint lacks weights that the model needs.
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
    model_class = choose_class(find((CONFIG,), folders))
    is_language_model = model_class is NeuroFlowPhi3ForCausalLM
    require(PHI3_NEEDS if is_language_model else SIGLIP_NEEDS, folders)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        repository = Path(temporary) / "repository"
        model = load_model(model_class, find((CONFIG,), folders), find(WEIGHTS, folders))
        generation = find((GENERATION,), folders)
        if generation:  # which is not always the one beside the weights
            model.generation_config = GenerationConfig.from_pretrained(generation.parent)
        model.save_pretrained(repository)
        others = [path for folder in folders for path in sorted(folder.iterdir()) if not left_out(path)]
        others += [folder / name for folder in general for name in (LICENCE, "THIRD_PARTY_NOTICES.md")]
        for path in others:
            # what was saved goes first, and in particular this version's code before any that lies with the weights
            if path.is_file() and not (repository / path.name).exists():
                shutil.copyfile(path, repository / path.name)
        if not is_language_model:
            name_processor(repository)
        if output.exists():
            output.rename(Path(temporary) / "previous")
        repository.rename(output)
    return output


def copy_adapter(source: Path, output: Path) -> Path:
    """
    Write the repository of a sparse adapter, which needs no code: its files, and the checkout's licence.

    Raises:
        FileExistsError: if there is something else at `output`.
    """
    if output.exists() and not (output / ADAPTER).is_file() and any(output.iterdir()):
        raise FileExistsError(f"{output} exists, and holds no sparse adapter. Delete it, or name another folder.")
    with staging_folder(output) as staged:
        licence = Path(__file__).resolve().parent.parent / LICENCE
        for path in [licence, *sorted(path for path in source.iterdir() if path.is_file())]:
            if path.is_file():
                shutil.copyfile(path, staged / path.name)
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


def load_model(model_class: type, config_file: Path, weights_file: Path):
    """
    The NeuroFlow model of a checkpoint, in the dtype that its weights are stored in, whatever the configuration says.

    Raises:
        ValueError: for a checkpoint that would leave weights of the model at random.
    """
    config = model_class.config_class.from_pretrained(config_file.parent)
    model, loading = model_class.from_pretrained(
        weights_file.parent, config=config, dtype=stored_dtype(weights_file), output_loading_info=True
    )
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(
            f"{weights_file} lacks {len(loading['missing_keys'])} weights of {model_class.__name__}, for example "
            f"{missing}. They would be published as random numbers."
        )
    return model


def stored_dtype(weights_file: Path) -> torch.dtype:
    """The dtype of most floating-point tensors in a safetensors file, or in the first file of an index."""
    if weights_file.suffix == ".json":
        index = json.loads(weights_file.read_text(encoding="utf-8"))
        weights_file = weights_file.parent / min(index["weight_map"].values())
    with safe_open(weights_file, framework="pt") as file:
        counts = Counter(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118, no mapping
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next((known[name] for name, _ in counts.most_common() if name in known), torch.float32)


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


def main(
    models: Annotated[Path, typer.Option(help="Folder with one folder per model.")] = Path("models"),
    output: Annotated[Path, typer.Option(help="Folder for the repositories, one per model.")] = Path("dist/hub"),
) -> None:
    """Write a complete Hub repository for every model, and the Space, and print what is in them."""
    logging.disable_progress_bar()
    try:
        sources = sorted(path for path in models.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not sources:
            raise FileNotFoundError(f"There is no model in {models}; expected a folder for each.")
        builders = [
            (copy_adapter if (source / ADAPTER).is_file() else build_hub_repository, source, output / source.name)
            for source in sources
        ]
        builders += [(build_space, source, output / "space") for source in sources if source.name == SPACE_MODEL]
        for build, source, target in builders:
            repository = build(source, target)
            typer.echo(repository)
            for path in sorted(repository.iterdir()):
                typer.echo(f"  {path.stat().st_size / 2**10:10.1f} KiB  {path.name}")
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
