"""Without a stream the models are the stock ones, bit for bit: outputs, gradients, weights, files, auto classes."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import ModelOutput

from neuroflow_hf import (
    NeuroFlowCLIPVisionConfig,
    NeuroFlowCLIPVisionModel,
    NeuroFlowDinov2Config,
    NeuroFlowDinov2Model,
    NeuroFlowDinov2WithRegistersConfig,
    NeuroFlowDinov2WithRegistersModel,
    NeuroFlowSiglipConfig,
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionConfig,
    NeuroFlowSiglipVisionModel,
)
from tests.conftest import (
    IMAGE_SIZE,
    TINY_DINOV2,
    TINY_TEXT,
    TINY_VISION,
    each_tower,
    lively,
    make_stock_tower,
    random_video,
    wrap_tower,
)

PARTS = {"text_config": TINY_TEXT, "vision_config": TINY_VISION}
# kind: stock class and its configuration, our class and its configuration, the options of both configurations
KINDS = {
    "dual": (SiglipModel, SiglipConfig, NeuroFlowSiglipModel, NeuroFlowSiglipConfig, PARTS),
    "vision": (
        SiglipVisionModel,
        SiglipVisionConfig,
        NeuroFlowSiglipVisionModel,
        NeuroFlowSiglipVisionConfig,
        TINY_VISION,
    ),
    "classifier": (
        SiglipForImageClassification,
        SiglipConfig,
        NeuroFlowSiglipForImageClassification,
        NeuroFlowSiglipConfig,
        {**PARTS, "num_labels": 3},
    ),
    "dinov2": (Dinov2Model, Dinov2Config, NeuroFlowDinov2Model, NeuroFlowDinov2Config, TINY_DINOV2),
    "registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        NeuroFlowDinov2WithRegistersModel,
        NeuroFlowDinov2WithRegistersConfig,
        TINY_DINOV2 | {"use_swiglu_ffn": True},
    ),
    "clip": (CLIPVisionModel, CLIPVisionConfig, NeuroFlowCLIPVisionModel, NeuroFlowCLIPVisionConfig, TINY_VISION),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def options_of(kind, attention_dropout=0.0):
    options = copy.deepcopy(KINDS[kind][4])
    dropout = "attention_probs_dropout_prob" if kind in ("dinov2", "registers") else "attention_dropout"
    for part in [options[name] for name in PARTS if name in options] or [options]:
        part[dropout] = attention_dropout
    return options


def make_stock(kind, attention_dropout=0.0, seed=0):
    stock_class, config_class = KINDS[kind][:2]
    torch.manual_seed(seed)
    return lively(stock_class(config_class(**options_of(kind, attention_dropout))))


def make_ours(kind, attention_dropout=0.0, seed=0):
    our_class, config_class = KINDS[kind][2:4]
    torch.manual_seed(seed)
    return lively(our_class(config_class(**options_of(kind, attention_dropout))))


def pair(kind, attention_dropout=0.0, attention="sdpa", dtype=torch.float32):
    """The stock model and ours with its weights, which were drawn from another seed before."""
    stock, ours = make_stock(kind, attention_dropout, seed=0), make_ours(kind, attention_dropout, seed=1)
    ours.load_state_dict(stock.state_dict(), strict=True)
    for model in (stock, ours):
        model.set_attn_implementation(attention)
        model.to(dtype)
    return stock, ours


def inputs_of(kind, size=IMAGE_SIZE):
    generator = torch.Generator().manual_seed(3)
    inputs = {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    if kind == "dual":
        attention_mask = torch.ones(2, 16, dtype=torch.int64)
        attention_mask[1, 10:] = 0
        inputs["input_ids"] = torch.randint(3, 99, (2, 16), generator=generator)
        inputs["attention_mask"] = attention_mask
        inputs["return_loss"] = True
    if kind == "classifier":
        inputs["labels"] = torch.tensor([2, 0])
    return inputs


def loss_of(kind, output):
    return output.loss if kind in ("dual", "classifier") else output.pooler_output.square().mean()


def leaves(value):
    """All tensors (and Nones) of a nested output, in order, with the names of the fields."""
    if isinstance(value, ModelOutput):
        return [leaf for name, field in value.items() for leaf in [name, *leaves(field)]]
    if isinstance(value, (tuple, list)):
        return [len(value), *(leaf for item in value for leaf in leaves(item))]
    return [value]


def assert_same(ours, stock):
    assert type(ours) is type(stock)
    ours, stock = leaves(ours), leaves(stock)
    assert len(ours) == len(stock)
    for one, other in zip(ours, stock, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


def assert_same_weights(ours, stock):
    assert set(ours) == set(stock)
    for name, weight in stock.items():
        assert torch.equal(ours[name], weight), name


# --- outputs -------------------------------------------------------------------------------------------------------

REQUESTS = {
    "plain": {},
    "hidden_states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True, "output_hidden_states": True},
    "tuple": {"return_dict": False},
    "tuple_of_everything": {"return_dict": False, "output_attentions": True, "output_hidden_states": True},
}


@each_kind
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs(kind, request_, attention):
    options = REQUESTS[request_]
    if attention == "sdpa" and "output_attentions" in options:
        pytest.skip("sdpa gives no attention weights")
    stock, ours = pair(kind, attention=attention)
    with torch.no_grad():
        output = stock(**inputs_of(kind), **options)
        assert_same(ours(**inputs_of(kind), **options), output)
        if kind == "dual":
            text = {name: inputs_of(kind)[name] for name in ("input_ids", "attention_mask")}
            pixels = inputs_of(kind)["pixel_values"]
            assert_same(ours.get_text_features(**text, **options), stock.get_text_features(**text, **options))
            assert_same(ours.get_image_features(pixels, **options), stock.get_image_features(pixels, **options))
    if options.get("output_attentions") and kind == "vision" and options.get("return_dict", True):
        assert len(output.attentions) == TINY_VISION["num_hidden_layers"]


@each_kind
def test_outputs_asked_for_in_the_configuration(kind):
    stock, ours = pair(kind, attention="eager")
    for model in (stock, ours):
        vision_config = getattr(model.config, "vision_config", model.config)
        vision_config.output_hidden_states = vision_config.output_attentions = True
        model.config.return_dict = kind in ("dinov2", "registers")  # whose stock class fails with False
    with torch.no_grad():
        assert_same(ours(**inputs_of(kind)), stock(**inputs_of(kind)))


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(kind, dtype):
    stock, ours = pair(kind, dtype=dtype)
    inputs = inputs_of(kind)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        assert_same(ours(**inputs), stock(**inputs))


@each_kind
def test_flash_attention(kind):
    pytest.importorskip("flash_attn")
    if not torch.cuda.is_available():
        pytest.skip("flash attention needs a CUDA device")
    stock, ours = (model.cuda() for model in pair(kind, attention="flash_attention_2", dtype=torch.bfloat16))
    inputs = {name: getattr(value, "cuda", lambda value=value: value)() for name, value in inputs_of(kind).items()}
    with torch.no_grad():
        assert_same(ours(**inputs), stock(**inputs))


@each_kind
@pytest.mark.parametrize("size", [IMAGE_SIZE, 16, 40])
def test_interpolated_positions(kind, size):
    stock, ours = pair(kind)
    with torch.no_grad():
        inputs = inputs_of(kind, size)
        option = {} if kind in ("dinov2", "registers") else {"interpolate_pos_encoding": True}
        assert_same(ours(**inputs, interpolate_pos_encoding=True), stock(**inputs, **option))
        if kind == "dual":
            pixels = inputs["pixel_values"]
            assert_same(ours.get_image_features(pixels, True), stock.get_image_features(pixels, True))


def test_a_resolution_without_positions_is_refused_as_by_stock():
    stock, ours = pair("vision")
    for model in (stock, ours):
        with pytest.raises(RuntimeError, match="size of tensor"):
            model(**inputs_of("vision", 40))


def enable_checkpointing(model):
    """By the name that this version of transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


