"""The search for drafters: what it measures is what a drafter would draft, and the model is left as it was."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from neuroflow_hf.drift.draft_search import Text, agreement, damage, least_harmful, leave_out, search_drafters
from tests.cli.test_run import assert_clean_error, call
from tests.conftest import assert_close_in_norm
from tests.phi3_models import FLOAT32, make_ours, random_ids, save_checkpoint

NONE, PARTS = (frozenset(), frozenset()), (frozenset([1, 2]), frozenset([2, 3]))


@torch.inference_mode()
@pytest.mark.parametrize("parts", [NONE, PARTS])
@pytest.mark.parametrize("kind", ["plain", "partial"])
def test_each_token_is_drafted_after_the_dense_models_own(kind, parts):
    model, prompt = make_ours(kind), random_ids(1, 6)[0].tolist()
    text = Text(model, prompt, 8)
    tokens, rows = [*prompt, *text.expected.tolist()], []
    for end in range(6, 14):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([tokens[: end - 1]]), past_key_values=cache, use_cache=True)
        with leave_out(model, parts):
            position = torch.tensor([[end - 1]])
            rows.append(
                model(torch.tensor([[tokens[end - 1]]]), past_key_values=cache, position_ids=position).logits[0]
            )
    assert_close_in_norm(text.logits(parts), torch.cat(rows), FLOAT32)
    assert_close_in_norm(text.logits(parts), torch.cat(rows), FLOAT32)  # the cache was put back
    if parts == NONE:
        assert agreement([text], parts) == 1
        assert damage([text], parts) > 0


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0.1, 0.5, 0.8, 1.0]),
)
@settings(deadline=None)
def test_the_knapsack_is_exact(attention, mlp, attention_seconds, mlp_seconds, saving):
    def subsets(values):
        places = range(len(values))
        return itertools.chain.from_iterable(itertools.combinations(places, size) for size in range(len(values) + 1))

    def harm(parts):
        return sum(attention[i] for i in parts[0]) + sum(mlp[i] for i in parts[1])

    wanted = saving * (len(attention) * attention_seconds + len(mlp) * mlp_seconds)
    pairs = [
        pair
        for pair in itertools.product(subsets(attention), subsets(mlp))
        if len(pair[0]) * attention_seconds + len(pair[1]) * mlp_seconds >= wanted - 1e-6
    ]
    found = least_harmful(attention, mlp, attention_seconds, mlp_seconds, saving)
    assert tuple(map(tuple, map(sorted, found))) in pairs
    assert harm(found) == min(map(harm, pairs))


def test_the_command_says_whether_a_drafter_pays(tmp_path):
    folder, prompts, out = save_checkpoint(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("hello\nab\ncd\n")
    how = ("--model", folder, "--prompts", prompts, "--out", out, "--new-tokens", 6)
    result = call("tune-drafts", *how)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "drafts.json").read_text())
    assert report["settings"]["prompts"] == 3 and report["check"]["0"] == 1
    last = report["held_out"]
    assert ("No drafter pays" in result.stdout) == (last["length"] == 0) == (last["speed"] <= 1)
    assert all(row["speed"] >= 1 for row in report["drafters"])
    prompts.write_text("hello\n")
    assert_clean_error(call("tune-drafts", *how), "at least two")


def test_the_model_is_left_as_it_was():
    model, ids = make_ours(), random_ids(1, 6)
    before = model(ids).logits
    search_drafters(model, random_ids(2, 6).tolist(), 4)
    assert torch.equal(model(ids).logits, before)
