"""Tiny random models and random videos. Everything here runs in milliseconds."""

# ruff: noqa: E402
import copy
import gc
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until all modules are there: what they hold stays, and to search it takes a fifth of the time

import pytest
import torch
from hypothesis import settings
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

from neuroflow_hf import (
    NeuroFlowCLIPVisionModel,
    NeuroFlowDinov2Model,
    NeuroFlowDinov2WithRegistersModel,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionModel,
)
from neuroflow_hf.vision.gate_config import MODE_NAMES

settings.register_profile("ci", derandomize=True)  # the same examples on every run
if os.environ.get("CI"):
    settings.load_profile("ci")
if "PYTEST_XDIST_WORKER" in os.environ or "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # the products are too small to share
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
sys.modules["openvino_telemetry"] = None  # OpenVINO works without it, and tests reach nobody
logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_collection_finish():
    """Garbage is collected among what tests make, not among modules."""
    gc.freeze()
    gc.enable()


TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
TINY_DINOV2 = {name: size for name, size in TINY_VISION.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
# by name: the stock model and its options, and what wraps it
TOWERS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, TINY_VISION, NeuroFlowSiglipVisionModel.from_siglip),
    "dinov2": (Dinov2Model, Dinov2Config, TINY_DINOV2, NeuroFlowDinov2Model.from_dinov2),
    "registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        TINY_DINOV2 | {"num_register_tokens": 2, "use_swiglu_ffn": True},
        NeuroFlowDinov2WithRegistersModel.from_dinov2,
    ),
    "clip": (CLIPVisionModel, CLIPVisionConfig, TINY_VISION, NeuroFlowCLIPVisionModel.from_clip),
}
each_tower = pytest.mark.parametrize("tower", TOWERS, indirect=True)  # else the fixtures below are SigLIP's
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "size": {"height": 24, "width": 24},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
GRID = (6, 6)
NUM_PATCHES = 36
IMAGE_SIZE = 24
PATCH_SIZE = 4
GATED_MODES = tuple(mode for mode in MODE_NAMES if mode not in ("dense", "hold"))


def lively(model):
    """The model with its random weights enlarged, so that attention is far from uniform and layers matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "in_proj_weight")):
                parameter.mul_(2)
            elif name.endswith(("bias", "cls_token", "register_tokens", "lambda1")):
                parameter.normal_(std=0.1 if name.endswith("bias") else 1)
    return model.eval()


@pytest.fixture(scope="session")
def stock_model():
    """A tiny `SiglipModel`. Do not change it."""
    torch.manual_seed(0)
    return lively(SiglipModel(SiglipConfig(text_config=SiglipTextConfig(**TINY_TEXT), vision_config=TINY_VISION)))


def make_stock_tower(tower, **sizes):
    """A tiny stock vision model; `sizes` are options that all towers have."""
    model_class, config_class, options, _ = TOWERS[tower]
    torch.manual_seed(0)
    return lively(model_class(config_class(**options | sizes)))


def wrap_tower(tower, stock, **gate_options):
    """NeuroFlow's model around a stock one."""
    return TOWERS[tower][3](stock, **gate_options)


@pytest.fixture(scope="session")
def tower(request):
    """The name of a tower in `TOWERS`: SigLIP, unless the test is marked with `each_tower`."""
    return getattr(request, "param", "siglip")


@pytest.fixture(scope="session")
def stock_vision(tower):
    """A tiny stock vision model. Do not change it."""
    return make_stock_tower(tower)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with the tiny `SiglipVisionModel`'s checkpoint and its image processor."""
    folder = tmp_path_factory.mktemp("model")
    make_stock_tower("siglip").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="session")
def stock_folder(stock_model, tmp_path_factory):
    """A folder with the tiny `SiglipModel`'s checkpoint."""
    folder = tmp_path_factory.mktemp("stock")
    stock_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(stock_folder):
    """The tiny model as `NeuroFlowSiglipModel`, in plain mode `context`. Do not change it."""
    return NeuroFlowSiglipModel.from_pretrained(stock_folder, gate={"mode": "context"})


@pytest.fixture(scope="session")
def vision(tower, stock_vision):
    """The tiny vision model as NeuroFlow's, in plain mode `context`. Do not change it."""
    return wrap_tower(tower, stock_vision, mode="context")


@pytest.fixture(scope="session")
def stock_vision64(stock_vision):
    """`stock_vision` in float64. Do not change it."""
    return copy.deepcopy(stock_vision).double()


@pytest.fixture(scope="session")
def vision64(tower, stock_vision64):
    """`vision` in float64. Do not change it."""
    return wrap_tower(tower, stock_vision64, mode="context")


def random_video(num_frames, batch_size=1, seed=0, size=IMAGE_SIZE, changed=0.2):
    """Frames [B, 3, size, size] in a list; from one to the next, about a share `changed` of the patches changes."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randn(batch_size, 3, size, size, generator=generator)
    frames = [frame]
    for _ in range(num_frames - 1):
        grid = size // PATCH_SIZE
        mask = torch.rand(batch_size, 1, grid, grid, generator=generator) < changed
        mask = mask.repeat_interleave(PATCH_SIZE, 2).repeat_interleave(PATCH_SIZE, 3)
        frame = torch.where(mask, torch.randn(frame.shape, generator=generator), frame)
        frames.append(frame)
    return frames


@pytest.fixture(autouse=True)
def accelerate_anew():
    """Accelerate keeps its options for the whole process, and refuses others: forget them after each test."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_grad():
    """For modules that train nothing: `pytestmark = pytest.mark.usefixtures("no_grad")`."""
    with torch.no_grad():
        yield


# Equalities are tested in float64, where what kernels add up in another order differs by 1e-15 or so, and a mistake
# by far more.
FLOAT64 = 1e-11


def assert_close_in_norm(actual, expected, rtol=FLOAT64, atol=0.0):
    """
    The norm of the difference is at most `rtol` times that of `expected`, plus `atol`. A kernel rounds in the size of
    the numbers that it adds up, so a small element may be far off in relation to itself, but not in relation to these.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (actual, expected)
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    assert difference <= rtol * size + atol, (
        f"off by {difference:.3g}, {difference / max(size, 1e-300):.3g} of the norm"
    )


def assert_outputs_close(output, expected, rtol=FLOAT64):
    """Hidden state and pooled output of two float64 models, one of which is in a stream."""
    assert_close_in_norm(output.last_hidden_state, expected.last_hidden_state, rtol)
    assert_close_in_norm(output.pooler_output, expected.pooler_output, rtol)


def play(model, frames, stream):
    """The outputs of frames, one after the other, in a stream."""
    return [model(pixel_values=frame, stream=stream) for frame in frames]
