"""Without a bypass the models are Phi-3, bit for bit: outputs, gradients, files, auto classes, pipelines."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    SiglipConfig,
    pipeline,
)

from neuroflow_hf import NeuroFlowPhi3Config, NeuroFlowPhi3ForCausalLM, NeuroFlowPhi3Model
from tests.phi3_models import KINDS, TINY, adopt, make_ours, make_stock, make_tokenizer, random_ids, run_steps

each_kind = pytest.mark.parametrize("kind", KINDS)
BYPASS = {"gate_layer": 0, "cache_layers": [2], "threshold": 0.5}


@each_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(kind, attention):
    stock = make_stock(kind)
    stock.set_attn_implementation(attention)
    ours, ids = adopt(stock), random_ids(2, 14)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)
    for one, other in zip(run_steps(ours, ids, 5)[0], run_steps(stock, ids, 5)[0], strict=True):
        assert torch.equal(one, other)


@each_kind
def test_generated_text(kind):
    stock = make_stock(kind)
    ours, ids = adopt(stock), random_ids(2, 6)
    for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        texts = []
        for model in (stock, ours):
            torch.manual_seed(1)
            texts.append(model.generate(ids, max_new_tokens=14, **options))
        assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype):
    stock = make_stock("window").to(dtype)
    ours, ids = adopt(stock).to(dtype), random_ids(1, 12)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)


def test_recorded_outputs_and_tuples():
    stock = make_stock()
    stock.set_attn_implementation("eager")
    ours, ids = adopt(stock), random_ids(1, 6)
    with torch.no_grad():
        outputs = [model(ids, output_hidden_states=True, output_attentions=True) for model in (stock, ours)]
        for name in ("hidden_states", "attentions"):
            assert all(torch.equal(one, other) for one, other in zip(*(o[name] for o in outputs), strict=True))
        for bypass in (None, BYPASS):
            assert torch.equal(ours(ids, return_dict=False, bypass=bypass)[0], outputs[0].logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("bypass", [None, BYPASS], ids=["off", "on"])
def test_training(checkpointing, bypass):
    ids = random_ids(2, 9)
    gradients = []
    for model in (stock := make_stock(resid_pdrop=0.2), adopt(stock, bypass)):
        model.train()
        if checkpointing:
            name = "activation_checkpointing_enable"  # in transformers 5.17 it has another name
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
        torch.manual_seed(3)
        output = model(ids, labels=ids)
        output.loss.backward()
        gradients.append([output.loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@each_kind
def test_initialisation_draws_the_same_weights(kind):
    weights = []
    for model_class, config_class in ((Phi3ForCausalLM, Phi3Config), (NeuroFlowPhi3ForCausalLM, NeuroFlowPhi3Config)):
        torch.manual_seed(7)
        weights.append(model_class(config_class(**TINY | KINDS[kind])).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- files ---------------------------------------------------------------------------------------------------------


@each_kind
def test_stock_checkpoints_load_and_go_back(kind, tmp_path):
    stock, ids = make_stock(kind), random_ids(1, 12)
    stock.save_pretrained(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config"}  # as early checkpoints have
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        expected = stock(ids).logits
        ours, info = NeuroFlowPhi3ForCausalLM.from_pretrained(
            tmp_path / "stock", output_loading_info=True, bypass=BYPASS
        )
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(ours(ids).logits, expected)
        ours.save_pretrained(tmp_path / "ours")
        again = NeuroFlowPhi3ForCausalLM.from_pretrained(tmp_path / "ours")
        assert again.config.bypass == BYPASS
        back, info = Phi3ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for model in (again, back):
            assert torch.equal(model(ids).logits, expected)
        bare = NeuroFlowPhi3Model.from_pretrained(tmp_path / "stock")
        assert torch.equal(bare(ids).last_hidden_state, Phi3Model.from_pretrained(tmp_path / "stock")(ids)[0])


def test_original_field_names_of_checkpoints(tmp_path):
    """The fields as they stand in the checkpoints' own files, from before transformers 5."""
    config = TINY | {
        "model_type": "phi3",
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 16,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, stock = NeuroFlowPhi3Config.from_pretrained(tmp_path), Phi3Config.from_pretrained(tmp_path)
    assert ours.rope_parameters == stock.rope_parameters
    assert ours.rope_parameters["rope_type"] == "longrope"
    assert ours.bypass is None


def test_other_configurations_are_refused():
    with pytest.raises(ValueError, match="siglip"):
        NeuroFlowPhi3Model(SiglipConfig())


def test_auto_classes(tmp_path):
    ours = make_ours(bypass=BYPASS)
    ours.save_pretrained(tmp_path / "ours")
    ours.model.save_pretrained(tmp_path / "bare")
    make_stock().save_pretrained(tmp_path / "stock")
    assert type(AutoConfig.from_pretrained(tmp_path / "ours")) is NeuroFlowPhi3Config
    assert type(AutoModel.from_pretrained(tmp_path / "ours")) is NeuroFlowPhi3Model
    assert type(AutoModel.from_pretrained(tmp_path / "bare")) is NeuroFlowPhi3Model
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is NeuroFlowPhi3ForCausalLM
    assert type(AutoModelForCausalLM.from_config(NeuroFlowPhi3Config(**TINY))) is NeuroFlowPhi3ForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")) is Phi3ForCausalLM
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["model_type"] == "neuroflow_phi3"
    assert stored["architectures"] == ["NeuroFlowPhi3ForCausalLM"]
    assert set(stored["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert set(json.loads((tmp_path / "bare" / "config.json").read_text())["auto_map"]) == {"AutoConfig", "AutoModel"}


@pytest.mark.parametrize("options", [{}, {"bypass": BYPASS}, {"lossless": True}], ids=["off", "bypass", "lossless"])
def test_the_pipeline(options, tmp_path):
    make_ours().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    assert type(generate.model) is NeuroFlowPhi3ForCausalLM
    (output,) = generate("hello world", max_new_tokens=8, do_sample=False, **options)
    assert output["generated_text"].startswith("hello world")
