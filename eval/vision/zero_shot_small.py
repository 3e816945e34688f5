"""
What does the embedded SigLIP recognise? Zero-shot top-1 on composed pictures that it was not trained on.

    python -m eval.vision.zero_shot_small                  # some minutes on two cores
    python -m eval.vision.zero_shot_small --checkpoint AGAIN --output eval/results/zero_shot_small_again.json

The labels are all things that the model was trained on. An answer is right if it names the largest drawing. Pictures
are composed as in training, but from held-out renderings (for each thing, one family of drawings is in no training
picture) on held-out photographs, and from a style that training did not have (OpenMoji). They are compared with
pictures of training renderings, grey pictures, pictures with shuffled patches, and chance. Two more questions give the
name of the largest drawing and ask where it is, and how many there are; their baseline is the most frequent answer.
Intervals are Wilson's, 95 %. The model runs in bfloat16. The last command measures the checkpoint of a second run of
the recipe. Writes `eval/results/zero_shot_small.json` and the metadata of the model card,
`models/neuroflow-siglip-small/README.md`, whose tables `eval.docs.tables` writes.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from huggingface_hub import EvalResult
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.nn.functional import normalize
from transformers import AutoProcessor, SiglipModel

from eval.docs.labels import HELD_OUT, LEAST_SHARE, STYLE, zero_shot_table
from eval.report import RESULTS, provenance, publish, write_whole
from eval.vision.composed_bench import CHECKPOINT
from neuroflow_hf.evaluation.card import card_with_results, dataset_type
from neuroflow_hf.evaluation.statistics import wilson
from neuroflow_hf.video.labels import embed_labels
from recipes.siglip_dinov2_small.head import to_pixels
from recipes.siglip_small.captions import (
    HELD_OUT_PHRASINGS,
    NUMBERS,
    PLACE_WORDS,
    TRAINING_PHRASINGS,
    prompts,
    with_article,
)
from recipes.siglip_small.compose import Material, Picture, compose, load_material
from recipes.siglip_small.facts import place_of
from recipes.siglip_small.sources import things

SEED = 1_000_000  # training uses small seeds
SIZES = ((0.0, 0.05), (0.05, 0.15), (0.15, 0.3), (0.3, 1.01))
BATCH = 32
PICTURES = 1600  # held-out pictures; half of it of each other kind

# --- pictures --------------------------------------------------------------------------------------------------------


def with_drawings(material: Material, count: int, seed: int) -> list[Picture]:
    """The first `count` composed pictures that hold a drawing."""
    composed = (compose(material, np.random.default_rng((seed, number))) for number in itertools.count())
    return list(itertools.islice((picture for picture in composed if picture.placed), count))


def in_grey(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """The picture without colours."""
    return image.convert("L").convert("RGB")


def shuffled(image: Image.Image, rng: np.random.Generator, patch: int = 14) -> Image.Image:
    """The picture with its patches in random order."""
    side = image.width // patch
    patches = np.asarray(image).reshape(side, patch, side, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)
    patches = patches[rng.permutation(len(patches))].reshape(side, side, patch, patch, 3)
    return Image.fromarray(patches.swapaxes(1, 2).reshape(image.height, image.width, 3))


def one_thing(picture: Picture) -> bool:
    """Whether all drawings in a picture are of one thing."""
    return len({item.thing for item in picture.placed}) == 1


# --- answers ---------------------------------------------------------------------------------------------------------


def accuracy(right: Sequence[bool]) -> dict:
    """The share of right answers, its interval, and the number of pictures."""
    low, high = wilson(sum(right), len(right))
    return {"top1": sum(right) / max(1, len(right)), "interval": [low, high], "pictures": len(right)}


@torch.inference_mode()
def embed(model: SiglipModel, images: Sequence[Image.Image], title: str) -> torch.Tensor:
    """Unit embeddings float32 [P, D]."""
    parts = [images[first : first + BATCH] for first in range(0, len(images), BATCH)]
    outputs = [
        model.get_image_features(pixel_values=to_pixels(part).to(model.dtype)).pooler_output.float()
        for part in track(parts, title, console=Console(stderr=True))
    ]
    return normalize(torch.cat(outputs), dim=-1)


def named(images: torch.Tensor, texts: torch.Tensor, names: list[str], count: int = 1) -> list[list[str]]:
    """The `count` best names for each picture."""
    return [[names[place] for place in row] for row in (images @ texts.T).topk(count).indices.tolist()]


def is_right(pictures: Sequence[Picture], answers: list[list[str]]) -> list[bool]:
    """For each picture, whether the largest drawing's name is among the answers."""
    return [picture.placed[0].thing in answer for picture, answer in zip(pictures, answers, strict=True)]


