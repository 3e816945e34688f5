"""A Llama in Phi-3's form is the same model, bit for bit, and what Phi-3 lacks is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM

from neuroflow_hf import NeuroFlowPhi3ForCausalLM
from neuroflow_hf.language.from_llama import phi3_config
from tests.llama_models import TINY_LLAMA, make_llama
from tests.phi3_models import make_stock, random_ids, run_steps


@st.composite
def shapes(draw):
    """Options of a Llama: any number of heads and groups, any head size and MLP that fill whole vectors."""
    groups, heads_of_each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "num_attention_heads": groups * heads_of_each,
        "num_key_value_heads": groups,
        "hidden_size": groups * heads_of_each * draw(st.sampled_from([16, 32, 64])),
        "intermediate_size": draw(st.sampled_from([64, 128, 192])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 1e4, 1e5]))},
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "pad_token_id": draw(st.sampled_from([None, 0, 5])),
        "attention": draw(st.sampled_from(["sdpa", "eager"])),
        "seed": draw(st.integers(0, 9)),
    }


@settings(max_examples=40, deadline=None)
@given(options=shapes(), batch_size=st.integers(1, 3), length=st.integers(2, 20))
def test_logits_are_equal_to_the_last_bit(options, batch_size, length):
    llama = make_llama(**options)
    ours, ids = NeuroFlowPhi3ForCausalLM.from_llama(llama), random_ids(batch_size, length)
    assert ours.config._attn_implementation == options["attention"]
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0  # padding on the left
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            assert torch.equal(ours(ids, **inputs).logits, llama(ids, **inputs).logits)


@pytest.mark.parametrize(
    "options", [{"hidden_size": 28, "intermediate_size": 37, "num_attention_heads": 2}, {"hidden_act": "gelu"}]
)
def test_others_differ_by_rounding_only(options):
    llama = make_llama(**options)
    ids = random_ids(2, 9)
    with torch.no_grad():
        actual, expected = NeuroFlowPhi3ForCausalLM.from_llama(llama)(ids).logits, llama(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_texts_are_equal(tied):
    llama = make_llama(tie_word_embeddings=tied)
    ours, ids = NeuroFlowPhi3ForCausalLM.from_llama(llama), random_ids(1, 6)
    for one, other in zip(run_steps(ours, ids, 2)[0], run_steps(llama, ids, 2)[0], strict=True):
        assert torch.equal(one, other)
    expected = llama.generate(ids, max_new_tokens=30)
    assert torch.equal(ours.generate(ids, max_new_tokens=30), expected)
    assert torch.equal(ours.generate(ids, max_new_tokens=30, lossless=True), expected)
    output = ours.generate(
        ids, max_new_tokens=30, bypass={"cache_layers": [2], "threshold": -1}, return_dict_in_generate=True
    )
    assert ours.bypass_statistics(output.past_key_values).rate == 1


def test_generation_goes_on_past_the_trained_length():
    llama = make_llama(max_position_embeddings=16)
    ours, ids = NeuroFlowPhi3ForCausalLM.from_llama(llama), random_ids(1, 6)
    expected = llama.generate(ids, max_new_tokens=30)
    assert torch.equal(ours.generate(ids, max_new_tokens=30), expected)
    assert torch.equal(ours.generate(ids, max_new_tokens=30, lossless=True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dtype_and_training_are_carried_over(dtype):
    llama, ids = make_llama().to(dtype), random_ids(1, 12)
    ours = NeuroFlowPhi3ForCausalLM.from_llama(llama)
    assert ours.dtype == dtype and not ours.training
    assert ours.model.rotary_emb.inv_freq.dtype == llama.model.rotary_emb.inv_freq.dtype
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, llama(ids).logits)
    assert NeuroFlowPhi3ForCausalLM.from_llama(llama.train()).training


def test_token_ids_and_generation_defaults_are_carried_over():
    llama = make_llama(eos_token_id=[2, 3], bos_token_id=4, pad_token_id=None)
    llama.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[7])
    ours = NeuroFlowPhi3ForCausalLM.from_llama(llama)
    assert (ours.config.eos_token_id, ours.config.bos_token_id, ours.config.pad_token_id) == ([2, 3], 4, None)
    assert ours.generation_config.to_dict() == llama.generation_config.to_dict()
    assert ours.generation_config is not llama.generation_config


def test_weights_are_copies():
    llama, ids = make_llama(tie_word_embeddings=True), random_ids(1, 8)
    ours = NeuroFlowPhi3ForCausalLM.from_llama(llama)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    with torch.no_grad():
        expected = llama(ids).logits
        for parameter in ours.parameters():
            parameter.zero_()
        assert torch.equal(llama(ids).logits, expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded(tied, tmp_path):
    llama, ids = make_llama(tie_word_embeddings=tied), random_ids(1, 8)
    NeuroFlowPhi3ForCausalLM.from_llama(llama).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is NeuroFlowPhi3ForCausalLM
    with torch.no_grad():
        assert torch.equal(again(ids).logits, llama(ids).logits)


def test_gradients_flow():
    ours = NeuroFlowPhi3ForCausalLM.from_llama(make_llama())
    ids = random_ids(1, 8)
    ours(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"attention_bias": True}, "biases .`attention_bias`"),
        ({"mlp_bias": True}, "biases .`mlp_bias`"),
        ({"head_dim": 32}, "`head_dim` 32; a width of 64 with 4 heads makes it 16"),
        *(
            ({"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}, f"RoPE scaling of type `{kind}`")
            for kind, more in {
                "linear": {"factor": 2.0},
                "dynamic": {"factor": 2.0},
                "yarn": {"factor": 2.0},
                "longrope": {"factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                "llama3": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            }.items()
        ),
    ],
)
def test_what_phi3_lacks_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        NeuroFlowPhi3ForCausalLM.from_llama(make_llama(**options))


def test_everything_lacking_is_named_at_once():
    with pytest.raises(ValueError, match=r"attention_bias.*; .*mlp_bias.*; .*head_dim"):
        phi3_config(LlamaConfig(**TINY_LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 4}))


def test_other_models_are_named():
    with pytest.raises(TypeError, match=r"Phi3ForCausalLM.*LlamaForCausalLM"):
        NeuroFlowPhi3ForCausalLM.from_llama(make_stock())
    mistral = MistralForCausalLM(MistralConfig(**TINY_LLAMA))
    with pytest.raises(TypeError, match="MistralForCausalLM"):
        NeuroFlowPhi3ForCausalLM.from_llama(mistral)
    with pytest.raises(ValueError, match=r"`mistral`.*`llama`"):
        phi3_config(mistral.config)


class OtherLinear(nn.Linear):
    """As a quantised layer or an adapter: what it computes is not in its weight alone."""


def test_weights_that_are_not_at_hand_are_refused():
    adapted = make_llama()
    adapted.model.layers[1].mlp.up_proj = OtherLinear(64, 64, bias=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*OtherLinear.*adapters"):
        NeuroFlowPhi3ForCausalLM.from_llama(adapted)
    hooked = make_llama()
    hooked.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model\.norm.*hooks"):
        NeuroFlowPhi3ForCausalLM.from_llama(hooked)
    with pytest.raises(ValueError, match="not here"):
        NeuroFlowPhi3ForCausalLM.from_llama(make_llama().to("meta"))
