"""
Train the embedded SigLIP: from packages to `models/neuroflow-siglip-small`, in one command.

    python -m recipes.siglip_small.train

Composes pictures, computes the frozen tower's patch features once, then trains the pooling head, a small text tower,
the scale and the bias with SigLIP's sigmoid loss (Zhai et al., 2023), every caption of a batch against every picture.
Two stages come first, so that the text tower is trained in minutes. First, the pooling head learns by the same loss,
with a vector for each fact in place of captions, to name the largest drawing and to attend to drawings rather than the
background. Second, the text tower learns to embed a text at the vectors of its facts.

The same command continues an interrupted training; the checkpoint is written whole, at the end.
"""

import json
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
from rich.progress import Progress, track
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import SiglipModel, SiglipProcessor, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from neuroflow_hf.loading import quiet_transformers
from neuroflow_hf.utils.files import staging_folder
from neuroflow_hf.utils.provenance import code_version, fingerprint, key_of
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir
from recipes.siglip_dinov2_small.head import pool, probe_weights
from recipes.siglip_small.captions import Caption, caption, name_caption, prompts
from recipes.siglip_small.features import SHARD, FeatureStore, cached_features
from recipes.siglip_small.model import make_model, make_tokenizer
from recipes.siglip_small.sources import HERE, cache_folder, things

NAME = "neuroflow-siglip-small"
OUTPUT = HERE.parent.parent / "models" / NAME
MATERIAL_CODE = ("sources.py", "facts.py", "compose.py")
MATERIAL_TABLES = ("things.csv", "photos.csv", "footage.csv")


@dataclass(frozen=True)
class Recipe:
    """The settings of the training."""

    pictures: int = 24576  # number of training pictures
    fact_epochs: int = 16  # passes over the pictures in the first stage, without texts
    reading_steps: int = 600  # steps of the second stage, without pictures
    epochs: int = 2  # passes over the pictures in the third stage, with texts
    batch: int = 256  # pictures in a step
    captions: int = 128  # texts in a step; each is compared with every picture of the step
    named_captions: int = 48  # number of these texts that name a random thing, in the pictures or not
    # learning rate of the pooling head in the first stage; twice as high for the text tower in the second
    learning_rate: float = 1e-3
    # learning rate of the text tower in the third stage; a tenth of it for the pooling head, which is trained already,
    # and ten times as high for scale and bias. With a much higher rate, names of held-out renderings are unlearned.
    joint_rate: float = 1e-4
    naming: float = 25.0  # weight of the largest drawing's name in the first stage
    looking: float = 1.0  # weight of `looking_loss` in the first stage
    kept_patches: float = 0.5  # share of each picture's patches that the head sees in a step
    seed: int = 0  # random seed of the pictures, the weights, the order and the captions


def sigmoid_loss(logits: Tensor, is_true: Tensor) -> Tensor:
    """
    SigLIP's loss for pictures and captions with any number of true pairs, from logits and bool [P, C]: the binary
    cross entropies, summed over pictures, averaged over captions. A caption is weighted by one over the number of
    pictures that it is true of; otherwise "a person" would outweigh a hundred things.
    """
    signs = torch.where(is_true, 1.0, -1.0)
    of_captions = -functional.logsigmoid(signs * logits).sum(0)
    return (of_captions / is_true.sum(0).clamp(min=1)).mean()


