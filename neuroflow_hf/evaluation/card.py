"""
Write figures into the metadata (`model-index`) and the text of model cards. All else in a card stays as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..utils.files import fill_block

CARD = "README.md"
BLOCK = "neuroflow-eval"
MARKS = (f"<!-- {BLOCK}:begin -->", f"<!-- {BLOCK}:end -->")
NEW_CARD = """
# {name}

A SigLIP checkpoint, measured on video by `neuroflow eval`.

## Video
"""


# --- any card ------------------------------------------------------------------------------------------------------


def card_with_results(text: str, model_name: str, results: Sequence[EvalResult]) -> str:
    """
    Add figures to the metadata of a card in Markdown, or replace those of the same task, data and metric. `model_name`
    is for metadata that have none.

    Raises:
        ValueError: if the metadata are not a YAML mapping, or have a `model-index` that the Hub would not accept.
    """

    def question(one: EvalResult) -> tuple:
        return one.unique_identifier, one.dataset_name, one.metric_type, one.metric_name, one.metric_config

    card, asked = read_card(text), {question(one) for one in results}
    kept = [one for one in card.data.eval_results or [] if question(one) not in asked]
    for one in results:
        value = one.metric_value  # YAML would write NumPy's floats as objects
        kept.append(replace(one, metric_value=float(value) if isinstance(value, float) else value))
    card.data.model_name, card.data.eval_results = card.data.model_name or model_name, kept
    return str(card)


def read_card(text: str) -> ModelCard:
    """Parse a card; raise a ValueError if its metadata cannot be read."""
    if not text.lstrip().startswith("---"):
        text = "---\n{}\n---\n" + text  # without metadata, huggingface_hub would print a warning
    try:
        return ModelCard(text)
    except Exception as error:  # YAML has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"The metadata of the model card (the YAML between its first `---`) cannot be read: {reason} Fix them, or "
            "give --no-card."
        ) from error


# --- the card of an evaluation -------------------------------------------------------------------------------------


def existing_card(source: str | Path) -> str | None:
    """
    The card of a checkpoint, a folder or a name on the Hub; None if there is none, or the Hub cannot be reached.

    Raises:
        ValueError: if the card is not UTF-8, its metadata cannot be read, or one of `MARKS` is missing or repeated.
    """
    file = Path(source) / CARD
    if not Path(source).is_dir():
        try:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(str(source), CARD))
        except Exception:  # no card, no network, no such repository
            return None
    if not file.is_file():
        return None
    try:
        # as bytes, to keep line ends
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 ({error.reason} at byte {error.start}); fix it, or give --no-card."
        ) from error
    read_card(text)
    begin, end = MARKS
    if (text.count(begin), text.count(end)) not in ((0, 0), (1, 1)) or text.find(begin) > text.find(end):
        raise ValueError(
            f"{file} does not have `{begin}` and `{end}` once each, in this order, around the figures; fix it, remove "
            "both, or give --no-card."
        )
    return text


def new_card(name: str, reads_text: bool) -> str:
    """A card for a checkpoint that has none; it says nothing about licence, training or use."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if reads_text else "image-feature-extraction",
        tags=["siglip", "video", "neuroflow"],
    )
    return f"---\n{data.to_yaml()}\n---\n{NEW_CARD.format(name=name)}"


def evaluation_card(report: dict, tables: str, existing: str | None) -> str:
    """
    A checkpoint's card (None for a new one) with the figures of an evaluation in its metadata, and tables in Markdown
    between `MARKS`, which are added at the end if they are missing.
    """
    name = report["model"]["name"]
    text = new_card(name, report["model"]["reads_text"]) if existing is None else existing
    text = card_with_results(text, name, evaluation_results(report))
    line_end = "\r\n" if "\r\n" in text else "\n"
    text = text.replace("\r\n", "\n")
    begin, end = MARKS
    if begin not in text and end not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    return fill_block(text, BLOCK, tables).replace("\n", line_end)


def evaluation_results(report: dict) -> list[EvalResult]:
    """The figures of dense and of all methods but baselines, for a card's metadata."""
    labelled, data = bool(report["labels"]["names"]), report["videos"]["name"]
    task = "zero-shot-image-classification" if labelled else "image-feature-extraction"
    results = []

    def add(method: str, metric_type: str, metric_name: str, value: float | None):
        if value is not None:
            results.append(
                EvalResult(
                    task_type=task,
                    task_name="zero-shot labels of videos" if labelled else "embeddings of videos",
                    dataset_type=dataset_type(data),
                    dataset_name=data,
                    metric_type=metric_type,
                    metric_name=f"{metric_name}, {method}",
                    metric_value=round(value, 6),
                    verified=False,
                )
            )

    for entry in report["methods"]:
        if entry["control"]:
            continue
        figures, name = entry["figures"], entry["name"]
        accuracy = figures.get("accuracy", {})
        for k in (1, 5):
            add(name, "accuracy", f"top-{k} accuracy", accuracy.get(f"top{k}"))
        if name == "dense":
            continue
        add(name, "cost", "multiply-adds, dense = 1", figures["cost"])
        add(name, "cosine", "cosine to dense, mean", figures["cosine"]["mean"])
        add(name, "cosine", "cosine to dense, 5th percentile", figures["cosine"]["p5"])
        add(name, "agreement", "best label as dense's", figures.get("agreement"))
    return results


def dataset_type(name: str) -> str:
    """A name as an identifier on the Hub: `"My clips"` to `"my-clips"`."""
    return (
        "-".join("".join(sign if sign.isalnum() or sign in "._-" else " " for sign in name.lower()).split())
        or "videos"
    )
