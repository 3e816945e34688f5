"""A trained drafter: what it reads and takes back, when it drafts, and which models it fits."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from neuroflow_hf.language.draft_policy import worth_checking
from neuroflow_hf.language.drafter import DrafterState, NeuroFlowDrafter
from tests.conftest import assert_close_in_norm
from tests.language.test_phi3_lossless import Machine, cheap
from tests.phi3_models import FLOAT32, KINDS, VOCABULARY, make_drafter, make_ours, random_ids

NEW = 24


def make_perfect(kind):
    """A model whose next token depends on the last alone, and a drafter that knows this."""
    model = make_ours(kind)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        drafter = make_drafter(model, range(VOCABULARY))
        eye = torch.eye(32)
        drafter.fuse.weight.copy_(torch.cat([0 * eye, eye], dim=1))
    return model, drafter


def generate(model, drafter, ids, **options):
    """The text and the counts of a generation in which the drafter alone drafts."""
    lossless = {"drafter": drafter, "max_ngram": 0, "min_confidence": 0.0} | options.pop("lossless", {})
    output = model.generate(ids, max_new_tokens=NEW, lossless=lossless, return_dict_in_generate=True, **options)
    return output.sequences, output.lossless


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_drafter_is_accepted_whole(kind, samples):
    model, drafter = make_perfect(kind)
    ids = random_ids(1, 6)
    torch.manual_seed(1)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=samples)
    torch.manual_seed(1)
    text, counts = generate(model, drafter, ids, do_sample=samples, lossless={"draft_length": 5})
    assert torch.equal(text, expected)
    assert counts.accepted == counts.drafted > 0
    assert counts.checks < NEW / 2


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(3, 1, 4), (1, 1), (5,)])
def test_what_a_draft_fed_is_taken_back(lengths):
    """After drafts of any length the drafter stands where one stands that read the model's states at once."""
    model = make_ours()
    drafter, ids = make_drafter(model), random_ids(1, 20)
    states = model.model(ids).last_hidden_state[0]
    state, read = DrafterState(drafter, model), 8
    state.unread.append(states[:read])
    for length in lengths:
        tokens = ids[0, : read + 1].tolist()
        for _ in range(length):
            logits = state.logits_after(tokens)
            tokens.append(int(logits.argmax()))
            assert tokens[-1] % 4  # the head lacks every fourth token
        state.take_back(length)
        assert state.cache.get_seq_length() == read
        state.unread += [states[read : read + 1], states[read + 1 : read + 2]]  # of two checks
        read += 2
    cache = DynamicCache()
    whole = drafter(states[None, :read], model.get_input_embeddings()(ids[:, 1 : read + 1]), cache)
    logits = state.logits_after(ids[0, : read + 1].tolist())
    assert_close_in_norm(logits[:, drafter.head_tokens], whole[:, -1] @ state.head.T, FLOAT32)
    assert_close_in_norm(state.cache.layers[0].keys, cache.layers[0].keys, FLOAT32)


def test_the_drafter_reads_the_models_states(monkeypatch):
    """In a generation with rejected drafts, every state is the dense model's at its token, and none is left out."""
    model = make_ours("window")
    drafter, read = make_drafter(model), []
    forward = NeuroFlowDrafter.forward

    def spy(self, states, embeddings, cache):
        read.append((cache.get_seq_length(), states))
        return forward(self, states, embeddings, cache)

    monkeypatch.setattr(NeuroFlowDrafter, "forward", spy)
    monkeypatch.setattr(
        DrafterState,
        "take_back",
        lambda self, count, old=DrafterState.take_back: (read.append(None), old(self, count)),
    )
    text, counts = generate(model, drafter, random_ids(1, 6), lossless={"draft_length": 2})
    assert 0 <= counts.accepted < counts.drafted
    with torch.no_grad():
        expected = model.model(text).last_hidden_state[0]
    known, is_first = 0, True
    for item in read:
        if item is None:
            is_first = True
            continue
        place, states = item
        if is_first:
            assert place == known
            known += states.shape[1]
            assert_close_in_norm(states[0], expected[place:known], FLOAT32)
        is_first = False
    assert known > 20


def test_a_lookup_drafts_where_it_promises_more():
    machine = Machine("folder", cheap, text=(1, 2, 3) * 200)
    machine.steps(12)
    assert machine.drafts.found == 3 or machine.drafts.found == 4  # what repeats is looked up


def test_the_drafter_drafts_where_nothing_is_found():
    machine = Machine("folder", cheap, text=range(10, 400))
    lengths = machine.steps(20)
    assert machine.drafts.found == 0
    assert lengths[0] == 0 and min(lengths[1:]) > 0


def test_a_drafter_that_does_not_pay_is_off():
    machine = Machine("folder", lambda drafted: 1 + 0.5 * bool(drafted), right=0, text=range(10, 400))
    lengths = machine.steps(60)
    begun = machine.now
    machine.steps(10)
    assert machine.now - begun == pytest.approx(10)  # dense steps, and no time for drafts
    assert max(lengths[3:]) == 0  # improbable tokens were not even verified


def test_only_tokens_that_pay_are_verified():
    def check(drafted):
        return [1.0, 1.2, 1.4, 1.6][drafted]

    for probabilities in itertools.product((0.1, 0.4, 0.9), repeat=3):
        kept, speeds = 1.0, [1.0]
        for length, probability in enumerate(probabilities, start=1):
            kept *= probability
            speeds.append((speeds[-1] * check(length - 1) + kept) / check(length))
        assert worth_checking(probabilities, check) == max(range(4), key=speeds.__getitem__)


def test_saved_and_loaded_by_its_folder(tmp_path):
    model = make_ours()
    drafter = make_drafter(model)
    drafter.save_pretrained(tmp_path)
    again, ids = NeuroFlowDrafter.from_pretrained(tmp_path), random_ids(1, 6)
    assert again.config.drafts_for["name"] == "tiny"
    for name, value in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    expected = generate(model, drafter, ids, lossless={"draft_length": 3})
    assert generate(model, str(tmp_path), ids, lossless={"draft_length": 3})[1] == expected[1]
    model.config.lossless = {"drafter": str(tmp_path)}
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, lossless=True), expected[0])


@pytest.mark.parametrize(
    "field, other",
    [
        ("hidden_size", {"hidden_size": 48}),
        ("vocab_size", {"vocab_size": 60}),
        ("num_hidden_layers", {"num_hidden_layers": 5}),
    ],
)
def test_a_drafter_of_another_model_is_refused(field, other):
    drafter = make_drafter(make_ours(**other))
    with pytest.raises(ValueError, match=f"'tiny' with a `{field}`.*tune-drafts"):
        generate(make_ours(), drafter, random_ids(1, 6))


def test_what_is_no_drafter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 'lookup', 'bypass', 'none'"):
        generate(make_ours(), str(tmp_path), random_ids(1, 6))
    with pytest.raises(ValueError, match="max_ngram"):
        make_ours().generate(random_ids(1, 6), max_new_tokens=3, lossless={"max_ngram": 0})