def looking_loss(weights: Tensor, covered: Tensor) -> Tensor:
    """
    Minus the logarithm of the share of the pooling head's attention [P, n, heads] on covered patches, mean over the
    pictures with a drawing, and over heads. `covered` [P, n] is the share of each patch that drawings cover.
    """
    is_covered = (covered > 0.3).float()
    seen = is_covered.sum(1) > 0
    on_drawings = torch.einsum("pnh,pn->ph", weights, is_covered)[seen]
    return -(on_drawings + 1e-6).log().mean() if seen.any() else weights.new_zeros(())


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

    def embed_pictures(self, patches: Tensor) -> Tensor:
        """Unit embeddings [P, D] of patch features [P, N, D]."""
        return functional.normalize(pool(self.head, patches), dim=-1)

    def compare(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits [P, C] of unit embeddings."""
        return images @ texts.T * self.logit_scale.exp() + self.logit_bias

    def forward(self, patches: Tensor, input_ids: Tensor) -> Tensor:
        """Logits [P, C] of patch features [P, N, D] and texts [C, T]."""
        texts = functional.normalize(self.text_model(input_ids=input_ids).pooler_output, dim=-1)
        return self.compare(self.embed_pictures(patches), texts)

    def groups(self, learning_rate: float) -> list[dict]:
        """Parameters for the optimizer, each once; biases, norms and the scalars are not decayed."""
        parts = (
            (learning_rate, 0.05, [item for item in self.text_model.parameters() if item.ndim > 1]),
            (learning_rate, 0.0, [item for item in self.text_model.parameters() if item.ndim <= 1]),
            (learning_rate / 10, 0.05, [item for item in self.head.parameters() if item.ndim > 1]),
            (learning_rate / 10, 0.0, [item for item in self.head.parameters() if item.ndim <= 1]),
            (10 * learning_rate, 0.0, [self.logit_scale, self.logit_bias]),
        )
        return [{"params": items, "lr": rate, "weight_decay": decay} for rate, decay, items in parts]


def tokens_of(tokenizer, texts: list[str]) -> Tensor:
    """Token ids [C, TEXT_LENGTH], padded as SigLIP's are."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


class Facts(nn.Module):
    """A unit vector [F, D] for each of F facts, by name, used in place of text embeddings."""

    def __init__(self, names: list[str], vectors: Tensor):
        super().__init__()
        self.places = {name: place for place, name in enumerate(names)}
        self.vectors = nn.Parameter(vectors)
        known = [thing.name for thing in things() if thing.name in self.places]
        self.of_things = [self.places[name] for name in known]  # the facts that a thing is in the picture
        self.numbers = {name: number for number, name in enumerate(known)}  # their places in `of_things`

    def target(self, facts: frozenset[str]) -> Tensor:
        """The embedding [D] that a text that asserts these facts should have: the direction of their sum."""
        unit = functional.normalize(self.vectors.detach()[[self.places[fact] for fact in sorted(facts)]], dim=-1)
        return functional.normalize(unit.sum(0), dim=0)

    def truth(self, pictures: list[frozenset[str]]) -> Tensor:
        """Bool [P, F]."""
        is_true = torch.zeros(len(pictures), len(self.places), dtype=torch.bool)
        for row, facts in enumerate(pictures):
            is_true[row, [self.places[fact] for fact in facts if fact in self.places]] = True
        return is_true


@torch.no_grad()
def begin_facts(trained: Trained, store: FeatureStore) -> Facts:
    """
    The facts that occur, each at the mean of the pictures that it is true of. First, the pooling head's output is
    shifted, in place, so that its mean over pictures is 0: unshifted, all outputs have nearly the same direction.
    """
    known = store.facts()
    names = sorted(set().union(*known))
    pooled = torch.cat(
        [
            pool(trained.head, torch.from_numpy(store.features[first : first + SHARD]).float())
            for first in range(0, len(known), SHARD)
        ]
    )
    mean = pooled.mean(0)
    trained.head.mlp.fc2.bias -= mean
    facts = Facts(names, torch.zeros(len(names), pooled.shape[1]))
    unit = functional.normalize(pooled - mean, dim=-1)
    facts.vectors += facts.truth(known).float().T @ unit
    facts.vectors.copy_(functional.normalize(facts.vectors, dim=-1))
    return facts


def learn_facts(trained: Trained, store: FeatureStore, recipe: Recipe) -> tuple[Facts, list[float]]:
    """
    First stage: train pooling head, scale and bias, with a vector for each fact instead of a text tower. Returns the
    facts, and each epoch's mean loss.
    """
    facts, known, losses = begin_facts(trained, store), store.facts(), []
    named = torch.tensor([facts.numbers[placed[0].thing] if placed else -1 for placed in store.placed()])
    parts = ((recipe.learning_rate, trained.head), (5 * recipe.learning_rate, facts))
    groups = [{"params": list(module.parameters()), "lr": rate} for rate, module in parts]
    groups.append({"params": [trained.logit_scale, trained.logit_bias], "lr": 10 * recipe.learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = len(known) // recipe.batch
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=recipe.fact_epochs * steps)
    for epoch in track(range(recipe.fact_epochs), "first stage: facts"):
        rng, total = np.random.default_rng((recipe.seed, 1, epoch)), 0.0
        for chosen in np.array_split(rng.permutation(len(known)), steps):
            chosen = np.sort(chosen)
            patches, covered = some_patches(store, chosen, recipe, rng)
            weights = probe_weights(trained.head, patches)
            images = functional.normalize(pool(trained.head, patches, weights), dim=-1)
            logits = trained.compare(images, functional.normalize(facts.vectors, dim=-1))
            is_true = facts.truth([known[place] for place in chosen])
            loss = functional.binary_cross_entropy_with_logits(logits, is_true.float(), reduction="sum") / len(chosen)
            # the largest drawing's name among all things; pictures without a drawing are ignored
            naming = functional.cross_entropy(logits[:, facts.of_things], named[chosen], ignore_index=-1)
            loss = loss + recipe.naming * naming
            loss = loss + recipe.looking * looking_loss(weights, covered)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / steps)
        print(f"facts, epoch {epoch + 1}: {losses[-1]:.2f}", flush=True)
    return facts, losses


def learn_to_read(trained: Trained, facts: Facts, tokenizer, store: FeatureStore, recipe: Recipe) -> list[float]:
    """
    Second stage: train the text tower to embed a text at the facts that it asserts. Training on the pictures alone
    would take many times longer. Returns the mean loss, 1 - cosine, of every hundred steps.
    """
    text_model, known, losses = trained.text_model, store.facts(), []
    with torch.no_grad():  # centre the embeddings, as for the pooling head
        text_model.head.bias -= text_model(input_ids=tokens_of(tokenizer, prompts("{}"))).pooler_output.mean(0)
    optimizer = torch.optim.AdamW(text_model.parameters(), lr=2 * recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2 * recipe.learning_rate, total_steps=recipe.reading_steps, pct_start=0.1
    )
    for step in track(range(recipe.reading_steps), "second stage: reading"):
        rng = np.random.default_rng((recipe.seed, 2, step))
        pictures = [known[place] for place in rng.integers(len(known), size=recipe.captions)]
        texts = draw_captions(pictures, recipe, rng)
        targets = torch.stack([facts.target(text.facts) for text in texts])
        with torch.autocast("cpu", torch.bfloat16):
            found = text_model(input_ids=tokens_of(tokenizer, [text.text for text in texts])).pooler_output
        loss = 1 - functional.cosine_similarity(found.float(), targets, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(text_model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"reading, step {step + 1}: {np.mean(losses[-100:]):.3f}", flush=True)
    return [float(np.mean(losses[first : first + 100])) for first in range(0, len(losses), 100)]


def some_patches(
    store: FeatureStore, chosen: np.ndarray, recipe: Recipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Features [P, n, D] of a random share of the chosen pictures' patches, and the covered share of each patch."""
    num_patches = store.features.shape[1]
    kept = rng.permutation(num_patches)[: round(recipe.kept_patches * num_patches)]
    found = (array[chosen][:, kept] for array in (store.features, store.covered))
    return tuple(torch.from_numpy(part).float() for part in found)


def draw_captions(facts: list[frozenset[str]], recipe: Recipe, rng: np.random.Generator) -> list[Caption]:
    """The texts of a step: most are true of some of its pictures, the others name a random thing."""
    count = recipe.captions - recipe.named_captions
    those = [facts[place] for place in rng.choice(len(facts), count, replace=len(facts) < count)]
    names = [thing.name for thing in things()]
    named = [name_caption(names[rng.integers(len(names))], rng) for _ in range(recipe.named_captions)]
    return [caption(known, rng) for known in those] + named


def train(model: SiglipModel, tokenizer, store: FeatureStore, recipe: Recipe, folder: Path) -> list[dict]:
    """
    Third stage: train pooling head, text tower, scale and bias together, in place. The state after each epoch is kept
    in `folder`, and an earlier state is continued. Returns mean loss and seconds of each epoch.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    trained = Trained(model).train()
    optimizer = torch.optim.AdamW(trained.groups(recipe.joint_rate), betas=(0.9, 0.98))
    steps = len(store.lines) // recipe.batch
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=recipe.epochs * steps, pct_start=0.08)
    trained, optimizer, schedule = accelerator.prepare(trained, optimizer, schedule)
    facts, log = store.facts(), []
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
                batch, _ = some_patches(store, chosen, recipe, rng)
                known = [facts[place] for place in chosen]
                texts = draw_captions(known, recipe, rng)
                input_ids = tokens_of(tokenizer, [text.text for text in texts])
                logits = trained(batch.to(accelerator.device), input_ids.to(accelerator.device))
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


def first_stages(model: SiglipModel, tokenizer, store: FeatureStore, recipe: Recipe, folder: Path) -> dict:
    """Run the first two stages, in place, or load their result from `folder`; returns their losses."""
    trained, weights, said = Trained(model), folder / "first_stages.safetensors", folder / "first_stages.json"
    if said.is_file():
        load_model(trained, weights)
        return json.loads(said.read_text(encoding="utf-8"))
    facts, fact_losses = learn_facts(trained, store, recipe)
    reading_losses = learn_to_read(trained, facts, tokenizer, store, recipe)
    save_model(trained, weights)
    losses = {"facts": fact_losses, "reading": reading_losses}
    said.write_text(json.dumps(losses), encoding="utf-8")
    return losses


def material_key(tower: SiglipVisionModel) -> str:
    """16 hex digits that change with the tower's weights and with everything that the pictures depend on."""
    code = code_version(HERE / name for name in MATERIAL_CODE)
    tables = [(HERE / name).read_text(encoding="utf-8") for name in MATERIAL_TABLES]
    return key_of(tower=fingerprint(tower), code=code, tables=tables)


def save_checkpoint(model: SiglipModel, tokenizer, folder: Path, record: dict) -> None:
    """Write the model in half precision with its processor, whole or not at all; other files in the folder stay."""
    processor = SiglipProcessor(SiglipImageProcessorPil.from_pretrained(default_tower_dir()), tokenizer)
    with staging_folder(folder) as partial, quiet_transformers():
        model.half().save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "recipe.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = OUTPUT,
) -> None:
    """Train the checkpoint, or continue an interrupted training."""
    started, recipe = time.perf_counter(), Recipe()
    tower = SiglipVisionModel.from_pretrained(build_tower(default_tower_dir())).eval()
    key = material_key(tower)
    store = cached_features(tower, "training", recipe.pictures, recipe.seed, key)
    features_seconds = time.perf_counter() - started
    set_seed(recipe.seed)
    tower = SiglipVisionModel.from_pretrained(default_tower_dir()).eval()
    tokenizer = make_tokenizer()
    model = make_model(tower, tokenizer, recipe.seed)
    settings = key_of(recipe=vars(recipe), material=key)
    folder = cache_folder() / "training" / f"{NAME}-{settings}"
    folder.mkdir(parents=True, exist_ok=True)
    early = first_stages(model, tokenizer, store, recipe, folder)
    log = train(model, tokenizer, store, recipe, folder)
    record = {
        "command": "python -m recipes.siglip_small.train",
        "recipe": vars(recipe),
        "things": len(things()),
        "parameters": {
            "text tower": sum(item.numel() for item in model.text_model.parameters()),
            "pooling head": sum(item.numel() for item in model.vision_model.head.parameters()),
            "all": sum(item.numel() for item in model.parameters()),
        },
        "first_stages": early,
        "log": log,
        "features_seconds_of_this_start": round(features_seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    save_checkpoint(model, tokenizer, output, record)
    typer.echo(f"Saved to {output}")


if __name__ == "__main__":
    typer.run(main)