# --- training ------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training(kind, checkpointing):
    """Two SGD steps with dropout give the same parameters, with and without gradient checkpointing."""
    trained = []
    for model in pair(kind, attention_dropout=0.3):
        model.train()
        if checkpointing:
            enable_checkpointing(model)
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(kind, model(**inputs_of(kind))).backward()
            optimizer.step()
        trained_parameters = zip(before[:6], model.parameters(), strict=False)
        assert not any(torch.equal(old, new) for old, new in trained_parameters if new.grad is not None)
        trained.append(model)
    stock, ours = trained
    assert_same_weights(ours.state_dict(), stock.state_dict())


def test_gradient_checkpointing_recomputes_our_layers():
    """With checkpointing a layer's forward runs again in the backward pass; otherwise nothing was checkpointed."""
    _, ours = pair("vision")
    enable_checkpointing(ours.train())
    calls = []
    ours.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ours(**inputs_of("vision")).pooler_output.sum().backward()
    assert len(calls) == 2


# --- initialisation ------------------------------------------------------------------------------------------------


@each_kind
def test_initialisation_draws_the_same_weights(kind):
    weights = []
    for model_class, config_class in (KINDS[kind][:2], KINDS[kind][2:4]):
        torch.manual_seed(7)
        weights.append(model_class(config_class(**options_of(kind))).state_dict())
    assert_same_weights(weights[1], weights[0])


