"""Lossless generation: the text of dense generation, whatever is drafted and `generate` is asked for."""

import functools
import itertools
import math
from collections import Counter

import numpy as np
import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neuroflow_hf import NeuroFlowLosslessConfig
from neuroflow_hf.language.bypass_state import find_state
from neuroflow_hf.language.draft_policy import FIRST_LENGTH, Drafts, Lookup, best_length, interpolated, repeated
from neuroflow_hf.language.naive import naive_best_length
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

DRAFTERS = ("none", "lookup", "bypass")
THAT_DRAFT = DRAFTERS[1:]  # lookup also has steps without a draft
each_kind = pytest.mark.parametrize("kind", KINDS)
each_drafter = pytest.mark.parametrize("drafter", DRAFTERS)
NEW = 24


@functools.cache
def models(kind, seed=0):
    """A stock model and ours of its weights. Do not change them."""
    stock = make_stock(kind, seed)
    return stock, adopt(stock)


@functools.cache
def dense_text(kind):
    """The stock model's greedy text after `random_ids(1, 6, seed=3)`."""
    return models(kind)[0].generate(random_ids(1, 6, seed=3), max_new_tokens=NEW)


def options_of(drafter, **options):
    """Drafts of a fixed length; the bypassed model skips the second and third layers."""
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
@pytest.mark.parametrize(
    "drafter, draft_length",
    [("none", None), *itertools.product(("lookup", "bypass"), (None, 5)), ("bypass", 1)],
)
def test_the_text_is_that_of_dense_generation(kind, drafter, draft_length):
    stock, ours = models(kind)
    ids, expected = random_ids(1, 6, seed=3), dense_text(kind)
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
    assert counts.checks + counts.accepted >= NEW - 1  # the last draft may have gone too far
    assert counts.accepted <= counts.drafted
    if drafter == "bypass":
        assert counts.draft_steps == counts.drafted > 0
    else:
        assert counts.draft_steps == 0
    if drafter == "none":
        assert counts.drafted == counts.drafts == 0


def test_a_checkpoint_has_options_of_its_own():
    _, ours = models("plain")
    own = {"drafter": "bypass", "draft_length": 2, "min_confidence": 0.0, "bypass": {"cache_layers": [1, 2]}}
    model = type(ours)(type(ours.config)(**{**ours.config.to_dict(), "lossless": own})).eval()
    model.load_state_dict(ours.state_dict())
    ids, options = random_ids(1, 6, seed=3), {"max_new_tokens": 12, "return_dict_in_generate": True}
    assert model.generate(ids, lossless=True, **options).lossless.draft_steps > 0
    assert model.generate(ids, lossless={"drafter": "none"}, **options).lossless.drafted == 0
    assert model.generate(ids, lossless={"draft_length": 1}, **options).lossless.drafts > 0
    with pytest.raises(ValueError, match="draft_lenght"):
        type(ours.config)(lossless={"draft_lenght": 2})
    with pytest.raises(ValueError, match="99"):
        type(ours.config)(num_hidden_layers=4, lossless={"bypass": {"cache_layers": [99]}})


class Scripted:
    """Drafts from a script, in the place of `Drafts`."""

    def __init__(self, script, options, draft_with_model):
        self.script = script

    def next(self, tokens, limit):
        return self.script(tokens)[: max(0, limit)]

    def record_check(self, drafted):
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
def test_any_draft(kind, seed, prompt, new_tokens, length, wrong_at, wrong_token):
    """Drafts that are right up to some token and then a constant: good, bad and absurd ones."""
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
)
def test_whatever_drafts(kind, drafter, prompt, seed, draft_length, target, threshold, layers, min_confidence):
    stock, ours = models(kind, seed)
    ids = torch.tensor([prompt])
    lossless = {
        "drafter": drafter,
        "draft_length": draft_length,
        "min_confidence": min_confidence,
        "bypass": {"gate_layer": 0, "target": target, "threshold": threshold, "cache_layers": layers},
    }
    text = ours.generate(ids, max_new_tokens=NEW, lossless=lossless)
    assert_same_text(stock, text, stock.generate(ids, max_new_tokens=NEW), len(prompt))


