"""Configurations: types and ranges, misspelt names, files, what is shared and what is not, and checkpoints refused."""

import json
import math
from dataclasses import fields, replace
from logging import Handler as LogHandler

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    configuration_utils,
)
from transformers.utils import logging

from neuroflow_hf import (
    NeuroFlowGateConfig,
    NeuroFlowSiglipConfig,
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionConfig,
    NeuroFlowSiglipVisionModel,
)
from neuroflow_hf.vision.gate_config import MODE_NAMES, PRESETS
from tests.conftest import TINY_TEXT, TINY_VISION

GATE = {"mode": "reconstruct", "threshold": 0.125, "token_budget": 7, "global_motion_norm": True}
BOTH = [NeuroFlowSiglipConfig, NeuroFlowSiglipVisionConfig]
both_configs = pytest.mark.parametrize("config_class", BOTH)
both_models = pytest.mark.parametrize("model_class", [NeuroFlowSiglipModel, NeuroFlowSiglipVisionModel])


def tiny(config_class, **options):
    if config_class in (NeuroFlowSiglipConfig, SiglipConfig):
        return config_class(text_config=dict(TINY_TEXT), vision_config=dict(TINY_VISION), **options)
    return config_class(**TINY_VISION, **options)


@pytest.fixture
def vision_folder(stock_vision, tmp_path):
    """A stock vision checkpoint that the test may spoil."""
    stock_vision.save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


# --- the gate's options: names, types, ranges ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("treshold", "threshold"),
        ("token_buget", "token_budget"),
        ("keyframe_intervall", "keyframe_interval"),
        ("min_active_token", "min_active_tokens"),
        ("slow_ema", "slow_ema_rate"),
        ("dilation", "dilate"),
    ],
)
def test_a_misspelt_option_names_the_nearest(misspelt, meant):
    makers = [
        lambda: NeuroFlowGateConfig.from_options(**{misspelt: 1}),
        lambda: NeuroFlowSiglipVisionConfig(gate={misspelt: 1}),
        lambda: NeuroFlowSiglipConfig(gate={misspelt: 1}),
        lambda: NeuroFlowSiglipConfig(vision_config={"gate": {misspelt: 1}}),
        lambda: setattr(NeuroFlowSiglipConfig(), "gate", {misspelt: 1}),
        lambda: setattr(NeuroFlowSiglipVisionConfig(), "gate", {misspelt: 1}),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=f"`{misspelt}`.*`{meant}`"):
            make()


def test_an_option_like_no_other_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`xyzzy`.*threshold.*on_change"):
        NeuroFlowGateConfig.from_options(xyzzy=1)


BAD_VALUES = [
    *[(name, value) for name in ("threshold",) for value in (math.nan, math.inf, -math.inf)],
    *[(name, value) for name in ("token_budget", "max_age", "keyframe_interval") for value in (0, -1)],
    *[(name, -1) for name in ("min_active_tokens", "dilate")],
    *[("keyframe_fraction", value) for value in (-0.01, 1.01, math.nan, math.inf)],
    *[
        (name, value)
        for name in ("ema_rate", "slow_ema_rate", "memory_blend")
        for value in (0, 0.0, -0.1, 1.01, math.nan, math.inf)
    ],
    ("mode", "extrapolation"),
    ("mode", "Context"),
    ("signal", "pixel"),
    ("reference", "last"),
    ("on_change", "ignore"),
]
WRONG_TYPES = [
    ("mode", None),
    ("mode", 1),
    ("threshold", "0.1"),
    ("threshold", None),
    ("threshold", True),
    ("token_budget", 1.0),
    ("token_budget", True),
    ("min_active_tokens", "4"),
    ("global_motion_norm", 1),
    ("global_motion_norm", None),
    ("dilate", 1.0),
    ("dilate", None),
    ("max_age", "300"),
    ("keyframe_interval", 2.5),
    ("keyframe_fraction", [0.5]),
    ("ema_rate", None),
    ("memory_blend", "1"),
]