def accuracy_where(
    pictures: Sequence[Picture],
    right: list[bool],
    least: float = LEAST_SHARE,
    fits: Callable[[Picture], bool] = lambda picture: True,
) -> dict:
    """The accuracy on pictures whose largest drawing covers at least the share `least`, and that `fits` accepts."""
    pairs = zip(pictures, right, strict=True)
    return accuracy([ok for picture, ok in pairs if picture.placed[0].share >= least and fits(picture)])


def breakdown(pictures: Sequence[Picture], right: list[bool]) -> dict:
    """The accuracy by size of the largest drawing and, where this is large, by number of drawings."""
    kinds: dict[str, Callable[[Picture], bool]] = {
        "one drawing": lambda picture: len(picture.placed) == 1,
        "several things": lambda picture: not one_thing(picture),
        "several of one thing": lambda picture: len(picture.placed) > 1 and one_thing(picture),
    }
    return {
        "by size": {
            f"{low:.0%} to {min(high, 1):.0%}": accuracy_where(
                pictures, right, low, lambda picture, high=high: picture.placed[0].share < high
            )
            for low, high in SIZES
        },
        "by number": {name: accuracy_where(pictures, right, fits=fits) for name, fits in kinds.items()},
    }


def place_texts(thing) -> dict[str, str]:
    """A text for each place that a thing may be at."""
    return {place: f"{with_article(thing.name, thing)} {words[0]}" for place, words in PLACE_WORDS.items()}


def number_texts(thing) -> dict[int, str]:
    """A text for each number of a thing."""
    return {1: f"one {thing.name}", **{number: f"{word} {thing.plural}" for number, word in NUMBERS.items()}}


def place_in(picture: Picture) -> str | None:
    """The place of a single drawing; None if it is not clearly at one of the places, or there are several drawings."""
    return place_of(picture.placed[0]) if len(picture.placed) == 1 else None


def details(
    pictures: Sequence[Picture], images: torch.Tensor, texts_of: Callable, truth_of: Callable, embed: Callable
):
    """
    The accuracy of the best of the texts `texts_of(thing)`, on pictures with drawings of one thing and their unit
    embeddings [P, D]; and the baseline, which always gives the most frequent answer. `truth_of` gives a picture's
    right answer, or None to leave the picture out; `embed` gives texts' unit embeddings.
    """
    by_name = {thing.name: thing for thing in things()}
    right, truths = [], []
    for picture, image in zip(pictures, images, strict=True):
        truth = truth_of(picture) if one_thing(picture) else None
        if truth is not None:
            texts = texts_of(by_name[picture.placed[0].thing])
            right.append(list(texts)[int((embed(list(texts.values())) @ image).argmax())] == truth)
            truths.append(truth)
    most = max(Counter(truths).values(), default=0)
    return {**accuracy(right), "most frequent": most / max(1, len(truths))}


def photographs(material: Material, model: SiglipModel, texts: torch.Tensor, names: list[str]) -> list[dict]:
    """For each held-out photograph that shows a thing: the thing, and the five best names."""
    unique = {photo.shows: photo for photo in material.photos if set(photo.shows) & set(names)}
    images = [photo.picture.resize((224, 224), Image.Resampling.BICUBIC) for photo in unique.values()]
    found = named(embed(model, images, "photographs"), texts, names, 5)
    return [
        {"shows": sorted(set(shows) & set(names)), "named": answer}
        for shows, answer in zip(unique, found, strict=True)
    ]