def test_right_drafts_are_accepted_whole():
    stock, ours = models("window")
    ids = random_ids(1, 6)
    expected = stock.generate(ids, max_new_tokens=NEW)
    right = expected[0].tolist()
    counts = generate_scripted(ours, ids, lambda tokens: right[len(tokens) :][:5], max_new_tokens=NEW).lossless
    assert counts.checks == 4  # 1 with the prompt, then 6 a check
    assert counts.accepted == counts.drafted


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
    assert (state is not None) == (drafter == "bypass")
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


@pytest.mark.parametrize("shift", [3, 9, 14, 20])
def test_positions_across_the_switch_of_long_rope(shift):
    """RoPE's factors follow positions, and transformers feeds all tokens again by their number: apart with padding."""
    stock, ours = models("longrope")
    ids = random_ids(1, 8)
    padded = torch.cat([torch.zeros(1, shift, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(8 + shift) >= shift).long().unsqueeze(0)
    for inputs in (
        {"input_ids": padded, "attention_mask": mask},
        {"input_ids": ids, "position_ids": torch.arange(shift, shift + 8).unsqueeze(0)},
    ):
        expected = stock.generate(**inputs, max_new_tokens=NEW)
        for drafter in THAT_DRAFT:
            text = ours.generate(**inputs, max_new_tokens=NEW, lossless=options_of(drafter, draft_length=5))
            assert_same_text(stock, text, expected, inputs["input_ids"].shape[1])


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("method", ["prompt", "prefix", "p-tuning", "lora"])
def test_adapters(method, padding):
    shared = {"task_type": peft.TaskType.CAUSAL_LM}
    configuration = {
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **shared),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **shared),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, **shared),
        "lora": lambda: peft.LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False, **shared),
    }[method]()
    ours = make_ours()
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.int64), random_ids(1, 6)], dim=1)
    mask = (ids > 0).long()
    without = ours.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    torch.manual_seed(0)
    model = peft.get_peft_model(ours, configuration).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name and name.endswith("weight"):
                parameter.normal_()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW}
    expected = model.generate(**options)
    assert not torch.equal(expected, without)
    for drafter in THAT_DRAFT:
        assert torch.equal(model.generate(**options, lossless=options_of(drafter)), expected), drafter


@each_drafter
def test_embeddings_as_input(drafter):
    _, ours = models("plain")
    embeds = ours.get_input_embeddings()(random_ids(1, 6)).detach()
    expected = ours.generate(inputs_embeds=embeds, max_new_tokens=NEW)
    assert torch.equal(ours.generate(inputs_embeds=embeds, max_new_tokens=NEW, lossless=options_of(drafter)), expected)


# --- sampling ------------------------------------------------------------------------------------------------------


@each_drafter
@pytest.mark.parametrize("kind", ["window", "longrope"])
@pytest.mark.parametrize("warpers", [{"top_k": 0}, {"temperature": 0.6, "top_k": 8, "top_p": 0.9}])
def test_the_text_is_that_of_dense_sampling_from_the_same_seed(kind, drafter, warpers):
    stock, ours = models(kind)
    ids, options = random_ids(1, 6, seed=3), {"max_new_tokens": NEW, "do_sample": True, **warpers}
    torch.manual_seed(0)
    expected, after = stock.generate(ids, **options), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(ours.generate(ids, **options, lossless=options_of(drafter)), expected)
    assert torch.equal(torch.rand(1), after)
    assert not torch.equal(ours.generate(ids, **options, lossless=options_of(drafter)), expected)


