"""Lossless generation: the text of dense greedy generation, whatever was guessed; when guessing pays."""

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList

from neuroflow_hf import NeuroFlowLosslessConfig
from neuroflow_hf.language.bypass_state import find_state
from neuroflow_hf.language.draft_policy import AcceptanceRate, Draft, Drafts, Lookup
from neuroflow_hf.language.layer_skip import LayerChanges
from neuroflow_hf.language.speculative_decoding import decode_losslessly
from tests.conftest import assert_close_in_norm
from tests.phi3_models import (
    FLOAT32,
    KINDS,
    VOCABULARY,
    adopt,
    make_ours,
    make_stock,
    make_tokenizer,
    random_ids,
    run_steps,
)

DRAFTERS = ("none", "lookup", "bypass", "both")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_drafter = pytest.mark.parametrize("drafter", DRAFTERS)
NEW = 24


@functools.cache
def models(kind, seed=0):
    """A stock model and ours of its weights. Do not change them."""
    stock = make_stock(kind, seed)
    return stock, adopt(stock)


def options_of(drafter, **options):
    """Drafts of a fixed length, from a drafter that skips the second and third layers."""
    return {
        "drafter": drafter,
        "draft_length": 3,
        "min_confidence": 0.0,
        "bypass": {"gate_layer": 0, "cache_layers": [1, 2]},
    } | options


def assert_same_text(stock, text, expected, prompt_length):
    """Equal, or different from a step on at which dense's first two logits are within rounding."""
    if torch.equal(text, expected):
        return
    common = min(text.shape[1], expected.shape[1])
    first = (text[0, :common] != expected[0, :common]).nonzero()[0].item()
    with torch.no_grad():
        top = stock(expected[:, :first]).logits[0, -1].topk(2).values
    assert first >= prompt_length
    assert top[0] - top[1] <= 1e-5


@each_kind
@each_drafter
@pytest.mark.parametrize("draft_length", [None, 1, 5])
def test_the_text_is_that_of_dense_generation(kind, drafter, draft_length):
    stock, ours = models(kind)
    ids = random_ids(1, 6, seed=3)
    expected = stock.generate(ids, max_new_tokens=NEW)
    output = ours.generate(
        ids,
        max_new_tokens=NEW,
        lossless=options_of(drafter, draft_length=draft_length),
        return_dict_in_generate=True,
    )
    assert_same_text(stock, output.sequences, expected, 6)
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    counts = output.lossless
    assert counts.tokens == NEW
    assert counts.checks + sum(counts.accepted.values()) >= NEW - 1  # the last draft may have gone too far
    assert set(counts.drafted) <= {"none": set(), "both": {"lookup", "bypass"}}.get(drafter, {drafter})
    if draft_length is not None and drafter in ("bypass", "both"):
        assert counts.draft_steps == counts.drafted["bypass"] > 0


def test_a_checkpoint_has_options_of_its_own():
    _, ours = models("plain")
    own = {"drafter": "bypass", "draft_length": 2, "min_confidence": 0.0, "bypass": {"cache_layers": [1, 2]}}
    model = type(ours)(type(ours.config)(**{**ours.config.to_dict(), "lossless": own})).eval()
    model.load_state_dict(ours.state_dict())
    ids, options = random_ids(1, 6, seed=3), {"max_new_tokens": 12, "return_dict_in_generate": True}
    assert set(model.generate(ids, lossless=True, **options).lossless.drafted) == {"bypass"}
    assert set(model.generate(ids, lossless={"drafter": "none"}, **options).lossless.drafted) == set()
    assert model.generate(ids, lossless={"draft_length": 1}, **options).lossless.drafts > 0
    with pytest.raises(ValueError, match="draft_lenght"):
        type(ours.config)(lossless={"draft_lenght": 2})
    with pytest.raises(ValueError, match="99"):
        type(ours.config)(num_hidden_layers=4, lossless={"bypass": {"cache_layers": [99]}})


