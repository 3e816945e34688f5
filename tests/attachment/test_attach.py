"""Models with a SigLIP tower, attached: the same answers, streams that do not meet, nothing left by `detach`."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from neuroflow_hf import NeuroFlowSiglipVisionModel, NeuroFlowStream, attach
from neuroflow_hf.attachment import StreamSession
from tests.conftest import TINY_VISION, assert_close_in_norm, random_video
from tests.vision.test_adapters import quantised
from tests.vision.test_no_stream import enable_checkpointing
from tests.vlms import IMAGE, MODELS

GATE_ALONE = 0.06  # projection and gate, of a dense frame of the tiny tower
each_model = pytest.mark.parametrize("name", MODELS)


def clip(frames=4, batch_size=1, seed=0):
    """[B, T, C, H, W] in float64, of which little changes from frame to frame."""
    return torch.stack(random_video(frames, batch_size, seed, changed=0.05), dim=1).double()


def state_of(model):
    """All that `attach` changes."""
    return [(module, type(module), list(vars(module)), vars(module).get("forward")) for module in model.modules()]


def tower_of(model):
    return next(module for module in model.modules() if isinstance(module, SiglipVisionModel))


@each_model
def test_everything_active_is_the_model_and_detach_gives_it_back(name):
    tiny, frames = MODELS[name], clip()[0]
    model = tiny.build()
    features, answer = tiny.features(model, frames), tiny.ask(model, frames)
    assert not torch.equal(tiny.ask(model, frames.flip(-1))[-1], answer[-1])  # the images count
    before, weights = state_of(model), set(model.state_dict())
    attached = attach(model, rows="frames", threshold=-1)
    assert list(attached.towers.values()) == [tower_of(model)] and set(model.state_dict()) == weights
    assert_close_in_norm(tiny.features(model, frames), features)
    streamed = tiny.ask(model, frames)
    assert attached.cost.min() > 0.9
    assert_close_in_norm(streamed[-1], answer[-1])
    assert torch.equal(streamed[0], answer[0]) or len(answer) == 1
    attached.detach()
    assert state_of(model) == before and attached.towers == {}
    assert torch.equal(tiny.features(model, frames), features)
    assert all(torch.equal(one, other) for one, other in zip(tiny.ask(model, frames), answer, strict=True))


@each_model
def test_a_clip_costs_less_and_stays_close(name):
    """A still one costs the gate, and every frame has the first one's features."""
    tiny, frames = MODELS[name], clip()[0]
    model = tiny.build()
    dense = tiny.features(model, frames)
    attached = attach(model, rows="frames")
    close = torch.nn.functional.cosine_similarity(tiny.features(model, frames), dense, dim=-1)
    assert close.mean() > 0.95 and attached.cost.mean() < 0.6
    still = frames[:1].repeat(4, 1, 1, 1)
    tiny.ask(model, still)
    assert attached.cost[0] > 0.9 and attached.cost[1:].max() < GATE_ALONE
    first, *later = tower_of(model)(still, output_hidden_states=[-1, 1]).hidden_states[1]
    assert all(torch.equal(frame, first) for frame in later)


# --- whose frames are neighbours -----------------------------------------------------------------------------------


def nearly_equal_images():
    """Two images that a stream would take for one."""
    image = clip(1)[0]
    return torch.cat([image, image + 1e-3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))])


def test_auto_takes_images_for_unrelated_and_clips_for_one_stream_each():
    model = MODELS["LLaVA-OneVision"].build()
    images, frames = nearly_equal_images(), clip(batch_size=2)
    options = {"image_sizes": torch.tensor([[24, 24]] * 2), "batch_num_images": torch.tensor([2])}

    @torch.no_grad()
    def features_of_images():
        return torch.cat(model.get_image_features(images, **options).pooler_output)

    dense = features_of_images()
    attached = attach(model)
    for _ in range(2):
        assert torch.equal(features_of_images(), dense) and attached.cost is None
    with torch.no_grad():
        together = model.get_video_features(frames).pooler_output
        assert attached.cost.view(2, 4)[:, 0].min() > 0.9 and attached.cost.mean() < 0.8
        alone = [model.get_video_features(one).pooler_output for one in frames.split(1)]
    assert_close_in_norm(torch.cat(alone), together)
    assert attached.stream is None
    attached.rows = "frames"
    assert not torch.equal(features_of_images(), dense)


def test_auto_without_a_method_for_video_says_that_it_does_nothing():
    tiny, images = MODELS["PaliGemma"], nearly_equal_images()
    model = tiny.build()
    dense = tiny.features(model, images)
    with pytest.warns(UserWarning, match='Pass `rows="frames"`'):
        attached = attach(model)
    assert torch.equal(tiny.features(model, images), dense)
    attached.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, rows="images")
    assert torch.equal(tiny.features(model, images), dense)