@pytest.mark.parametrize("name, value", BAD_VALUES + WRONG_TYPES)
def test_bad_values_are_refused_by_name(name, value):
    options = {"reference": "ema", name: value}
    for make in (
        lambda: NeuroFlowGateConfig.from_options(options),
        lambda: NeuroFlowSiglipVisionConfig(gate=options),
        lambda: NeuroFlowSiglipConfig(gate=options),
    ):
        with pytest.raises(ValueError, match=name):
            make()


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": -1},
        {"threshold": -5.0},
        {"threshold": 0},
        {"threshold": 2},
        {"token_budget": 1},
        {"min_active_tokens": 0},
        {"keyframe_fraction": 0},
        {"keyframe_fraction": 1},
        {"ema_rate": 1},
        {"memory_blend": 1},
        {"memory_blend": 1e-6},
        {"slow_ema_rate": 0.001, "reference": "both"},
        {"slow_ema_rate": 1, "reference": "ema"},
        {"max_age": 1},
        {"keyframe_interval": 1, "cost_budget": None},
    ],
)
def test_values_at_the_edge_are_taken(options):
    gate = NeuroFlowGateConfig.from_options(options)
    assert {name: getattr(gate, name) for name in options} == options


def test_a_slow_mean_needs_a_running_mean():
    with pytest.raises(ValueError, match=r"slow_ema_rate.*reference"):
        NeuroFlowGateConfig.from_options(slow_ema_rate=0.001)
    with pytest.raises(ValueError, match=r"slow_ema_rate.*reference"):
        NeuroFlowGateConfig.from_options({"slow_ema_rate": 0.001, "reference": "ema"}, reference="last_update")


def test_options_over_options():
    base = {"threshold": 0.5, "mode": "mlp"}
    gate = NeuroFlowGateConfig.from_options(base, threshold=0.25)
    assert (gate.mode, gate.threshold) == ("mlp", 0.25)
    assert base == {"threshold": 0.5, "mode": "mlp"}
    assert NeuroFlowGateConfig.from_options(gate.to_dict()) == gate


# --- the configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeuroFlowSiglipVisionConfig(hidden_size="32"),
        lambda: NeuroFlowSiglipVisionConfig(attention_dropout="none"),
        lambda: NeuroFlowSiglipVisionConfig(gate=[("threshold", 0.1)]),
        lambda: NeuroFlowSiglipVisionConfig(gate="context"),
        lambda: NeuroFlowSiglipConfig(initializer_factor="1"),
        lambda: NeuroFlowSiglipConfig(vision_config={"hidden_size": "32"}),
        lambda: NeuroFlowSiglipConfig(text_config={"vocab_size": 1.5}),
    ],
)
def test_wrong_types_are_refused(make):
    with pytest.raises(Exception, match=r"hidden_size|attention_dropout|gate|initializer|vocab_size"):
        make()


def test_wrong_types_are_refused_when_set():
    config = NeuroFlowSiglipVisionConfig()
    with pytest.raises(Exception, match="gate"):
        config.gate = "context"
    with pytest.raises(Exception, match="num_hidden_layers"):
        config.num_hidden_layers = "12"


@both_configs
def test_without_options_the_gate_has_its_defaults(config_class):
    for config in (tiny(config_class), tiny(config_class, gate=None), tiny(config_class, gate={})):
        assert config.gate == {}
        assert NeuroFlowGateConfig.from_options(config.gate) == NeuroFlowGateConfig(**PRESETS["balanced"])