def measure(model: SiglipModel, tokenizer, material: dict[str, Material], pictures: int) -> dict:
    """All figures, from `pictures` held-out pictures and half that number of each other kind."""
    names = [thing.name for thing in things()]

    def embed_texts(texts: list[str]) -> torch.Tensor:
        return embed_labels(model, tokenizer, texts, "{}").text_embeddings

    texts = {phrasing: embed_texts(prompts(phrasing)) for phrasing in (*TRAINING_PHRASINGS, *HELD_OUT_PHRASINGS)}
    ensemble = normalize(sum(texts[phrasing] for phrasing in HELD_OUT_PHRASINGS), dim=-1)
    held_out = with_drawings(material["held out"], pictures, SEED)
    embedded = embed(model, [picture.image for picture in held_out], "held out")
    answers = named(embedded, ensemble, names)
    right, top5 = is_right(held_out, answers), is_right(held_out, named(embedded, ensemble, names, 5))
    phrasings = {
        phrasing: {
            "held out": phrasing in HELD_OUT_PHRASINGS,
            **accuracy_where(held_out, is_right(held_out, named(embedded, found, names))),
        }
        for phrasing, found in texts.items()
    }
    rng, some = np.random.default_rng(SEED), held_out[: pictures // 2]
    others = {
        "new pictures of training drawings": with_drawings(material["training"], pictures // 2, SEED + 1),
        STYLE: with_drawings(material["unseen style"], pictures // 2, SEED + 2),
        "the held-out pictures in grey": [replace(one, image=in_grey(one.image, rng)) for one in some],
        "*baseline:* their patches shuffled": [replace(one, image=shuffled(one.image, rng)) for one in some],
    }
    missed = Counter(
        (picture.placed[0].thing, answer[0])
        for picture, answer, ok in zip(held_out, answers, right, strict=True)
        if not ok and picture.placed[0].share >= LEAST_SHARE
    )

    def of_others(title: str, found: list[Picture]) -> dict:
        images = embed(model, [picture.image for picture in found], title)
        return accuracy_where(found, is_right(found, named(images, ensemble, names)))

    def told(texts_of: Callable, truth_of: Callable) -> dict:
        return details(held_out, embedded, texts_of, truth_of, embed_texts)

    return {
        "things": len(names),
        "pictures": len(held_out),
        HELD_OUT: {
            **accuracy_where(held_out, right),
            "top5": accuracy_where(held_out, top5)["top1"],
        },
        "phrasings": phrasings,
        **breakdown(held_out, right),
        "others": {
            **{title: of_others(title, found) for title, found in others.items()},
            "*baseline:* chance": {"top1": 1 / len(names)},
        },
        "details": {
            "where it is, of five places": told(place_texts, place_in),
            "whether there are one, two or three": told(number_texts, lambda picture: min(3, len(picture.placed))),
        },
        "most confused": [[*pair, count] for pair, count in missed.most_common(20)],
        "photographs": photographs(material["held out"], model, ensemble, names),
    }


# --- the card --------------------------------------------------------------------------------------------------------


def card_results(report: dict) -> list[EvalResult]:
    """The figures in the card's metadata: top-1 and top-5 on held-out pictures, top-1 on a new style."""
    figures = {
        ("top-1 accuracy", HELD_OUT): report[HELD_OUT]["top1"],
        ("top-5 accuracy", HELD_OUT): report[HELD_OUT]["top5"],
        ("top-1 accuracy", STYLE): report["others"][STYLE]["top1"],
    }
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            task_name=f"One of {report['things']} things, which covers at least {LEAST_SHARE:.0%} of the picture",
            dataset_type=dataset_type(f"composed pictures {data}"),
            dataset_name=f"Composed pictures: {data}",
            metric_type="accuracy",
            metric_name=metric,
            metric_value=round(value, 4),
            verified=False,
        )
        for (metric, data), value in figures.items()
    ]


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "zero_shot_small.json",
):
    """Measure, write and show; of the repository's checkpoint also write the card's metadata."""
    model = SiglipModel.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    report = {**provenance(), **measure(model, tokenizer, load_material(), PICTURES)}
    publish(output, report, zero_shot_table(report, report))
    if checkpoint == CHECKPOINT:
        card = checkpoint / "README.md"
        text = card_with_results(card.read_text(encoding="utf-8"), CHECKPOINT.name, card_results(report))
        write_whole(card, text)


if __name__ == "__main__":
    typer.run(main)
