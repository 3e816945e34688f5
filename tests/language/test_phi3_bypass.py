"""The bypass: against the method in plain loops, its caches, its batches, its memory, in every way to generate."""

import copy
import inspect

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache, modeling_utils
from transformers.cache_utils import DynamicSlidingWindowLayer

from neuroflow_hf import NeuroFlowPhi3Config
from neuroflow_hf.language.bypass_state import find_state
from neuroflow_hf.language.naive import NaiveBypass
from tests.conftest import assert_close_in_norm
from tests.phi3_models import FLOAT32, KINDS, SWITCHES, WINDOW, adopt, make_ours, make_stock, random_ids, run_steps

PROMPT = 5
LAYERS = {
    "one": {"gate_layer": 1, "cache_layers": [2]},
    "several": {"gate_layer": 0, "cache_layers": [1, 3]},
    "inverted": {"gate_layer": 2, "cache_layers": [0, 1]},
    "itself": {"gate_layer": 1, "cache_layers": [1]},
}
each_target = pytest.mark.parametrize("target", ["attention", "mlp", "block"])
# Kinds differ in their caches and positions, and a bypassed MLP touches neither: it is tested with one of them.
PAIRS = [
    ("plain", "mlp"),
    ("plain", "block"),
    ("window", "attention"),
    ("window", "block"),
    ("longrope", "block"),
    ("partial", "attention"),
]
assert {kind for kind, _ in PAIRS} == set(KINDS)
each_pair = pytest.mark.parametrize("kind, target", PAIRS)


def threshold_of(model, ids, prompt_length=PROMPT, share=0.5, **options):
    """A threshold between the similarities of a run, which about this share of the steps is below."""
    _, cache = run_steps(model, ids, prompt_length, bypass=options | {"threshold": 2})
    values = model.bypass_statistics(cache).similarity
    values = values[~values.isnan()].sort().values
    middle = max(1, min(len(values) - 1, round(share * len(values))))
    return values[middle - 1 : middle + 1].mean().item()


def run_naively(model, ids, prompt_length, options):
    """The method in plain loops: a row's logits as `run_steps` gives them, [n, V], and what it remembers."""
    with torch.no_grad():
        naive = NaiveBypass(model, model.bypass_options(options))
        logits = [naive.feed(ids[0, :prompt_length].tolist())[-1]]
        logits += [naive.feed([token])[0] for token in ids[0, prompt_length:].tolist()]
    return torch.stack(logits), naive


def bypassed_at(model, cache):
    return model.bypass_statistics(cache).bypassed_mask.tolist()


# --- what is computed ----------------------------------------------------------------------------------------------


@each_pair
@pytest.mark.parametrize("layers", LAYERS)
def test_as_in_plain_loops(kind, target, layers):
    model, ids = make_ours(kind), random_ids(1, 15)
    options = LAYERS[layers] | {"target": target}
    for share in (0.5, 0.4, 0.3, 0.6):  # an inverted gate sees what it did: all or nothing happens easily
        options["threshold"] = threshold_of(model, ids, share=share, **options | {"threshold": 2})
        logits, cache = run_steps(model, ids, PROMPT, bypass=options)
        if 0 < model.bypass_statistics(cache).bypassed.item() < 10:
            break
    expected, naive = run_naively(model, ids, PROMPT, options)
    statistics = model.bypass_statistics(cache)
    assert statistics.bypassed_mask[0].tolist() == naive.bypassed
    assert 0 < statistics.bypassed.item() < statistics.steps.item() == 10
    assert_close_in_norm(logits[0], expected, FLOAT32)
    similarity = torch.tensor(naive.similarity)
    assert torch.equal(statistics.similarity[0].isnan(), similarity.isnan())
    assert_close_in_norm(statistics.similarity[0].nan_to_num(), similarity.nan_to_num(), FLOAT32)