@each_drafter
def test_sampling_without_temperature_is_greedy(drafter):
    stock, ours = models("plain")
    ids = random_ids(1, 6)
    for warpers in ({"top_k": 1}, {"temperature": 1e-4}):
        options = {"max_new_tokens": NEW, "do_sample": True, "lossless": options_of(drafter), **warpers}
        assert torch.equal(ours.generate(ids, **options), stock.generate(ids, max_new_tokens=NEW))


@pytest.mark.parametrize("drafter", ["scripted", "bypass"])
def test_sampled_texts_are_as_frequent_as_probable(drafter):
    """Chi-square of sampled texts against the dense model's probabilities, which are computed text by text."""
    _, ours = models("plain")
    ids, count = torch.tensor([[5, 9, 5]]), 300
    warpers = {"temperature": 1.5, "top_k": 3, "top_p": 0.98}
    processors = LogitsProcessorList([TemperatureLogitsWarper(1.5), TopKLogitsWarper(3), TopPLogitsWarper(0.98)])
    probabilities = {(): 1.0}
    for _ in range(2):
        shorter, probabilities = probabilities, {}
        for text, probability in shorter.items():
            before = torch.cat([ids, torch.tensor([text], dtype=torch.int64).view(1, -1)], dim=1)
            with torch.no_grad():
                row = processors(before, ours(before).logits[:, -1]).double().softmax(-1)[0].tolist()
            probabilities |= {(*text, token): probability * p for token, p in enumerate(row) if p > 0}
    draft = list(max(probabilities, key=probabilities.get))
    options = {"max_new_tokens": 3, "do_sample": True, **warpers}
    torch.manual_seed(0)
    found = Counter()
    for _ in range(count):
        if drafter == "scripted":  # one proposal, whatever is drawn
            text = generate_scripted(ours, ids, lambda tokens: draft[len(tokens) - 3 :], **options).sequences
        else:
            text = ours.generate(ids, **options, lossless=options_of(drafter))
        found[tuple(text[0, 3:5].tolist())] += 1
    assert set(found) <= set(probabilities)
    observed = [found[text] for text in probabilities]
    assert chisquare(observed, [count * probability for probability in probabilities.values()]).pvalue > 0.05


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


def test_ends_with_a_string():
    tokenizer = make_tokenizer()
    ours = make_ours(vocab_size=len(tokenizer))
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    dense = ours.generate(ids, max_new_tokens=NEW)
    ending = {"stop_strings": tokenizer.decode(dense[0, 15]), "tokenizer": tokenizer}
    expected = ours.generate(ids, max_new_tokens=NEW, **ending)
    assert ids.shape[1] < expected.shape[1] <= 16
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW, lossless=options_of("lookup"), **ending), expected)
    configuration = GenerationConfig(max_new_tokens=NEW, stop_strings=ending["stop_strings"], pad_token_id=0)
    text = ours.generate(ids, configuration, tokenizer=tokenizer, lossless=options_of("lookup"))
    assert torch.equal(text, expected)
    assert configuration.stop_strings == ending["stop_strings"]
    with pytest.raises(ValueError, match="pass `tokenizer="):
        ours.generate(ids, lossless=True, stop_strings="a")


class StopsWhereUnsure(StoppingCriteria):
    """Stops after a token whose highest probability was below a limit, and counts its calls."""

    def __init__(self, limit):
        self.limit, self.calls = limit, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), bool(scores[-1].softmax(-1).max() < self.limit))


@each_drafter
def test_criteria_get_the_scores(drafter):
    _, ours = models("plain")
    wanted = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
    ids = random_ids(1, 6, seed=3)
    scores = ours.generate(ids, **wanted).scores
    limit = sorted(row.softmax(-1).max().item() for row in scores[:12])[1]
    criteria = [StopsWhereUnsure(limit) for _ in range(2)]
    expected = ours.generate(ids, stopping_criteria=StoppingCriteriaList(criteria[:1]), **wanted)
    assert expected.sequences.shape[1] < 6 + NEW
    output = ours.generate(
        ids,
        stopping_criteria=StoppingCriteriaList(criteria[1:]),
        lossless=options_of(drafter, draft_length=5),
        **wanted,
    )
    assert torch.equal(output.sequences, expected.sequences)
    assert criteria[0].calls == criteria[1].calls