def test_attention_is_initialised_as_xavier_uniform():
    """Its bound is sqrt(6 / (fan_in + fan_out)); the linear layers' own default has another bound and a tail."""
    torch.manual_seed(0)
    vision = NeuroFlowSiglipVisionModel(NeuroFlowSiglipVisionConfig(**TINY_VISION))
    bound = (6 / (2 * TINY_VISION["hidden_size"])) ** 0.5
    for layer in vision.encoder.layers:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weight = getattr(layer.self_attn, name).weight
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not getattr(layer.self_attn, name).bias.any()


# --- files ---------------------------------------------------------------------------------------------------------

CLASSIFIER_KEYS = {"classifier.weight", "classifier.bias"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of stock checkpoints by name, and the state dicts that they hold."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {kind: make_stock(kind) for kind in KINDS}
    headless = SiglipVisionModel(SiglipVisionConfig(**TINY_VISION, vision_use_head=False))
    models["headless"] = lively(headless)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    models["dual"].save_pretrained(folder / "sharded", max_shard_size="50KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    # Files of a vision tower exist with and without the prefix; what stock writes depends on its version.
    models["vision"].save_pretrained(folder / "prefixed")
    put_prefix(folder / "prefixed" / "model.safetensors")
    return folder, {name: model.state_dict() for name, model in models.items()}


def put_prefix(path):
    """Write the file again with every name under `vision_model.`."""
    tensors = {"vision_model." + name.removeprefix("vision_model."): item for name, item in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "checkpoint, kind, source, newly_made",
    [
        ("dual", "dual", "dual", set()),
        ("sharded", "dual", "dual", set()),
        ("dual", "vision", "dual", set()),
        ("sharded", "vision", "dual", set()),
        ("dual", "classifier", "dual", CLASSIFIER_KEYS),
        ("vision", "vision", "vision", set()),
        ("prefixed", "vision", "vision", set()),
        ("headless", "vision", "headless", set()),
        ("classifier", "classifier", "classifier", set()),
        ("classifier", "vision", "classifier", set()),
        *((kind, kind, kind, set()) for kind in ("dinov2", "registers", "clip")),
    ],
)
def test_loading_stock_checkpoints(checkpoints, checkpoint, kind, source, newly_made):
    folder, states = checkpoints
    ours, info = KINDS[kind][2].from_pretrained(folder / checkpoint, output_loading_info=True)
    assert set(info["missing_keys"]) == newly_made
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert not ours.training
    theirs = states[source]
    if kind == "vision":
        theirs = {name.removeprefix("vision_model."): weight for name, weight in theirs.items()}
    for name, weight in ours.state_dict().items():
        if name not in newly_made:
            assert torch.equal(weight, theirs[name]), name


@each_kind
def test_round_trip_and_back_into_stock(kind, tmp_path):
    """A model made here, saved and loaded by our class and by the stock class: the same weights and outputs."""
    stock_class, _, our_class = KINDS[kind][:3]
    ours = make_ours(kind)
    ours.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    with torch.no_grad():
        expected = ours(**inputs_of(kind))
        for model_class in (our_class, stock_class):
            again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert_same_weights(again.state_dict(), ours.state_dict())
            assert_same(again(**inputs_of(kind)), expected)


@pytest.mark.parametrize("checkpoint", ["dual", "vision", "prefixed", "headless", "classifier"])
def test_a_stock_checkpoint_through_ours_and_back(checkpoints, checkpoint, tmp_path):
    """Stock file -> our vision tower -> file -> stock vision tower, whatever the first file looked like."""
    folder, _ = checkpoints
    ours = NeuroFlowSiglipVisionModel.from_pretrained(folder / checkpoint)
    ours.save_pretrained(tmp_path)
    stock, info = SiglipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(stock.state_dict(), ours.state_dict())


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@each_kind
def test_device_map(checkpoints, kind, device_map):
    folder, states = checkpoints
    ours = KINDS[kind][2].from_pretrained(folder / kind, device_map=device_map)
    assert_same_weights(ours.state_dict(), states[kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_kind
def test_loading_in_half_precision(checkpoints, kind, dtype):
    folder, _ = checkpoints
    stock_class, _, our_class = KINDS[kind][:3]
    stock, ours = (model_class.from_pretrained(folder / kind, dtype=dtype) for model_class in (stock_class, our_class))
    assert ours.dtype == dtype
    assert_same_weights(ours.state_dict(), stock.state_dict())


def test_resizing_the_vocabulary():
    resized = []
    for model in pair("dual"):
        torch.manual_seed(0)
        model.resize_token_embeddings(110, mean_resizing=False)
        assert model.config.text_config.vocab_size == 110
        resized.append(model.state_dict())
    assert_same_weights(resized[1], resized[0])


def test_state_dict_names_are_those_of_stock():
    for kind in KINDS:
        assert list(make_ours(kind).state_dict()) == list(make_stock(kind).state_dict())


@each_kind
def test_deep_copy(kind):
    _, ours = pair(kind)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        expected = ours(**inputs_of(kind))
        assert_same(twin(**inputs_of(kind)), expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert_same(ours(**inputs_of(kind)), expected)
    assert twin.new_stream().gate == ours.new_stream().gate


# --- from_siglip ---------------------------------------------------------------------------------------------------

both_wrapped_kinds = pytest.mark.parametrize("kind", ["dual", "vision"])


@both_wrapped_kinds
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_from_siglip_shares_the_model(kind, attention, dtype, training):
    stock = make_stock(kind).to(dtype).train(training)
    stock.set_attn_implementation(attention)
    next(stock.parameters()).requires_grad_(False)
    wrapper = KINDS[kind][2].from_siglip(stock, threshold=0.02)
    theirs = dict(stock.named_parameters())
    ours = dict(wrapper.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert all(tensor.device.type != "meta" for tensor in [*wrapper.parameters(), *wrapper.buffers()])
    assert {module.training for module in wrapper.modules()} == {training}
    assert wrapper.dtype == dtype
    assert wrapper.config._attn_implementation == attention
    assert getattr(wrapper.config, "vision_config", wrapper.config)._attn_implementation == attention
    assert wrapper.new_stream().gate.threshold == 0.02
    assert not hasattr(getattr(stock.config, "vision_config", stock.config), "gate")
    inputs = inputs_of(kind)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        assert_same(wrapper(**inputs), stock(**inputs))


@both_wrapped_kinds
def test_training_the_wrapper_trains_the_original(kind):
    stock = make_stock(kind)
    wrapper = KINDS[kind][2].from_siglip(stock)
    before = {name: weight.clone() for name, weight in stock.state_dict().items()}
    loss_of(kind, wrapper(**inputs_of(kind))).backward()
    torch.optim.SGD(wrapper.parameters(), lr=0.1).step()
    changed = [name for name, weight in stock.state_dict().items() if not torch.equal(weight, before[name])]
    assert any("self_attn.q_proj" in name for name in changed)
    assert any("embeddings" in name for name in changed)
    with torch.no_grad():
        assert_same(wrapper(**inputs_of(kind)), stock(**inputs_of(kind)))


@both_wrapped_kinds
def test_attention_of_a_wrapper_can_be_changed(kind):
    """The shared attention modules read a configuration: it must be the one that `set_attn_implementation` writes."""
    wrapper = KINDS[kind][2].from_siglip(make_stock(kind))
    wrapper.set_attn_implementation("eager")
    vision = getattr(wrapper, "vision_model", wrapper)
    assert {layer.self_attn.config._attn_implementation for layer in vision.encoder.layers} == {"eager"}
    output = vision(**inputs_of("vision"), output_attentions=True)
    assert output.attentions[0].shape == (2, 4, 36, 36)


@both_wrapped_kinds
def test_gradient_checkpointing_survives_wrapping(kind):
    stock = make_stock(kind).train()
    enable_checkpointing(stock)
    wrapper = KINDS[kind][2].from_siglip(stock)
    vision = getattr(wrapper, "vision_model", wrapper)
    calls = []
    vision.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    vision(**inputs_of("vision")).pooler_output.sum().backward()
    assert len(calls) == 2


@both_wrapped_kinds
def test_a_wrapper_is_saved_like_any_model(kind, tmp_path):
    stock_class, _, our_class = KINDS[kind][:3]
    stock = make_stock(kind)
    our_class.from_siglip(stock, threshold=0.02).save_pretrained(tmp_path)
    again = our_class.from_pretrained(tmp_path)
    assert again.gate_options == {"threshold": 0.02}
    assert_same_weights(again.state_dict(), stock.state_dict())
    assert_same_weights(stock_class.from_pretrained(tmp_path).state_dict(), stock.state_dict())


@each_tower
def test_every_wrapper_shares_the_model(tower):
    stock = make_stock_tower(tower).train()
    stock(**inputs_of("vision"), output_hidden_states=True)  # leaves hooks behind that record
    wrapper = wrap_tower(tower, stock, threshold=0.02)
    ours, theirs = dict(wrapper.named_parameters()), dict(stock.named_parameters())
    assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in theirs)
    assert {module.training for module in wrapper.modules()} == {True}
    assert wrapper.new_stream().gate.threshold == 0.02
    wrapper.set_attn_implementation("eager")
    stock.set_attn_implementation("eager")
    request = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        assert_same(wrapper(**inputs_of("vision"), **request), stock(**inputs_of("vision"), **request))
    with pytest.raises(TypeError, match="Cannot wrap a NeuroFlowSiglipModel"):
        wrap_tower(tower, make_ours("dual"))


def test_dinov2_refuses_masks_and_stochastic_depth_with_a_stream():
    model = make_ours("dinov2")
    pixels, stream = inputs_of("dinov2")["pixel_values"], model.new_stream(2)
    with pytest.raises(ValueError, match="Masks"):
        model(pixels, bool_masked_pos=torch.zeros(2, 36, dtype=torch.bool), stream=stream)
    model.config.drop_path_rate = 0.1
    with pytest.raises(ValueError, match="Stochastic depth"):
        model.train()(pixels, stream=stream)
    assert stream.frames == [0, 0]


def test_from_siglip_refuses_other_models():
    with pytest.raises(TypeError, match=r"SiglipModel.*SiglipVisionModel"):
        NeuroFlowSiglipVisionModel.from_siglip(make_stock("dual"))
    with pytest.raises(TypeError, match=r"SiglipVisionModel.*SiglipModel"):
        NeuroFlowSiglipModel.from_siglip(make_stock("vision"))
    with pytest.raises(TypeError, match="str"):
        NeuroFlowSiglipModel.from_siglip("some/checkpoint")
    with pytest.raises(ValueError, match="threshold"):
        NeuroFlowSiglipVisionModel.from_siglip(make_stock("vision"), treshold=0.1)


def test_from_siglip_takes_a_model_without_head():
    stock = SiglipVisionModel(SiglipVisionConfig(**TINY_VISION, vision_use_head=False)).eval()
    wrapper = NeuroFlowSiglipVisionModel.from_siglip(stock)
    with torch.no_grad():
        assert_same(wrapper(**inputs_of("vision")), stock(**inputs_of("vision")))


# --- stock configurations given to our classes ---------------------------------------------------------------------


@each_kind
def test_a_stock_configuration_object(checkpoints, kind):
    """Our classes given a stock configuration object (as from `AutoConfig`) are whole: they make streams, and save."""
    folder, states = checkpoints
    _, stock_config, our_class, our_config, _ = KINDS[kind]
    config = stock_config.from_pretrained(folder / kind)
    ours = our_class.from_pretrained(folder / kind, config=config)
    assert_same_weights(ours.state_dict(), states[kind])
    assert ours.new_stream().frames == [0]
    assert ours.config.model_type == our_config.model_type
    assert config.model_type == stock_config.model_type


# --- auto classes --------------------------------------------------------------------------------------------------

AUTO = [
    (AutoModel, "dual"),
    (AutoModel, "vision"),
    (AutoModelForZeroShotImageClassification, "dual"),
    (AutoModelForImageClassification, "classifier"),
    *((AutoModel, kind) for kind in ("dinov2", "registers", "clip")),
]


@pytest.mark.parametrize("auto_class, kind", AUTO, ids=lambda value: getattr(value, "__name__", value))
def test_auto_classes(checkpoints, auto_class, kind, tmp_path):
    """Our model types give our classes, from a configuration and from files; stock files still give stock classes."""
    stock_class, _, our_class, our_config, _ = KINDS[kind]
    assert type(auto_class.from_config(our_config(**options_of(kind)))) is our_class
    make_ours(kind).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is our_config
    assert type(auto_class.from_pretrained(tmp_path)) is our_class
    assert type(auto_class.from_pretrained(checkpoints[0] / kind)) is stock_class


def test_saved_configuration_names_our_classes(tmp_path):
    make_ours("dual").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "neuroflow_siglip"
    assert stored["architectures"] == ["NeuroFlowSiglipModel"]
    assert stored["auto_map"]["AutoModel"].endswith(".NeuroFlowSiglipModel")


@pytest.mark.parametrize(
    "classes", [(SiglipVisionModel, NeuroFlowSiglipVisionModel), (SiglipModel, NeuroFlowSiglipModel)]
)
def test_files_saved_after_loading_name_weights_as_stock_files_do(classes, stock_folder, tmp_path):
    names = []
    for model_class in classes:
        folder = tmp_path / model_class.__name__
        model_class.from_pretrained(stock_folder).save_pretrained(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("of_call", [None, False, True])
@pytest.mark.parametrize("of_config", [False, True])
def test_image_features_obey_return_dict(stock_model, streams, of_call, of_config):
    stock, ours = copy.deepcopy(stock_model), NeuroFlowSiglipModel.from_siglip(copy.deepcopy(stock_model))
    stock.config.return_dict = ours.config.return_dict = of_config
    options = {"pixel_values": random_video(1)[0], "return_dict": of_call}
    more = {"stream": ours.new_stream(mode="context")} if streams else {}
    with torch.no_grad():
        expected, found = stock.get_image_features(**options), ours.get_image_features(**options, **more)
    assert isinstance(found, tuple) == isinstance(expected, tuple)
