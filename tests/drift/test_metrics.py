"""Drift in figures: hand-made sequences and distributions with known answers, intervals, prompts out of files."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroflow_hf.drift.grid import (
    FIRST,
    full_grid,
    own_configuration,
    scaled_pairs,
    thresholds_for_rates,
    weights_left_out,
)
from neuroflow_hf.drift.metrics import (
    PromptRecord,
    compare_steps,
    figures,
    first_divergence,
    kl_divergence,
    negative_log_likelihood,
    position_drift,
    summarise,
)
from neuroflow_hf.drift.prompts import CHAT, Prompt, encode_prompt, first_of_each, order_tasks, read_prompts
from neuroflow_hf.evaluation.statistics import (
    bootstrap_interval,
    difference_interval,
    mean,
    mean_interval,
    zero_failure_bound,
)
from tests.phi3_models import make_ours, make_tokenizer

tokens = st.lists(st.integers(0, 5), max_size=12)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=30)

# --- sequences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "other", "drift", "first"),
    [
        ([], [], 0.0, None),
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.0, None),
        ([1, 2, 3, 4], [1, 9, 3, 9], 0.5, 1),
        ([1, 2, 3, 4], [9, 9, 9, 9], 1.0, 0),
        ([1, 2, 3, 4], [1, 2], 0.5, 2),
        ([1, 2], [1, 2, 3, 4], 0.5, 2),
        ([], [1], 1.0, 0),
        ([1, 2, 3, 4], [2, 3, 4], 1.0, 0),  # one token less moves all others
    ],
)
def test_known_sequences(dense, other, drift, first):
    assert position_drift(dense, other) == drift
    assert first_divergence(dense, other) == first


@settings(deadline=None)
@given(tokens, tokens)
def test_drift_and_first_divergence_agree(dense, other):
    drift, first = position_drift(dense, other), first_divergence(dense, other)
    assert 0 <= drift <= 1
    assert (drift == 0) == (first is None) == (dense == other)
    assert drift == position_drift(other, dense) and first == first_divergence(other, dense)
    if first is not None:
        assert dense[:first] == other[:first]
        positions = max(len(dense), len(other))
        assert drift <= (positions - first) / positions


# --- distributions -------------------------------------------------------------------------------------------------


def logits_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_known_distributions():
    dense, other = logits_of(0.5, 0.25, 0.25), logits_of(0.25, 0.25, 0.5)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert kl_divergence(dense, other).item() == pytest.approx(expected)
    assert kl_divergence(dense, dense).item() == 0
    assert kl_divergence(dense + 5, other - 3).item() == pytest.approx(expected)  # logits, not log-probabilities
    assert kl_divergence(logits_of(1.0, 0.0), logits_of(0.5, 0.5)).item() == pytest.approx(math.log(2))
    assert kl_divergence(logits_of(0.5, 0.5), logits_of(1.0, 0.0)).item() == math.inf


def test_steps_are_compared():
    differs, kl = compare_steps(
        torch.cat([logits_of(0.5, 0.25, 0.25), logits_of(0.9, 0.1, 0.0)]),
        torch.cat([logits_of(0.25, 0.25, 0.5), logits_of(0.8, 0.1, 0.1)]),
    )
    assert differs.tolist() == [True, False]
    assert (kl > 0).all()
    with pytest.raises(ValueError, match=r"\[1, 3\] and \[2, 3\]"):
        compare_steps(torch.zeros(1, 3), torch.zeros(2, 3))


def test_likelihood():
    costs = negative_log_likelihood(logits_of(0.5, 0.25, 0.25), torch.tensor([1]))
    assert costs.item() == pytest.approx(2 * math.log(2))


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.integers(0, 2**31))
def test_divergence_is_never_negative(row, seed):
    dense = torch.tensor([row])
    other = dense + torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed))
    assert kl_divergence(dense, other).item() >= 0
    assert kl_divergence(dense, dense).item() == 0


# --- intervals -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(shares, st.integers(0, 100))
def test_intervals_of_means(values, seed):
    few = {"samples": 50, "seed": seed}
    low, high = mean_interval(values, **few)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert mean_interval(values[::-1], **few) == (low, high)  # whatever the order


def test_pairing_narrows_what_prompts_have_in_common():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(40, generator=generator).tolist()
    more = [value + 0.01 for value in base]
    low, high = mean_interval([a - b for a, b in zip(more, base, strict=True)])
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    low, high = difference_interval(more, base)
    assert low < 0 < high


def test_an_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        values = torch.rand(40, generator=generator).tolist()
        low, high = mean_interval(values, samples=300)
        covered += low <= 0.5 <= high
    assert 175 <= covered <= 200


def test_intervals_of_little():
    assert mean_interval([]) is None
    assert bootstrap_interval([(0.0, 0.0)], lambda sums: sums[:, 0] / sums[:, 1]) is None
    assert difference_interval([], [1.0]) is None
    assert mean([]) is None


def test_no_failure_in_n():
    assert zero_failure_bound(50) == 0.06
    assert zero_failure_bound(300) == 0.01
    assert [zero_failure_bound(trials) for trials in (0, 1, 3)] == [1, 1, 1]


# --- records -------------------------------------------------------------------------------------------------------


def test_figures_of_records():
    records = [
        PromptRecord("code", forced_steps=4, kl=[0.0] * 4, dense_nll=4.0, nll=4.0, steps=5),
        PromptRecord(
            "prose",
            drift=0.5,
            first_divergence=2,
            margin=0.25,
            forced_steps=4,
            forced_divergent=1,
            kl=[0.0, 0.4, 0.0, 0.0],
            dense_nll=4.0,
            nll=6.0,
            steps=5,
            bypassed=2,
        ),
    ]
    found = figures(records, samples=100)["tasks"]
    assert list(found) == ["code", "prose", "all"]
    assert (found["code"]["drift"], found["code"]["diverged_prompts"], found["code"]["diverged_bound"]) == (0, 0, 1)
    assert found["prose"]["diverged_bound"] is None
    total = found["all"]
    assert (total["prompts"], total["drift"], total["diverged_prompts"]) == (2, 0.25, 1)
    assert total["first_divergence"] == {"min": 2, "median": 2}
    assert (total["forced_divergent"], total["bypass_rate"]) == (0.125, 0.2)
    assert total["kl"]["mean"] == pytest.approx(0.05)
    perplexity = total["perplexity"]
    assert perplexity["dense"] == pytest.approx(math.e) and perplexity["bypass"] == pytest.approx(math.exp(1.25))
    low, high = perplexity["interval"]
    assert low <= perplexity["delta"] <= high


def test_figures_of_nothing():
    found = summarise([PromptRecord("code")], samples=10)
    assert found["drift"] == 0 and found["bypass_rate"] is None and found["kl"]["mean"] is None
    assert found["perplexity"]["delta"] is None and found["forced_interval"] is None


# --- which configurations ------------------------------------------------------------------------------------------


def test_published_layers_in_the_models_proportions():
    assert scaled_pairs(32) == {"1->24": (1, 24), "1->31": (1, 31)}
    assert scaled_pairs(8) == {"1->24": (1, 6), "1->31": (1, 7)}
    assert scaled_pairs(3) == {"1->24": (1, 2)}
    with pytest.raises(ValueError, match="has 2 layers"):
        scaled_pairs(2)


def test_the_grid_compares_all_kinds_at_one_rate():
    steps = [(1 - place / 100, place / 20) for place in range(100)]  # similarity, entropy
    thresholds = {layer: thresholds_for_rates(steps) for layer in scaled_pairs(8)[FIRST]}
    grid = full_grid(8, thresholds)
    assert len({configuration.name for configuration in grid}) == len(grid) == 10
    of_kind = {
        (c.pair, c.options["target"], c.bypass.is_guarded, c.bypass.is_inverted): c
        for c in grid
        if c.asked_rate == 0.2
    }
    assert set(of_kind) == {
        *((pair, "attention", False, False) for pair in ("1->24", "1->31")),
        *(("1->24", target, False, False) for target in ("mlp", "block")),
        *(("1->24", "attention", *kind) for kind in ((True, False), (False, True))),
    }
    assert [c.name for c in grid if c.asked_rate is None] == [
        f"1->{cache}, attention, threshold 0.65" for cache in (6, 7)
    ]
    inverted = of_kind["1->24", "attention", False, True].options
    assert (inverted["gate_layer"], inverted["cache_layers"]) == (6, [1])


def test_a_guard_gets_a_threshold_for_the_same_rate():
    steps = [(place / 100, 2.0 if place >= 60 else 0.5) for place in range(100)]
    thresholds = thresholds_for_rates(steps)
    assert sum(value >= thresholds["0.2"] for value, _ in steps) == 20
    assert sum(value >= thresholds["guarded"] and entropy <= 1 for value, entropy in steps) == 20
    assert thresholds_for_rates([(0.5, 2.0)] * 10)["guarded"] == -1  # every step that the guard allows


def test_the_share_of_weights_that_a_bypassed_step_leaves_out():
    model = make_ours()
    layer, count = model.base_model.layers[2], sum(parameter.numel() for parameter in model.parameters())
    count -= 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    mlp = sum(parameter.numel() for parameter in layer.mlp.parameters())
    keys_and_values = 2 * model.config.num_key_value_heads * layer.self_attn.head_dim * model.config.hidden_size
    attention = sum(parameter.numel() for parameter in layer.self_attn.parameters()) - keys_and_values
    for target, expected in (("attention", attention), ("mlp", mlp), ("block", attention + mlp)):
        bypass = own_configuration(4, {"cache_layers": [2], "target": target}).bypass
        assert weights_left_out(model, bypass) == pytest.approx(expected / count)


def test_own_options_are_completed_and_checked():
    found = own_configuration(8, {"threshold": 0.5, "cache_layers": 6})
    assert found.pair == "1->24" and found.options["cache_layers"] == [6] and found.options["target"] == "attention"
    assert own_configuration(8, {"cache_layers": [3, 4], "max_consecutive": 2}).pair == "own"
    with pytest.raises(ValueError, match="layer 8; the model has 8 layers"):
        own_configuration(8, {"cache_layers": 8})


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_of_both_kinds(tmp_path):
    lines = [{"prompt": "def f", "task": "code", "source": "x"}, {"prompt": "once"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_prompts(path) == [Prompt("def f", "code"), Prompt("once", "own")]
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\n\n  two \n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["one", "  two "]


def test_chat_prompts_go_through_the_chat_template():
    tokenizer = make_tokenizer()
    expected = tokenizer("what is it")["input_ids"]
    assert encode_prompt(tokenizer, Prompt("what is it", CHAT)) == expected  # there is no template
    tokenizer.chat_template = "q {{ messages[0].content }} {% if add_generation_prompt %}a{% endif %}"
    assert tokenizer.decode(encode_prompt(tokenizer, Prompt("what is it", CHAT))) == "q what is it a"
    assert encode_prompt(tokenizer, Prompt("what is it", "prose")) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": ', "line 2: not JSON"),
        (b'["prompt"]', "line 2: a list; expected an object"),
        (b'{"text": "a"}', "line 2: `prompt` is missing"),
        (b'{"prompt": 3}', "line 2: `prompt` is 3"),
        (b'{"prompt": " "}', "line 2: `prompt` is ' '"),
        (b'{"prompt": "a", "task": null}', "line 2: `task` is None"),
        (b'{"prompt": "a", "task": "all"}', "line 2: `task` is 'all'"),
        (b'{"prompt": "\xff"}', "line 2: not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, ") as error:
        read_prompts(path)
    assert words in str(error.value)


def test_no_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"'\.csv'; expected \.jsonl"):
        read_prompts(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="gone"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="ends in 'nothing'"):
        read_prompts(tmp_path)


def test_tasks_in_order_and_the_first_of_each():
    assert order_tasks(["own", "prose", "code", "prose"]) == ["code", "prose", "own"]
    prompts = [Prompt(str(number), task) for number, task in enumerate(["code", "prose", "code", "code"])]
    tasks = [prompt.task for prompt in prompts]
    assert first_of_each(tasks, 1) == [0, 1] and first_of_each(tasks, None) == [0, 1, 2, 3]
