"""Sparse adapters: on in sparse frames, off elsewhere, and on disk as PEFT writes them."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from neuroflow_hf import NeuroFlowSiglipForImageClassification, NeuroFlowSiglipModel, NeuroFlowSiglipVisionModel
from neuroflow_hf.vision.gate_config import NeuroFlowGateConfig
from neuroflow_hf.vision.sparse_adapter import DISTILLABLE_MODES, TARGETS, SparseAdapter
from tests.conftest import NUM_PATCHES, assert_close_in_norm, play, random_video

pytestmark = pytest.mark.usefixtures("no_grad")
OPTIONS = {
    "eliminate": {"summary_tokens": 4, "threshold": 0.05},
    "reconstruct": {"summary_tokens": 4, "threshold": 0.05},
    "context": {"threshold": 0.05},
    "extrapolate": {"threshold": 0.05},
}


def with_adapter(model, mode="reconstruct", targets=tuple(TARGETS), rank=2):
    """A copy of a vision model with an adapter whose changes are not small."""
    model = copy.deepcopy(model)
    gate = NeuroFlowGateConfig.from_options({"mode": mode}, **OPTIONS[mode])
    torch.manual_seed(3)
    model.sparse_adapter = SparseAdapter(model, gate, rank, 2 * rank, targets, "tiny")
    for name, parameter in model.sparse_adapter.named_parameters():
        parameter.normal_(std=0.3 if name.endswith("up") else 0.1)
    model.sparse_adapter.to(model.dtype)
    return model


@pytest.mark.parametrize("mode", DISTILLABLE_MODES)
def test_the_model_and_its_keyframes_stay_what_they_were(vision, mode):
    adapted, frames = with_adapter(vision, mode), random_video(3, batch_size=2)
    assert torch.equal(adapted(frames[0]).pooler_output, vision(frames[0]).pooler_output)
    ours = play(adapted, frames, stream := adapted.new_stream(2))
    theirs = play(vision, frames, other := vision.new_stream(2, mode=mode, **OPTIONS[mode]))
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(ours[0][name], theirs[0][name])
        assert not torch.allclose(ours[1][name], theirs[1][name], atol=1e-3)
    # one stream at a keyframe, beside one at a sparse frame
    stream.reset(0)
    other.reset(0)
    ours, theirs = adapted(frames[2], stream=stream), vision(frames[2], stream=other)
    assert (ours.skip_rate > 0).tolist() == [False, True]
    assert torch.equal(ours.pooler_output[0], theirs.pooler_output[0])
    assert not torch.allclose(ours.pooler_output[1], theirs.pooler_output[1], atol=1e-3)


@pytest.mark.parametrize("mode", DISTILLABLE_MODES)
def test_sparse_frames_are_those_of_a_model_with_the_weights_merged(vision64, mode):
    """The naive reference: after the keyframe, the same stream goes on in a model whose weights were changed."""
    adapted, frames = with_adapter(vision64, mode), [frame.double() for frame in random_video(2, batch_size=2)]
    stream = adapted.new_stream(2)
    output = play(adapted, frames, stream)[1]
    assert 0 < output.skip_rate.min() < output.skip_rate.max() < 1
    for number, strength in enumerate(1 - output.active_mask.flatten(1).double().mean(1)):
        merged = copy.deepcopy(vision64)
        for layer, changes in zip(merged.encoder.layers, adapted.sparse_adapter.layers, strict=True):
            for name, change in changes.items():
                layer.get_submodule(TARGETS[name]).weight += strength * change.scaling * change.up @ change.down
        plain = vision64.new_stream(mode=mode, **OPTIONS[mode])
        vision64(frames[0][number : number + 1], stream=plain)
        expected = merged(frames[1][number : number + 1], stream=plain)
        assert_close_in_norm(output.pooler_output[number : number + 1], expected.pooler_output)


@pytest.mark.parametrize("targets", [("q_proj",), ("fc1",), ("out_proj", "fc2")])
def test_only_its_targets_are_changed(vision, targets):
    adapter = with_adapter(vision, targets=targets).sparse_adapter
    assert {name for changes in adapter.layers for name in changes} == set(targets)


@pytest.mark.parametrize("mode", DISTILLABLE_MODES)
def test_it_is_counted(vision, mode):
    adapted, frames = with_adapter(vision, mode), random_video(2)
    ours, theirs = (
        play(model, frames, stream)[1]
        for model, stream in (
            (adapted, adapted.new_stream(token_budget=8)),
            (vision, vision.new_stream(mode=mode, token_budget=8, **OPTIONS[mode])),
        )
    )
    weights = sum(parameter.numel() for parameter in adapted.sparse_adapter.parameters())
    dim, inner, layers = 32, 64, 3
    per_layer = 4 * dim * dim + 2 * NUM_PATCHES * dim + 2 * dim * inner
    dense = NUM_PATCHES * (layers * per_layer + 48 * dim)
    active = ours.active_mask.sum().item()
    assert (ours.cost - theirs.cost).item() == pytest.approx(active * weights / dense, rel=0.2)  # without the head


def test_streams_start_from_its_options_and_others_are_refused(vision):
    adapted = with_adapter(vision)
    assert (adapted.new_stream().gate.mode, adapted.new_stream().gate.summary_tokens) == ("reconstruct", 4)
    assert adapted.new_stream(threshold=0.2).gate.threshold == 0.2
    frame = random_video(1)[0]
    with pytest.raises(ValueError, match="distilled for mode 'reconstruct', and this stream has 'context'"):
        adapted(frame, stream=adapted.new_stream(mode="context"))
    with pytest.raises(ValueError, match="distilled for summary_tokens 4, and this stream has 9"):
        adapted(frame, stream=adapted.new_stream(summary_tokens=9))
    for options in ({"mode": "dense"}, {"mode": "hold", "keyframe_interval": 3}):  # these have no sparse frames
        adapted(frame, stream=adapted.new_stream(**options))
    adapted.sparse_adapter = None
    assert adapted.new_stream().gate.mode == "context"


@pytest.fixture
def saved(stock_folder, tmp_path):
    """A model with an adapter, and the folder of the adapter."""
    model = with_adapter(NeuroFlowSiglipVisionModel.from_pretrained(stock_folder))
    model.save_sparse_adapter(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize(
    "model_class", [NeuroFlowSiglipVisionModel, NeuroFlowSiglipModel, NeuroFlowSiglipForImageClassification]
)
def test_it_is_read_again(saved, stock_folder, model_class):
    model, folder = saved
    loaded = model_class.from_pretrained(stock_folder, sparse_adapter=folder)
    tower = getattr(loaded, "vision_model", loaded)
    assert loaded.new_stream().gate.to_dict() == model.new_stream().gate.to_dict()
    frames = random_video(3)
    for ours, theirs in zip(
        play(tower, frames, tower.new_stream()), play(model, frames, model.new_stream()), strict=True
    ):
        assert torch.equal(ours.pooler_output, theirs.pooler_output)


def test_half_precision_and_loading_info(saved, stock_folder):
    _, folder = saved
    loaded, info = NeuroFlowSiglipVisionModel.from_pretrained(
        stock_folder, sparse_adapter=folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert {parameter.dtype for parameter in loaded.sparse_adapter.parameters()} == {torch.bfloat16}
    loaded(random_video(1)[0].bfloat16(), stream=loaded.new_stream())


def test_the_checkpoint_is_saved_without_it(saved, tmp_path, stock_folder):
    model, _ = saved
    model.save_pretrained(tmp_path / "base")
    again, info = NeuroFlowSiglipVisionModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert again.sparse_adapter is None and not info["missing_keys"] and not info["unexpected_keys"]
    frame = random_video(1)[0]
    assert torch.equal(again(frame).pooler_output, model(frame).pooler_output)
    with pytest.raises(ValueError, match="no sparse adapter"):
        again.save_sparse_adapter(tmp_path / "none")


def test_remote_code_takes_it(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path / "remote")
    model_class = get_class_from_dynamic_module(
        "modeling_neuroflow_siglip.NeuroFlowSiglipVisionModel", str(tmp_path / "remote")
    )
    assert model_class is not NeuroFlowSiglipVisionModel
    loaded = model_class.from_pretrained(tmp_path / "remote", sparse_adapter=folder)
    frames = random_video(2)
    ours, theirs = play(loaded, frames, loaded.new_stream()), play(model, frames, model.new_stream())
    assert torch.equal(ours[1].pooler_output, theirs[1].pooler_output)


def test_peft_reads_it(saved, stock_vision, stock_folder):
    """PEFT applies the same changes, to every frame: its dense model is the merged one."""
    peft = pytest.importorskip("peft")
    model, folder = saved
    stock = NeuroFlowSiglipVisionModel.from_pretrained(stock_folder).double()
    theirs = peft.PeftModel.from_pretrained(stock, folder).double().merge_and_unload()
    for layer, ours, changes in zip(
        theirs.encoder.layers, model.encoder.layers, model.sparse_adapter.layers, strict=True
    ):
        for name, change in changes.items():
            weight = ours.get_submodule(TARGETS[name]).weight.double()
            merged = weight + change.scaling * change.up.double() @ change.down.double()
            torch.testing.assert_close(layer.get_submodule(TARGETS[name]).weight, merged)


def test_another_checkpoint_is_refused(saved, stock_folder, tmp_path):
    _, folder = saved
    other = NeuroFlowSiglipVisionModel.from_pretrained(stock_folder)
    for layer in other.encoder.layers:
        nn.init.normal_(layer.layer_norm1.weight, mean=1.0, std=0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"distilled for tiny, and this model has other weights .*other"):
        NeuroFlowSiglipVisionModel.from_pretrained(tmp_path / "other", sparse_adapter=folder)


def test_damaged_folders_are_refused(saved, stock_folder, tmp_path):
    _, folder = saved

    def load():
        return NeuroFlowSiglipVisionModel.from_pretrained(stock_folder, sparse_adapter=folder)

    with pytest.raises(OSError, match=r"sparse_adapter\.json"):
        NeuroFlowSiglipVisionModel.from_pretrained(stock_folder, sparse_adapter=tmp_path)
    config = folder / "adapter_config.json"
    good = config.read_text()
    config.write_text(json.dumps({**json.loads(good), "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load()
    config.write_text(json.dumps({**json.loads(good), "r": 5}))
    with pytest.raises(ValueError, match="does not fit"):
        load()
    config.write_text(good)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        load()


@pytest.mark.parametrize("mode, why", [("dense", "every patch"), ("hold", "or none"), ("mlp", "see all patches")])
def test_modes_without_anything_to_learn_are_refused(vision, mode, why):
    with pytest.raises(ValueError, match=f"`{mode}` cannot be distilled: .*{why}"):
        SparseAdapter(vision, NeuroFlowGateConfig.from_options({"mode": mode}))
