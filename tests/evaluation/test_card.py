"""Model cards: figures go into the head, and nothing that was there is lost; the cards in this repository."""

import json
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard

from eval.vision.zero_shot_small import card_results
from neuroflow_hf.evaluation.card import (
    MARKS,
    card_with_results,
    dataset_type,
    evaluation_card,
    existing_card,
)

ROOT = Path(__file__).parents[2]
HEAD = """---
license: mit
base_model: someone/else
my_own_key:
- 1
- two: three
model-index:
- name: named
  results:
  - task:
      type: image-classification
    dataset:
      name: Theirs
      type: theirs
    metrics:
    - type: accuracy
      value: 0.5
---
"""
BODY = "\n# A card\n\nText with `code`, | pipes |, --- and\n\n---\n\na rule.  \n<!-- a comment -->\n\nNo end of line"


def result(value=0.25, **more):
    named = {"task_type": "t", "dataset_type": "d", "dataset_name": "D", "metric_type": "accuracy"}
    return EvalResult(**{**named, "metric_name": "top-1", "metric_value": value, "verified": False, **more})


def report(labels=("a", "b"), **accuracy):
    figures = {"cost": 0.2, "cosine": {"mean": 0.9, "p5": 0.8}, "agreement": 0.75}
    if accuracy:
        figures["accuracy"] = accuracy
    entries = [("dense", False), ("balanced", False), ("every 3", True)]
    return {
        "model": {"name": "tiny"},
        "videos": {"name": "My clips"},
        "labels": {"names": list(labels)},
        "methods": [{"name": name, "control": control, "figures": figures} for name, control in entries],
    }


def test_nothing_is_lost():
    card = ModelCard(card_with_results(HEAD + BODY, "mine", [result()]))
    assert card.text.endswith(BODY)
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["base_model"] == "someone/else"
    assert data["my_own_key"] == [1, {"two": "three"}]
    assert card.data.model_name == "named"
    assert [one.metric_value for one in card.data.eval_results] == [0.5, 0.25]


def test_figures_are_replaced_not_repeated():
    once = card_with_results(HEAD + BODY, "mine", [result(0.25)])
    assert card_with_results(once, "mine", [result(0.25)]) == once
    twice = ModelCard(card_with_results(once, "mine", [result(0.75), result(0.1, metric_name="top-5")]))
    assert [one.metric_value for one in twice.data.eval_results] == [0.5, 0.75, 0.1]


def test_a_card_without_head_gets_one():
    card = ModelCard(card_with_results("# Only text\n", "mine", [result()]))
    assert card.data.model_name == "mine" and "# Only text" in card.text


@pytest.mark.parametrize("head", ["---\na: [\n---\n", "---\n- a\n- b\n---\n", "---\nmodel-index: 3\n---\n"])
def test_a_head_that_cannot_be_kept_is_refused(head, tmp_path):
    with pytest.raises(ValueError, match=r"metadata .* cannot be read"):
        card_with_results(head, "mine", [result()])
    (tmp_path / "README.md").write_text(head)
    with pytest.raises(ValueError, match="--no-card"):
        existing_card(tmp_path)


def test_there_may_be_no_card(tmp_path):
    assert existing_card(tmp_path) is None
    assert existing_card("no-one/has-this-model") is None
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"README\.md cannot be extended: .*utf-8"):
        existing_card(tmp_path)


def test_an_evaluation_in_an_existing_card():
    text = evaluation_card(report(top1=0.5, top5=1.0), "A TABLE", HEAD + BODY)
    assert BODY.rstrip() in text and "A TABLE" in text
    found = {
        (one.metric_type, one.metric_name): one
        for one in ModelCard(text).data.eval_results
        if one.dataset_name != "Theirs"
    }
    assert found["accuracy", "top-1 accuracy, balanced"].metric_value == 0.5
    assert found["accuracy", "top-5 accuracy, dense"].metric_value == 1
    assert found["cosine", "cosine to dense, 5th percentile, balanced"].metric_value == 0.8
    assert ("cost", "multiply-adds, dense = 1, balanced") in found
    assert all(one.verified is False and one.dataset_type == "my-clips" for one in found.values())
    assert not any("every 3" in name or (name.startswith("cosine") and "dense, dense" in name) for _, name in found)
    again = evaluation_card(report(top1=0.75, top5=1.0), "ANOTHER TABLE", text)
    assert "A TABLE" not in again and "ANOTHER TABLE" in again and BODY.rstrip() in again
    assert len(ModelCard(again).data.eval_results) == len(ModelCard(text).data.eval_results)


def test_a_new_card_says_nothing_that_is_not_known():
    text = evaluation_card(report(labels=()), "A TABLE", None)
    card = ModelCard(text)
    assert card.data.pipeline_tag == "image-feature-extraction" and card.data.license is None
    assert "# tiny" in text and "A TABLE" in text
    labelled = ModelCard(evaluation_card(report(), "A TABLE", None))
    assert labelled.data.pipeline_tag == "zero-shot-image-classification"
    assert dataset_type("  ") == "videos" and dataset_type("UCF-101") == "ucf-101"


# --- the card under models/ ----------------------------------------------------------------------------------------


def test_the_card_agrees_with_the_json():
    name = "neuroflow-siglip-small"
    card = ModelCard.load(ROOT / "models" / name / "README.md")
    report = json.loads((ROOT / "eval" / "results" / "zero_shot_small.json").read_text(encoding="utf-8"))
    assert card.data.model_name == name and card.data.license == "apache-2.0"
    found = {(one.dataset_name, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert found == {(one.dataset_name, one.metric_name): one.metric_value for one in card_results(report)}
    held_out = report["held-out renderings, photographs and phrasings"]
    assert round(held_out["top1"], 4) in found.values() and round(held_out["top5"], 4) in found.values()


@pytest.mark.parametrize("marks", ["{0}", "{1}\n{0}", "{0}\n{1}\n{0}\n{1}"])
def test_a_card_whose_marks_do_not_fit_is_refused_before_anything_is_measured(tmp_path, marks):
    file = tmp_path / "README.md"
    file.write_text("# Mine\n" + "\n".join(MARKS))
    assert existing_card(tmp_path) is not None
    file.write_text("# Mine\n" + marks.format(*MARKS))
    with pytest.raises(ValueError, match=r"README\.md cannot be extended: .* once each, in this order"):
        existing_card(tmp_path)
