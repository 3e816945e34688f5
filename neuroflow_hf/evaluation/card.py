"""Model cards: write the figures of an evaluation into the metadata (`model-index`) and the text, keep the rest."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

from ..utils.files import fill_block

CARD = "README.md"
BLOCK = "neuroflow-eval"
MARKS = (f"<!-- {BLOCK}:begin -->", f"<!-- {BLOCK}:end -->")
NEW_CARD = """
# {name}

A SigLIP checkpoint, measured on video by `neuroflow eval`.

## Video
"""


def card_with_results(text: str, model_name: str, results: Sequence[EvalResult]) -> str:
    """
    A card in Markdown with results in its metadata, in place of earlier ones of the same task, data and metric.
    `model_name` is used if the metadata have no name.
    """
    card = read_card(text)
    kept = [old for old in card.data.eval_results or [] if not any(map(old.is_equal_except_value, results))]
    card.data.model_name, card.data.eval_results = card.data.model_name or model_name, [*kept, *results]
    return str(card)


def read_card(text: str) -> ModelCard:
    """Parse a card; raise a ValueError if its metadata cannot be read."""
    if not text.lstrip().startswith("---"):
        text = "---\n{}\n---\n" + text  # without metadata, huggingface_hub would print a warning
    try:
        return ModelCard(text)
    except Exception as error:  # YAML has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"The metadata (the YAML between the first `---`) cannot be read: {reason}") from error


def existing_card(source: str | Path) -> str | None:
    """
    The card of a checkpoint, a folder or a name on the Hub; None if there is none, or the Hub cannot be reached.
    ValueError if it is not UTF-8, its metadata cannot be read, or one of `MARKS` is missing or repeated.
    """
    file = Path(source) / CARD
    if not Path(source).is_dir():
        try:
            file = Path(hf_hub_download(str(source), CARD))
        except Exception:  # no card, no network, no such repository
            return None
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
        read_card(text)
        if any(mark in text for mark in MARKS):
            fill_block(text, BLOCK, "")
    except ValueError as error:
        raise ValueError(f"{file} cannot be extended: {error} Fix the card, or give --no-card.") from error
    return text


def evaluation_card(report: dict, tables: str, existing: str | None) -> str:
    """
    A checkpoint's card (None: a new one) with the figures of an evaluation in its metadata, and tables in Markdown
    between `MARKS`, which are added at the end if they are missing.
    """
    name, text = report["model"]["name"], existing
    if text is None:
        task = "zero-shot-image-classification" if report["labels"]["names"] else "image-feature-extraction"
        data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["siglip", "video", "neuroflow"])
        text = f"---\n{data.to_yaml()}\n---\n{NEW_CARD.format(name=name)}"
    text = card_with_results(text, name, evaluation_results(report))
    if MARKS[0] not in text:
        text = "{}\n\n{}\n{}\n".format(text.rstrip(), *MARKS)
    return fill_block(text, BLOCK, tables)


def evaluation_results(report: dict) -> list[EvalResult]:
    """The figures of dense and of all methods but baselines, for a card's metadata."""
    labelled, data = bool(report["labels"]["names"]), report["videos"]["name"]
    about = {
        "task_type": "zero-shot-image-classification" if labelled else "image-feature-extraction",
        "task_name": "zero-shot labels of videos" if labelled else "embeddings of videos",
        "dataset_type": dataset_type(data),
        "dataset_name": data,
        "verified": False,
    }
    results = []
    for entry in report["methods"]:
        figures = entry["figures"]
        found = [("accuracy", f"top-{k} accuracy", figures.get("accuracy", {}).get(f"top{k}")) for k in (1, 5)]
        if entry["name"] != "dense":
            found += [
                ("cost", "multiply-adds, dense = 1", figures["cost"]),
                ("cosine", "cosine to dense, mean", figures["cosine"]["mean"]),
                ("cosine", "cosine to dense, 5th percentile", figures["cosine"]["p5"]),
                ("agreement", "best label as dense's", figures.get("agreement")),
            ]
        for kind, metric, value in found:
            if value is not None and not entry["control"]:
                measured = {"metric_name": f"{metric}, {entry['name']}", "metric_value": round(value, 6)}
                results.append(EvalResult(**about, metric_type=kind, **measured))
    return results


def dataset_type(name: str) -> str:
    """A name as an identifier on the Hub: `"My clips"` to `"my-clips"`."""
    return re.sub(r"[^\w.-]+", "-", name.lower()).strip("-") or "videos"