def test_cameras_of_a_robot_continue_over_calls(tmp_path):
    """Those of pi0: the tower gets what a stream of four cameras gets, call by call, also after it was saved."""
    tiny = MODELS["pi0"]
    model, frames = tiny.build(), clip(5, batch_size=4, seed=1)
    reference = NeuroFlowSiglipVisionModel.from_siglip(copy.deepcopy(tower_of(model)))
    stream = reference.new_stream(4, preset="faithful")
    attached = attach(model, rows="cameras")
    for number, images in enumerate(frames.unbind(1)):
        with torch.no_grad():
            expected = reference(images, stream=stream)
        seen = []
        hook = tower_of(model).register_forward_hook(lambda *args, seen=seen: seen.append(args[2].last_hidden_state))
        tiny.ask(model, images)
        hook.remove()
        assert torch.equal(seen[0], expected.last_hidden_state) and torch.equal(attached.cost, expected.cost)
        if number == 2:
            attached.stream.save(tmp_path / "cameras.safetensors")
            attached.reset()
            attached.stream = NeuroFlowStream.load(tmp_path / "cameras.safetensors")
    assert attached.stream.frames == [5] * 4 and attached.cost.max() < 1
    with pytest.raises(ValueError, match="images of 2 cameras, and the stream that it would continue has 4"):
        tiny.ask(model, frames[:2, 0])
    assert attached.stream.frames == [5] * 4
    attached.reset()
    tiny.ask(model, frames[:2, 0])
    assert attached.stream.frames == [1] * 2


def test_the_next_frames_of_cameras_continue_in_the_video_method():
    model, frames = MODELS["LLaVA-OneVision"].build(), clip(6, batch_size=2)
    attached = attach(model, rows="cameras")
    with torch.no_grad():
        outputs = [model.get_video_features(part.contiguous()).hidden_states[-1] for part in frames.split(3, 1)]
        attached.reset()
        whole = model.get_video_features(frames).hidden_states[-1]
    assert attached.stream.frames == [6, 6]
    parts = torch.cat([output.unflatten(0, (2, 3)) for output in outputs], dim=1)
    assert_close_in_norm(parts.flatten(0, 1), whole)


def test_requests_with_sessions_of_their_own_do_not_meet():
    """Interleaved in one thread, and in two, each answers as alone."""
    tiny, clips = MODELS["PaliGemma"], clip(4, batch_size=2)
    model = tiny.build()
    attached = attach(model, rows="cameras")

    def follow(session, frames, wait=lambda: None):
        answers = []
        for frame in frames.split(1):
            wait()
            with attached.using(session):
                answers.append(tiny.ask(model, frame)[-1])
        return answers

    alone = [follow(StreamSession(), frames) for frames in clips]
    sessions = [StreamSession(), StreamSession()]
    interleaved = [[], []]
    for number in range(4):
        for session, frames, answers in zip(sessions, clips, interleaved, strict=True):
            answers += follow(session, frames[number : number + 1])
    barrier, threaded = threading.Barrier(2), {}

    def work(index):
        threaded[index] = follow(StreamSession(), clips[index], barrier.wait)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answers in enumerate(alone):
        for one, between, beside in zip(answers, interleaved[index], threaded[index], strict=True):
            assert torch.equal(one, between) and torch.equal(one, beside)
    assert attached.stream is None and [session.streams.popitem()[1].frames for session in sessions] == [[4], [4]]


