"""What `python -m recipes.hub` writes loads where the package is not installed, and is whole or not there."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
)
from typer import Typer
from typer.testing import CliRunner

from neuroflow_hf import NeuroFlowSiglipVisionModel
from recipes import hub
from tests.conftest import IMAGE_SIZE, TINY_TEXT, TINY_VISION, lively, random_video
from tests.loopback_hub import call_elsewhere
from tests.vision.test_pipelines import LABELS, PIPELINE_TEXT, make_processor


@pytest.fixture
def source(stock_vision, tmp_path):
    """A folder as under `models/`, with a tiny stock vision model, its preprocessor and a card."""
    folder = tmp_path / "models" / "tiny"
    stock_vision.save_pretrained(folder)
    SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


@pytest.fixture
def run():
    """Runs the command with the arguments it is given."""
    app = Typer()
    app.command()(hub.main)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def use_repository(folder, video, output):
    """Runs elsewhere: load and stream."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, SiglipImageProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = SiglipImageProcessor.from_pretrained(folder)
    stream = model.new_stream()
    with torch.no_grad():
        outputs = [
            model(pixel_values=frame, stream=stream).pooler_output for frame in load_file(video)["frames"].unbind(0)
        ]
    save_file({"pooled": torch.stack(outputs)}, output)
    return {"gate": model.gate_options, "size": dict(processor.size), "class": type(model).__name__}


def test_the_repository_works_without_the_package(source, stock_vision, tmp_path, run):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "gate": {"threshold": 0.05}}))
    output = tmp_path / "dist" / "hub"
    result = run("--models", source.parent, "--output", output)
    assert result.exit_code == 0, result.output
    repository = output / "tiny"
    written = {path.name for path in repository.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "LICENSE"} <= written
    assert all(name in result.output for name in ("tiny", *written))
    assert (repository / "README.md").read_text() == (source / "README.md").read_text()
    assert list(output.iterdir()) == [repository]

    frames = random_video(4)
    save_file({"frames": torch.stack(frames)}, tmp_path / "video.safetensors")
    report = call_elsewhere(
        use_repository,
        tmp_path / "elsewhere",
        folder=repository,
        video=tmp_path / "video.safetensors",
        output=tmp_path / "out.safetensors",
    )
    assert report == {
        "gate": {"threshold": 0.05},
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "class": "NeuroFlowSiglipVisionModel",
    }
    model = NeuroFlowSiglipVisionModel.from_siglip(stock_vision, threshold=0.05)
    with torch.no_grad():
        expected = torch.stack([output.pooler_output for output in model.stream_frames(frames)])
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["pooled"], expected, rtol=0, atol=1e-6)


def use_whole_repositories(folders, labels):
    """Runs elsewhere: an image of noise and labels, through the processor and the model; transformers' questions."""
    import builtins

    import numpy as np
    import torch
    from transformers import AutoModel, AutoProcessor

    asked, found = [], []
    ask = builtins.input
    for folder in folders:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        builtins.input = lambda text="": asked.append(text) or "n"
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        builtins.input = ask
        image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        inputs = processor(text=labels, images=image, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs, stream=model.new_stream()).logits_per_image
        found.append({"logits": logits.tolist(), "classes": [type(model).__name__, type(processor).__name__]})
    return {"found": found, "asked": asked}


def test_a_whole_model_takes_its_tokenizer_along(tmp_path):
    """Saved with a processor, or with a tokenizer and an image processor."""
    text = SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT)
    torch.manual_seed(0)
    stock = lively(SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_VISION)))
    processor, repositories = make_processor(), []
    for name, parts in {
        "processor": [processor],
        "parts": [processor.tokenizer, processor.image_processor],
    }.items():
        source = tmp_path / "models" / name
        for part in (stock, *parts):
            part.save_pretrained(source)
        (source / "README.md").write_text("# Whole")
        beside = {path.name for path in source.iterdir()}
        repository = hub.build_hub_repository(source, tmp_path / "out" / name)
        assert beside <= {path.name for path in repository.iterdir()}
        assert "tokenizer.json" in beside
        assert set(load_file(repository / "model.safetensors")) == set(stock.state_dict())
        repositories.append(str(repository))

    answer = call_elsewhere(use_whole_repositories, tmp_path / "elsewhere", folders=repositories, labels=list(LABELS))
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    inputs = make_processor()(text=list(LABELS), images=image, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = stock(**inputs).logits_per_image
    assert not answer["asked"] and len(answer["found"]) == 2
    for found in answer["found"]:
        assert found["classes"] == ["NeuroFlowSiglipModel", "SiglipProcessor"]
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=1e-5)


