"""The prompts that text generation is measured with: how they are built, and what is in the file."""

import json
from collections import Counter

import numpy as np
import pytest

from neuroflow_hf.loading import EMBEDDED_PROMPTS
from recipes.prompts import build
from recipes.prompts.build import draw, function_heads, packages, sentences


@pytest.fixture(scope="module")
def lines():
    return [json.loads(line) for line in EMBEDDED_PROMPTS.read_text(encoding="utf-8").splitlines()]


def test_prompts_end_where_a_function_begins_to_do_something():
    text = "@x.y\ndef f(a):\n    '''Doc.'''\n    b = a\n    c = b\n    return c\n\ndef short():\n    return 1\n"
    assert list(function_heads(text)) == ["@x.y\ndef f(a):\n    '''Doc.'''"]


def test_prose_begins_with_a_sentence_and_goes_on():
    text = "Mr. Smith went on.\nHe did so for long: " + "word " * 100
    found = set(sentences(text, np.random.default_rng(0)))
    assert all(prompt.startswith(("Mr. Smith went", "He did so")) for prompt in found)
    assert all(40 <= len(prompt.split()) < 70 for prompt in found)
    assert list(sentences("Too short to go on.", np.random.default_rng(0))) == []


def test_prompts_are_drawn_from_all_files_in_turn():
    files = [(source, [f"{source}{number}" for number in range(5)]) for source in "abc"] + [("d", ["a0"])]
    drawn = draw("code", files, np.random.default_rng(0), 7)
    assert drawn == draw("code", files, np.random.default_rng(0), 7)
    assert len({item["prompt"] for item in drawn}) == 7
    assert {item["source"] for item in drawn[:3]} >= set("abc") - {drawn[3]["source"]}
    with pytest.raises(ValueError, match="only 15 prompts for code; expected 16"):
        draw("code", files, np.random.default_rng(0), 16)


def test_every_package_is_pinned_and_credited():
    for name, row in packages().items():
        assert len(row["sha256"]) == 64 and row["version"] and row["licence"] and row["author"], name


def test_there_are_enough_prompts_of_every_task(lines):
    counts = Counter(item["task"] for item in lines)
    assert counts.keys() == {"code", "structured", "prose", "chat"} and min(counts.values()) >= 50
    assert len({item["prompt"] for item in lines}) == len(lines)
    assert all(item["source"] and item["prompt"] == item["prompt"].strip() for item in lines)
    forms = Counter(item["source"].rpartition(" ")[2] for item in lines if item["task"] == "structured")
    assert forms.keys() == {"json", "csv", "yaml", "toml", "log"} and min(forms.values()) >= 10


@pytest.mark.slow
def test_the_file_is_what_the_builder_makes(lines):
    """Downloads 20 MB."""
    assert build.build() == [item for item in lines if item["task"] in ("code", "prose")]
