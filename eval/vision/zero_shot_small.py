"""
What the embedded SigLIP recognises: zero-shot top-1 on composed pictures that it has not seen.

    python -m eval.vision.zero_shot_small      # some minutes on two cores

Question: asked for one of all the things that it was trained on, does the model name a picture's largest drawing?
Pictures are composed as in training, of held-out renderings (for each thing, one family of drawings is in no training
picture), before held-out photographs; and of a style of which nothing was in training (OpenMoji). Beside them the
training's renderings, pictures in grey, pictures whose patches are shuffled, and chance. And, told what the largest
drawing is: where is it, and of how many alike, beside the most frequent answer. Intervals are Wilson's, 95 %.
Runs in bfloat16.
Writes `eval/results/zero_shot_small.json` and fills the card's figures, in its head too.

    python -m eval.vision.zero_shot_small --card-only      # the card alone, from the JSON file

Of a checkpoint that the recipe made again, to be put beside the first:

    python -m eval.vision.zero_shot_small --checkpoint AGAIN --no-card --output eval/results/zero_shot_small_again.json
"""

import json
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
from transformers import AutoProcessor, SiglipModel

from eval.report import RESULTS, fill_block, provenance, write_json, write_whole
from eval.vision.composed_bench import CHECKPOINT
from neuroflow_hf.evaluation.card import card_with_results, dataset_type
from neuroflow_hf.evaluation.statistics import wilson
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

AGAIN = RESULTS / "zero_shot_small_again.json"
SEED = 1_000_000  # far from the training's numbers
LEAST_SHARE = 0.15
SIZES = ((0.0, 0.05), (0.05, 0.15), (0.15, 0.3), (0.3, 1.01))
PIPELINE_PHRASING = "This is a photo of {name}."
BATCH = 32


def accuracy(right: Sequence[bool]) -> dict:
    """A share of right answers, its interval, and of how many."""
    low, high = wilson(sum(right), len(right))
    return {"top1": sum(right) / max(1, len(right)), "interval": [low, high], "pictures": len(right)}


def with_drawings(material: Material, count: int, seed: int) -> list[Picture]:
    """So many composed pictures that hold a drawing."""
    found: list[Picture] = []
    number = 0
    while len(found) < count:
        picture = compose(material, np.random.default_rng((seed, number)))
        number += 1
        if picture.placed:
            found.append(picture)
    return found


