"""The `evaluate` modules: known answers, tensors, batches, processes, READMEs; the intervals behind them."""

import doctest
import json
import math
import os
import socket
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuroflow_hf.drift.metrics import kl_divergence
from neuroflow_hf.evaluation.statistics import (
    PairedCounts,
    mcnemar,
    paired_difference,
    paired_ratio,
    wilson,
)
from tests.processes import call_in_two

ROOT = Path(__file__).parents[2]
NAMES = ("embedding_fidelity", "zero_shot_accuracy", "skip_rate", "token_drift")
# complete response before and after consolidation therapy, M. Cavo et al., 2012: an example of textbooks
CAVO = PairedCounts(59, 6, 16, 80)


@pytest.fixture(scope="module", autouse=True)
def no_network_and_own_caches(tmp_path_factory):
    """`evaluate` copies module scripts and keeps inputs in files: both in a folder of these tests; no connections."""

    def refuse(connection, address):
        if connection.family != socket.AF_UNIX:
            raise AssertionError("a metric asked for the network")
        return connect(connection, address)

    connect = socket.socket.connect

    def forget_modules():
        for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
            del sys.modules[name]

    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        for config in (evaluate.config, datasets.config):
            patch.setattr(config, "HF_MODULES_CACHE", str(folder / "modules"), raising=False)
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        # other tests may have loaded a metric from another folder, which would be looked into first
        patch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "evaluate_modules").is_dir()])
        patch.setattr(socket.socket, "connect", refuse)
        forget_modules()
        yield
        forget_modules()


def load(name, *args, **kwargs):
    return evaluate.load(str(ROOT / "eval/metrics" / name), *args, **kwargs)


# --- intervals -----------------------------------------------------------------------------------------------------


def test_wilson_of_known_counts():
    assert wilson(1, 2) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe's example, 1998
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert wilson(0, 7)[0] == 0 and wilson(7, 7)[1] == 1


def test_paired_intervals_of_known_counts():
    # as the R package `contingencytables` computes them
    assert paired_ratio(CAVO) == pytest.approx((0.7579, 0.9910), abs=5e-5)
    assert paired_difference(CAVO) == pytest.approx((-0.1186, -0.0046), abs=5e-5)
    assert mcnemar(6, 16) == pytest.approx(0.0525, abs=1e-4)


TABLES = [  # of 16 questions
    PairedCounts(both, first, second, 16 - both - first - second)
    for both in range(17)
    for first in range(17 - both)
    for second in range(17 - both - first)
]


@pytest.mark.parametrize("interval", [paired_difference, paired_ratio])
def test_paired_intervals_hold_the_truth_about_as_often_as_they_say(interval):
    bounds = np.array([interval(counts) or (0, math.inf) for counts in TABLES])
    ways = [math.factorial(16) / math.prod(map(math.factorial, counts)) for counts in TABLES]
    for cells in [(0.6, 0.1, 0.15, 0.15), (0.3, 0.2, 0.1, 0.4), (0.8, 0.05, 0.1, 0.05)]:
        both, first, second, _ = cells
        truth = first - second if interval is paired_difference else (both + first) / (both + second)
        chances = ways * np.prod(np.power(cells, TABLES), axis=1)
        assert chances.sum() == pytest.approx(1)
        assert 0.93 < chances[(bounds[:, 0] <= truth) & (truth <= bounds[:, 1])].sum() < 0.995


tables = st.builds(PairedCounts, *[st.integers(0, 300)] * 4)


@given(tables)
def test_paired_intervals_hold_the_estimate_and_mirror(counts):
    swapped = PairedCounts(counts.both, counts.only_second, counts.only_first, counts.neither)
    low, high = paired_difference(counts)
    assert -1 <= low <= high <= 1
    if sum(counts):
        assert low - 1e-12 <= (counts.first - counts.second) / sum(counts) <= high + 1e-12
        assert paired_difference(swapped) == pytest.approx((-high, -low))
    ratio = paired_ratio(counts)
    assert (ratio is None) == (counts.first == counts.second == 0)
    if ratio is not None:
        assert 0 <= ratio.low <= ratio.high
        if counts.second:
            assert ratio.low - 1e-12 <= counts.first / counts.second <= ratio.high + 1e-9