def test_a_draft_changes_by_what_each_run_of_layers_changed_at_the_last_position():
    layers = [SimpleNamespace(self_attn=SimpleNamespace(layer_idx=index)) for index in range(6)]
    changes = LayerChanges([1, 2, 4])

    def forward(hidden):
        changes.begin()
        for index, layer in enumerate(layers):
            compute = functools.partial(lambda hidden, by: hidden * by, by=index + 2)
            hidden = changes.run(layer, compute, hidden) if changes.applies_to(index) else compute(hidden)
        return hidden

    dense = torch.tensor([[[1.0], [10.0], [100.0]]])
    forward(dense)
    changes.last, changes.is_drafting = -2, True  # the last of the three positions was taken back
    for new in (1.0, 3.0):  # the second draft step changes by as much as the first
        passed = new * 2 + (10 * 2 * 3 * 4 - 10 * 2)
        passed = passed * 5 + (10 * 2 * 3 * 4 * 5 * 6 - 10 * 2 * 3 * 4 * 5)
        assert forward(torch.tensor([[[new]]])).item() == passed * 7


class Scripted:
    """Drafts from a script, in the place of `Drafts`."""

    def __init__(self, script, options, draft_with_bypass, prior_drafting):
        self.script = script

    def next(self, tokens, limit):
        return Draft(self.script(tokens)[: max(0, limit)], "script")

    def learn(self, draft, accepted, seconds):
        pass


def generate_scripted(model, ids, script, **kwargs):
    decode = functools.partial(
        decode_losslessly,
        options=NeuroFlowLosslessConfig(drafter="none"),
        make_drafts=functools.partial(Scripted, script),
    )
    return model.generate(ids, custom_generate=decode, return_dict_in_generate=True, **kwargs)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 4),
    prompt=st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=12),
    new_tokens=st.integers(1, NEW),
    length=st.integers(0, 9),
    wrong_at=st.integers(0, 9),
    wrong_token=st.integers(0, VOCABULARY - 1),
)
def test_whatever_is_guessed(kind, seed, prompt, new_tokens, length, wrong_at, wrong_token):
    """Guesses that are right up to some point and then a constant: good, bad and absurd ones."""
    stock, ours = models(kind, seed)
    ids = torch.tensor([prompt])
    expected = stock.generate(ids, max_new_tokens=new_tokens)
    right = expected[0].tolist()

    def script(tokens):
        known = right[len(tokens) : len(tokens) + min(length, wrong_at)]
        return known + [wrong_token] * (length - len(known))

    output = generate_scripted(ours, ids, script, max_new_tokens=new_tokens)
    assert_same_text(stock, output.sequences, expected, len(prompt))
    assert output.past_key_values.get_seq_length() == len(prompt) + new_tokens - 1


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    drafter=st.sampled_from(DRAFTERS),
    prompt=st.lists(st.integers(2, 9), min_size=1, max_size=20),
    seed=st.integers(0, 4),
    draft_length=st.one_of(st.none(), st.integers(1, 6)),
    target=st.sampled_from(["attention", "mlp", "block"]),
    threshold=st.sampled_from([-1, 0.3, 2]),
    layers=st.sampled_from([[1], [3], [1, 2, 3]]),
    min_confidence=st.sampled_from([0.0, 0.3, 1.0]),
    reuse=st.booleans(),
)
def test_whatever_drafts(kind, drafter, prompt, seed, draft_length, target, threshold, layers, min_confidence, reuse):
    stock, ours = models(kind, seed)
    ids = torch.tensor([prompt])
    lossless = {
        "drafter": drafter,
        "draft_length": draft_length,
        "min_confidence": min_confidence,
        "reuse": reuse,
        "bypass": {"gate_layer": 0, "target": target, "threshold": threshold, "cache_layers": layers},
    }
    text = ours.generate(ids, max_new_tokens=NEW, lossless=lossless)
    assert_same_text(stock, text, stock.generate(ids, max_new_tokens=NEW), len(prompt))


def test_right_guesses_are_all_taken():
    stock, ours = models("window")
    ids = random_ids(1, 6)
    expected = stock.generate(ids, max_new_tokens=NEW)
    right = expected[0].tolist()
    counts = generate_scripted(ours, ids, lambda tokens: right[len(tokens) :][:5], max_new_tokens=NEW).lossless
    assert counts.checks == 4  # 1 with the prompt, then 6 a check
    assert counts.accepted == counts.drafted