@both_configs
def test_the_gate_can_be_cleared(config_class):
    config = tiny(config_class, gate=GATE)
    config.gate = None
    assert NeuroFlowGateConfig.from_options(config.gate) == NeuroFlowGateConfig(**PRESETS["balanced"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_saving_and_is_laid_under_other_options(preset, tmp_path):
    config = tiny(NeuroFlowSiglipVisionConfig, gate={"preset": preset, "threshold": 0.5})
    config.save_pretrained(tmp_path)
    gate = NeuroFlowGateConfig.from_options(NeuroFlowSiglipVisionConfig.from_pretrained(tmp_path).gate)
    assert gate == NeuroFlowGateConfig(**PRESETS[preset] | {"threshold": 0.5})
    assert NeuroFlowGateConfig.from_options(gate.to_dict()) == gate


def test_which_defaults_the_options_start_from():
    def options(*layers, **last):
        return NeuroFlowGateConfig.from_options(*layers, **last)

    plain = NeuroFlowGateConfig(mode="context")
    assert options(threshold=0.2) == NeuroFlowGateConfig(**PRESETS["balanced"] | {"threshold": 0.2})
    assert options(mode="context") == plain
    assert options({"preset": "faithful"}, mode="context") == plain
    assert options({"mode": "context", "dilate": 2}, threshold=0.2) == replace(plain, dilate=2, threshold=0.2)
    assert options({"mode": "context", "dilate": 2}, preset="thrifty") == NeuroFlowGateConfig(**PRESETS["thrifty"])
    assert options(preset="thrifty", mode="context").cost_budget == PRESETS["thrifty"]["cost_budget"]
    with pytest.raises(ValueError, match=r"Unknown preset 'quick'; expected one of faithful"):
        options(preset="quick")


@both_configs
def test_two_configurations_share_no_gate(config_class):
    one, other = tiny(config_class), tiny(config_class)
    one.gate["threshold"] = 0.5
    assert other.gate == {}
    assert tiny(config_class).gate == {}


@both_configs
def test_the_callers_options_are_not_aliased(config_class):
    options = {"threshold": 0.5}
    config = tiny(config_class, gate=options)
    also = tiny(config_class)
    also.gate = options
    options["threshold"] = 9
    assert config.gate == {"threshold": 0.5}
    assert also.gate == {"threshold": 0.5}


def test_the_callers_vision_configuration_keeps_its_gate():
    vision = tiny(NeuroFlowSiglipVisionConfig, gate={"threshold": 0.5})
    dual = NeuroFlowSiglipConfig(vision_config=vision, text_config=dict(TINY_TEXT), gate={"threshold": 0.25})
    assert dual.gate == {"threshold": 0.25}
    assert vision.gate == {"threshold": 0.5}


@both_configs
def test_a_gate_option_outside_the_gate_is_an_error(config_class):
    """It would be kept as a stray attribute and have no effect."""
    with pytest.raises((TypeError, ValueError), match="threshold"):
        tiny(config_class, threshold=0.5)


# --- files ---------------------------------------------------------------------------------------------------------


@both_configs
def test_round_trips(config_class, tmp_path):
    config = tiny(config_class, gate=GATE)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == config_class.model_type
    for again in (
        config_class.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        config_class.from_dict(config.to_dict()),
        config_class.from_dict(json.loads(config.to_json_string())),
        config_class(**json.loads(config.to_json_string(use_diff=False))),
    ):
        assert type(again) is config_class
        assert again.gate == GATE
        ours, theirs = again.to_dict(), config.to_dict()
        for volatile in ("transformers_version", "_name_or_path"):
            ours.pop(volatile, None), theirs.pop(volatile, None)
        assert ours == theirs


def test_the_vision_part_of_a_dual_configuration_keeps_the_gate(tmp_path):
    tiny(NeuroFlowSiglipConfig, gate=GATE).save_pretrained(tmp_path)
    vision = NeuroFlowSiglipVisionConfig.from_pretrained(tmp_path)
    assert vision.gate == GATE
    assert vision.hidden_size == TINY_VISION["hidden_size"]


OPTIONS = {
    "mode": st.sampled_from(MODE_NAMES),
    "signal": st.sampled_from(["patch", "token"]),
    "threshold": st.one_of(st.integers(-2, 2), st.floats(-2, 2)),
    "token_budget": st.one_of(st.none(), st.integers(1, 1000)),
    "min_active_tokens": st.one_of(st.none(), st.integers(0, 1000)),
    "global_motion_norm": st.booleans(),
    "dilate": st.integers(0, 5),
    "max_age": st.one_of(st.none(), st.integers(1, 1000)),
    "keyframe_interval": st.one_of(st.none(), st.integers(1, 1000)),
    "keyframe_fraction": st.one_of(st.none(), st.floats(0, 1)),
    "keyframe_surprise": st.one_of(st.none(), st.floats(0, 2)),
    "cost_budget": st.one_of(st.none(), st.floats(1e-6, 1)),
    "cost_reserve": st.floats(1, 100),
    "min_fidelity": st.one_of(st.none(), st.floats(1e-6, 0.999999)),
    "sentinels": st.one_of(st.integers(0, 1), st.floats(0, 1)),
    "ema_rate": st.floats(1e-6, 1),
    "memory_blend": st.floats(1e-6, 1),
    "on_change": st.sampled_from(["error", "keyframe"]),
}
MEANS = st.one_of(
    st.fixed_dictionaries({}, optional={"reference": st.sampled_from(["last_update", "ema", "both"])}),
    st.fixed_dictionaries({"reference": st.sampled_from(["ema", "both"]), "slow_ema_rate": st.floats(1e-6, 1)}),
)


SUMMARIES = st.just({}) | st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["eliminate", "reconstruct"]),
        "summary_tokens": st.integers(0, 40).map(lambda side: side**2),
    }
)