# --- known answers -------------------------------------------------------------------------------------------------


def test_embedding_fidelity_of_known_angles():
    angles = torch.linspace(0, math.pi, 101, dtype=torch.float64)
    predictions = 3 * torch.stack((angles.cos(), angles.sin()), dim=-1)
    found = load("embedding_fidelity").compute(
        predictions=predictions, references=torch.tensor([[2.0, 0.0]]).expand(101, 2)
    )
    assert found["count"] == 101
    assert found["cosine_mean"] == pytest.approx(0, abs=1e-6) and found["cosine_median"] == pytest.approx(0, abs=1e-6)
    assert found["cosine_p1"] == pytest.approx(math.cos(0.99 * math.pi), abs=1e-6)
    assert found["cosine_p5"] == pytest.approx(math.cos(0.95 * math.pi), abs=1e-6)
    assert [found[f"norm_ratio_{which}"] for which in ("mean", "min", "max")] == pytest.approx([1.5] * 3)


def test_accuracy_counts_ties_as_wrong():
    metric = load("zero_shot_accuracy")
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    found = metric.compute(predictions=scores, references=[0, 0, 0, 2], top_k=[2, 1, 3])
    assert (found["top1"], found["top2"], found["top3"]) == (0.25, 0.5, 1.0)
    assert found["top1_interval"] == list(wilson(1, 4))
    assert "top1_retention" not in found
    assert set(metric.compute(predictions=scores, references=[0] * 4)) == {"count", "top1", "top1_interval"}


def test_accuracy_against_dense():
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    table = [(right, right)] * 59 + [(right, wrong)] * 6 + [(wrong, right)] * 16 + [(wrong, wrong)] * 80
    ours, dense = zip(*table, strict=True)
    found = load("zero_shot_accuracy", "against_dense").compute(
        predictions=ours, dense_predictions=dense, references=[0] * len(table), confidence=0.9
    )
    assert (found["top1"], found["dense_top1"]) == pytest.approx((65 / 161, 75 / 161))
    assert found["top1_retention"] == pytest.approx(65 / 75)
    assert found["top1_retention_interval"] == list(paired_ratio(CAVO, 0.9))
    assert found["top1_difference_interval"] == list(paired_difference(CAVO, 0.9))
    assert (found["top1_only_ours"], found["top1_only_dense"]) == (6, 16)
    assert found["top1_mcnemar"] == mcnemar(6, 16)
    json.dumps(found, allow_nan=False)


def test_accuracy_where_dense_is_never_right_is_still_json():
    found = load("zero_shot_accuracy", "against_dense").compute(
        predictions=[[0.0, 1.0]], dense_predictions=[[1.0, 0.0]], references=[1]
    )
    assert found["top1_retention"] is None and found["top1_retention_interval"][1] is None
    json.dumps(found, allow_nan=False)


def test_skip_rate_of_frames_of_two_sizes():
    found = load("skip_rate").compute(
        active=torch.tensor([10, 0, 30]),
        patches=[10, 10, 60],
        multiply_adds=[100, 5, 120],
        dense_multiply_adds=[100, 100, 300],
    )
    assert found["frames"] == 3
    assert found["skip_rate"] == 0.5 and found["skip_rate_median"] == 0.5
    assert found["cost"] == 0.45 and found["cost_median"] == pytest.approx(0.4)
    assert found["cost_p95"] == pytest.approx(0.94)


