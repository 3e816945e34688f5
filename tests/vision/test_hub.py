"""Models pushed to a hub are pulled, trusted and streamed by a process that has only transformers."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, pipeline

from neuroflow_hf import NeuroFlowSiglipModel
from tests.conftest import IMAGE_SIZE, TINY_TEXT, TINY_VISION, assert_close_in_norm, lively, random_video
from tests.loopback_hub import LoopbackHub, call_elsewhere
from tests.vision.test_pipelines import LABELS, PIPELINE_TEXT, make_processor

GATE = {"threshold": 0.05, "max_age": 9}


def pull(video, image, labels, output):
    """Runs elsewhere, without the package: pull, stream, run a pipeline, push the vision model again."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoProcessor, pipeline

    report, tensors = {}, {}
    frames = load_file(video)["frames"].unbind(0)
    for name in ("tiny", "tiny-vision"):
        model = AutoModel.from_pretrained(f"user/{name}", trust_remote_code=True)
        report[name] = {
            "module": type(model).__module__,
            "config module": type(model.config).__module__,
            "one config class": type(model.config) is type(model).config_class,
            "gate": model.gate_options,
        }
        forward = getattr(model, "get_image_features", model) if name == "tiny" else model
        stream = model.new_stream()
        with torch.no_grad():
            for index, pixel_values in enumerate(frames):
                result = forward(pixel_values=pixel_values, stream=stream)
                tensors |= {f"{name}.{index}.pooled": result.pooler_output, f"{name}.{index}.cost": result.cost}
    save_file(tensors, output)
    # `model` is the vision model, from a repository: its names in the configuration must not point back there
    model.push_to_hub("user/again")
    AutoModel.from_pretrained("user/again", trust_remote_code=True)
    report["processor"] = type(AutoProcessor.from_pretrained("user/tiny")).__name__
    classify = pipeline("zero-shot-image-classification", model="user/tiny", trust_remote_code=True)
    report["scores"] = {entry["label"]: entry["score"] for entry in classify(image, candidate_labels=labels)}
    return report


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """A push and a pull: the hub, the pulling process's report, and its tensors beside those expected."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    text = SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT)
    stock = lively(SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_VISION)))
    model = NeuroFlowSiglipModel.from_siglip(stock, **GATE)
    processor = make_processor()
    frames = random_video(4, seed=5)
    save_file({"frames": torch.stack(frames)}, root / "video.safetensors")
    Image.effect_noise((IMAGE_SIZE, IMAGE_SIZE), 90).convert("RGB").save(root / "image.png")
    with torch.no_grad():
        expected = list(model.stream_frames(frames))
    assert all(output.cost < 0.9 for output in expected[1:])
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    scores = {
        entry["label"]: entry["score"] for entry in classify(str(root / "image.png"), candidate_labels=list(LABELS))
    }

    with LoopbackHub() as hub:
        with hub.reached_from_here():
            model.push_to_hub("user/tiny")
            processor.push_to_hub("user/tiny")
            model.vision_model.push_to_hub("user/tiny-vision")
        report = call_elsewhere(
            pull,
            root / "without package",
            hub=hub.url,
            video=root / "video.safetensors",
            image=root / "image.png",
            labels=list(LABELS),
            output=root / "out.safetensors",
        )
    return hub, report, load_file(root / "out.safetensors"), expected, scores


@pytest.mark.parametrize("name", ["tiny", "tiny-vision"])
def test_pushing_writes_code_weights_and_auto_map(visit, name):
    files = visit[0].files(f"user/{name}")
    auto_map = json.loads(files["config.json"])["auto_map"]
    for reference in auto_map.values():
        module, _, class_name = reference.partition(".")
        assert f"class {class_name}(".encode() in files[f"{module}.py"]
    assert {"model.safetensors", "README.md", "stream.py", "gate_config.py"} <= set(files)


@pytest.mark.parametrize("name", ["tiny", "tiny-vision"])
def test_a_pulled_model_streams_alike(visit, name):
    _, report, tensors, expected, _ = visit
    for index, output in enumerate(expected):
        assert_close_in_norm(tensors[f"{name}.{index}.pooled"], output.pooler_output, 1e-6)
        torch.testing.assert_close(tensors[f"{name}.{index}.cost"], output.cost, rtol=0, atol=1e-6)
    assert report[name]["gate"] == GATE


@pytest.mark.parametrize("name", ["tiny", "tiny-vision"])
def test_from_a_hub_configuration_and_model_share_a_module_folder(visit, name):
    report = visit[1][name]
    assert report["module"].startswith("transformers_modules.user.")
    assert report["module"].rpartition(".")[0] == report["config module"].rpartition(".")[0]
    assert report["one config class"]


def test_a_pulled_model_is_pushed_again_whole(visit):
    hub = visit[0]
    first, again = hub.files("user/tiny-vision"), hub.files("user/again")
    assert set(again) == set(first)
    assert json.loads(again["config.json"]) == json.loads(first["config.json"])
    assert all(again[name] == content for name, content in first.items() if name.endswith(".py"))


def test_processor_and_pipeline_from_the_hub(visit):
    _, report, _, _, scores = visit
    assert report["processor"] == "SiglipProcessor"
    assert report["scores"] == pytest.approx(scores, abs=1e-6)


def test_the_hub_knew_what_was_asked(visit):
    hub = visit[0]
    # client libraries also ask for things that have nothing to do with a model, and take a 404 for an answer
    assert [request for request in hub.unknown if "user/" in request or "/repos" in request] == []
    for name in ("tiny", "tiny-vision", "again"):
        assert any(request.startswith(f"GET /user/{name}/resolve/") for request in hub.requests)


def look_up_another_address():
    """Runs elsewhere: what a library does that swallows its network errors."""
    import contextlib
    import socket

    with contextlib.suppress(OSError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    return {}


def look_up_another_name():
    """Runs elsewhere: the same with a host name."""
    import contextlib
    import socket

    with contextlib.suppress(OSError):
        socket.getaddrinfo("hub.invalid", 443)
    return {}


def import_the_package():
    """Runs elsewhere: must not work without the package."""
    import neuroflow_hf.vision.stream

    return {"file": neuroflow_hf.vision.stream.__file__}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (look_up_another_address, "192.0.2.1"),
        (look_up_another_name, "hub.invalid"),
        (import_the_package, "No module named 'neuroflow_hf"),
    ],
)
def test_the_other_processes_are_cut_off(function, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        call_elsewhere(function, tmp_path)
