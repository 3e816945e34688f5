"""The bound of the embedded SigLIP: pooling under masks, classifiers, parts of the drawings; nothing is downloaded."""

import json
from types import SimpleNamespace

import pytest
import torch

from eval.report import RESULTS, fill_block
from eval.vision import zero_shot_bound
from eval.vision.composed_bench import CHECKPOINT
from eval.vision.zero_shot_bound import beside, card_table, classifiers, part_of_styles, under_mask
from eval.vision.zero_shot_small import card_tables, is_large, one_thing
from recipes.siglip_small.facts import Placed


def test_only_covered_patches_are_pooled():
    features = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [100.0, 100.0]]])
    pooled = under_mask(features, torch.tensor([[1.0, 0.5, 0.1]]))
    assert pooled.tolist() == [[2.0, -3.0, 3.0, -2.0]]


def test_pictures_of_one_large_thing():
    def picture(*placed):
        return SimpleNamespace(placed=[Placed(thing, "noto", 0.5, 0.5, share) for thing, share in placed])

    assert one_thing(picture(("dog", 0.2), ("dog", 0.1))) and is_large(picture(("dog", 0.2), ("dog", 0.1)))
    assert not one_thing(picture(("dog", 0.2), ("cat", 0.1)))
    assert not is_large(picture(("dog", 0.1)))


def test_classifiers_tell_what_can_be_told_and_nothing_else(monkeypatch):
    monkeypatch.setattr(zero_shot_bound, "FEWEST_STEPS", 200)  # enough for 400 pictures
    torch.manual_seed(0)
    named = torch.arange(600) % 3
    far = torch.nn.functional.one_hot(named, 3).float() * 4
    known = torch.cat([far, torch.zeros(600, 5)], dim=1) + 0.3 * torch.randn(600, 8)
    for name, scores in classifiers(known[:400], named[:400], 3).items():
        assert (scores(known[400:]).argmax(-1) == named[400:]).float().mean() > 0.95, name
    shuffled = named[torch.randperm(600)]
    for name, scores in classifiers(known[:400], shuffled[:400], 3).items():
        assert (scores(known[400:]).argmax(-1) == shuffled[400:]).float().mean() < 0.5, name


def test_parts_of_the_styles_are_nested_and_leave_no_thing_out():
    named = torch.tensor([0] * 8 + [1] * 4)
    styles = list("abcdabcd") + list("aabb")
    parts = [set(part_of_styles(styles, named, share).tolist()) for share in (0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [4, 6, 12]  # one style of each thing, half of them, all
    assert parts[0] < parts[1] < parts[2]


def test_a_classifier_is_compared_with_the_model_picture_by_picture():
    right, of_model = torch.tensor([True, True, True, False]), torch.tensor([True, False, False, False])
    found = beside(right, of_model)
    assert found["top1"] == 0.75 and found["above_model"] == pytest.approx(0.5)
    low, high = found["above_model_interval"]
    assert low < 0.5 < high


@pytest.mark.parametrize(
    ("name", "block", "make"),
    [("zero_shot_small", "figures", card_tables), ("zero_shot_bound", "figures:bound", card_table)],
)
def test_the_cards_tables_are_those_of_the_json(name, block, make):
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert fill_block(card, block, make(report)) == card