@pytest.mark.parametrize("kind", ["plain", "window", "partial"])
@pytest.mark.parametrize("layers", [[1], [2, 3]])
def test_passing_over_layers_is_bypassing_them(kind, layers):
    """Drafts that leave out layers are those of the bypass that writes keys and values."""
    _, ours = models(kind)
    ids = random_ids(1, 6, seed=3)
    drafted = []
    for bypass in ({}, {"max_consecutive": 100}):  # a cap that is never reached makes it ask, and so write
        lossless = options_of("bypass", bypass={"gate_layer": 0, "cache_layers": layers} | bypass)
        output = ours.generate(ids, max_new_tokens=NEW, lossless=lossless, return_dict_in_generate=True)
        drafted.append((output.lossless.drafted, output.lossless.accepted, output.lossless.checks))
    assert drafted[0] == drafted[1]


def test_layers_without_change_are_left_out():
    _, ours = models("plain")
    ids = random_ids(1, 6, seed=3)
    seen = []
    layer = ours.model.layers[2]
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(torch.equal(inputs[0], output)))
    lossless = options_of("bypass", reuse=False)
    counts = ours.generate(ids, max_new_tokens=NEW, lossless=lossless, return_dict_in_generate=True).lossless
    handle.remove()
    assert seen.count(True) == counts.draft_steps > 0
    assert seen.count(False) == counts.checks + 1


def test_drafts_that_skip_nothing_are_right():
    _, ours = models("window")
    lossless = options_of("bypass", bypass={"threshold": 2})
    output = ours.generate(random_ids(1, 6), max_new_tokens=NEW, lossless=lossless, return_dict_in_generate=True)
    assert output.lossless.accepted == output.lossless.drafted
    assert output.lossless.checks == 6


@pytest.mark.parametrize("kind", ["plain", "window", "partial"])
@each_drafter
@pytest.mark.parametrize("target", ["block", "mlp"])
def test_the_cache_is_that_of_dense_generation(kind, drafter, target):
    stock, ours = models(kind)
    ids = random_ids(1, 6, seed=3)
    lossless = options_of(drafter, bypass={"gate_layer": 0, "cache_layers": [1, 2], "target": target})
    output = ours.generate(ids, max_new_tokens=NEW, lossless=lossless, return_dict_in_generate=True)
    _, dense = run_steps(stock, output.sequences[:, :-1], 6)
    for layer, expected in zip(output.past_key_values.layers, dense.layers, strict=False):
        assert_close_in_norm(layer.keys, expected.keys, FLOAT32)
        assert_close_in_norm(layer.values, expected.values, FLOAT32)
    assert not any(getattr(layer, "record_past", False) for layer in output.past_key_values.layers)
    state = find_state(output.past_key_values)
    # layers that are passed over as a whole leave nothing in the cache
    assert (state is not None) == (drafter in ("bypass", "both") and target == "mlp")
    if state is not None:
        assert state.positions == output.sequences.shape[1] - 1


@each_drafter
def test_a_continued_cache_goes_on(drafter):
    _, ours = models("window")
    ids = random_ids(1, 6)
    whole = ours.generate(ids, max_new_tokens=NEW)
    first = ours.generate(ids, max_new_tokens=9, return_dict_in_generate=True, lossless=options_of(drafter))
    cache = first.past_key_values
    text = ours.generate(first.sequences, max_new_tokens=NEW - 9, past_key_values=cache, lossless=options_of(drafter))
    assert torch.equal(text, whole)


@each_drafter
def test_only_the_new_tokens_with_the_whole_mask(drafter):
    _, ours = models("plain")
    ids, more = random_ids(1, 6), random_ids(1, 3, seed=4)
    expected = ours.generate(torch.cat([ids, more], dim=1), max_new_tokens=NEW)
    with torch.no_grad():
        cache = ours(ids, use_cache=True).past_key_values
    text = ours.generate(
        more,
        attention_mask=torch.ones(1, 9, dtype=torch.int64),
        past_key_values=cache,
        max_new_tokens=NEW,
        lossless=options_of(drafter),
    )
    assert torch.equal(text[:, 3:], expected[:, 9:])