class ParityGrammar(LogitsProcessor):
    """An automaton that is advanced by the last token of every call, as those of grammar libraries are."""

    def __init__(self):
        self.calls, self.odd = 0, 0

    def __call__(self, input_ids, scores):
        if self.calls:
            self.odd += int(input_ids[0, -1]) % 2
        self.calls += 1
        scores = scores.clone()
        scores[:, self.odd % 7 :: 7] -= 5.0
        return scores


@each_drafter
@each_kind
def test_processors_keep_state(kind, drafter):
    stock, ours = models(kind)
    ids, grammars = random_ids(1, 6, seed=3), [ParityGrammar(), ParityGrammar()]
    expected = stock.generate(ids, max_new_tokens=NEW, logits_processor=LogitsProcessorList(grammars[:1]))
    text = ours.generate(
        ids, max_new_tokens=NEW, logits_processor=LogitsProcessorList(grammars[1:]), lossless=options_of(drafter)
    )
    assert torch.equal(text, expected)
    assert grammars[0].calls == grammars[1].calls == NEW


# What options of `GenerationConfig` do to lossless generation. `SAME`: a value with which the text must be that of
# dense generation; `REFUSED`: a value that raises a ValueError before a token is made.
END = 17
SAME = {
    "bad_words_ids": [[11], [12, 13]],
    "begin_suppress_tokens": [4, 5],
    "cache_implementation": "dynamic",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.3,
    "exponential_decay_length_penalty": (4, 1.5),
    "forced_bos_token_id": 9,
    "forced_eos_token_id": END,
    "guidance_scale": 1.5,
    "max_length": 20,
    "max_new_tokens": 9,
    "max_time": 1000.0,
    "min_length": 15,
    "min_new_tokens": 9,
    "no_repeat_ngram_size": 2,
    "output_logits": True,
    "output_scores": True,
    "prefill_chunk_size": 2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.7,
    "return_dict_in_generate": True,
    "sequence_bias": [[[11], 3.0], [[12, 13], -4.0]],
    "suppress_tokens": [11, 12],
    "use_cache": True,
    "watermarking_config": {"bias": 4.0, "greenlist_ratio": 0.5},
}
REFUSED = {
    "assistant_early_exit": 2,
    "constraints": [None],
    "dola_layers": "low",
    "force_words_ids": [[5]],
    "num_beams": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "token_healing": True,
    "use_mtp": True,
}
CALLS = {name: {name: value} for name, value in SAME.items()} | {
    "negative prompt": {"guidance_scale": 2.0, "negative_prompt_ids": random_ids(1, 4, seed=8)},
    "function": {"prefix_allowed_tokens_fn": lambda _, ids: range(2 + len(ids) % 3, 60, 3)},
}


@pytest.mark.parametrize("name", CALLS)
def test_generation_options_act_as_in_dense_generation(name):
    stock, ours = models("plain")
    ids, options = random_ids(1, 6, seed=3), {"max_new_tokens": NEW, "eos_token_id": END, **CALLS[name]}
    if name == "max_length":
        del options["max_new_tokens"]
    expected = stock.generate(ids, **options)
    for drafter in THAT_DRAFT:
        text = ours.generate(ids, lossless=options_of(drafter), **options)
        if name == "return_dict_in_generate":
            assert_same_text(stock, text.sequences, expected.sequences, 6)
        else:
            assert_same_text(stock, text, expected, 6)


@pytest.mark.parametrize("name", REFUSED)
def test_generation_options_are_refused(name):
    options = {"top_k": 4} if name == "penalty_alpha" else {}
    # transformers itself refuses several sequences in greedy generation, and token healing without its tokenizer
    own = {"num_return_sequences": "num_return_sequences", "token_healing": "token healing"}
    with pytest.raises(ValueError, match=own.get(name, "Lossless generation|lossless=")):
        models("plain")[1].generate(
            random_ids(1, 6), max_new_tokens=3, lossless=True, **options, **{name: REFUSED[name]}
        )


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