@pytest.mark.parametrize("policy", ["max_consecutive", "guard_entropy", "always"])
@pytest.mark.parametrize("layers", ["one", "inverted"])
def test_policies_as_in_plain_loops(policy, layers):
    model, ids = make_ours(), random_ids(1, 25, seed=1)
    options = LAYERS[layers] | {"target": "block", "threshold": -1}
    if policy == "max_consecutive":
        options |= {"max_consecutive": 2, "threshold": threshold_of(model, ids, share=0.1, **options)}
    elif policy == "guard_entropy":
        _, dense = run_naively(model, ids, 25, options)
        options["guard_entropy"] = sorted(dense.entropy)[12] + 1e-3
    logits, cache = run_steps(model, ids, PROMPT, bypass=options)
    expected, naive = run_naively(model, ids, PROMPT, options)
    assert bypassed_at(model, cache) == [naive.bypassed]
    assert 2 < sum(naive.bypassed) <= 20
    assert (sum(naive.bypassed) == 20) == (policy == "always")
    assert_close_in_norm(logits[0], expected, FLOAT32)


@pytest.mark.parametrize("layers", LAYERS)
def test_a_prompt_of_one_token(layers):
    model, ids = make_ours(), random_ids(1, 9)
    options = LAYERS[layers] | {"target": "block", "threshold": 0.1}
    logits, cache = run_steps(model, ids, 1, bypass=options)
    expected, naive = run_naively(model, ids, 1, options)
    assert bypassed_at(model, cache) == [naive.bypassed]
    assert_close_in_norm(logits[0], expected, FLOAT32)


@each_pair
def test_a_threshold_above_1_is_dense(kind, target):
    stock, ids = make_stock(kind), random_ids(2, 14)
    options = LAYERS["several"] | {"target": target, "threshold": 1.01}
    logits, _ = run_steps(adopt(stock), ids, PROMPT, bypass=options)
    assert torch.equal(logits, run_steps(stock, ids, PROMPT)[0])


@pytest.mark.parametrize("kind", ["plain", "window", "partial"])
@pytest.mark.parametrize("target", ["attention", "block"])
def test_caches_have_no_holes(kind, target):
    """Lengths and positions are the dense run's; up to the first cache layer, whose input is, so are the entries."""
    model, ids = make_ours(kind), random_ids(2, PROMPT + 2 * WINDOW)
    options = {"gate_layer": 0, "cache_layers": [2], "target": target, "threshold": -1}
    _, dense = run_steps(model, ids, PROMPT)
    _, cache = run_steps(model, ids, PROMPT, bypass=options)
    assert model.bypass_statistics(cache).rate.tolist() == [1, 1]
    assert cache.get_seq_length() == dense.get_seq_length() == ids.shape[1]
    for index, (ours, theirs) in enumerate(zip(cache.layers, dense.layers, strict=False)):
        assert ours.keys.shape == theirs.keys.shape
        assert ours.get_seq_length() == theirs.get_seq_length()
        if index <= 2:
            assert_close_in_norm(ours.keys, theirs.keys, FLOAT32)
            assert_close_in_norm(ours.values, theirs.values, FLOAT32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind, target", [pair for pair in PAIRS if pair[0] != "longrope"])
def test_rows_decide_for_themselves(kind, attention, target):
    model, ids = make_ours(kind), random_ids(3, 17, seed=2)
    model.set_attn_implementation(attention)
    options = LAYERS["several"] | {"target": target}
    options["threshold"] = threshold_of(model, ids, **options)
    logits, cache = run_steps(model, ids, PROMPT, bypass=options)
    together = bypassed_at(model, cache)
    counts = {sum(row[position] for row in together) for position in range(PROMPT, 17)}
    assert counts >= {0, 1, 2} or counts >= {1, 2, 3}
    for row in range(3):
        alone, cache_alone = run_steps(model, ids[row : row + 1], PROMPT, bypass=options)
        assert bypassed_at(model, cache_alone) == [together[row]]
        assert_close_in_norm(logits[row], alone[0], FLOAT32)


@each_target
@pytest.mark.parametrize("layers", ["one", "inverted"])
def test_padding_on_the_left_changes_nothing(layers, target):
    model = make_ours("window")
    prompts = [random_ids(1, length, seed=length)[0] for length in (1, 3, 6)]
    mask = torch.zeros(3, 6, dtype=torch.int64)
    ids = torch.zeros(3, 6, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 6 - len(prompt) :], mask[row, 6 - len(prompt) :] = prompt, 1
    options = LAYERS[layers] | {"target": target, "threshold": threshold_of(model, ids, **LAYERS[layers])}
    together = model.generate(ids, attention_mask=mask, bypass=options, max_new_tokens=12)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt.unsqueeze(0), bypass=options, max_new_tokens=12)
        assert torch.equal(together[row, 6:], alone[0, len(prompt) :])


