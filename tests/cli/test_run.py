import json
import os
import signal
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import neuroflow_hf.loading
import neuroflow_hf.video.reader
from neuroflow_hf.cli.main import app
from neuroflow_hf.cli.vision_model import parse_gate
from neuroflow_hf.video.run_tables import baseline_note
from neuroflow_hf.vision.gate_config import MODE_NAMES
from tests.conftest import PROCESSOR, make_stock_tower
from tests.processes import neuroflow, start

ALL_FILES = {"frames.jsonl", "embeddings.safetensors", "overlay.mp4", "contact_sheet.png", "plot.png", "summary.json"}


def write_clip(path, frames, codec="ffv1", options=None, keyframe_interval=None, seed=0):
    """A video of 64x48 pixels, 10 frames a second: a bright square moves over noise that stands still."""
    ground = np.random.default_rng(seed).integers(0, 160, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.gop_size = keyframe_interval or stream.gop_size
        for i in range(frames):
            image = ground.copy()
            image[16:28, 2 * i % 52 : 2 * i % 52 + 12] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "square.mkv", frames=20)


def call(*arguments):
    """The result of `neuroflow ARGUMENTS`, its output wide and without colours."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.parametrize("tower", ["dinov2", "registers", "clip"])
def test_other_towers_run_and_have_no_labels(tower, clip, tmp_path):
    make_stock_tower(tower).save_pretrained(tmp_path / "model")
    crop = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": True}
    settings = PROCESSOR | crop | {"crop_size": {"height": 24, "width": 24}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    arguments = ("run", clip, "--model", tmp_path / "model", "--out", tmp_path / "out", "--no-overlay")
    result = call(*arguments, "--dense-every", 4, "--max-frames", 9, "--mode", "context")
    assert result.exit_code == 0, result.output
    summary, _, tensors = read_run(tmp_path / "out")
    assert summary["grid"] == [6, 6] and 0 < summary["cost"]["mean"] < 1
    assert tensors["embeddings"].shape == (9, 32)
    assert summary["cosine_to_dense"]["streamed"]["min"] > 0.9
    result = call(*arguments, "--labels", "a cat, a dog")
    assert result.exit_code != 0 and "name a whole SigLIP or SigLIP 2 checkpoint" in result.output


@pytest.fixture(scope="module")
def finished(clip, model_folder, tmp_path_factory):
    """A whole run: (what was printed, its folder)."""
    out = tmp_path_factory.mktemp("runs") / "new" / "folder"
    options = ("--threshold", 0.02, "--keyframe-fraction", 0.5, "--gate", "dilate=1", "--dense-every", 4)
    result = call("run", clip, "--model", model_folder, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return result.stdout, out


def read_run(out):
    """(summary, lines of frames.jsonl, tensors)."""
    lines = [json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), lines, load_file(out / "embeddings.safetensors")


def count_frames(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_all_files_are_there_and_agree(finished):
    _, out = finished
    assert {path.name for path in out.iterdir()} == ALL_FILES
    summary, lines, tensors = read_run(out)
    assert summary["status"] == "complete" and summary["message"] == ""
    assert summary["frames"] == len(lines) == len(tensors["embeddings"]) == count_frames(out / "overlay.mp4") == 20
    assert set(summary["files"]) == ALL_FILES
    assert [line["index"] for line in lines] == tensors["frame_index"].tolist() == list(range(20))
    assert [line["time"] for line in lines] == pytest.approx(tensors["time"].tolist())
    assert summary["keyframes"] == sum(line["keyframe"] for line in lines)
    for line in lines:
        assert line["skip_rate"] == pytest.approx(1 - line["active"] / line["patches"], abs=1e-6)
        assert line["milliseconds"] > 0
    assert summary["cost"]["mean"] == pytest.approx(np.mean([line["cost"] for line in lines]), abs=1e-6)
    sampled = [line for line in lines if "cosine_to_dense" in line]
    assert [line["index"] for line in sampled] == tensors["dense_frame_index"].tolist() == [0, 4, 8, 12, 16]
    dense = tensors["dense_embeddings"]
    cosines = torch.cosine_similarity(tensors["embeddings"][::4], dense, dim=1)
    assert [line["cosine_to_dense"] for line in sampled] == pytest.approx(cosines.tolist(), abs=1e-5)
    mean = np.mean([line["cosine_to_dense"] for line in sampled[1:]])
    assert summary["cosine_to_dense"]["streamed"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert all("dense_milliseconds" in line for line in sampled)
    for name in ("contact_sheet.png", "plot.png"):
        with Image.open(out / name) as picture:
            picture.verify()


def test_the_summary_says_what_was_run(finished, model_folder):
    _, out = finished
    summary = read_run(out)[0]
    gate = summary["gate"]
    assert (gate["threshold"], gate["keyframe_fraction"], gate["dilate"]) == (0.02, 0.5, 1)
    assert (gate["mode"], gate["reference"]) == ("extrapolate", "last_update")
    assert summary["model"] == str(model_folder) and summary["video"]["name"] == "square.mkv"
    assert summary["command"].startswith("neuroflow") and summary["dtype"] == "float32"
    assert summary["versions"]["torch"] == torch.__version__ and summary["cpu_count"] == os.cpu_count()
    assert summary["wall_clock_seconds"] > 0 and summary["milliseconds_per_frame"]["dense"]["median"] > 0


def test_the_table_says_what_the_summary_says(finished):
    printed, out = finished
    summary = read_run(out)[0]
    assert f"{summary['cost']['median']:.3f}" in printed
    assert f"{summary['cosine_to_dense']['streamed']['mean']:.4f}" in printed
    for words in (
        "skip rate",
        "milliseconds, dense",
        "baseline: first frame repeated",
        "every 4 frames",
        "Wall clock",
    ):
        assert words in printed
    assert f"{summary['keyframes']} of 20 frames" in printed


def test_without_arguments_the_shipped_clip_and_model_are_taken(clip, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(neuroflow_hf.video.reader, "bundled_clip", lambda: clip)
    monkeypatch.setattr("neuroflow_hf.loading.EMBEDDED_MODEL", model_folder)
    monkeypatch.chdir(tmp_path)
    result = call("run", "--max-frames", 3, "--stride", 2, "--no-overlay", "--dense-every", 0)
    assert result.exit_code == 0, result.output
    summary, lines, _ = read_run(tmp_path / "neuroflow-run")
    assert [line["index"] for line in lines] == [0, 2, 4]
    assert summary["model"] == model_folder.name and "overlay.mp4" not in summary["files"]


def test_a_damaged_video_keeps_the_frames_before_the_damage(model_folder, tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", frames=40, codec="libx264", options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(0.8 * whole.stat().st_size)])
    result = call("run", cut, "--model", model_folder, "--out", tmp_path / "out")
    assert result.exit_code == 1
    summary, lines, tensors = read_run(tmp_path / "out")
    assert summary["status"] == "damaged" and "cut.mp4" in summary["message"]
    assert 0 < len(lines) < 40 and len(lines) == len(tensors["embeddings"])
    assert count_frames(tmp_path / "out" / "overlay.mp4") == len(lines)
    assert f"after frame {lines[-1]['index']}" in result.stderr and f"{len(lines)} frames" in result.stderr


def test_frames_that_cannot_be_decoded_are_counted(model_folder, tmp_path):
    path = write_clip(tmp_path / "broken.mkv", frames=20)
    with av.open(str(path)) as container:
        packet = next(packet for packet in container.demux(video=0) if packet.pts == 1900)
    path.write_bytes(path.read_bytes().replace(bytes(packet), bytes(255 - byte for byte in bytes(packet))))
    with pytest.warns(UserWarning, match=r"broken\.mkv: 1 of its frames") as caught:
        result = call("run", path, "--model", model_folder, "--out", tmp_path / "out")
    assert result.exit_code == 0 and len(caught) == 1, result.output
    summary, lines, _ = read_run(tmp_path / "out")
    assert summary["status"] == "complete" and summary["video"]["failed_frames"] == 1
    assert len(lines) == summary["frames"] == count_frames(tmp_path / "out" / "overlay.mp4") == 19


def test_any_name_of_a_file_can_be_given(clip, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "-cam:2024-01-01T12:30\n#%03d?$a_{b$.mkv"
    os.link(clip, name)
    result = call("run", "--model", model_folder, "--out", "out:%03d", "--dense-every", 4, "--", name)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "out:%03d").iterdir())


def test_ctrl_c_keeps_the_frames_before_it(model_folder, tmp_path):
    clip = write_clip(tmp_path / "long.mp4", frames=4000, codec="mpeg4")
    out = tmp_path / "out"
    process, said = start(neuroflow, "run", clip, "--out", out, "--model", model_folder)
    # the run's own folder appears right before the first frame
    deadline = time.monotonic() + 100
    while not list(out.glob(".partial-*/overlay.mp4")) and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert said.poll(100)
    code, printed, errors = said.recv()
    assert code == 130, errors
    assert {path.name for path in out.iterdir()} == ALL_FILES
    summary, lines, tensors = read_run(out)
    assert summary["status"] == "interrupted" and 0 < summary["frames"] < 4000
    assert len(lines) == len(tensors["embeddings"]) == count_frames(out / "overlay.mp4") == summary["frames"]
    assert "Ctrl-C" in errors and "Traceback" not in errors and "skip rate" in printed


def test_ctrl_c_before_the_first_frame_says_that_nothing_was_written(clip, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(neuroflow_hf.loading, "load_tower", interrupted)
    result = call("run", clip, "--model", "any", "--out", tmp_path)
    assert result.exit_code == 130 and "nothing was written" in result.stderr


def assert_clean_error(result, *words):
    """Exit code 2, and one line on stderr that holds all of `words`."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert str(word) in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "inf"], ["threshold", "finite"]),
        (["--max-age", "0"], ["max_age"]),
        (["--mode", "contxt"], ["mode", "contxt"]),
        (["--gate", "treshold=0.1"], ["treshold", "Did you mean `threshold`"]),
        (["--gate", "dilate"], ["NAME=VALUE"]),
        (["--gate", "dilate=much"], ["dilate"]),
        (["--stride", "0"], ["stride"]),
        (["--max-frames", "0"], ["max_frames"]),
        (["--dense-every", "-1"], ["dense_every"]),
        (["--resolution", "0"], ["resolution"]),
        (["--resolution", "3"], ["one patch, 4 pixels"]),
        (["--dtype", "float8"], ["float8", "bfloat16"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_values_out_of_range(clip, model_folder, tmp_path, monkeypatch, options, words):
    model = ("--model", model_folder)
    # of the default model, most are refused before it is loaded
    if options[0] not in ("--resolution", "--dense-every"):

        def load(*_, **__):
            raise AssertionError("loads the model")

        monkeypatch.setattr("neuroflow_hf.loading.load_tower", load)
        model = ()
    result = call("run", clip, *model, "--out", tmp_path / "out", *options)
    assert_clean_error(result, *words)
    assert not list(tmp_path.glob("out/*"))


def test_unusable_videos(model_folder, tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("no video in here")
    assert_clean_error(call("run", text, "--model", model_folder, "--out", tmp_path / "out"), "notes.mp4")
    assert_clean_error(call("run", tmp_path / "gone.mp4", "--model", model_folder), "gone.mp4")
    assert_clean_error(call("run", tmp_path, "--model", model_folder), tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(clip, model_folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        assert_clean_error(call("run", clip, "--model", model_folder, "--out", out), out)
    assert (tmp_path / "out").read_text() == "mine"


def test_unusable_models(clip, model_folder, tmp_path):
    assert_clean_error(call("run", clip, "--model", tmp_path / "gone", "--out", tmp_path / "out"), tmp_path / "gone")
    for name, content in (
        ("model.safetensors", b"\0" * 40),
        ("config.json", b"{"),
        ("preprocessor_config.json", b"{"),
    ):
        broken = tmp_path / name.partition(".")[0]
        broken.mkdir()
        for path in model_folder.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        (broken / name).write_bytes(content)
        assert_clean_error(call("run", clip, "--model", broken, "--out", tmp_path / "out"), broken)
    (broken / "preprocessor_config.json").unlink()
    assert_clean_error(call("run", clip, "--model", broken, "--out", tmp_path / "out"), broken, "image processor")


def test_debug_lets_the_traceback_through(tmp_path):
    result = call("run", tmp_path / "gone.mp4", "--debug")
    assert isinstance(result.exception, FileNotFoundError)


def test_gate_settings_are_parsed():
    settings = ["dilate=1", "max-age=none", "threshold=0.5", "mode=hold", "global_motion_norm=True"]
    assert parse_gate(settings) == {
        "dilate": 1,
        "max_age": None,
        "threshold": 0.5,
        "mode": "hold",
        "global_motion_norm": True,
    }


def test_the_note_names_a_baseline_that_is_as_good():
    def summary(ours, first, held=None):
        return {
            "cosine_to_dense": {"streamed": {"mean": ours}, "first_frame": {"mean": first}},
            "held_at_cost": held and {"every": 12, "cost": 0.083, "cosine": {"mean": held}},
        }

    assert baseline_note(summary(0.99, 0.95)) == ""
    assert "first frame" in baseline_note(summary(0.95, 0.96))
    assert "first frame" in baseline_note(summary(0.951, 0.95))
    assert "every 12 frames" in baseline_note(summary(0.97, 0.96, held=0.975))
    assert baseline_note(summary(0.97, 0.96, held=0.96)) == ""


def test_version_and_help():
    assert call("--version").stdout == f"neuroflow {neuroflow_hf.__version__}\n"
    assert {"run", "tune", "eval", "generate", "drift"} <= set(call("--help").stdout.split())
    printed = call("run", "--help").stdout
    for mode in MODE_NAMES:
        assert mode in printed