# --- what is drafted ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 8))
@settings(deadline=None)
def test_lookup_finds_the_latest_longest_occurrence(tokens, max_ngram, limit):
    lookup, expected, length = Lookup(max_ngram), [], 0
    for length in range(min(max_ngram, len(tokens) - 1), 0, -1):
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if ends:
            extended = list(tokens)
            for offset in range(limit):
                extended.append(extended[ends[-1] + offset])
            expected = extended[len(tokens) :]
            break
    lookup.find(tokens[: len(tokens) // 2])  # as the text grows
    found, start = lookup.find(tokens)
    assert found == (length if expected else 0)
    assert not found or repeated(tokens, start, limit) == expected


costs = st.floats(0.01, 3)


@given(st.floats(0, 1), costs, st.lists(st.floats(1, 9), min_size=17, max_size=17), st.sets(st.integers(1, 16)))
@settings(deadline=None)
def test_the_best_length_gives_the_most_tokens_for_the_time(acceptance, draft, checks, lengths):
    lengths = sorted(lengths)
    found, expected = (
        choose(acceptance, draft, checks.__getitem__, lengths) for choose in (best_length, naive_best_length)
    )
    if found != expected:  # two are as good, but for rounding
        speeds = [
            sum(acceptance**place for place in range(length + 1)) / (length * draft + checks[length])
            for length in (found, expected)
        ]
        assert math.isclose(*speeds)


@given(st.dictionaries(st.integers(1, 32), st.floats(0, 9)), st.floats(0, 9), st.integers(0, 40))
@settings(deadline=None)
def test_times_between_measured_ones_are_interpolated(seconds, step, length):
    points = sorted({0: step, **seconds}.items())
    expected = np.interp(length, *zip(*points, strict=True))
    if length > points[-1][0] and len(points) > 1:  # beyond the longest they grow as between the last two
        (before, low), (last, high) = points[-2:]
        expected += max(0.0, high - low) * (length - last) / (last - before)
    assert math.isclose(interpolated(points, length), expected, rel_tol=1e-9, abs_tol=1e-9)


@given(st.floats(0, 1), costs, costs)
@settings(deadline=None)
def test_a_token_pays_if_its_acceptance_exceeds_what_it_costs(acceptance, draft, more):
    assume(abs(acceptance - draft - more) > 1e-6)
    pays = best_length(acceptance, 2 * draft, {0: 2.0, 1: 2 * (1 + more)}.__getitem__, [1]) == 1
    assert pays == (acceptance > draft + more)


class Machine:
    """
    Generates `text` by a clock of its own: a token that the bypassed model drafts takes `draft` seconds, a step
    `check(drafted)`. The first `right` tokens of its drafts are right.
    """

    def __init__(self, drafter, check, draft=0.1, right=99, text=(1, 2, 3) * 200, **options):
        self.now, self.check, self.draft, self.right = 0.0, check, draft, right
        self.text, self.length = list(text), 6
        options = NeuroFlowLosslessConfig(drafter=drafter, **options)
        self.drafts = Drafts(options, self.draft_tokens, lambda: self.now)

    def draft_tokens(self, length):
        self.now += self.draft * length
        right = self.text[self.length : self.length + min(length, self.right)]
        return right + [0] * (length - len(right))

    def steps(self, count):
        """The lengths of the drafts of so many steps."""
        lengths = []
        for _ in range(count):
            draft = self.drafts.next(self.text[: self.length], 1000)
            self.now += self.check(len(draft))
            self.drafts.record_check(len(draft))
            kept = 0
            while kept < len(draft) and draft[kept] == self.text[self.length + kept]:
                kept += 1
            self.length += kept + 1
            lengths.append(len(draft))
        return lengths


def cheap(drafted):
    return 1 + 0.05 * drafted


@pytest.mark.parametrize("drafter", ["lookup", "bypass"])
def test_drafts_that_pay_are_long_and_those_that_do_not_are_off(drafter):
    assert Machine(drafter, cheap).steps(12)[:3] == [0, FIRST_LENGTH, FIRST_LENGTH]
    assert Machine(drafter, cheap).steps(12)[-1] == 15
    assert Machine(drafter, cheap, max_draft=5).steps(12)[-1] == 5
    assert Machine(drafter, lambda drafted: 1 + drafted).steps(12)[4:] == [0] * 8  # 15 is tried once
    assert Machine(drafter, lambda drafted: 1 + drafted, draft_length=2).steps(12) == [2] * 12
    assert Machine("none", cheap).steps(3) == [0] * 3


def test_the_bypassed_model_stays_off():
    assert Machine("bypass", cheap, right=0).steps(60)[-40:] == [0] * 40


def test_tokens_after_a_rejected_one_do_not_count():
    assert Machine("bypass", lambda drafted: 1 + 0.4 * drafted, right=3).steps(20)[-1] > 0  # 3 of 4, not of 7


@pytest.mark.parametrize("slow", [1, 5])
def test_a_slow_moment_does_not_decide(slow):
    steps = itertools.count()
    machine = Machine("bypass", lambda drafted: cheap(drafted) if next(steps) != slow else 100.0)
    assert machine.steps(9)[6:] == [15] * 3


def test_a_lookup_that_is_off_is_compared_with_the_text():
    new = [token for other in range(10, 40) for token in (7, other)]  # after 7 comes what did not come before
    machine = Machine("lookup", lambda drafted: 1 + 0.5 * bool(drafted), text=[*new, *[1, 2, 3] * 150])
    lengths = machine.steps(70)
    assert lengths[20:40] == [0] * 20
    assert lengths[-1] == 15


def test_each_length_that_a_lookup_finds_has_its_own_acceptance_rate():
    # after 5 comes something new, after 1, 2, 3, 4 what came before
    text = [token for other in range(10, 90) for token in (1, 2, 3, 4, 5, other, 5)]
    machine = Machine("lookup", lambda drafted: 1 + 0.4 * bool(drafted), text=text, max_draft=1)
    machine.steps(60)
    end = 7 * 60
    assert len(machine.drafts.next(text[: end + 4], 9)) == 1  # after 1, 2, 3, 4
    assert machine.drafts.next(text[: end + 7], 9) == []  # after 5, found alone


def test_no_drafts_beyond_the_limit():
    drafts = Drafts(NeuroFlowLosslessConfig(draft_length=5), None)
    assert len(drafts.next([1, 1, 1], 2)) == 2
    assert drafts.next([1] * 6, 0) == drafts.next([1] * 7, -1) == []


def test_a_rate_finds_its_threshold_in_the_models_similarities():
    stock, _ = models("plain")
    ours = adopt(stock)
    options = {"drafter": "bypass", "bypass": {"rate": 0.3, "cache_layers": [3]}, "draft_length": 2}
    ours.config.lossless = options  # which need not be calibrated yet
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match=r"similarities at gate layer 1.*neuroflow calibrate"):
        ours.generate(ids, max_new_tokens=NEW, lossless=True)
    found = ours.calibrate_bypass([ids[0].tolist()])
    assert NeuroFlowLosslessConfig(**options).draft_bypass(4, {"1": found}).threshold == pytest.approx(
        found[70], abs=1e-5
    )
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW, lossless=True), stock.generate(ids, max_new_tokens=NEW))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafer": "lookup"}, "Did you mean `drafter`"),
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
        ({"inputs": random_ids(2)}, "one sequence at a time, and the input has 2"),
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
        models("plain")[1].generate(random_ids(), lossless="lookup")
