"""Embedding many videos: whose rows depend on nothing beside them, survive kills, and open in other tools."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from neuroflow_hf.archive import dataset
from neuroflow_hf.archive.dataset import file_of, read_metadata
from neuroflow_hf.archive.embed import embed_videos, video_paths
from neuroflow_hf.utils.provenance import fingerprint
from neuroflow_hf.video.labels import Labels
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import VideoReader
from neuroflow_hf.vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from tests.cli.test_run import call, write_clip
from tests.processes import start

GATE = {"mode": "extrapolate", "threshold": 0.02, "keyframe_interval": 6}
FRAMES = (3, 12, 7, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four videos of different lengths, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for place, frames in enumerate(FRAMES):
        write_clip(folder / ("more" if place == 3 else "") / f"video{place}.mkv", frames, keyframe_interval=4)
    return folder


@pytest.fixture(scope="module")
def embed(vision64, folder):
    """`embed_videos` with the tiny model in float64."""

    def embed(out, videos=None, gate=GATE, **options):
        paths = video_paths([folder]) if videos is None else videos
        return embed_videos(paths, vision64, Preprocessor(resolution=24), out, gate, **options)

    return embed


def rows(out):
    """All rows of a dataset by video and frame."""
    frames = [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    found = {(row["video"], row["frame"]): row for row in frames}
    assert len(found) == len(frames)
    return found


def assert_same_rows(out, other):
    found, expected = rows(out), rows(other)
    assert found.keys() == expected.keys()
    for place, row in found.items():
        np.testing.assert_allclose(row.pop("embedding"), expected[place].pop("embedding"), rtol=1e-3, atol=1e-6)
        assert row == expected[place]


@pytest.fixture(scope="module")
def whole(embed, tmp_path_factory):
    """A dataset that was written without a stop, all videos side by side."""
    out = tmp_path_factory.mktemp("whole")
    embed(out)
    return out


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("segment_rows", [4, 256])
def test_a_row_depends_on_its_segment_alone(embed, vision64, folder, tmp_path, monkeypatch, streams, segment_rows):
    monkeypatch.setattr(dataset, "SEGMENT_ROWS", segment_rows)
    result = embed(tmp_path, streams=streams)
    assert (result.videos, result.kept, result.embedded, result.failures) == (4, 0, 4, {})
    found, seen = rows(tmp_path), 0
    for video in video_paths([folder]):
        frames = list(VideoReader(video))
        stored = pq.read_table(file_of(tmp_path, video))["frame"].to_pylist()
        assert stored == [frame.index for frame in frames]
        for begin in range(0, len(frames), segment_rows):
            part = frames[begin : begin + segment_rows]
            pixel_values = [Preprocessor(resolution=24)(frame.image, torch.float64) for frame in part]
            with torch.no_grad():
                for frame, output in zip(part, vision64.stream_frames(pixel_values, **GATE), strict=True):
                    row = found[str(video), frame.index]
                    expected = output.pooler_output[0].half().tolist()
                    np.testing.assert_allclose(row["embedding"], expected, rtol=1e-3, atol=1e-6)
                    assert row["cost"] == output.cost.item() and row["keyframe"] == bool(output.active_mask.all())
                    assert row["seconds"] == frame.time
                    seen += 1
    assert seen == len(found) == sum(FRAMES) and {row["keyframe"] for row in found.values()} == {True, False}


def test_after_a_segment_with_an_error_come_no_more_rows(embed, folder, tmp_path, monkeypatch):
    def broken(self, segment):
        for frame in whole(self, segment):
            if segment.begin is not None and frame.index == 2:
                raise ValueError(f"broken at {frame.time}")
            yield frame

    whole = VideoReader.read
    monkeypatch.setattr(VideoReader, "read", broken)
    monkeypatch.setattr(dataset, "SEGMENT_ROWS", 4)
    result = embed(tmp_path, [folder / "video1.mkv"])
    assert result.failures == {str(folder / "video1.mkv"): "broken at 0.6"}  # the first of two
    assert sorted(frame for _, frame in rows(tmp_path)) == list(range(6))


def embed_and_die(folder, out, steps):
    """Embed, and be killed after some steps."""
    torch.manual_seed(0)
    from tests.conftest import TINY_VISION

    model = NeuroFlowSiglipVisionModel(NeuroFlowSiglipVisionModel.config_class(**TINY_VISION)).eval()
    left = iter(range(steps))

    def on_step(*_):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    videos = video_paths([folder])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "SEGMENT_ROWS", 4)
        embed_videos(videos, model, Preprocessor(resolution=24), out, GATE, streams=2, on_step=on_step)


def test_after_kills_nothing_is_lost_and_nothing_twice(folder, tmp_path):
    kept = 0
    for steps in (12, 18):
        process, _ = start(embed_and_die, folder, tmp_path / "out", steps)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        files = list((tmp_path / "out").glob("*.parquet"))
        assert all(len(pq.read_table(file)) in FRAMES for file in files) and len(files) >= kept
        kept = len(files)
    assert 0 < kept < len(FRAMES) and list((tmp_path / "out").glob(".*.part"))
    embed_and_die(folder, tmp_path / "out", 1000)
    embed_and_die(folder, tmp_path / "whole", 1000)
    assert_same_rows(tmp_path / "out", tmp_path / "whole")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".parquet"}


def test_ctrl_c_keeps_what_is_finished(embed, whole, tmp_path):
    steps = iter(range(20))
    result = embed(tmp_path, on_step=lambda *_: next(steps, None) is None and signal.raise_signal(signal.SIGINT))
    assert result.interrupted and 0 < result.embedded < 4
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}
    again = embed(tmp_path)
    assert (again.kept, again.embedded, again.interrupted) == (result.embedded, 4 - result.embedded, False)
    assert_same_rows(tmp_path, whole)


def test_damaged_videos_are_listed_until_they_are_whole(embed, folder, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(folder, videos)
    cut, text = videos / "video1.mkv", videos / "video0.mkv"
    whole = {path: path.read_bytes() for path in (cut, text)}
    cut.write_bytes(whole[cut][: len(whole[cut]) // 2])
    text.write_text("no video")
    for _ in range(2):  # again, nothing changes
        result = embed(out, video_paths([videos]))
        assert {Path(video) for video in result.failures} == {cut, text}
        lines = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
        assert {line["video"]: line["reason"] for line in lines} == result.failures
        assert "is cut short" in result.failures[str(cut)] and "not a video" in result.failures[str(text)]
        assert not file_of(out, text).exists() and 0 < len(pq.read_table(file_of(out, cut))) < FRAMES[1]
    assert result.kept == 3
    for path, content in whole.items():
        path.write_bytes(content)
    assert embed(out, video_paths([videos])).embedded == 2
    assert len(rows(out)) == sum(FRAMES) and not (out / "failures.jsonl").exists()


@pytest.mark.parametrize("streams", [1, 2])
def test_videos_that_change_or_vanish_meanwhile_are_listed_and_the_rest_goes_on(embed, tmp_path, streams):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name, frames in (("a", 60), ("b", 50), ("c", 3), ("d", 3)):
        write_clip(videos / f"{name}.mkv", frames)
    paths = dict(zip("abcd", video_paths([videos]), strict=True))
    seen = set()

    def on_step(what, *_):
        name = what.partition(", ")[2][0]
        if name not in seen:  # each is touched when its first frame, or that of another one, is embedded
            seen.add(name)
            if name == "a":
                os.utime(paths["a"], (1, 1))
                paths["c"].unlink()
            elif name == "b":
                paths["b"].unlink()

    result = embed(out, list(paths.values()), streams=streams, on_step=on_step)
    reasons = {Path(video).stem: reason for video, reason in result.failures.items()}
    assert reasons.keys() == {"a", "b", "c"} and result.embedded == 2 and not result.interrupted
    assert "changed while it was read" in reasons["a"] and "was deleted while it was read" in reasons["b"]
    assert "There is no video file" in reasons["c"] or "No such file" in reasons["c"]
    assert not file_of(out, paths["a"]).exists() and len(pq.read_table(file_of(out, paths["b"]))) == 50
    assert {path.suffix for path in out.iterdir()} == {".parquet", ".jsonl"}
    again = embed(out, [paths["a"], paths["d"]])
    assert (again.kept, again.embedded) == (1, 1) and len(pq.read_table(file_of(out, paths["a"]))) == 60
    assert {Path(video).stem for video in again.failures} == {"b", "c"}


def test_a_dataset_is_of_one_kind(embed, whole, tmp_path):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(ValueError, match=r"other settings \(gate\)"):
        embed(whole, gate=GATE | {"threshold": 0.5})
    with pytest.raises(ValueError, match=r"other settings \(every\)"):
        embed(whole, every=1.0)
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    (tmp_path / "other.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="is not a file of"):
        embed(tmp_path)


def test_the_files_say_where_they_come_from(whole, vision64, folder):
    video = video_paths([folder])[0]
    metadata = read_metadata(file_of(whole, video))
    assert metadata["weights"] == fingerprint(vision64) and metadata["dtype"] == "float64"
    assert metadata["preprocessing"]["resolution"] == 24 and metadata["gate"]["threshold"] == GATE["threshold"]
    assert metadata["gate_options"] == GATE
    assert metadata["versions"]["torch"] == torch.__version__ and metadata["video"]["path"] == str(video)


def test_labels_and_long_videos(embed, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("neuroflow_hf.archive.job.ROWS", 5)  # parts of a file are written as they come
    texts = torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = Labels(("a", "b", "c"), "{}", texts, 10.0, -1.0)
    embed(tmp_path, labels=labels)
    for row in rows(tmp_path).values():
        name, confidence = labels.best(torch.tensor(row["embedding"]))
        assert row["label"] == name and row["confidence"] == pytest.approx(confidence, abs=2e-3)
    assert pq.ParquetFile(file_of(tmp_path, folder / "video1.mkv")).num_row_groups == 3


def test_videos_by_folder_pattern_and_list(folder, tmp_path):
    everything = video_paths([folder])
    assert len(everything) == 4 and video_paths([folder / "**" / "*.mkv", folder]) == everything
    assert video_paths([str(folder / "video[01].mkv")]) == [folder / "video0.mkv", folder / "video1.mkv"]
    (tmp_path / "list.txt").write_text(f"{folder / 'more'}\n\n{folder}/video2.mkv\n")
    assert video_paths([tmp_path / "list.txt"]) == [folder / "more" / "video3.mkv", folder / "video2.mkv"]
    with pytest.raises(FileNotFoundError):
        video_paths([folder / "nothing*.mp4"])


def test_other_tools_read_it(whole, tmp_path):
    expected = sorted((row["seconds"], tuple(row["embedding"])) for row in rows(whole).values())
    frame = pytest.importorskip("pandas").read_parquet(whole)
    assert sorted((row.seconds, tuple(row.embedding.tolist())) for row in frame.itertuples()) == expected
    datasets = pytest.importorskip("datasets")
    files = {"data_files": str(whole / "*.parquet"), "cache_dir": str(tmp_path)}
    loaded = datasets.load_dataset("parquet", split="train", **files)
    assert sorted((row["seconds"], tuple(row["embedding"])) for row in loaded) == expected
    query = f"select seconds, embedding from '{whole}/*.parquet' order by all"
    found = pytest.importorskip("duckdb").sql(query).fetchall()
    assert [(seconds, tuple(embedding)) for seconds, embedding in found] == expected


def test_lancedb_searches_it(whole, tmp_path):
    table = pytest.importorskip("lancedb").connect(tmp_path).create_table("frames", pq.read_table(whole))
    row = next(iter(rows(whole).values()))
    found = table.search(np.array(row["embedding"], np.float16)).limit(1).to_list()[0]
    assert found["embedding"] == row["embedding"]


def test_the_command(folder, model_folder, tmp_path):
    out, broken = tmp_path / "out", tmp_path / "broken.mp4"
    options = ("--model", model_folder, "--out", out, "--fps", 5, "--gate", "threshold=0.02")
    result = call("embed", folder, *options)
    assert result.exit_code == 0 and "4 embedded, 0 were there" in result.output, result.output
    assert sorted(row["frame"] for row in rows(out).values())[:8] == [0, 0, 0, 0, 2, 2, 2, 2]
    broken.write_text("no video")
    result = call("embed", folder, broken, *options)
    assert result.exit_code == 1 and "0 embedded, 4 were there" in result.output and "says why" in result.output
    assert call("embed", folder, *options, "--every", 1).exit_code == 2
    assert call("embed", folder, *options[:4], "--fps", 0).exit_code == 2