def test_the_strategies_cover_every_option():
    assert {*OPTIONS, "reference", "slow_ema_rate", "summary_tokens"} == {
        field.name for field in fields(NeuroFlowGateConfig)
    }


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=OPTIONS), MEANS, SUMMARIES)
def test_any_valid_options_survive_json(options, means, summaries):
    options = {**options, **means, **summaries}
    expected = NeuroFlowGateConfig.from_options(options)
    assert NeuroFlowGateConfig.from_options(json.loads(json.dumps(expected.to_dict()))) == expected
    for config_class in BOTH:
        config = config_class.from_dict(json.loads(tiny(config_class, gate=options).to_json_string()))
        assert config.gate == options
        assert NeuroFlowGateConfig.from_options(config.gate) == expected


# --- from_pretrained -----------------------------------------------------------------------------------------------


@both_models
def test_gate_options_at_loading(model_class, stock_folder, tmp_path):
    """They reach the streams, survive saving, and are not the caller's dict."""
    options = dict(GATE)
    model = model_class.from_pretrained(stock_folder, gate=options)
    options["threshold"] = 9
    stream = model.new_stream(threshold=0.5)
    assert (stream.gate.mode, stream.gate.token_budget, stream.gate.threshold) == ("reconstruct", 7, 0.5)
    assert model.new_stream().gate.threshold == 0.125
    model.save_pretrained(tmp_path)
    assert model_class.from_pretrained(tmp_path).gate_options == GATE
    assert model_class.from_pretrained(tmp_path, gate={"mode": "mlp"}).new_stream().gate.mode == "mlp"


@both_models
@pytest.mark.parametrize(
    "gate, message",
    [
        ({"treshold": 0.1}, "`threshold`"),
        ({"threshold": math.nan}, "threshold"),
        ({"token_budget": "9"}, "token_budget"),
    ],
    ids=["misspelt", "range", "type"],
)
def test_bad_gate_options_at_loading(model_class, stock_folder, gate, message):
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(stock_folder, gate=gate)


@both_models
@pytest.mark.parametrize("name", ["threshold", "treshold"])
def test_a_flat_keyword_at_loading_is_an_error(model_class, stock_folder, name):
    with pytest.raises((TypeError, ValueError), match=name):
        model_class.from_pretrained(stock_folder, **{name: 0.1})


@both_models
def test_bad_gate_options_in_a_file(model_class, tmp_path):
    """A model's config.json, edited by hand."""
    config = tiny(model_class.config_class)
    model_class(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored.get("vision_config", stored)["gate"] = {"token_buget": 3}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"`token_buget`.*`token_budget`"):
        model_class.from_pretrained(tmp_path)


