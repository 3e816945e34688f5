"""
Train the embedded SigLIP: from packages to `models/neuroflow-siglip-small`, in one command.

    python -m recipes.siglip_small.train

Composes pictures, computes the frozen tower's patch features once, then trains the pooling head, a small text tower,
the scale and the bias with SigLIP's sigmoid loss (Zhai et al., 2023), every caption of a batch against every picture.
Each step can be interrupted and is continued by the same command; the checkpoint appears whole, at the end.
"""

import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional
from transformers import SiglipModel, SiglipProcessor, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from neuroflow_hf.run import fingerprint
from neuroflow_hf.tower import build_tower, default_tower_dir
from neuroflow_hf.tower_head import pool
from neuroflow_hf.tower_weights import quiet_transformers

from .captions import Caption, caption, name_caption
from .features import FeatureStore, cached_features
from .model import make_model, make_tokenizer
from .sources import HERE, cache_folder, things

NAME = "neuroflow-siglip-small"
OUTPUT = HERE.parent.parent / "models" / NAME
MATERIAL_FILES = ("sources.py", "facts.py", "compose.py", "things.csv", "photos.csv", "footage.csv")


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        pictures: how many are composed for training.
        epochs: passes over them.
        batch: pictures a step.
        captions: texts a step; each is compared with every picture of the step.
        named_captions: of these, so many name a thing at random, whatever the pictures show.
        learning_rate: of the text tower; a third of it of the pooling head, which is trained already.
        kept_patches: of each picture's patches, the share that the head sees in a step.
        seed: of the pictures, the weights, the order and the captions.
    """

    pictures: int = 16384
    epochs: int = 16
    batch: int = 512
    captions: int = 192
    named_captions: int = 64
    learning_rate: float = 1e-3
    kept_patches: float = 0.5
    seed: int = 0


def sigmoid_loss(logits: Tensor, is_true: Tensor) -> Tensor:
    """
    SigLIP's loss for pictures [P] and captions [C] with any number of true pairs.

    Args:
        logits: [P, C].
        is_true: bool [P, C].

    Returns:
        The pairs' binary cross entropies, summed over pictures, averaged over captions.
    """
    signs = torch.where(is_true, 1.0, -1.0)
    return -functional.logsigmoid(signs * logits).sum(0).mean()


def truth(pictures: list[frozenset[str]], captions: list[Caption]) -> Tensor:
    """Bool [P, C]: whether a picture has all the facts that a caption asserts."""
    asserted = {fact: place for place, fact in enumerate(sorted(set().union(*(text.facts for text in captions))))}
    has = torch.zeros(len(pictures), len(asserted))
    for row, facts in enumerate(pictures):
        for fact in facts & asserted.keys():
            has[row, asserted[fact]] = 1
    needs = torch.zeros(len(captions), len(asserted))
    for row, text in enumerate(captions):
        for fact in text.facts:
            needs[row, asserted[fact]] = 1
    return has @ needs.T == needs.sum(1)


class Trained(nn.Module):
    """The parts of a SiglipModel that are trained: pooling head, text tower, scale and bias."""

    def __init__(self, model: SiglipModel):
        super().__init__()
        self.head, self.text_model = model.vision_model.head, model.text_model
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias

    def forward(self, patches: Tensor, input_ids: Tensor) -> Tensor:
        """Logits [P, C] of patch features [P, N, D] and texts [C, T]."""
        images = functional.normalize(pool(self.head, patches), dim=-1)
        texts = functional.normalize(self.text_model(input_ids=input_ids).pooler_output, dim=-1)
        return images @ texts.T * self.logit_scale.exp() + self.logit_bias

    def groups(self, learning_rate: float) -> list[dict]:
        """Parameters for the optimizer; biases, norms, embeddings and the scalars are not decayed."""
        head = set(self.head.parameters())
        groups = []
        for rate, chosen in (
            (learning_rate, [item for item in self.parameters() if item not in head]),
            (learning_rate / 3, list(head)),
        ):
            for decay, members in (
                (0.05, [item for item in chosen if item.ndim > 1]),
                (0.0, [item for item in chosen if item.ndim <= 1]),
            ):
                groups.append({"params": members, "lr": rate, "weight_decay": decay})
        return groups


def tokens_of(tokenizer, texts: list[str]) -> Tensor:
    """Token ids [C, TEXT_LENGTH], padded as SigLIP's are."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


def draw_captions(facts: list[frozenset[str]], recipe: Recipe, rng: np.random.Generator) -> list[Caption]:
    """The texts of a step: most are true of some of its pictures, the rest name any thing."""
    those = [facts[place] for place in rng.choice(len(facts), recipe.captions - recipe.named_captions, replace=False)]
    names = [thing.name for thing in things()]
    named = [name_caption(names[rng.integers(len(names))], rng) for _ in range(recipe.named_captions)]
    return [caption(known, rng) for known in those] + named