def test_drift_of_known_sequences():
    texts, dense = [[5, 6, 7, 8], [5, 6], [9, 9, 9, 9, 9], []], [[5, 6, 9, 8], [5, 6], [9, 9], []]
    found = load("token_drift").compute(predictions=texts, references=dense)
    assert found["drift"] == pytest.approx((0.25 + 0 + 0.6 + 0) / 4)
    assert 0 <= found["drift_interval"][0] <= found["drift"] <= found["drift_interval"][1] <= 0.6
    assert (found["diverged"], found["diverged_bound"], found["sequences"]) == (0.5, None, 4)
    assert (found["first_divergence_min"], found["first_divergence_median"]) == (2, 2)
    same = load("token_drift", "tokens").compute(predictions=dense * 10, references=dense * 10)
    assert (same["drift"], same["diverged"], same["first_divergence_min"]) == (0, 0, None)
    assert same["diverged_bound"] == 3 / 40
    for end in (2, [2, 7]):
        ended = load("token_drift").compute(predictions=[[5, 2, 0]], references=[[5, 2, 8, 9]], eos_token_id=end)
        assert ended["drift"] == 0


def test_drift_of_logits():
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    found = load("token_drift", "logits").compute(predictions=other, references=dense)
    assert found["kl_mean"] == pytest.approx(kl_divergence(dense, other).mean().item(), rel=1e-5)
    assert found["other_top1"] == pytest.approx((dense.argmax(-1) != other.argmax(-1)).float().mean().item())
    same = load("token_drift", "logits").compute(predictions=dense, references=dense)
    assert (same["kl_mean"], same["other_top1"], same["steps"]) == (0, 0, 6)
    with pytest.raises(ValueError, match="2 `predictions` and 3 `references`"):
        load("token_drift", "logits").compute(predictions=other[:1, :2], references=dense[:1])


# --- tensors, batches, processes -----------------------------------------------------------------------------------


