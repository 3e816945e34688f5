"""On CUDA: the same contracts in half precision, and one wait of the host per frame. Run with `pytest -m gpu`."""

import pytest
import torch

from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.vision.gate_config import MODE_NAMES
from tests.conftest import random_video

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def cuda_model(stock_vision, request):
    stock = type(stock_vision)(stock_vision.config)
    stock.load_state_dict(stock_vision.state_dict())
    return NeuroFlowSiglipVisionModel.from_siglip(stock.eval().to("cuda", request.param))


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_everything_active_equals_dense(cuda_model, mode):
    stream = cuda_model.new_stream(2, mode=mode, threshold=-1)
    with torch.inference_mode():
        for frame in random_video(3, batch_size=2):
            frame = frame.to("cuda", cuda_model.dtype)
            streamed = cuda_model(pixel_values=frame, stream=stream).pooler_output
            dense = cuda_model(pixel_values=frame).pooler_output
            assert torch.cosine_similarity(streamed.float(), dense.float()).min() > 0.9998


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_a_still_scene_keeps_its_embedding_exactly(cuda_model, mode):
    frame = random_video(1)[0].to("cuda", cuda_model.dtype)
    stream = cuda_model.new_stream(mode=mode, threshold=0)
    with torch.inference_mode():
        first = cuda_model(pixel_values=frame, stream=stream)
        later = cuda_model(pixel_values=frame, stream=stream)
    if mode not in ("eliminate", "dense"):
        assert later.skip_rate.item() == 1
        assert torch.equal(later.pooler_output, first.pooler_output)


def test_the_host_waits_once_a_frame(cuda_model):
    frames = [frame.to("cuda", cuda_model.dtype) for frame in random_video(3)]
    stream = cuda_model.new_stream()
    waits = []
    with torch.inference_mode():
        cuda_model(pixel_values=frames[0], stream=stream)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning) as waits:
                cuda_model(pixel_values=frames[1], stream=stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) == 1


def test_a_stream_moves_between_devices(cuda_model):
    frames = [frame.to("cuda", cuda_model.dtype) for frame in random_video(4)]
    stayed, moved = cuda_model.new_stream(), cuda_model.new_stream()
    with torch.inference_mode():
        for frame in frames[:2]:
            cuda_model(pixel_values=frame, stream=stayed)
            cuda_model(pixel_values=frame, stream=moved)
        moved.to("cpu").to("cuda")
        for frame in frames[2:]:
            expected = cuda_model(pixel_values=frame, stream=stayed).pooler_output
            assert torch.equal(cuda_model(pixel_values=frame, stream=moved).pooler_output, expected)