def train(model: SiglipModel, tokenizer, store: FeatureStore, recipe: Recipe, folder: Path) -> list[dict]:
    """
    Train in place.

    Args:
        model: from `make_model`.
        tokenizer: its.
        store: features of the training pictures.
        recipe: the settings.
        folder: where the state after each epoch is kept; a state that is there is continued.

    Returns:
        For each epoch, its mean loss and seconds.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    trained = Trained(model).train()
    optimizer = torch.optim.AdamW(trained.groups(recipe.learning_rate), betas=(0.9, 0.98))
    steps = len(store.lines) // recipe.batch
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=recipe.epochs * steps, pct_start=0.08)
    trained, optimizer, schedule = accelerator.prepare(trained, optimizer, schedule)
    facts, log, num_patches = store.facts(), [], store.features.shape[1]
    state = folder / "state"
    if (folder / "log.json").is_file():
        accelerator.load_state(state)
        log = json.loads((folder / "log.json").read_text())
    with Progress(disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("training", total=recipe.epochs * steps, completed=len(log) * steps)
        for epoch in range(len(log), recipe.epochs):
            rng = np.random.default_rng((recipe.seed, epoch))
            started, total = time.perf_counter(), 0.0
            for chosen in np.array_split(rng.permutation(len(facts)), steps):
                chosen = np.sort(chosen)
                kept = rng.permutation(num_patches)[: round(recipe.kept_patches * num_patches)]
                batch = torch.from_numpy(store.features[chosen][:, kept])
                known = [facts[place] for place in chosen]
                texts = draw_captions(known, recipe, rng)
                input_ids = tokens_of(tokenizer, [text.text for text in texts])
                logits = trained(batch.to(accelerator.device, torch.float32), input_ids.to(accelerator.device))
                loss = sigmoid_loss(logits.float(), truth(known, texts).to(logits.device))
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item()
                progress.advance(task)
            log.append({"loss": total / steps, "seconds": round(time.perf_counter() - started, 1)})
            progress.console.print(f"epoch {epoch + 1}: loss {log[-1]['loss']:.3f}, {log[-1]['seconds']} s")
            accelerator.save_state(state)
            (folder / "log.json").write_text(json.dumps(log))
    model.eval()
    return log


def material_key(tower: SiglipVisionModel) -> str:
    """8 hex digits that change with the tower's weights and with whatever the pictures depend on."""
    digest = hashlib.blake2b(fingerprint(tower).encode(), digest_size=4)
    for name in MATERIAL_FILES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def save_checkpoint(model: SiglipModel, tokenizer, folder: Path, record: dict) -> None:
    """Write the model in half precision with its processor, whole or not at all; other files in the folder stay."""
    processor = SiglipProcessor(SiglipImageProcessorPil.from_pretrained(default_tower_dir()), tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial, quiet_transformers():
        model.half().save_pretrained(partial)
        processor.save_pretrained(partial)
        (Path(partial) / "recipe.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in sorted(Path(partial).iterdir()):
            shutil.move(path, folder / path.name)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = OUTPUT,
    pictures: Annotated[int, typer.Option(help="How many pictures are composed for training.")] = Recipe.pictures,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = Recipe.epochs,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = Recipe.seed,
) -> None:
    """Train the checkpoint, or continue."""
    started, recipe = time.perf_counter(), Recipe(pictures=pictures, epochs=epochs, seed=seed)
    tower = SiglipVisionModel.from_pretrained(build_tower(default_tower_dir())).eval()
    key = material_key(tower)
    store = cached_features(tower, "training", recipe.pictures, recipe.seed, key)
    features_seconds = time.perf_counter() - started
    set_seed(recipe.seed)
    tower = SiglipVisionModel.from_pretrained(default_tower_dir()).eval()
    tokenizer = make_tokenizer()
    model = make_model(tower, tokenizer, recipe.seed)
    settings = hashlib.blake2b(repr((recipe, key)).encode(), digest_size=4).hexdigest()
    folder = cache_folder() / "training" / f"{NAME}-{settings}"
    folder.mkdir(parents=True, exist_ok=True)
    log = train(model, tokenizer, store, recipe, folder)
    record = {
        "command": f"python -m recipes.siglip_small.train --pictures {pictures} --epochs {epochs} --seed {seed}",
        "recipe": vars(recipe),
        "things": len(things()),
        "parameters": {
            "text tower": sum(item.numel() for item in model.text_model.parameters()),
            "pooling head": sum(item.numel() for item in model.vision_model.head.parameters()),
            "all": sum(item.numel() for item in model.parameters()),
        },
        "log": log,
        "features_seconds_of_this_start": round(features_seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    save_checkpoint(model, tokenizer, output, record)
    typer.echo(f"Saved to {output}")


if __name__ == "__main__":
    typer.run(main)