def test_a_recipe_fills_in_what_is_missing(source, tmp_path, monkeypatch):
    made = tmp_path / "made"
    source.rename(made)
    source.mkdir()
    (source / "README.md").write_text("# The card")
    (made / "README.md").write_text("# Not the card")
    (made / "recipe.json").write_text("{}")
    (made / "modeling_neuroflow_siglip.py").write_text("an old version")
    monkeypatch.setitem(hub.RECIPES, "tiny", lambda: made)
    repository = hub.build_hub_repository(source, tmp_path / "out")
    assert (repository / "README.md").read_text() == "# The card"
    assert (repository / "recipe.json").read_text() == "{}"
    assert "class NeuroFlowSiglipVisionModel" in (repository / "modeling_neuroflow_siglip.py").read_text()
    assert {path.name for path in source.iterdir()} == {"README.md"}


def test_a_classifier_keeps_its_class(tmp_path, source):
    config = SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, num_labels=3)
    stock = lively(SiglipForImageClassification(config))
    stock.save_pretrained(source)
    repository = hub.build_hub_repository(source, tmp_path / "out")
    assert json.loads((repository / "config.json").read_text())["architectures"] == [
        "NeuroFlowSiglipForImageClassification"
    ]
    torch.testing.assert_close(
        load_file(repository / "model.safetensors")["classifier.weight"], stock.classifier.weight.detach()
    )


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (["model.safetensors"], ["weights (model.safetensors or"]),
        (
            ["config.json", "model.safetensors"],
            ["config.json", "weights"],
        ),
        (["preprocessor_config.json"], ["a preprocessor (preprocessor_config.json or processor_config.json)"]),
        (["README.md"], ["a card (README.md)"]),
    ],
)
def test_what_is_missing_is_named(source, removed, named, tmp_path, run):
    for name in removed:
        (source / name).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        hub.build_hub_repository(source, tmp_path / "out" / "tiny")
    assert all(part in str(raised.value) for part in (*named, str(source)))
    assert not (tmp_path / "out").exists()
    result = run("--models", source.parent, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert named[0] in result.output


def test_no_models(tmp_path, run):
    result = run("--models", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "There is no model" in result.output


def test_weights_at_random_are_not_published(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors.pop("post_layernorm.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .* post_layernorm\.weight"):
        hub.build_hub_repository(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype_whatever_the_configuration_says(source, stock_vision, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in stock_vision.state_dict().items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    repository = hub.build_hub_repository(source, tmp_path / "out")
    written = load_file(repository / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert json.loads((repository / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_other_models_are_refused(source, tmp_path):
    (source / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="'clip'"):
        hub.build_hub_repository(source, tmp_path / "out")


def test_a_new_repository_replaces_the_old_one_when_it_is_whole(source, tmp_path, monkeypatch):
    output = hub.build_hub_repository(source, tmp_path / "out" / "tiny")
    (output / "left over.txt").write_text("")
    before = {path.name for path in output.iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            hub.build_hub_repository(source, output)
    assert {path.name for path in output.iterdir()} == before

    hub.build_hub_repository(source, output)
    assert {path.name for path in output.iterdir()} == before - {"left over.txt"}
    assert list(output.parent.iterdir()) == [output]


def test_other_folders_are_not_replaced(source, tmp_path):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis"):
        hub.build_hub_repository(source, output)
    assert (output / "chapter.txt").read_text() == "years of work"


def test_an_empty_folder_is_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert (hub.build_hub_repository(source, tmp_path / "out") / "config.json").is_file()


def test_a_sparse_adapter_is_copied_with_the_licence(tmp_path):
    source = tmp_path / "adapter"
    source.mkdir()
    for name in ("sparse_adapter.json", "adapter_model.safetensors", "README.md"):
        (source / name).write_text(name)
    hub.copy_adapter(source, tmp_path / "hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        *(path.name for path in source.iterdir()),
        "LICENSE",
    }
    hub.copy_adapter(source, tmp_path / "hub")  # again
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no sparse adapter"):
        hub.copy_adapter(source, tmp_path / "other")