def flops(model, token, cache, **kwargs):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(token, past_key_values=copy.deepcopy(cache), **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("fired", [0, 2, 3])
@each_target
def test_bypassed_layers_are_skipped(target, fired):
    """Exactly the multiply-adds of query, attention, output projection and MLP, where all rows fired."""
    model, ids = make_ours(), random_ids(3, PROMPT + 1)
    model.set_attn_implementation("eager")  # whose products the counter sees
    options = {"gate_layer": 0, "cache_layers": [1, 2], "target": target, "threshold": 2}
    with torch.no_grad():
        cache = model(ids[:, :PROMPT], bypass=options).past_key_values
        after = model(ids[:, PROMPT:], past_key_values=copy.deepcopy(cache), bypass=options).past_key_values
    similarity = model.bypass_statistics(after).similarity[:, -1].sort().values.tolist()
    threshold = [2.0, *reversed(similarity)][fired]
    dense = flops(model, ids[:, PROMPT:], cache, bypass=False)
    bypassed = flops(model, ids[:, PROMPT:], cache, bypass=options | {"threshold": threshold})
    width, inner, positions = model.config.hidden_size, model.config.intermediate_size, PROMPT + 1
    attention = 2 * (2 * width * width + 2 * positions * width)
    saved = {"attention": attention, "mlp": 2 * 3 * width * inner, "block": attention + 2 * 3 * width * inner}
    assert dense - bypassed == (fired == 3) * 3 * 2 * saved[target]


def test_an_adapted_projection_is_called():
    """What is more than its weights is not read past: keys and values come from the module."""
    model, ids = make_ours(), random_ids(2, 9)
    options = {"gate_layer": 0, "cache_layers": [2], "threshold": -1}
    calls = []
    model.model.layers[2].self_attn.qkv_proj.register_forward_hook(lambda module, inputs, output: calls.append(output))
    logits, _ = run_steps(model, ids, PROMPT, bypass=options)
    assert len(calls) == 5
    assert_close_in_norm(logits, run_steps(make_ours(), ids, PROMPT, bypass=options)[0], FLOAT32)


def test_rows_with_different_adapters_decide_for_themselves():
    """PEFT's `adapter_names` chooses an adapter for every row, and its hooks expect all rows."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(make_ours(), lora, adapter_name="a")
    model.add_adapter("b", lora)
    model.eval()
    ids = random_ids(2, PROMPT)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True}
    bypass = {"gate_layer": 0, "cache_layers": [1, 2], "threshold": 2}
    for target in ("block", "attention", "mlp"):
        bypass["target"] = target
        output = model.generate(ids, adapter_names=["a", "b"], bypass=bypass | {"threshold": 2}, **options)
        similarity = model.bypass_statistics(output.past_key_values).similarity
        bypass["threshold"] = similarity[~similarity.isnan()].median().item()
        alone = []
        for row, name in enumerate(("a", "b")):
            model.set_adapter(name)
            alone.append(model.generate(ids[row : row + 1], bypass=bypass, **options).sequences)
        together = model.generate(ids, adapter_names=["a", "b"], bypass=bypass, **options)
        rates = model.bypass_statistics(together.past_key_values).bypassed_mask[:, PROMPT:].float().mean(dim=1)
        assert 0 < rates.mean() < 1
        assert torch.equal(together.sequences, torch.cat(alone))


def test_prompt_tuning():
    model = make_ours()
    ids = random_ids(1, PROMPT)
    adapter = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4)
    model = peft.get_peft_model(model, adapter).eval()
    dense = model.generate(ids, max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, bypass={"cache_layers": [2], "threshold": 2}), dense)
    output = model.generate(
        ids, max_new_tokens=12, bypass={"cache_layers": [2], "threshold": -1}, return_dict_in_generate=True
    )
    assert model.bypass_statistics(output.past_key_values).bypassed_mask[:, 4 + PROMPT :].all()


# --- what is remembered --------------------------------------------------------------------------------------------


@each_pair
@pytest.mark.parametrize("back", [1, 4, 8])
def test_after_cropping_all_is_as_if_never_gone_further(kind, target, back):
    if kind == "longrope":
        pytest.skip("transformers' cache does not survive the switch of frequencies")
    if kind == "window" and "num_visible" not in inspect.getsource(DynamicSlidingWindowLayer.update):
        pytest.skip("this version of transformers records the past for a single forward only")
    model, ids, others = make_ours(kind), random_ids(2, 16), random_ids(2, 16, seed=9)
    options = LAYERS["several"] | {"target": target, "max_consecutive": 3}
    options["threshold"] = threshold_of(model, ids, share=0.3, **options)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    _, cache = run_steps(model, ids, 10, bypass=options, cache=cache)
    cache.crop(-back)
    never_further = DynamicCache(config=model.config)
    _, never_further = run_steps(model, ids[:, : 16 - back], 10, bypass=options, cache=never_further)
    for position in range(16 - back, 16):
        with torch.no_grad():
            outputs = [
                model(others[:, position : position + 1], past_key_values=each, bypass=options).logits
                for each in (cache, never_further)
            ]
        cache.crop(0)
        assert_close_in_norm(*outputs, FLOAT32)
    assert bypassed_at(model, cache) == bypassed_at(model, never_further)


def test_steps_of_several_tokens_are_dense_and_remembered():
    model, ids = make_ours(), random_ids(1, 14)
    options = LAYERS["several"] | {"target": "block", "threshold": -1}
    _, cache = run_steps(model, ids, PROMPT, bypass=options)
    _, reference = run_steps(model, ids, PROMPT, bypass=options)
    token = random_ids(1, 1, seed=5)
    with torch.no_grad():
        output = model(random_ids(1, 3, seed=4), past_key_values=cache, bypass=options)
        dense = model(random_ids(1, 3, seed=4), past_key_values=reference, bypass=False)
        assert_close_in_norm(output.logits, dense.logits, FLOAT32)
        cache.crop(-2)  # a verified draft of which one token was right
        after = model(token, past_key_values=cache, bypass=options)
        _, naive = run_naively(model, ids, PROMPT, options)
        naive.feed(random_ids(1, 3, seed=4)[0].tolist())
        naive.crop(15)
        assert_close_in_norm(after.logits[0], naive.feed(token[0].tolist()), FLOAT32)


def test_rows_are_repeated_selected_and_reordered():
    model, ids = make_ours(), random_ids(2, 12)
    options = LAYERS["several"] | {"target": "block"}
    options["threshold"] = threshold_of(model, ids, **options)
    _, cache = run_steps(model, ids, PROMPT, bypass=options)
    before = torch.tensor(bypassed_at(model, cache))
    assert not torch.equal(before[0], before[1])
    cache.batch_repeat_interleave(2)
    assert torch.equal(torch.tensor(bypassed_at(model, cache)), before[[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(torch.tensor(bypassed_at(model, cache)), before[[1, 0]])
    token = random_ids(2, 1, seed=3)
    with torch.no_grad():
        logits = model(token, past_key_values=cache, bypass=options).logits
        _, fresh = run_steps(model, ids.flip(0), PROMPT, bypass=options)
        assert_close_in_norm(logits, model(token, past_key_values=fresh, bypass=options).logits, FLOAT32)
    cache.reset()
    assert find_state(cache).positions == 0


def test_generations_do_not_meet():
    model, ids = make_ours(), random_ids(2, 12)
    options = LAYERS["one"] | {"threshold": threshold_of(model, ids, **LAYERS["one"])}
    with torch.no_grad():
        caches = [model(ids[row : row + 1, :PROMPT], bypass=options).past_key_values for row in range(2)]
        for position in range(PROMPT, 12):
            for row in range(2):
                model(ids[row : row + 1, position : position + 1], past_key_values=caches[row], bypass=options)
    _, together = run_steps(model, ids, PROMPT, bypass=options)
    assert [bypassed_at(model, cache)[0] for cache in caches] == bypassed_at(model, together)


@each_target
def test_half_precision(target):
    model, ids = make_ours("partial").to(torch.bfloat16), random_ids(3, 12)
    options = LAYERS["several"] | {"target": target}
    options["threshold"] = threshold_of(model, ids, **options)
    logits, cache = run_steps(model, ids, PROMPT, bypass=options)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert 0 < model.bypass_statistics(cache).bypassed.sum() < 21


def test_what_was_not_recorded_is_not_reused():
    """Where a cache grew without a bypass, or with another, the next step is computed; those after it may not be."""
    model, ids = make_ours(), random_ids(1, 12)
    one, several = ({"threshold": -1} | LAYERS[name] for name in ("one", "several"))
    _, cache = run_steps(model, ids, PROMPT, bypass=one)
    outcomes = []
    for options in (False, one, one, several, several):
        with torch.no_grad():
            model(ids[:, :1], past_key_values=cache, bypass=options)
        outcomes.append(find_state(cache).whole("outcome")[0].tolist())
    assert outcomes[1:] == [[1], [1, 2], [1], [1, 2]]


def test_bypassed_steps_store_no_outputs_of_their_own():
    model, ids = make_ours(), random_ids(1, 12)
    _, cache = run_steps(model, ids, PROMPT, bypass=LAYERS["one"] | {"threshold": -1})
    chunks = find_state(cache).records["attention.2"]
    assert {chunk.untyped_storage().data_ptr() for chunk in chunks} == {chunks[0].untyped_storage().data_ptr()}


# --- in every way to generate --------------------------------------------------------------------------------------

GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "returns": {"num_return_sequences": 2, "do_sample": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize(
    "kind, target", [("plain", "mlp"), ("window", "block"), ("longrope", "block"), ("partial", "attention")]
)
@pytest.mark.parametrize("way", GENERATION)
def test_generating(kind, target, way):
    """In the configuration or in the call; text of the wanted length, a cache of all tokens but the last."""
    ids = random_ids(1, 6)
    options = LAYERS["several"] | {"target": target, "threshold": 0.2}
    in_config, in_call = make_ours(kind, bypass=options), make_ours(kind)
    texts = []
    for model, call in ((in_config, {}), (in_call, {"bypass": options})):
        torch.manual_seed(0)
        output = model.generate(ids, max_new_tokens=13, return_dict_in_generate=True, **call, **GENERATION[way])
        assert output.past_key_values.get_seq_length() == 18
        assert output.sequences.shape[1] == 19
        statistics = model.bypass_statistics(output.past_key_values)
        assert ((statistics.rate >= 0) & (statistics.rate <= 1)).all()
        texts.append(output.sequences)
    assert torch.equal(*texts)


@each_target
@pytest.mark.parametrize("kind", ["plain", "window"])
def test_beams_carry_their_memory_along(kind, target):
    """The score of the text that beam search found is that of the same text fed token by token."""
    model, ids = make_ours(kind), random_ids(1, 6, seed=8)
    options = LAYERS["several"] | {"target": target}
    options["threshold"] = threshold_of(model, random_ids(1, 30), share=0.8, **options)
    output = model.generate(
        ids,
        max_new_tokens=12,
        num_beams=4,
        length_penalty=0.0,
        bypass=options,
        return_dict_in_generate=True,
        output_scores=True,
    )
    text = output.sequences
    logits, cache = run_steps(model, text[:, :-1], 6, bypass=options)
    assert 0 < model.bypass_statistics(cache).bypassed.item() < 11
    chosen = logits[0].log_softmax(dim=-1).gather(1, text[0, 6:].unsqueeze(1))
    assert_close_in_norm(output.sequences_scores[0], chosen.sum(), FLOAT32)


def test_embeddings_as_input():
    model, ids = make_ours(), random_ids(1, 6)
    options = LAYERS["one"] | {"threshold": threshold_of(model, random_ids(1, 30), **LAYERS["one"])}
    embeds = model.get_input_embeddings()(ids)
    text = model.generate(inputs_embeds=embeds, max_new_tokens=10, bypass=options)
    assert torch.equal(text, model.generate(ids, max_new_tokens=10, bypass=options)[:, 6:])


@each_target
def test_a_continued_cache_goes_on(target):
    model, ids = make_ours("window"), random_ids(1, 6)
    options = LAYERS["one"] | {"target": target}
    options["threshold"] = threshold_of(model, random_ids(1, 30), **options)
    whole = model.generate(ids, max_new_tokens=14, bypass=options)
    first = model.generate(ids, max_new_tokens=6, bypass=options, return_dict_in_generate=True)
    second = model.generate(first.sequences, max_new_tokens=8, bypass=options, past_key_values=first.past_key_values)
    assert torch.equal(second, whole)


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_as_an_assistant(kind):
    """The bypassed model drafts for the stock one: same text. A stock assistant is not asked for a bypass."""
    stock, ids = make_stock(kind), random_ids(1, 6)
    options = LAYERS["several"] | {"target": "block", "threshold": -1}
    dense = stock.generate(ids, max_new_tokens=14)
    assert torch.equal(stock.generate(ids, max_new_tokens=14, assistant_model=adopt(stock, options)), dense)
    text = adopt(stock).generate(ids, max_new_tokens=14, assistant_model=make_stock(kind, seed=1), bypass=options)
    assert text.shape == (1, 20)


@pytest.mark.skipif(not SWITCHES, reason="this version of transformers loses the text where long RoPE switches")
def test_long_rope_starts_anew():
    """Phi-3 drops the cache where the frequencies switch; what the bypass remembers goes with it."""
    model, ids = make_ours("longrope"), random_ids(1, 10)
    options = LAYERS["one"] | {"threshold": -1}
    output = model.generate(ids, max_new_tokens=12, bypass=options, return_dict_in_generate=True)
    outcome = find_state(output.past_key_values).whole("outcome")[0].tolist()
    assert outcome == [0] * 17 + [2] * 4


def test_a_guard_follows_the_logits_that_were_kept():
    model, ids = make_ours(), random_ids(2, 9)
    options = LAYERS["one"] | {"threshold": -1, "guard_entropy": 99.0}
    keeps = [0, 1, 3, torch.tensor([8])]
    if hasattr(modeling_utils, "slice_logits_to_keep"):  # not in transformers 5.17
        keeps += [torch.tensor([[7, 8], [7, 8]]), torch.arange(9).ge(6).expand(2, 9)]
    for keep in keeps:
        with torch.no_grad():
            output = model(ids, bypass=options, logits_to_keep=keep)
            entropy = find_state(output.past_key_values).whole("entropy")
            output = model(ids[:, :1], past_key_values=output.past_key_values, bypass=options)
        assert not entropy[:, -1].isnan().any()
        assert model.bypass_statistics(output.past_key_values).bypassed.tolist() == [1, 1]


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 0.5}, "Did you mean `threshold`"),
        ({"colour": 1}, "Known options: gate_layer"),
        ({"gate_layer": 4}, "layer 4; the model has 4 layers, 0 to 3"),
        ({"gate_layer": -1}, "layer -1"),
        ({"cache_layers": [2, 9]}, "layer 9"),
        ({"cache_layers": []}, "is empty"),
        ({"gate_layer": 1, "cache_layers": [0, 2]}, "both sides"),
        ({"threshold": float("nan")}, "expected a finite cosine"),
        ({"threshold": float("inf")}, "expected a finite cosine"),
        ({"threshold": -1.01}, "at least -1"),
        ({"threshold": "high"}, "threshold"),
        ({"target": "heads"}, "target"),
        ({"max_consecutive": 0}, "at least 1"),
        ({"guard_entropy": -1.0}, "guard_entropy"),
        ({"guard_entropy": float("nan")}, "guard_entropy"),
    ],
)
def test_bad_options(options, message):
    model = make_ours()
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(), bypass=options, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        NeuroFlowPhi3Config(num_hidden_layers=4, bypass=options)
    with pytest.raises(ValueError, match=message):
        model.config.bypass = options


def test_options_beside_the_bypass_are_refused():
    with pytest.raises(ValueError, match=r"pass `bypass=\{'threshold': 0.5\}`"):
        NeuroFlowPhi3Config(threshold=0.5)


def test_what_is_no_dict_is_refused():
    with pytest.raises(TypeError, match="expected a dict"):
        make_ours()(random_ids(), bypass=0.5)


def test_options_of_a_call_are_laid_over_the_configuration():
    model = make_ours(bypass={"gate_layer": 0, "cache_layers": 2, "threshold": 0.5})
    assert model.config.bypass["cache_layers"] == [2]
    options = model.bypass_options({"threshold": 0.75})
    assert (options.gate_layer, options.cache_layers, options.threshold) == (0, [2], 0.75)
    assert model.bypass_options().threshold == 0.5
    assert model.bypass_options(False) is None
    assert make_ours().bypass_options() is None
    assert make_ours().bypass_options({}).cache_layers == [3]
    model.config.bypass = None
    assert model.bypass_options() is None


def test_a_bare_model_refuses_a_guard():
    model = make_ours()
    with pytest.raises(ValueError, match="NeuroFlowPhi3ForCausalLM"):
        model.model(random_ids(), bypass={"guard_entropy": 1.0})
    model.config.bypass = {"guard_entropy": 1.0}
    with pytest.raises(ValueError, match="NeuroFlowPhi3ForCausalLM"):
        model.model(random_ids())


def test_a_static_cache_is_refused():
    model = make_ours(bypass=LAYERS["one"])
    with pytest.raises(ValueError, match='cache_implementation="dynamic"'):
        model.generate(random_ids(), max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="StaticCache"):
        model(random_ids(), past_key_values=StaticCache(config=model.config, max_cache_len=9))
    assert model.generate(random_ids(), max_new_tokens=3, cache_implementation="static", bypass=False).shape == (1, 8)


def test_another_number_of_sequences_is_refused():
    model = make_ours(bypass=LAYERS["one"])
    with torch.no_grad():
        cache = model(random_ids(2)).past_key_values
        with pytest.raises(ValueError, match="holds 2 sequences, the input 3"):
            model(random_ids(3, 1), past_key_values=cache)


def test_attentions_are_refused():
    model = make_ours(bypass=LAYERS["one"])
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="bypass=False"):
        model(random_ids(), output_attentions=True)


def test_statistics_without_a_bypass_are_refused():
    model = make_ours()
    cache = model(random_ids()).past_key_values
    with pytest.raises(ValueError, match="no bypass"):
        model.bypass_statistics(cache)


def test_without_a_cache_all_is_dense():
    stock, ids = make_stock(), random_ids()
    ours = adopt(stock, LAYERS["one"] | {"threshold": -1, "guard_entropy": 99.0})
    assert torch.equal(
        ours.generate(ids, max_new_tokens=5, use_cache=False), stock.generate(ids, max_new_tokens=5, use_cache=False)
    )
