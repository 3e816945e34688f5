"""
How much better than the embedded SigLIP could any pooling of the frozen tower's features be?

    python -m eval.vision.zero_shot_bound    # after `make siglip-small`, whose features it reads

Does the model miss pictures because its pooling head and text tower are poor, or because the features, from so few
drawings of each thing, do not tell? Classifiers without a text tower are told where the drawing is: of each picture's
patches only those that it covers are averaged, and the greatest of each feature taken; among the 165 things they
choose by the nearest mean, by logistic regression, and by a network with a hidden layer. They are trained on the
training pictures, and asked for the held-out renderings and for new pictures of training drawings, beside the model
itself, on the same pictures: those of a single thing that covers at least 15 % of the frame. And how much do more
drawings help? The same, from pictures of a part of the drawings, with as many pictures each time. Writes
`eval/results/zero_shot_bound.json` and a table of the model card, `models/neuroflow-siglip-small/README.md`.
"""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoProcessor, SiglipModel, SiglipVisionModel

from eval.docs.tables import table
from eval.report import RESULTS, fill_block, provenance, publish, write_whole
from eval.vision.composed_bench import CHECKPOINT
from eval.vision.zero_shot_small import (
    BATCH,
    SEED,
    accuracy,
    embed_texts,
    is_large,
    one_thing,
    share_cell,
    with_drawings,
)
from neuroflow_hf.evaluation.statistics import paired_difference
from neuroflow_hf.evaluation.zero_shot import paired_counts
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir
from recipes.siglip_dinov2_small.head import to_pixels
from recipes.siglip_small.captions import HELD_OUT_PHRASINGS, prompts
from recipes.siglip_small.compose import Picture, load_material
from recipes.siglip_small.features import FeatureStore, cached_features, patch_shares
from recipes.siglip_small.sources import things
from recipes.siglip_small.train import Recipe, material_key

COVERED = 0.3  # the share of a patch from which on it counts as the drawing's
PARTS = (0.25, 0.5, 0.75, 1.0)  # of each thing's drawing styles
HIDDEN = 512
EPOCHS, FEWEST_STEPS = 40, 800
ASKED = {"held-out renderings": "held out", "training drawings": "training"}  # names and splits


def under_mask(features: Tensor, covered: Tensor) -> Tensor:
    """Mean and greatest of features [P, N, D] over the patches that are covered [P, N]: [P, 2 D]."""
    inside = (covered > COVERED).unsqueeze(-1)
    mean = (features * inside).sum(1) / inside.sum(1).clamp(min=1)
    return torch.cat([mean, features.masked_fill(~inside, -torch.inf).amax(1)], dim=-1)


def training_set(store: FeatureStore, numbers: dict[str, int]) -> tuple[Tensor, Tensor, list[str]]:
    """Pooled features [P, 2 D] of the training pictures of one thing that covers anything, its number, its style."""
    chosen = [
        (place, placed[0])
        for place, placed in enumerate(store.placed())
        if len({item.thing for item in placed}) == 1 and (store.covered[place] > COVERED).any()
    ]
    pooled = []
    for first in track(range(0, len(chosen), 256), "training pictures", console=Console(stderr=True)):
        places = [place for place, _ in chosen[first : first + 256]]
        features, covered = (torch.from_numpy(array[places]).float() for array in (store.features, store.covered))
        pooled.append(under_mask(features, covered))
    named = torch.tensor([numbers[item.thing] for _, item in chosen])
    return torch.cat(pooled), named, [item.style for _, item in chosen]


def nearest_mean(known: Tensor, named: Tensor, count: int):
    """A classifier by the cosine to each class's mean: features to scores."""
    means = torch.stack([known[named == number].mean(0) for number in range(count)]).nan_to_num()
    return lambda features: functional.normalize(features, dim=-1) @ functional.normalize(means, dim=-1).T


def trained(network: nn.Module, known: Tensor, named: Tensor):
    """A classifier by gradient descent on the cross entropy, with some noise on the features."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    steps = max(FEWEST_STEPS, EPOCHS * len(known) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(known), (256,), generator=generator)
        loss = functional.cross_entropy(network(known[rows]), named[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return torch.no_grad()(network)


def classifiers(known: Tensor, named: Tensor, count: int) -> dict:
    """By name, what makes scores [P, things] of pooled features [P, 2 D]."""
    torch.manual_seed(0)
    middle, spread = known.mean(0), known.std(0) + 1e-3
    scaled = (known - middle) / spread
    width = known.shape[1]
    hidden = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(0.4), nn.Linear(HIDDEN, count)
    )
    linear = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, count))
    found = {
        "nearest mean": nearest_mean(scaled, named, count),
        "logistic regression": trained(linear, scaled, named),
        "hidden layer": trained(hidden, scaled, named),
    }
    return {name: lambda features, of=of: of((features - middle) / spread) for name, of in found.items()}


@torch.inference_mode()
def of_pictures(model: SiglipModel, pictures: list[Picture]) -> tuple[Tensor, Tensor]:
    """Pooled features [P, 2 D] under the masks, and the model's own unit embeddings [P, D]."""
    pooled, embeddings = [], []
    for first in track(range(0, len(pictures), BATCH), "asked pictures", console=Console(stderr=True)):
        part = pictures[first : first + BATCH]
        output = model.vision_model(pixel_values=to_pixels([picture.image for picture in part]).to(model.dtype))
        features = output.last_hidden_state.float()
        covered = np.stack([patch_shares(picture.covered, features.shape[1]) for picture in part])
        pooled.append(under_mask(features, torch.from_numpy(covered)))
        embeddings.append(output.pooler_output.float())
    return torch.cat(pooled), functional.normalize(torch.cat(embeddings), dim=-1)