def in_grey(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """The picture without colours."""
    return image.convert("L").convert("RGB")


def shuffled(image: Image.Image, rng: np.random.Generator, patch: int = 14) -> Image.Image:
    """The picture's patches in another order."""
    side = image.width // patch
    patches = (
        np.asarray(image).reshape(side, patch, side, patch, 3).transpose(0, 2, 1, 3, 4).reshape(-1, patch, patch, 3)
    )
    patches = patches[rng.permutation(len(patches))].reshape(side, side, patch, patch, 3)
    return Image.fromarray(
        np.ascontiguousarray(patches.transpose(0, 2, 1, 3, 4)).reshape(image.height, image.width, 3)
    )


@torch.inference_mode()
def embed(encode: Callable, images: Sequence[Image.Image], title: str) -> torch.Tensor:
    """Unit embeddings float32 [P, D]."""
    parts = [images[first : first + BATCH] for first in range(0, len(images), BATCH)]
    outputs = [encode(to_pixels(part)) for part in track(parts, title, console=Console(stderr=True))]
    return torch.nn.functional.normalize(torch.cat(outputs), dim=-1)


@torch.inference_mode()
def text_embeddings(model: SiglipModel, tokenizer, texts: list[str]) -> torch.Tensor:
    """Unit embeddings float32 [T, D]."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return torch.nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def named(images: torch.Tensor, texts: torch.Tensor, names: list[str], count: int = 1) -> list[list[str]]:
    """The `count` best names of every picture."""
    return [[names[place] for place in row] for row in (images @ texts.T).topk(count).indices.tolist()]


def is_right(pictures: Sequence[Picture], answers: list[list[str]]) -> list[bool]:
    """Whether the largest drawing's name is among the answers."""
    return [picture.placed[0].thing in answer for picture, answer in zip(pictures, answers, strict=True)]


def large(pictures: Sequence[Picture], right: list[bool]) -> list[bool]:
    """Of the pictures whose largest drawing covers at least LEAST_SHARE."""
    return [ok for picture, ok in zip(pictures, right, strict=True) if picture.placed[0].share >= LEAST_SHARE]


def breakdown(pictures: Sequence[Picture], right: list[bool]) -> dict:
    """By size of the largest drawing; and, where it is large, by number of drawings."""
    pairs = list(zip(pictures, right, strict=True))
    sizes = {
        f"{low:.0%} to {min(high, 1):.0%}": accuracy(
            [ok for picture, ok in pairs if low <= picture.placed[0].share < high]
        )
        for low, high in SIZES
    }
    in_large = [(picture, ok) for picture, ok in pairs if picture.placed[0].share >= LEAST_SHARE]
    kinds = {
        "one drawing": lambda picture: len(picture.placed) == 1,
        "several things": lambda picture: len({item.thing for item in picture.placed}) > 1,
        "several of one thing": lambda picture: (
            len(picture.placed) > 1 and len({item.thing for item in picture.placed}) == 1
        ),
    }
    numbers = {name: accuracy([ok for picture, ok in in_large if fits(picture)]) for name, fits in kinds.items()}
    return {"by size": sizes, "by number": numbers}


def place_texts(thing) -> dict[str, str]:
    """By place, a text that puts a thing there."""
    return {place: f"{with_article(thing.name, thing)} {words[0]}" for place, words in PLACE_WORDS.items()}


def number_texts(thing) -> dict[str, str]:
    """By number, a text of so many."""
    return {1: f"one {thing.name}", **{number: f"{word} {thing.plural}" for number, word in NUMBERS.items()}}


def details(pictures: Sequence[Picture], images: torch.Tensor, texts_of: Callable, truth_of: Callable, embed_texts):
    """
    Of the pictures of one thing, of how many the detail is told right that `truth_of(picture)` says (None: not asked),
    out of `texts_of(thing)`; and the baseline, the most frequent one always.

    Args:
        images: unit embeddings [P, D].
        embed_texts: list of texts to unit embeddings.
    """
    by_name = {thing.name: thing for thing in things()}
    right, truths = [], []
    for picture, image in zip(pictures, images, strict=True):
        truth = truth_of(picture) if len({item.thing for item in picture.placed}) == 1 else None
        if truth is None:
            continue
        texts = texts_of(by_name[picture.placed[0].thing])
        answers = list(texts)
        right.append(answers[int((embed_texts(list(texts.values())) @ image).argmax())] == truth)
        truths.append(truth)
    most = max(Counter(truths).values(), default=0)
    return {**accuracy(right), "most frequent": most / max(1, len(truths))}


def place_in(picture: Picture) -> str | None:
    """Where a single drawing is, if it is clearly there."""
    return place_of(picture.placed[0]) if len(picture.placed) == 1 else None


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    pictures: Annotated[int, typer.Option(help="Number of held-out pictures; half as many of the others.")] = 1600,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "zero_shot_small.json",
    card: Annotated[bool, typer.Option(help="Fill the card's figures.")] = True,
    card_only: Annotated[bool, typer.Option("--card-only", help="Fill the card from the JSON file alone.")] = False,
):
    """Measure, print and write."""
    if card_only:
        write_card(checkpoint, json.loads(output.read_text(encoding="utf-8")))
        return
    model = SiglipModel.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    names = [thing.name for thing in things()]
    texts = {
        phrasing: text_embeddings(model, tokenizer, prompts(phrasing))
        for phrasing in (*TRAINING_PHRASINGS, *HELD_OUT_PHRASINGS)
    }
    ensemble = torch.nn.functional.normalize(sum(texts[phrasing] for phrasing in HELD_OUT_PHRASINGS), dim=-1)
    material = load_material()

    def encode(pixels):
        return model.get_image_features(pixel_values=pixels.bfloat16()).pooler_output.float()

    held_out = with_drawings(material["held out"], pictures, SEED)
    embedded = embed(encode, [picture.image for picture in held_out], "held out")
    by_phrasing = {phrasing: is_right(held_out, named(embedded, found, names)) for phrasing, found in texts.items()}
    right = [ok for phrasing in HELD_OUT_PHRASINGS for ok in large(held_out, by_phrasing[phrasing])]
    answers = named(embedded, ensemble, names)
    of_ensemble = is_right(held_out, answers)
    top5 = is_right(held_out, named(embedded, ensemble, names, 5))
    report = {
        **provenance(),
        "things": len(names),
        "pictures": len(held_out),
        "held-out renderings, photographs and phrasings": {
            **accuracy(large(held_out, of_ensemble)),
            "top5": accuracy(large(held_out, top5))["top1"],
        },
        "one phrasing at a time, mean": sum(right) / len(right),
        "phrasings": {
            phrasing: {"held out": phrasing in HELD_OUT_PHRASINGS, **accuracy(large(held_out, found))}
            for phrasing, found in by_phrasing.items()
        },
        **breakdown(held_out, of_ensemble),
    }
    others = {
        "new pictures of training drawings": with_drawings(material["training"], pictures // 2, SEED + 1),
        "a style never seen": with_drawings(material["unseen style"], pictures // 2, SEED + 2),
    }
    rng = np.random.default_rng(SEED)
    some = held_out[: pictures // 2]
    changed = {"the held-out pictures in grey": in_grey, "*control:* their patches shuffled": shuffled}
    for name, change in changed.items():
        others[name] = [replace(picture, image=change(picture.image, rng)) for picture in some]
    report["others"] = {}
    for name, found in others.items():
        here = embed(encode, [picture.image for picture in found], name)
        report["others"][name] = accuracy(large(found, is_right(found, named(here, ensemble, names))))
    report["others"]["*control:* chance"] = {"top1": 1 / len(names)}

    def embed_texts(found):
        return text_embeddings(model, tokenizer, found)

    report["details"] = {
        "where it is, of five places": details(held_out, embedded, place_texts, place_in, embed_texts),
        "whether there are one, two or three": details(
            held_out, embedded, number_texts, lambda picture: min(3, len(picture.placed)), embed_texts
        ),
    }
    missed = Counter(
        (picture.placed[0].thing, answer[0])
        for picture, answer, ok in zip(held_out, answers, of_ensemble, strict=True)
        if not ok and picture.placed[0].share >= LEAST_SHARE
    )
    report["most confused"] = [[*pair, count] for pair, count in missed.most_common(20)]
    report["photographs"] = photographs(material["held out"], encode, ensemble, names)
    write_json(output, report)
    if card:
        write_card(checkpoint, report)
    Console().print(card_tables(report))


def photographs(material: Material, encode, texts: torch.Tensor, names: list[str]) -> list[dict]:
    """The held-out photographs that show a thing: what it is, and the five best names."""
    shown = [photo for photo in material.photos if set(photo.shows) & set(names)]
    unique = list({photo.shows: photo for photo in shown}.values())
    images = [photo.picture.resize((224, 224), Image.Resampling.BICUBIC) for photo in unique]
    found = named(embed(encode, images, "photographs"), texts, names, 5)
    return [
        {"shows": sorted(set(photo.shows) & set(names)), "named": answer}
        for photo, answer in zip(unique, found, strict=True)
    ]


def held_out_again() -> list[dict]:
    """The main figure of a checkpoint that the recipe made again, if it was measured."""
    if not AGAIN.is_file():
        return []
    return [json.loads(AGAIN.read_text(encoding="utf-8"))["held-out renderings, photographs and phrasings"]]


def write_card(checkpoint: Path, report: dict):
    """Fill the card's tables and the figures in its head."""
    path = checkpoint / "README.md"
    text = fill_block(path.read_text(encoding="utf-8"), "figures", card_tables(report))
    write_whole(path, card_with_results(text, CHECKPOINT.name, card_results(report)))


def card_results(report: dict) -> list[EvalResult]:
    """The figures of the card's head: top-1 and top-5 on held-out pictures, top-1 on a style never seen."""
    held_out, style = "held-out renderings, photographs and phrasings", "a style never seen"
    figures = {
        ("top-1 accuracy", held_out): report[held_out]["top1"],
        ("top-5 accuracy", held_out): report[held_out]["top5"],
        ("top-1 accuracy", style): report["others"][style]["top1"],
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


def card_tables(report: dict) -> str:
    """The figures in Markdown."""

    def row(name, found):
        low, high = found.get("interval", (None, None))
        between = "" if low is None else f" ({low:.1%} to {high:.1%})"
        return f"| {name} | {found['top1']:.1%}{between} | {found.get('pictures', '')} |"

    main = report["held-out renderings, photographs and phrasings"]
    phrasings, versions = report["phrasings"], report["versions"]
    held_out = [found["top1"] for found in phrasings.values() if found["held out"]]
    known = [found["top1"] for found in phrasings.values() if not found["held out"]]
    photographs_right = sum(found["named"][0] in found["shows"] for found in report["photographs"])
    lines = [
        f"| main thing at least 15% of the frame | top-1 among {report['things']} things (95 % interval) | pictures |",
        "|---|---|---|",
        row("**held-out renderings, photographs and phrasings**", main),
        *(row(name, found) for name, found in report["others"].items()),
        *(row("the first row, of the recipe run again from nothing", found) for found in held_out_again()),
        "",
        "| main thing covers | top-1 | pictures |",
        "|---|---|---|",
        *(row(name, found) for name, found in report["by size"].items()),
        "",
        "| in the picture | top-1 | pictures |",
        "|---|---|---|",
        *(row(name, found) for name, found in report["by number"].items()),
        "",
        "| held-out pictures, told what it is | right | most frequent answer | pictures |",
        "|---|---|---|---|",
        *(
            f"| {name} | {found['top1']:.1%} ({found['interval'][0]:.1%} to {found['interval'][1]:.1%}) | "
            f"{found['most frequent']:.1%} | {found['pictures']} |"
            for name, found in report["details"].items()
        ),
        "",
        f"Five held-out phrasings together; one at a time {min(held_out):.1%} to {max(held_out):.1%}, those of "
        f"training {min(known):.1%} to {max(known):.1%}, `{PIPELINE_PHRASING}` (the pipeline's) "
        f"{phrasings[PIPELINE_PHRASING]['top1']:.1%}. Top-5: {main['top5']:.1%}.",
        "",
        "Most confused: " + ", ".join(f"{a} taken for {b}" for a, b, _ in report["most confused"][:10]) + ".",
        "",
        f"Of {len(report['photographs'])} held-out photographs and scenes of footage that show one of the things, "
        f"{photographs_right} were named right: "
        + "; ".join(f"{' or '.join(found['shows'])}: {found['named'][0]}" for found in report["photographs"])
        + ".",
        "",
        f"`{report['command']}`, bfloat16, torch {versions['torch']}, transformers {versions['transformers']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
