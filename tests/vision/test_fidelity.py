"""A stream's `min_fidelity`: what it keeps, what that costs, and what it does with a budget."""

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from neuroflow_hf import NeuroFlowSiglipVisionModel, NeuroFlowStream
from neuroflow_hf.vision.controller import Pace
from tests.conftest import TINY_VISION, play, random_video

pytestmark = pytest.mark.usefixtures("no_grad")


def fidelities(model, frames, outputs):
    """Cosine of each output to dense's."""
    dense = torch.cat([model(pixel_values=frame).pooler_output for frame in frames])
    return torch.cosine_similarity(torch.cat([output.pooler_output for output in outputs]), dense, dim=-1)


def cost_of(outputs):
    """Mean cost after the first frame."""
    return torch.cat([output.cost for output in outputs])[1:].mean().item()


def test_held_frames_keep_the_fidelity_nearly_always_and_more_of_it_costs_more(vision):
    frames, costs = random_video(80, changed=0.05, seed=3), []
    for least in (0.7, 0.9, 0.99):
        outputs = play(vision, frames, vision.new_stream(mode="hold", min_fidelity=least))
        assert (fidelities(vision, frames, outputs) >= least).float().mean() >= 0.9
        costs.append(cost_of(outputs))
    assert costs == sorted({*costs}) and costs[0] < 0.5 * costs[-1]


def test_sparse_frames_are_used_where_they_are_enough(vision):
    frames, found = random_video(60, changed=0.1, seed=3), []
    for least in (0.7, 0.99):
        outputs = play(vision, frames, vision.new_stream(mode="extrapolate", min_fidelity=least))
        found.append((cost_of(outputs), fidelities(vision, frames, outputs).mean().item()))
        shares = {1 - output.skip_rate.item() for output in outputs}
        assert any(0 < share < 1 for share in shares)
    assert found == sorted({*found})


@pytest.mark.parametrize("mode", ["hold", "context", "extrapolate", "reconstruct", "mlp", "eliminate"])
def test_whatever_the_mode_a_fidelity_next_to_1_is_dense(vision, mode):
    frames = random_video(6, changed=0.9)
    outputs = play(vision, frames, vision.new_stream(mode=mode, min_fidelity=1 - 1e-7))
    assert fidelities(vision, frames, outputs).min() > 1 - 1e-5


def test_a_still_camera_is_only_looked_at(vision):
    frames = random_video(1) * 20
    outputs = play(vision, frames, vision.new_stream(min_fidelity=0.999, keyframe_interval=None))
    assert not any(output.active_mask.any() for output in outputs[1:])


def test_it_replaces_the_budget_of_a_preset_and_no_other(vision):
    assert vision.new_stream(preset="thrifty", min_fidelity=0.9).gate.cost_budget is None
    assert vision.new_stream(preset="thrifty", min_fidelity=0.9, cost_budget=0.4).gate.cost_budget == 0.4
    assert vision.new_stream(preset="thrifty", min_fidelity=None).gate.cost_budget == 0.1


def test_with_a_budget_what_need_not_be_encoded_is_held(vision):
    frames = random_video(40, changed=0.3, seed=1)
    costs = [
        cost_of(play(vision, frames, vision.new_stream(cost_budget=0.6, min_fidelity=least))) for least in (None, 0.3)
    ]
    assert costs[1] < 0.7 * costs[0]


def test_streams_of_a_batch_saved_and_restarted_are_as_alone(vision, tmp_path):
    frames = random_video(12, batch_size=2, changed=0.15, seed=5)
    both = vision.new_stream(2, min_fidelity=0.9)
    play(vision, frames[:6], both)
    both.save(tmp_path / "stream.safetensors")
    both = NeuroFlowStream.load(tmp_path / "stream.safetensors")
    whole = play(vision, frames[6:], both)
    for index in range(2):
        alone = vision.new_stream(min_fidelity=0.9)
        outputs = play(vision, [frame[index : index + 1] for frame in frames], alone)[6:]
        for one, other in zip(outputs, whole, strict=True):
            assert torch.equal(one.active_mask[0], other.active_mask[index])
            torch.testing.assert_close(one.pooler_output[0], other.pooler_output[index])
        assert alone.pace[0].error.rate == pytest.approx(both.pace[index].error.rate, rel=1e-3)
    both.reset(1)
    vision(pixel_values=frames[0], stream=both)
    assert both.pace[1] == Pace() != both.pace[0]


def test_a_model_without_a_pooling_head_is_refused_before_the_first_write():
    headless = SiglipVisionModel(SiglipVisionConfig(**TINY_VISION, vision_use_head=False)).eval()
    model = NeuroFlowSiglipVisionModel.from_siglip(headless)
    stream = model.new_stream(min_fidelity=0.9)
    with pytest.raises(ValueError, match="`min_fidelity` is of the pooled output"):
        model(pixel_values=random_video(1)[0], stream=stream)
    assert stream.frames == [0] and not stream.memory


@pytest.mark.parametrize("least", [0, 1, 1.5, -0.1])
def test_what_is_no_cosine_to_keep_is_refused(vision, least):
    with pytest.raises(ValueError, match=r"`min_fidelity` is .*expected a cosine above 0 and below 1"):
        vision.new_stream(min_fidelity=least)