def beside(right: Tensor, of_model: Tensor) -> dict:
    """A classifier's accuracy, and by how much it is above the model's on the same pictures."""
    return {
        **accuracy(right.tolist()),
        "above_model": float(right.float().mean() - of_model.float().mean()),
        "above_model_interval": list(paired_difference(paired_counts(right.numpy(), of_model.numpy()))),
    }


def part_of_styles(styles: list[str], named: Tensor, share: float) -> Tensor:
    """Places of the pictures whose drawing is of the first `share` of its thing's styles, by lot, at least one."""
    of_thing: dict[int, set] = defaultdict(set)
    for number, style in zip(named.tolist(), styles, strict=True):
        of_thing[number].add(style)
    rng = np.random.default_rng(0)
    kept = {}
    for number in sorted(of_thing):
        every = sorted(of_thing[number])
        kept[number] = {every[place] for place in rng.permutation(len(every))[: max(1, round(share * len(every)))]}
    return torch.tensor([p for p, (n, s) in enumerate(zip(named.tolist(), styles, strict=True)) if s in kept[n]])


def main(
    pictures: Annotated[int, typer.Option(help="Number of composed pictures of each kind.")] = 1600,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "zero_shot_bound.json",
    card: Annotated[bool, typer.Option(help="Fill the card's block.")] = True,
):
    """Measure, write and show."""
    names = [thing.name for thing in things()]
    numbers = {name: number for number, name in enumerate(names)}
    tower, recipe = SiglipVisionModel.from_pretrained(build_tower(default_tower_dir())).eval(), Recipe()
    store = cached_features(tower, "training", recipe.pictures, recipe.seed, material_key(tower))
    known, named, styles = training_set(store, numbers)
    model = SiglipModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval()
    tokenizer = AutoProcessor.from_pretrained(CHECKPOINT).tokenizer
    texts = sum(embed_texts(model, tokenizer, prompts(phrasing)) for phrasing in HELD_OUT_PHRASINGS)
    material, asked = load_material(), {}
    for offset, (name, split) in enumerate(ASKED.items()):
        every = with_drawings(material[split], pictures, SEED + offset)
        chosen = [picture for picture in every if one_thing(picture) and is_large(picture)]
        pooled, embeddings = of_pictures(model, chosen)
        truth = torch.tensor([numbers[picture.placed[0].thing] for picture in chosen])
        asked[name] = (pooled, truth, (embeddings @ texts.T).argmax(-1) == truth)
    told_where: dict[str, dict] = {name: {} for name in asked}
    for kind, scores in classifiers(known, named, len(names)).items():
        for name, (pooled, truth, right) in asked.items():
            told_where[name][kind] = beside(scores(pooled).argmax(-1) == truth, right)
    by_styles = []
    pooled, truth, _ = asked["held-out renderings"]
    least = len(part_of_styles(styles, named, min(PARTS)))
    for share in PARTS:
        those = part_of_styles(styles, named, share)
        those = those[torch.randperm(len(those), generator=torch.Generator().manual_seed(0))[:least]]
        distinct = len({(n, styles[p]) for p, n in zip(those.tolist(), named[those].tolist(), strict=True)})
        scores = classifiers(known[those], named[those], len(names))["hidden layer"]
        found = accuracy((scores(pooled).argmax(-1) == truth).tolist())
        by_styles.append({"styles_per_thing": distinct / len(names), "pictures": len(those), "accuracy": found})
    report = {
        **provenance(),
        "things": len(names),
        "training_pictures": len(known),
        "model": {name: accuracy(right.tolist()) for name, (_, _, right) in asked.items()},
        "told where": told_where,
        "by styles": by_styles,
    }
    publish(output, report, card_table(report))
    if card:
        path = CHECKPOINT / "README.md"
        write_whole(path, fill_block(path.read_text(encoding="utf-8"), "figures:bound", card_table(report)))


def card_table(report: dict) -> str:
    """The figures in Markdown."""
    told = report["told where"]
    rows = {"this model": report["model"]}
    for kind in told["held-out renderings"]:
        rows[f"told where the thing is: {kind}"] = {name: told[name][kind] for name in told}
    cells = ([name, *(share_cell(one) for one in found.values())] for name, found in rows.items())
    columns = dict(zip(["one thing, at least 15% of the frame", *told], ("{0}", "{1}", "{2}"), strict=True))
    by_styles = "; ".join(
        f"{found['styles_per_thing']:.1f} styles a thing: {found['accuracy']['top1']:.1%}"
        for found in report["by styles"]
    )
    return table(
        cells,
        columns,
        "With a hidden layer, told where, on held-out renderings, by how many styles of drawings each thing has in "
        f"training (as many pictures each time, {report['by styles'][0]['pictures']}): {by_styles}.",
        "",
        f"`{report['command']}`: classifiers without texts, from {report['training_pictures']} training pictures.",
    )


if __name__ == "__main__":
    typer.run(main)
