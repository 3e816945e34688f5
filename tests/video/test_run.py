import copy
import json

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open

from neuroflow_hf.loading import ModelLoadError, load_model
from neuroflow_hf.utils.provenance import fingerprint
from neuroflow_hf.video.overlay import (
    ACCENT,
    OverlayWriter,
    captioned,
    contact_sheet,
    mark_encoded,
    marked_picture,
    overlay_frame,
    overlay_size,
    patch_pixels,
)
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import VideoReader, ffmpeg_name
from neuroflow_hf.video.records import FrameRecord, compare_with_dense, figures, held_at_cost
from neuroflow_hf.video.run import SHEET_CELLS, RunPictures, run_video, sampling_step
from tests.cli.test_run import write_clip
from tests.conftest import PROCESSOR


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "square.mkv", frames=12)


@pytest.fixture
def preprocess():
    return Preprocessor(resolution=24)


def record(index, active=3, embedding=(1.0, 0.0), dense=None, milliseconds=1.0):
    return FrameRecord(
        index=index,
        time=index / 10,
        active=active,
        patches=12,
        cost=active / 12,
        milliseconds=milliseconds,
        embedding=torch.tensor(embedding),
        dense_embedding=None if dense is None else torch.tensor(dense),
        dense_milliseconds=None if dense is None else 4.0,
    )


# --- figures -------------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_first_dense_sample():
    records = [
        record(0, dense=(1.0, 0.0)),
        record(1),
        record(2, dense=(1.0, 1.0), embedding=(2.0, 2.0)),
        record(3),
        record(4, dense=(0.0, 1.0), embedding=(1.0, 1.0)),
    ]
    compared = compare_with_dense(records)
    half = 0.5**0.5
    assert compared["streamed"] == pytest.approx([1, 1, half])
    assert compared["first_frame"] == pytest.approx([1, half, 0])