def made_up(count=40, seed=0):
    """Inputs of every metric, in bfloat16: by name, its configuration and columns."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    active = torch.randint(0, 197, (count,), generator=generator)
    embeddings, scores = normal(count, 24), normal(count, 7)
    return {
        "embedding_fidelity": (None, {"predictions": embeddings + normal(count, 24) / 8, "references": embeddings}),
        "zero_shot_accuracy": (
            "against_dense",
            {
                "predictions": scores + normal(count, 7) / 2,
                "references": scores.argmax(-1).where(active > 60, torch.zeros(())).long(),
                "dense_predictions": scores,
            },
        ),
        "skip_rate": (
            None,
            {
                "active": active,
                "patches": torch.full((count,), 196),
                "multiply_adds": (active / 190).bfloat16(),
                "dense_multiply_adds": torch.ones(count),
            },
        ),
        "token_drift": (None, {"predictions": active.view(-1, 1) // 9, "references": active.view(-1, 1) // 8}),
    }


def together(name):
    """The figures of `made_up` columns in one call."""
    configuration, columns = made_up()[name]
    return load(name, configuration).compute(**columns)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_taken_as_it_is(name):
    configuration, columns = made_up()[name]
    as_float = {key: value.float() if value.is_floating_point() else value for key, value in columns.items()}
    assert load(name, configuration).compute(**as_float) == together(name)


@pytest.mark.parametrize("name", NAMES)
def test_batches_in_any_order_give_what_one_call_gives(name):
    configuration, columns = made_up()[name]
    metric = load(name, configuration)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for places in order.split(13):
        metric.add_batch(**{key: value[places] for key, value in columns.items()})
    assert metric.compute() == together(name)


def test_gradients_are_no_obstacle():
    embeddings = torch.randn(3, 4, requires_grad=True)
    found = load("embedding_fidelity").compute(predictions=embeddings, references=embeddings.detach())
    assert found["cosine_p1"] == pytest.approx(1)


def compute_a_half(folder):
    """What one of two processes does: every second row of every metric."""
    for config in (evaluate.config, datasets.config):
        config.HF_MODULES_CACHE = str(folder / "modules")
    rank, options = int(os.environ["RANK"]), {"cache_dir": str(folder / "cache"), "experiment_id": "two"}
    metrics = {}
    for name, (configuration, columns) in made_up().items():
        metrics[name] = load(name, configuration, num_process=2, process_id=rank, **options)
        metrics[name].add_batch(**{key: value[rank::2] for key, value in columns.items()})
    print(json.dumps({name: metric.compute() for name, metric in metrics.items()}))


def test_two_processes_give_what_one_gives(tmp_path):
    printed = call_in_two(compute_a_half, tmp_path)
    expected = {name: together(name) for name in NAMES}
    assert [json.loads(line) for line in printed] == [json.loads(json.dumps(expected)), dict.fromkeys(NAMES)]


# --- refusals and documentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, columns, said",
    [
        ("embedding_fidelity", {"predictions": [[1.0]], "references": [[0.0]]}, "Row 0 of `references` has length 0"),
        ("embedding_fidelity", {"predictions": [[math.nan]], "references": [[1.0]]}, "`predictions` has length nan"),
        ("embedding_fidelity", {"predictions": [[1.0]], "references": [[1.0, 2.0]]}, "expected one shape"),
        ("embedding_fidelity", {"predictions": [[1.0], [1.0, 2.0]], "references": [[1.0]] * 2}, "widths"),
        ("zero_shot_accuracy", {"predictions": [[1.0, 2.0]], "references": [2]}, "Label 0 is 2; expected from 0 to 1"),
        ("zero_shot_accuracy", {"predictions": [[1.0, math.nan]], "references": [0]}, "holds NaN"),
        ("zero_shot_accuracy", {"predictions": [[1.0, 2.0]], "references": [0], "top_k": 3}, "holds 3; expected"),
        (
            "skip_rate",
            {"active": [5], "patches": [4], "multiply_adds": [1], "dense_multiply_adds": [1]},
            "Frame 0: 5 of 4 patches are active",
        ),
        (
            "skip_rate",
            {"active": [4], "patches": [4], "multiply_adds": [1], "dense_multiply_adds": [0]},
            "Frame 0: 1.0 multiply-adds were spent and 0.0 are dense's",
        ),
    ],
)
def test_what_has_no_answer_is_refused(name, columns, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        load(name, cache_dir=str(tmp_path)).compute(**columns)


@pytest.mark.parametrize("name, expected", [("zero_shot_accuracy", "against_dense"), ("token_drift", "logits")])
def test_an_unknown_configuration_is_refused(name, expected):
    with pytest.raises(ValueError, match=expected):
        load(name, "against_the_wall")


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    metric = load(name)
    readme = (ROOT / "eval/metrics" / name / "README.md").read_text(encoding="utf-8")
    assert metric.citation.strip() and metric.description.strip()
    for text in (readme, metric.inputs_description):
        case = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
        assert case.examples
        printed = []
        outcome = doctest.DocTestRunner().run(case, out=printed.append)
        assert outcome.failed == 0, "".join(printed)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_documented(name):
    readme = (ROOT / "eval/metrics" / name / "README.md").read_text(encoding="utf-8")
    for key in together(name):
        stem = key.replace("top1", "top{k}").replace("top5", "top{k}").removesuffix("_interval")
        assert f"`{stem}`" in readme, key


def test_skip_rate_is_that_of_the_model(vision):
    stream, metric, rates = vision.new_stream(threshold=0.02), load("skip_rate"), []
    torch.manual_seed(0)
    frame = torch.randn(1, 3, 24, 24)
    for place in range(3):
        frame[..., place] += 1
        with torch.no_grad():
            output = vision(pixel_values=frame, stream=stream)
        rates.append((output.skip_rate.item(), output.cost.item()))
        metric.add_batch(
            active=output.active_mask.sum((1, 2)), patches=[36], multiply_adds=output.cost, dense_multiply_adds=[1]
        )
    found = metric.compute()
    assert (found["skip_rate"], found["cost"]) == pytest.approx(tuple(np.mean(rates, axis=0)))