def test_features_computed_before_are_taken_by_generate():
    """Transformers' own seam: frames are encoded as they come, and a question is about the last one."""
    tiny, frames = MODELS["PaliGemma"], clip()[0]
    model = tiny.build()
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers has no `mm_encoder_outputs`")
    inputs = {"input_ids": torch.tensor([[1, 5, *[IMAGE] * 36, 7, 8]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    dense = model.generate(**inputs, pixel_values=frames[-1:], max_new_tokens=4, do_sample=False)
    attached = attach(model, rows="cameras", threshold=-1)
    with torch.no_grad():
        for frame in frames.split(1):
            features = model.get_image_features(frame)
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        answer = model.generate(
            **inputs, mm_encoder_outputs={"image": features}, max_new_tokens=4, do_sample=False, **options
        )
        assert torch.equal(answer[0], dense[0]) or options
    assert attached.stream.frames == [4]


# --- models that are not plain -------------------------------------------------------------------------------------


def test_training_is_dense_and_the_same_with_gradient_checkpointing():
    model, frames = MODELS["LLaVA-OneVision"].build(), clip()
    inputs = {"input_ids": torch.tensor([[1, 5, *[98] * 37, 7, 8]]), "pixel_values_videos": frames}

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [parameter.grad.clone() for parameter in tower_of(model).parameters() if parameter.grad is not None]

    model.train()
    enable_checkpointing(model)
    expected = gradients()
    attached = attach(model)
    assert len(expected) > 40
    assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))
    model.eval()
    gradients()
    assert attached.cost.mean() < 0.6  # in evaluation, clips are streams again


@pytest.mark.parametrize("how", ["offloaded", "quantised"])
def test_offloaded_and_quantised_models(how):
    accelerate = pytest.importorskip("accelerate")
    tiny, frames = MODELS["LLaVA-OneVision"], clip()[0]
    model, plain = tiny.build(), tiny.build()
    if how == "offloaded":
        accelerate.cpu_offload(tower_of(model), torch.device("cpu"))
        for module in (tower_of(model), *tower_of(model).encoder.layers):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(io_same_device=True))
        assert tower_of(model).encoder.layers[0].mlp.fc1.weight.is_meta
    else:
        quantised(tower_of(model), ["encoder"])
        quantised(tower_of(plain), ["encoder"])
    dense = tiny.features(plain, frames)
    attached, reference = attach(model), attach(plain)
    assert_close_in_norm(tiny.features(model, frames), tiny.features(plain, frames))
    assert torch.equal(attached.cost, reference.cost) and attached.cost.mean() < 0.6
    attached.detach()
    assert_close_in_norm(tiny.features(model, frames), dense)


def test_a_copy_of_an_attached_model_is_one_of_its_own():
    tiny, frames = MODELS["LLaVA-OneVision"], clip()[0]
    model = tiny.build()
    dense = tiny.features(model, frames)
    attached = attach(model)
    other = copy.deepcopy(model)
    attached.detach()
    assert torch.equal(tiny.features(model, frames), dense) and attached.cost is None
    assert not torch.equal(tiny.features(other, frames), dense)
    tower_of(other).attachment.detach()
    assert torch.equal(tiny.features(other, frames), dense)


def test_a_model_with_two_towers():
    towers = nn.ModuleList([SiglipVisionModel(SiglipVisionConfig(**TINY_VISION)) for _ in range(2)]).eval()
    attached, frames = attach(towers, rows="cameras"), random_video(2, batch_size=2)
    with torch.no_grad():
        for frame in frames:
            towers[0](frame)
        towers[1](frames[0][:1])
    assert {name: stream.frames for name, stream in attached.session.streams.items()} == {"0": [2, 2], "1": [1]}
    with pytest.raises(ValueError, match="2 SigLIP towers"):
        attached.stream  # noqa: B018


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rows": "video"}, "`rows` is 'video'; expected one of 'auto', 'frames'"),
        ({"preset": "exact"}, "Unknown preset 'exact'"),
        ({"treshold": 0.1}, "treshold"),
        ({"mode": "eliminate"}, "Mode `eliminate` returns active patches only"),
    ],
)
def test_wrong_options_change_nothing(options, words):
    model = MODELS["LLaVA-OneVision"].build()
    before = state_of(model)
    with pytest.raises(ValueError, match=words):
        attach(model, **options)
    assert state_of(model) == before


def test_models_that_cannot_be_attached():
    with pytest.raises(ValueError, match="no `SiglipVisionModel` in this Linear"):
        attach(nn.Linear(2, 2))
    model = MODELS["LLaVA-OneVision"].build()
    layer = tower_of(model).encoder.layers[1]
    layer.forward = lambda *args, **kwargs: args[0]
    before = state_of(model)
    with pytest.raises(ValueError, match=r"`model.vision_tower` has a SiglipEncoderLayer with another `forward`"):
        attach(model)
    assert state_of(model) == before
    del layer.forward
    attach(model)
    with pytest.raises(ValueError, match=r"has streams already; call `detach\(\)`"):
        attach(model)


def test_outputs_that_no_stream_has():
    model = MODELS["LLaVA-OneVision"].build()
    attach(model, rows="cameras")
    tower, frame = tower_of(model), clip(1)[0]
    tower(frame, output_hidden_states=-1)
    with pytest.raises(ValueError, match=r"hidden states \[1\], and this stream keeps \[3\]"):
        tower(frame, output_hidden_states=1)
    with pytest.raises(ValueError, match="output_attentions"):
        tower(frame, output_attentions=True)
    tower.register_forward_pre_hook(lambda _, args: (args[0][:-1], *args[1:]))
    with pytest.raises(ValueError, match="1 clips of 2 frames, and the tower 1 images"):
        model.get_video_features(clip(2))