@each_drafter
@each_kind
def test_padding_on_the_left(kind, drafter):
    _, ours = models(kind)
    ids = random_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    expected = ours.generate(padded, attention_mask=mask, max_new_tokens=NEW)
    text = ours.generate(padded, attention_mask=mask, max_new_tokens=NEW, lossless=options_of(drafter))
    assert torch.equal(text, expected)


@each_drafter
def test_embeddings_as_input(drafter):
    _, ours = models("plain")
    embeds = ours.get_input_embeddings()(random_ids(1, 6)).detach()
    expected = ours.generate(inputs_embeds=embeds, max_new_tokens=NEW)
    assert torch.equal(ours.generate(inputs_embeds=embeds, max_new_tokens=NEW, lossless=options_of(drafter)), expected)


# --- where it ends, and what is done with the logits ---------------------------------------------------------------


@each_drafter
@pytest.mark.parametrize("at", [0, 1, 4, 11])
def test_ends_with_an_end_token(drafter, at):
    stock, ours = models("window")
    ids = random_ids(1, 6, seed=3)
    dense = stock.generate(ids, max_new_tokens=NEW)[0].tolist()
    end = dense[6 + at]
    first = dense.index(end, 6)
    output = ours.generate(
        ids, max_new_tokens=NEW, eos_token_id=[end, 1], lossless=options_of(drafter), return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == dense[: first + 1]
    assert output.past_key_values.get_seq_length() == first


class AfterTokens(StoppingCriteria):
    """Stops at a length, of its own accord."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@each_drafter
def test_ends_where_other_criteria_say(drafter):
    _, ours = models("plain")
    ids = random_ids(1, 6)
    dense = ours.generate(ids, max_new_tokens=NEW)
    text = ours.generate(
        ids,
        max_new_tokens=NEW,
        stopping_criteria=StoppingCriteriaList([AfterTokens(17)]),
        lossless=options_of(drafter, draft_length=5),
    )
    assert torch.equal(text, dense[:, :17])


def test_ends_with_a_string():
    tokenizer = make_tokenizer()
    ours = make_ours(vocab_size=len(tokenizer))
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    dense = ours.generate(ids, max_new_tokens=NEW)
    ending = {"stop_strings": tokenizer.decode(dense[0, 15]), "tokenizer": tokenizer}
    expected = ours.generate(ids, max_new_tokens=NEW, **ending)
    assert ids.shape[1] < expected.shape[1] <= 16
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW, lossless=options_of("both"), **ending), expected)
    with pytest.raises(ValueError, match="pass `tokenizer="):
        ours.generate(ids, lossless=True, stop_strings="a")


@each_drafter
@pytest.mark.parametrize(
    "processor", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}]
)
def test_logits_are_processed(drafter, processor):
    stock, ours = models("plain")
    ids = random_ids(1, 6, seed=3)
    end = stock.generate(ids, max_new_tokens=5)[0, -1].item()
    expected = stock.generate(ids, max_new_tokens=NEW, eos_token_id=end, **processor)
    text = ours.generate(ids, max_new_tokens=NEW, eos_token_id=end, lossless=options_of(drafter), **processor)
    assert torch.equal(text, expected)


@each_drafter
def test_scores_and_logits(drafter):
    stock, ours = models("plain")
    wanted = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    ids = random_ids(1, 6)
    expected = stock.generate(ids, max_new_tokens=NEW, repetition_penalty=1.5, **wanted)
    output = ours.generate(ids, max_new_tokens=NEW, repetition_penalty=1.5, lossless=options_of(drafter), **wanted)
    for name in ("scores", "logits"):
        assert_close_in_norm(torch.cat(output[name]), torch.cat(expected[name]), FLOAT32)


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.pieces, self.ended = [], 0, False

    def put(self, value):
        assert not self.ended
        self.tokens += value.flatten().tolist()
        self.pieces += 1

    def end(self):
        self.ended = True


@each_drafter
def test_streaming(drafter):
    _, ours = models("plain")
    streamer, ids = Collector(), random_ids(1, 6)
    text = ours.generate(ids, max_new_tokens=NEW, lossless=options_of(drafter), streamer=streamer)
    assert streamer.tokens == text[0].tolist()
    assert streamer.pieces == 1 + NEW
    assert streamer.ended


def test_a_bypass_in_the_configuration_plays_no_part():
    stock, _ = models("plain")
    ours = adopt(stock, {"cache_layers": [3], "threshold": -1})
    ids = random_ids(1, 6)
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW, lossless=True), stock.generate(ids, max_new_tokens=NEW))


# --- when guessing pays --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 8))
@settings(deadline=None)
def test_lookup_finds_the_latest_longest_occurrence(tokens, max_ngram, limit):
    lookup, expected = Lookup(max_ngram), (0, [])
    for length in range(min(max_ngram, len(tokens) - 1), 0, -1):
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if ends:
            extended = list(tokens)
            for offset in range(limit):
                extended.append(extended[ends[-1] + offset])
            expected = (length, extended[len(tokens) :])
            break
    lookup.propose(tokens[: len(tokens) // 2], limit)  # as the text grows
    assert lookup.propose(tokens, limit) == expected


def simulate(share, drafting, each, drafter="bypass", steps=400):
    """Share of seconds that dense decoding would have taken, when this share of guesses comes true."""
    generator = torch.Generator().manual_seed(0)
    drafts = Drafts(NeuroFlowLosslessConfig(drafter=drafter), lambda token, length: [0] * length)
    drafts.pace.drafted = lambda steps, seconds: type(drafts.pace).drafted(drafts.pace, steps, steps * drafting)
    tokens, seconds, drafted = [1, 2, 3] * 20, 0.0, 0
    for _ in range(steps):
        draft = drafts.next(tokens, 1000)
        drafted += len(draft.tokens)
        accepted = 0
        while accepted < len(draft.tokens) and torch.rand((), generator=generator) < share:
            accepted += 1
        took = 1.0 + each * len(draft.tokens)
        drafts.learn(draft, accepted, took)
        seconds += took + (drafting * len(draft.tokens) if draft.source == "bypass" else 0)
        tokens += [1 + len(tokens) % 3] * (accepted + 1)
    return seconds / (len(tokens) - 60), drafted


@pytest.mark.parametrize("drafter", ["bypass", "lookup", "both"])
@pytest.mark.parametrize("each", [0.0, 0.3])
def test_guessing_stops_where_it_fails(drafter, each):
    seconds, drafted = simulate(share=0.0, drafting=0.4, each=each, drafter=drafter)
    assert seconds < 1.08
    assert drafted > 8  # it tries again, now and then


@pytest.mark.parametrize("share, most", [(0.95, 0.55), (0.7, 0.85)])
def test_guessing_goes_on_where_it_pays(share, most):
    assert simulate(share=share, drafting=0.3, each=0.02)[0] < most


def test_free_guesses_are_preferred():
    assert simulate(share=0.9, drafting=0.5, each=0.02, drafter="both")[0] < 0.35


def test_old_outcomes_fade():
    record = AcceptanceRate()
    for _ in range(50):
        record.learn(4, 0)
    assert record.share < 0.05
    for _ in range(50):
        record.learn(4, 4)
    assert record.share > 0.95


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafer": "both"}, "Did you mean `drafter`"),
        ({"colour": 1}, "Known options: drafter"),
        ({"drafter": "oracle"}, "drafter"),
        ({"max_draft": 0}, "at least 1"),
        ({"draft_length": -1}, "at least 1"),
        ({"min_confidence": 2}, "a probability"),
        ({"bypass": {"threshold": -3}}, "threshold"),
        ({"bypass": {"cache_layers": [7]}}, "layer 7"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        models("plain")[1].generate(random_ids(), max_new_tokens=3, lossless=options)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"num_beams": 2}, "num_beams"),
        ({"inputs": random_ids(2)}, "one sequence at a time, and the input has 2"),
        ({"prompt_lookup_num_tokens": 3}, "lookups are"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "dynamic"),
        ({"bypass": {}}, 'lossless={"bypass"'),
        ({"custom_generate": print}, "two ways"),
        ({"assistant_model": 1}, "two ways"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
)
def test_what_cannot_be_done_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_ours().generate(**{"inputs": random_ids(), "max_new_tokens": 3, "lossless": True} | kwargs)


def test_what_is_no_dict_is_refused():
    with pytest.raises(TypeError, match="expected a dict"):
        models("plain")[1].generate(random_ids(), lossless="both")
