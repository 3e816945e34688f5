"""The `evaluate` module: loaded by path, with lists and tensors, in batches, from several processes."""

import multiprocessing
import re
from pathlib import Path

import evaluate
import pytest
import torch

from neuroflow_hf.drift.metrics import kl_divergence

ROOT = Path(__file__).parents[2]
MODULE = str(ROOT / "eval" / "metrics" / "token_drift")
TEXTS = [[5, 6, 7, 8], [5, 6], [9, 9, 9, 9, 9], []]
DENSE = [[5, 6, 9, 8], [5, 6], [9, 9], []]
FEW = {"samples": 100}


@pytest.fixture
def load(tmp_path):
    return lambda *args, **options: evaluate.load(MODULE, *args, cache_dir=str(tmp_path), **options)


def test_known_sequences(load):
    found = load().compute(predictions=TEXTS, references=DENSE, **FEW)
    assert found["drift"] == pytest.approx((0.25 + 0 + 0.6 + 0) / 4)
    low, high = found["drift_interval"]
    assert 0 <= low <= found["drift"] <= high <= 0.6
    assert (found["diverged"], found["diverged_bound"], found["sequences"]) == (0.5, None, 4)
    assert (found["first_divergence_min"], found["first_divergence_median"]) == (2, 2)


def test_no_difference(load):
    found = load("tokens").compute(predictions=DENSE * 10, references=DENSE * 10, **FEW)
    assert (found["drift"], found["diverged"]) == (0, 0) and found["first_divergence_min"] is None
    assert found["diverged_bound"] == 3 / 40


def test_batches_and_tensors_give_the_same(load):
    texts, dense = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 3], [4, 9, 2]])
    expected = load().compute(predictions=texts.tolist(), references=dense.tolist(), **FEW)
    metric = load()
    metric.add_batch(predictions=texts[:1], references=dense[:1])
    metric.add_batch(predictions=texts[1:], references=dense[1:])
    assert metric.compute(**FEW) == expected
    assert load().compute(predictions=texts.numpy(), references=dense.numpy(), **FEW) == expected
    metric = load()
    for prediction, reference in zip(texts, dense, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute(**FEW) == expected


@pytest.mark.parametrize("end", [2, [2, 7]])
def test_what_follows_the_end_is_left_out(load, end):
    found = load().compute(predictions=[[5, 2, 0, 0]], references=[[5, 2, 8, 9]], eos_token_id=end, **FEW)
    assert found["drift"] == 0


def test_logits(load):
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    metric = load("logits")
    metric.add_batch(predictions=other, references=dense)
    found = metric.compute(**FEW)
    assert found["kl_mean"] == pytest.approx(kl_divergence(dense, other).mean().item(), rel=1e-5)
    assert found["other_top1"] == pytest.approx((dense.argmax(-1) != other.argmax(-1)).float().mean().item())
    same = load("logits").compute(predictions=dense, references=dense, **FEW)
    assert (same["kl_mean"], same["other_top1"], same["steps"]) == (0, 0, 6)


def test_bad_input(load):
    with pytest.raises(ValueError, match="'words'; expected 'tokens' or 'logits'"):
        load("words")
    logits = torch.randn(1, 3, 5)
    with pytest.raises(ValueError, match="2 `predictions` and 3 `references`"):
        load("logits").compute(predictions=logits[:, :2], references=logits, **FEW)


def measure_part(queue, folder, index, part):
    """What one of two processes does."""
    metric = evaluate.load(MODULE, cache_dir=folder, num_process=2, process_id=index, experiment_id="two")
    metric.add_batch(predictions=TEXTS[part], references=DENSE[part])
    queue.put((index, metric.compute(**FEW)))


@pytest.mark.parametrize("parts", [(slice(0, 3), slice(3, None)), (slice(0, None, 2), slice(1, None, 2))])
def test_two_processes_give_what_one_gives(load, tmp_path, parts):
    expected = load().compute(predictions=TEXTS, references=DENSE, **FEW)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=measure_part, args=(queue, str(tmp_path), index, part))
        for index, part in enumerate(parts)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    assert found == {0: expected, 1: None}


def test_the_cards_examples_say_what_they_give(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    names = {}
    card = (ROOT / "eval" / "metrics" / "token_drift" / "README.md").read_text(encoding="utf-8")
    checked = 0
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
        for expression, said in re.findall(r"^(result.*|round.*?)  # (.+)$", block, re.MULTILINE):
            value = eval(expression, names)
            assert value == pytest.approx(eval(said))
            checked += 1
    assert checked >= 5