def test_the_baseline_at_the_stream_s_cost_is_compared_at_its_oldest():
    # sampled every second frame; the dense embedding turns by a right angle on the last sample
    samples = [(1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    records = [record(index, dense=samples[index // 2] if index % 2 == 0 else None) for index in range(8)]
    baseline = held_at_cost(records, cost=0.3)
    assert (baseline["every"], baseline["cost"]) == (4, 0.25)
    assert baseline["cosine"]["mean"] == pytest.approx(0.5)
    assert baseline["cosine"]["min"] == pytest.approx(0)
    assert held_at_cost(records, cost=0.01) is None  # the video is shorter than the hold
    assert held_at_cost(records[:2], cost=0.3) is None


def test_figures_count_keyframes_and_leave_the_first_sample_out_of_the_fidelity():
    records = [
        record(0, active=12, dense=(1.0, 0.0)),
        record(1),
        record(2, dense=(0.0, 1.0), milliseconds=2.0),
        record(3, active=12),
    ]
    found = figures(records)
    assert (found["frames"], found["keyframes"], found["sampled_frames"], found["compared_frames"]) == (4, 2, 2, 1)
    assert found["compared_keyframes"] == 0
    assert found["skip_rate"]["mean"] == pytest.approx(0.375)
    assert found["cost"]["max"] == 1
    assert found["speed_up"] == {"median": 2, "mean": 3.2}
    assert found["cosine_to_dense"]["streamed"]["mean"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("frames", "interval", "step"),
    [(100, None, 4), (3, None, 1), (100, 12, 5), (100, 1, 4), (2500, 50, 101)],
)
def test_samples_do_not_fall_into_step_with_keyframes(frames, interval, step):
    assert sampling_step(frames, interval) == step


# --- the job -------------------------------------------------------------------------------------------------------


def test_a_run_gives_what_the_model_gives(clip, vision, preprocess, tmp_path):
    seen = []
    summary = run_video(
        VideoReader(clip), vision, preprocess, tmp_path, {"threshold": 0.02}, dense_every=3, on_frame=seen.append
    )
    stream = vision.new_stream(threshold=0.02)
    with torch.no_grad():
        outputs = [vision(pixel_values=preprocess(frame.image), stream=stream) for frame in VideoReader(clip)]
        dense = [vision(pixel_values=preprocess(frame.image)).pooler_output[0] for frame in VideoReader(clip)]
    with safe_open(tmp_path / "embeddings.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    torch.testing.assert_close(stored["embeddings"], torch.cat([output.pooler_output for output in outputs]))
    torch.testing.assert_close(stored["dense_embeddings"], torch.stack(dense[::3]))
    assert stored["frame_index"].tolist() == list(range(12)) and stored["dense_frame_index"].tolist() == [0, 3, 6, 9]
    assert [record.active for record in seen] == [int(output.active_mask.sum()) for output in outputs]
    # the clip's square moves and its ground does not
    assert seen[0].keyframe and all(0 < record.active < 20 for record in seen[1:])
    assert summary["status"] == "complete" and summary["keyframes"] == 1
    assert set(summary["files"]) == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("mode", ["dense", "hold", "eliminate", "context"])
def test_modes_run_at_another_resolution(clip, vision, tmp_path, mode):
    reader = VideoReader(clip, max_frames=3)
    # 30 is no multiple of the 4-pixel patches: two pixels on the right and below are not seen
    summary = run_video(reader, vision, Preprocessor(resolution=30), tmp_path, {"mode": mode}, overlay=False)
    assert summary["grid"] == [7, 7] and summary["frames"] == 3


def test_one_frame_and_no_comparison(clip, vision, preprocess, tmp_path):
    one = run_video(VideoReader(clip, max_frames=1), vision, preprocess, tmp_path / "one", overlay=False)
    assert one["compared_frames"] == 0
    none = run_video(VideoReader(clip), vision, preprocess, tmp_path / "none", dense_every=0, overlay=False)
    assert none["sampled_frames"] == 0
    assert all("cosine_to_dense" not in line for line in (tmp_path / "none" / "frames.jsonl").read_text().splitlines())


def test_files_of_an_earlier_run_are_replaced_and_others_kept(clip, vision, preprocess, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    run_video(VideoReader(clip), vision, preprocess, tmp_path)
    run_video(VideoReader(clip, max_frames=2), vision, preprocess, tmp_path, overlay=False)
    assert not (tmp_path / "overlay.mp4").exists()
    assert len((tmp_path / "frames.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "note.txt").read_text() == "mine"


# --- loading -------------------------------------------------------------------------------------------------------


def test_stock_checkpoints_load_with_their_text_tower(stock_folder, tmp_path):
    for path in stock_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model, preprocess = load_model(tmp_path, torch.bfloat16, "cpu", resolution=32)
    assert model.dtype == torch.bfloat16 and not model.training
    assert preprocess.resolution == 32


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **tiny)).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="weights are missing"):
        load_model(tmp_path)


def test_the_fingerprint_tells_checkpoints_apart(stock_vision, vision):
    other = copy.deepcopy(stock_vision)
    assert fingerprint(other) == fingerprint(stock_vision) == fingerprint(vision)
    with torch.no_grad():
        other.head.probe[0, 0, 0] += 1
    assert fingerprint(other) != fingerprint(stock_vision)
    assert len(fingerprint(other.bfloat16())) == 16


# --- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(60, 60), (61, 83), (480, 270)])
def test_the_overlay_marks_exactly_the_encoded_patches(height, width):
    generator = np.random.default_rng(0)
    image = generator.integers(60, 256, (height, width, 3), dtype=np.uint8)
    original = image.copy()
    mask = generator.random((6, 5)) < 0.4
    drawn = mark_encoded(image, mask)
    rows = np.arange(height) * 6 // height
    columns = np.arange(width) * 5 // width
    # sides that are no multiple of the grid may round a boundary by one pixel
    sure = ~np.isin(np.arange(height), np.round(np.arange(7) * height / 6).astype(int).repeat(3) + [-1, 0, 1] * 7)
    sure_columns = ~np.isin(
        np.arange(width), np.round(np.arange(6) * width / 5).astype(int).repeat(3) + [-1, 0, 1] * 6
    )
    expected = mask[rows][:, columns]
    for value in (True, False):
        inside = (expected == value) & sure[:, None] & sure_columns[None, :]
        same = (drawn == image).all(-1) | (drawn == ACCENT).all(-1)
        assert (same[inside] == value).all()
    np.testing.assert_array_equal(image, original)


def test_reused_patches_are_grey_and_darker():
    image = np.full((40, 40, 3), (200, 100, 50), dtype=np.uint8)
    drawn = mark_encoded(image, np.zeros((4, 4), dtype=bool))
    assert (drawn == drawn[..., :1]).all() and drawn.max() < 70
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 2] = True
    drawn = mark_encoded(image, mask)
    np.testing.assert_array_equal(drawn[12:18, 22:28], image[12:18, 22:28])
    assert (drawn[10, 20:30] == ACCENT).all() and (drawn[9, 20:30] != ACCENT).any()


def test_what_the_patches_do_not_cover_is_never_marked():
    pixels = patch_pixels(np.ones((2, 3), dtype=bool), 20, 30, covered=0.8)
    assert pixels[:16, :24].all() and not pixels[16:].any() and not pixels[:, 24:].any()


@pytest.mark.parametrize("size", [(576, 768), (32, 48), (2160, 3840), (999, 401), (48, 1000)])
def test_overlay_frames_have_even_sides_and_one_size(size):
    picture = marked_picture(np.zeros((*size, 3), dtype=np.uint8), np.zeros((2, 2), dtype=bool))
    frames = [overlay_frame(picture, [text]) for text in ("1", "a caption that is much too long for its picture " * 3)]
    assert frames[0].shape == frames[1].shape
    assert frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0
    assert frames[0].shape[1] >= 480 and max(overlay_size(*size)) <= 960


def test_captions_are_not_clipped():
    picture = np.zeros((10, 480, 3), dtype=np.uint8)
    for line in ("short", "a line that is much too long for its picture " * 3):
        strip = captioned(picture, [line, line], size=24)[10:]
        ink = (strip.astype(int) - strip[0, 0]).any(-1)
        assert ink.any() and not ink[:, -6:].any() and not ink[:2].any() and not ink[-2:].any()
        np.testing.assert_array_equal(strip[: len(strip) // 2], strip[len(strip) // 2 :])


def test_the_contact_sheet_has_evenly_spaced_frames():
    pictures = RunPictures(None, (), 1.0, every=3)
    for value in range(60):
        pictures.add(np.full((6, 8, 3), value, dtype=np.uint8), np.ones((2, 2), bool), record(value))
    assert [caption for _, caption in pictures.cells] == [
        [f"time {value / 10:.1f} s, encoded 25.0%, cost 0.25"] for value in range(0, 60, 3)
    ]
    pictures.cells = pictures.cells[:4]
    sheets = [pictures.sheet("title", ""), contact_sheet(pictures.cells[:1], "title")]
    assert all(sheet.dtype == np.uint8 and sheet.shape[1] >= 400 for sheet in sheets)
    assert sheets[0].shape == sheets[1].shape
    last = pictures.cells[-1][0][0, 0]  # a shade of grey that only the last picture has
    counts = [(sheet == last).all(-1).sum() for sheet in sheets]
    assert counts[0] > 3 * counts[1]  # the caption has some of it
    assert contact_sheet(pictures.cells * 2, "title").shape[0] > 1.5 * sheets[0].shape[0] and SHEET_CELLS == 8


def test_an_overlay_without_frames_writes_nothing(tmp_path):
    OverlayWriter(tmp_path / "overlay.mp4").close()
    assert list(tmp_path.iterdir()) == []


def written_times(path, times):
    """When an overlay of plain pictures that are written for `times` shows them, and its length; in seconds."""
    writer = OverlayWriter(path)
    for place, seconds in enumerate(times):
        writer.write(np.full((48, 64, 3), 10 * place % 256, dtype=np.uint8), seconds)
    writer.close()
    with av.open(ffmpeg_name(path)) as container:
        stream = container.streams.video[0]
        shown = [frame.pts * stream.time_base for frame in container.decode(stream)]
        return [float(time) for time in shown], float(stream.duration * stream.time_base)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize(
    "times, length",
    [
        ([0, 0.1, 0.2, 1.2, 5.0, 5.04], 5.08),
        ([place * 1001 / 30000 for place in range(40)], 40 * 1001 / 30000),
        ([7200.5, 7200.75], 0.5),  # the overlay begins with its first picture
        ([3.0], 0.1),
        ([0, 0, 0, 0.5], 1.0),  # pictures at one time are shown one after the other
    ],
    ids=["variable", "29.97 a second", "late", "one", "the same"],
)
def test_an_overlay_shows_a_picture_when_the_video_does(tmp_path, monkeypatch, codec, times, length):
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    shown, seconds = written_times(tmp_path / "overlay.mp4", times)
    assert shown == pytest.approx([time - times[0] for time in times], abs=1e-4)
    assert shown == sorted(set(shown))
    assert seconds == pytest.approx(length, abs=2e-4)
