"""From pixels to rows: the fast ways against SigLIP's own, and where they must not be taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.vision import patches as neuroflow_patches
from neuroflow_hf.vision.patches import project_patches
from neuroflow_hf.vision.shortcuts import can_project_as_product, interpolate_at, project_as_product
from tests.conftest import FLOAT64, TINY_VISION, assert_close_in_norm, assert_outputs_close, lively, random_video


def new_vision(**options):
    """In float64."""
    torch.manual_seed(0)
    stock = lively(SiglipVisionModel(SiglipVisionConfig(**TINY_VISION | options))).double()
    return NeuroFlowSiglipVisionModel.from_siglip(stock)


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (27, 30), (4, 7)])
@pytest.mark.parametrize(
    "dtype, rtol",
    [(torch.float64, FLOAT64), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_projection_as_a_product_is_the_convolution(size, dtype, rtol):
    model = new_vision().to(dtype)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    projection = model.embeddings.patch_embedding
    with torch.no_grad():
        expected = projection(pixels.to(dtype)).flatten(2).transpose(1, 2)
        assert can_project_as_product(projection)
        for image in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
            product = project_patches(model, image, as_product=True)
            assert product.is_contiguous()
            assert_close_in_norm(product, expected, rtol)
        assert torch.equal(project_patches(model, pixels, as_product=False), expected)


def test_gradients_of_the_product_are_those_of_the_convolution():
    projection = new_vision().embeddings.patch_embedding
    gradients = []
    for project in (project_as_product, lambda module, x: module(x).flatten(2).transpose(1, 2)):
        pixels = random_video(1, batch_size=2)[0].double().requires_grad_()
        project(projection, pixels).square().sum().backward()
        gradients.append((pixels.grad, projection.weight.grad, projection.bias.grad))
        projection.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        assert_close_in_norm(ours, theirs)


class Wrapped(nn.Module):
    """Like an adapter or a quantised layer: a module around another, with its weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight = base.weight

    def forward(self, x):
        return self.base(x) * 2


def hook(module):
    module.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def other_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def pruned(module):
    prune.random_unstructured(module, "weight", amount=0.5)


def parametrised(module):
    parametrizations.weight_norm(module)


@pytest.mark.parametrize("change", [hook, pre_hook, other_forward, pruned, parametrised], ids=lambda f: f.__name__)
def test_a_projection_that_is_more_than_its_weights_is_called(change):
    model = new_vision()
    change(model.embeddings.patch_embedding)
    assert not can_project_as_product(model.embeddings.patch_embedding)
    check_with_everything_active(model)


@pytest.mark.parametrize(
    "other",
    [
        Wrapped,
        lambda conv: nn.Conv2d(3, 32, 3, stride=4, padding=(0, 0)),
        lambda conv: nn.Conv2d(3, 32, 2, stride=4, padding=0, dilation=2),
        lambda conv: type("OtherConv", (nn.Conv2d,), {})(3, 32, 4, stride=4),
    ],
    ids=["wrapped", "gaps", "dilated", "subclass"],
)
def test_a_projection_of_another_kind_is_called(other):
    model = new_vision()
    model.embeddings.patch_embedding = other(model.embeddings.patch_embedding)
    assert not can_project_as_product(model.embeddings.patch_embedding)
    check_with_everything_active(model)


def test_weights_of_another_class_are_not_read():
    class Quantised(nn.Parameter):
        """As bitsandbytes and torchao have them."""

    projection = nn.Conv2d(3, 32, 4, stride=4)
    assert can_project_as_product(projection)
    projection.weight = Quantised(projection.weight.data)
    assert not can_project_as_product(projection)
    assert not can_project_as_product(nn.Conv2d(3, 32, 4, stride=4, device="meta"))


def check_with_everything_active(model):
    """What a stream with everything active gives is what the model gives without one."""
    model, frame = model.double(), random_video(1)[0]
    with torch.no_grad():
        streamed = model(pixel_values=frame, stream=model.new_stream(threshold=-1))
        assert_outputs_close(streamed, model(pixel_values=frame))


def test_training_the_projection_shows_on_the_next_frame():
    model = new_vision()
    frames = random_video(2)
    optimizer = torch.optim.SGD([model.embeddings.patch_embedding.weight], lr=0.01)
    stream = model.new_stream(threshold=-1)
    model(pixel_values=frames[0], stream=stream).pooler_output.sum().backward()
    optimizer.step()
    with torch.no_grad():
        output, dense = model(pixel_values=frames[1], stream=stream), model(pixel_values=frames[1])
    assert_outputs_close(output, dense)


@given(
    side=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_positions_interpolated_one_by_one_are_those_of_the_whole_grid(side, grid, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    config = SiglipVisionConfig(**TINY_VISION | {"image_size": 4 * side, "hidden_size": 8})
    embeddings = SiglipVisionEmbeddings(config).to(dtype)
    with torch.no_grad():
        weight = embeddings.position_embedding.weight.copy_(torch.randn(side**2, 8, generator=generator))
        places = torch.randperm(grid[0] * grid[1], generator=generator)[:5]
        whole = embeddings.interpolate_pos_encoding(torch.zeros(1, grid[0] * grid[1], 8), 4 * grid[0], 4 * grid[1])
        found = interpolate_at(weight, places, grid)
    assert found.dtype == dtype
    # in bfloat16, torch rounds between rows and columns, too
    rtol = {torch.float64: FLOAT64, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert_close_in_norm(found, whole[0, places], rtol)


def positions_taken(monkeypatch):
    """Records which way the positions of the frames to come are interpolated."""
    taken = []
    whole, single = SiglipVisionEmbeddings.interpolate_pos_encoding, neuroflow_patches.interpolate_at

    def one_by_one(*args):
        taken.append("one by one")
        return single(*args)

    def of_the_grid(*args):
        taken.append("whole grid")
        return whole(*args)

    monkeypatch.setattr(neuroflow_patches, "interpolate_at", one_by_one)
    monkeypatch.setattr(SiglipVisionEmbeddings, "interpolate_pos_encoding", of_the_grid)
    return taken


class OtherEmbeddings(SiglipVisionEmbeddings):
    """Whose interpolation might be another one."""

    def interpolate_pos_encoding(self, *args):
        return super().interpolate_pos_encoding(*args)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_both_ways_to_the_positions_give_the_same_frames_and_gradients(monkeypatch, batch_size):
    model, other = new_vision(), new_vision()
    other.embeddings.__class__ = OtherEmbeddings
    frames = random_video(4, batch_size=batch_size, size=40)
    taken = positions_taken(monkeypatch)
    outputs = []
    for vision in (model, other):
        stream = vision.new_stream(batch_size, mode="context", threshold=0.3)
        outputs.append([vision(pixel_values=f, stream=stream, interpolate_pos_encoding=True) for f in frames])
        assert taken == ["whole grid"] + ["one by one" if vision is model else "whole grid"] * 3
        taken.clear()
        outputs[-1][-1].pooler_output.square().sum().backward()
    for ours, theirs in zip(*outputs, strict=True):
        assert_close_in_norm(ours.last_hidden_state, theirs.last_hidden_state)
    ours, theirs = (vision.embeddings.position_embedding.weight.grad for vision in (model, other))
    assert theirs.any()
    assert_close_in_norm(ours, theirs)
