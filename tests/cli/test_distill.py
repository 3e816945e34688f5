"""`neuroflow distill`: from videos to a folder that can be loaded, and what it says of wrong input."""

import re

import pytest
from typer.testing import CliRunner

from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.cli.main import app
from tests.cli.test_run import write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "square.mkv", frames=20)


def run(*arguments):
    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


TINY = ("--steps", 4, "--clip-frames", 4, "--frame-stride", 1, "--batch", 2, "--rank", 2, "--summary-tokens", 4)


def test_distill(clip, model_folder, tmp_path):
    done = run(clip, "--model", model_folder, "--out", tmp_path, *TINY)
    assert done.exit_code == 0, done.output
    assert "keyframe repeated" in done.stdout and "after" in done.stdout
    assert re.search(r"step 4: held-out cosine 0\.\d{4}", done.stderr)
    for name in ("adapter_config.json", "adapter_model.safetensors", "sparse_adapter.json", "distill.json"):
        assert (tmp_path / name).is_file()
    assert 'sparse_adapter="' in done.stdout
    model = NeuroFlowSiglipVisionModel.from_pretrained(model_folder, sparse_adapter=tmp_path)
    assert model.new_stream().gate.summary_tokens == 4
    again = run(clip, "--model", model_folder, "--out", tmp_path, *TINY)
    assert again.exit_code == 0 and "step 4" not in again.stderr  # nothing is trained again


def test_full(clip, model_folder, tmp_path):
    options = ("--method", "full", "--mode", "eliminate", "--steps", 2, "--clip-frames", 4, "--frame-stride", 1)
    done = run(clip, "--model", model_folder, "--out", tmp_path, *options)
    assert done.exit_code == 0, done.output
    assert NeuroFlowSiglipVisionModel.from_pretrained(tmp_path).config.model_type == "neuroflow_siglip_vision_model"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--mode", "dense"), "Mode `dense` cannot be distilled"),
        (("--mode", "hold"), "Mode `hold` cannot be distilled"),
        (("--method", "some"), "expected one of lora, full"),
        (("--targets", "head"), "expected some of q_proj"),
        (("--resolutions", "big"), "expected such as 224,448"),
        (("--clip-frames", "500"), "No training video has a clip of 500 frames"),
    ],
)
def test_wrong_input_is_one_line(clip, model_folder, tmp_path, options, message):
    done = run(clip, "--model", model_folder, "--out", tmp_path, *options)
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_without_videos(tmp_path, model_folder):
    (tmp_path / "note.txt").write_text("nothing to see")
    done = run(tmp_path, "--model", model_folder)
    assert done.exit_code == 2 and "There is no video in" in done.stderr


def test_clips_of_another_length_are_left_out(clip, model_folder, tmp_path):
    short = write_clip(tmp_path / "short.mkv", frames=3)
    done = run(clip, short, "--model", model_folder, "--out", tmp_path / "out", *TINY)
    assert done.exit_code == 0 and "short.mkv is too short" in done.stderr
