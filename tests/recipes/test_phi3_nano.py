"""The embedded Phi-3 as it is published: loading, size, and a few completions."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM

from neuroflow_hf import NeuroFlowPhi3ForCausalLM
from recipes.phi3_nano.judge import judge

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "neuroflow-phi3-nano"
PROMPTS = ROOT / "eval" / "prompts" / "phi3_nano.jsonl"
TASKS = ("code", "structured", "prose")


@pytest.fixture(scope="module")
def stock():
    return Phi3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def prompts():
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def test_it_is_small_deep_and_in_half_precision(stock):
    assert stock.config.num_hidden_layers >= 12
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 30e6
    assert {path.suffix for path in FOLDER.iterdir()} <= {".json", ".md", ".safetensors", ".jinja"}
    assert Phi3ForCausalLM.from_pretrained(FOLDER).dtype == torch.float16


def test_stock_and_ours_give_equal_logits(stock, tokenizer, prompts):
    ours = NeuroFlowPhi3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.inference_mode():
        for item in (prompts[0], prompts[-1]):
            inputs = tokenizer(item["prompt"], return_tensors="pt")
            assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_the_auto_class_loads_it(stock):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)


def test_lossless_generation_gives_the_same_text(stock, tokenizer, prompts):
    ours = NeuroFlowPhi3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    inputs = tokenizer(prompts[0]["prompt"], return_tensors="pt")
    options = {"max_new_tokens": 40, "do_sample": False}
    lossless = {"drafter": "bypass", "draft_length": 3, "min_confidence": 0}
    output = ours.generate(**inputs, **options, lossless=lossless, return_dict_in_generate=True)
    assert torch.equal(output.sequences, stock.generate(**inputs, **options))
    assert output.lossless.accepted > 0


def test_functions_are_completed_to_python(stock, tokenizer, prompts):
    heads = [
        "def count_lines(path):",
        "class Reader:\n    def __init__(self, name, value=None):",
        *[item["prompt"] for item in prompts if item["task"] == "code"][:4],
    ]
    good = 0
    for head in heads:
        inputs = tokenizer(head, return_tensors="pt")
        output = stock.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs.input_ids.shape[1] :]
        good += judge(head, tokenizer.decode(output, skip_special_tokens=True)).statements > 0
    assert good >= len(heads) // 2


def test_prompts_are_held_out_short_and_of_every_task(tokenizer, prompts):
    for task in TASKS:
        texts = [item["prompt"] for item in prompts if item["task"] == task]
        assert len(texts) == len(set(texts)) >= 50
        assert all(50 <= len(tokenizer(text).input_ids) <= 120 for text in texts)
    assert all(item["source"] and item["prompt"] == item["prompt"].rstrip() for item in prompts)


def test_the_tokenizer_gives_back_the_prompts(tokenizer, prompts):
    for item in prompts:
        assert tokenizer.decode(tokenizer(item["prompt"]).input_ids) == item["prompt"]


def test_the_card_has_figures_and_credits():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for found in ("bits per byte", "Herman Melville", "Princeton University", "trust_remote_code=True", "Not to be"):
        assert found in card
    report = json.loads((ROOT / "eval" / "results" / "phi3_nano.json").read_text(encoding="utf-8"))
    assert f"{report['perplexity']['code']['model']['perplexity']:.1f}" in card
