"""The prompts that a drafter is trained on: none is measured, and structured text is what it says."""

import numpy as np

from neuroflow_hf.drift.prompts import first_of_each, read_prompts
from neuroflow_hf.loading import EMBEDDED_PROMPTS
from recipes.smollm2_drafter import prompts


def test_no_prompt_is_measured(monkeypatch):
    read = read_prompts(EMBEDDED_PROMPTS)
    measured = [read[index] for index in first_of_each([prompt.task for prompt in read], prompts.MEASURED)]
    code = next(prompt.text for prompt in measured if prompt.task == "code")
    prose = next(prompt.text for prompt in measured if prompt.task == "prose")
    other = "word " * 45
    files = {"code_files": [("a", code), ("b", code.replace("def ", "def x"))], "prose_files": [("c", other)]}
    for name, found in files.items():
        monkeypatch.setattr(prompts, name, lambda found=found: found)
    monkeypatch.setattr(prompts, "function_heads", lambda text: [text])
    monkeypatch.setattr(prompts, "sentences", lambda text, rng: [text, f"Then {prose}"])
    monkeypatch.setattr(prompts, "questions", lambda *_: ["What is a word?", measured[-1].text])
    built = [item["prompt"] for item in prompts.build(None, None)]
    assert not {prompt.text for prompt in measured} & set(built)
    assert f"Then {prose}" not in built
    assert {other, "What is a word?"} <= set(built)
    assert len(built) == len(set(built))
    assert sum(prompt.text in built for prompt in read) > len(read) - len(measured) - 10


def test_structured_text_differs():
    rng = np.random.default_rng(0)
    texts = [prompts.structured(rng) for _ in range(40)]
    assert len(set(texts)) > 35
    assert all(30 <= len(text) <= 350 for text in texts)
    assert {text[0] for text in texts} >= {"{", "[", "2"}