@pytest.fixture
def transformers_log():
    """The lines that transformers logs at level warning and above."""
    lines = []

    class Recorder(LogHandler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, level = Recorder(), logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.add_handler(handler)
    yield lines
    logging.remove_handler(handler)
    logging.set_verbosity(level)


def test_stock_checkpoints_load_without_a_warning(stock_folder, vision_folder, transformers_log):
    dual = NeuroFlowSiglipModel.from_pretrained(stock_folder)
    assert dual.config.model_type == "neuroflow_siglip"
    assert dual.config.vision_config.model_type == "neuroflow_siglip_vision_model"
    for folder in (stock_folder, vision_folder):
        vision = NeuroFlowSiglipVisionModel.from_pretrained(folder)
        assert vision.config.model_type == "neuroflow_siglip_vision_model"
    assert transformers_log == []
    SiglipVisionModel.from_pretrained(write_config(vision_folder, {"model_type": "clip_vision_model", **TINY_VISION}))
    assert any("clip_vision_model" in line for line in transformers_log)  # the fixture does capture


@pytest.mark.parametrize(
    "config_class, stock_class",
    [(NeuroFlowSiglipConfig, SiglipConfig), (NeuroFlowSiglipVisionConfig, SiglipVisionConfig)],
)
def test_stock_options_carry_over(config_class, stock_class, tmp_path):
    """Whatever a stock configuration says, ours says too."""
    stock = tiny(stock_class, num_labels=5, dtype="bfloat16")
    stock.save_pretrained(tmp_path)
    for ours in (config_class.from_pretrained(tmp_path), config_class.from_dict(stock.to_dict())):
        assert (ours.num_labels, ours.dtype) == (5, torch.bfloat16)
        theirs = stock.to_dict()
        ours = ours.to_dict()
        parts = ["vision_config", "text_config"] if stock_class is SiglipConfig else [None]
        for part in parts:
            mine, other = (ours[part], theirs[part]) if part else (ours, theirs)
            assert {name: mine[name] for name in TINY_VISION if name in other} == {
                name: other[name] for name in TINY_VISION if name in other
            }


# --- checkpoints that are refused ----------------------------------------------------------------------------------


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


NAFLEX = {
    "dual": {"model_type": "siglip2", "vision_config": {"model_type": "siglip2_vision_model"}},
    "dual_with_bare_parts": {"model_type": "siglip2", "vision_config": {}},
    "vision_part_only": {"model_type": "siglip", "vision_config": {"model_type": "siglip2_vision_model"}},
    "vision": {"model_type": "siglip2_vision_model", "hidden_size": 32},
}
TINY_NAFLEX = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("stored", NAFLEX)
@pytest.mark.parametrize(
    "model_class",
    [NeuroFlowSiglipModel, NeuroFlowSiglipVisionModel, NeuroFlowSiglipForImageClassification],
)
def test_naflex_checkpoints_are_refused(model_class, stored, tmp_path):
    folder = write_config(tmp_path, NAFLEX[stored])
    with pytest.raises(ValueError, match="NaFlex"):
        model_class.from_pretrained(folder)
    with pytest.raises(ValueError, match="NaFlex"):
        model_class.config_class.from_pretrained(folder)


def test_naflex_configurations_are_refused():
    dual = Siglip2Config(vision_config=dict(TINY_NAFLEX), text_config=dict(TINY_TEXT))
    vision = Siglip2VisionConfig(**TINY_NAFLEX)
    for make in (
        lambda: NeuroFlowSiglipConfig(**dual.to_dict()),
        lambda: NeuroFlowSiglipConfig.from_dict(dual.to_dict()),
        lambda: NeuroFlowSiglipConfig(vision_config=vision),
        lambda: NeuroFlowSiglipConfig(vision_config=vision.to_dict()),
        lambda: NeuroFlowSiglipVisionConfig(**vision.to_dict()),
        lambda: NeuroFlowSiglipVisionConfig.from_dict(vision.to_dict()),
    ):
        with pytest.raises(ValueError, match="NaFlex"):
            make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeuroFlowSiglipModel(
            Siglip2Config(vision_config=dict(TINY_NAFLEX), text_config=dict(TINY_TEXT)),
        ),
        lambda: NeuroFlowSiglipForImageClassification(Siglip2Config(vision_config=dict(TINY_NAFLEX))),
        lambda: NeuroFlowSiglipVisionModel(Siglip2VisionConfig(**TINY_NAFLEX)),
    ],
    ids=["dual", "classifier", "vision"],
)
def test_naflex_configuration_objects_are_refused_by_the_models(make):
    with pytest.raises(ValueError, match="NaFlex"):
        make()


def test_parts_may_be_stock_configuration_objects():
    text, vision = SiglipTextConfig(**TINY_TEXT), SiglipVisionConfig(**TINY_VISION)
    config = NeuroFlowSiglipConfig(text_config=text, vision_config=vision, gate=GATE)
    assert type(config.vision_config) is NeuroFlowSiglipVisionConfig
    assert config.vision_config.image_size == TINY_VISION["image_size"]
    assert config.text_config.vocab_size == TINY_TEXT["vocab_size"]
    assert not hasattr(vision, "gate")
    assert vision.model_type == "siglip_vision_model"


@pytest.mark.parametrize(
    "damage, message", [("truncated", "metadata|header"), ("empty", "header"), ("gone", "safetensors")]
)
def test_damaged_weights(vision_folder, damage, message):
    weights = vision_folder / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100] if damage == "truncated" else b"")
    with pytest.raises(Exception, match=message):
        NeuroFlowSiglipVisionModel.from_pretrained(vision_folder)


@both_models
def test_a_config_that_is_not_json(model_class, vision_folder):
    with pytest.raises(OSError, match=r"config\.json.* not a valid JSON"):
        model_class.from_pretrained(write_config(vision_folder, "{'gate': }"))


@both_models
def test_weights_of_another_size(model_class, tmp_path):
    """The shapes that differ are named, as by transformers; never loaded in part."""
    config = tiny(model_class.config_class)
    model_class(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored.get("vision_config", stored)["intermediate_size"] = 48
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model_class.from_pretrained(write_config(tmp_path, stored))


def test_a_configuration_names_no_tokens_outside_of_its_vocabulary(monkeypatch):
    """Transformers writes a configuration out as it loads one, and compares it with the defaults of its class."""
    warned = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", lambda text, *args: warned.append(text))
    config = NeuroFlowSiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION)
    assert (
        str(config) and str(NeuroFlowSiglipConfig()) and config.text_config.eos_token_id == TINY_TEXT["eos_token_id"]
    )
    assert not warned
