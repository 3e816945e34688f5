"""Search: held by a naive reference; what a query is refused for; the command."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig

from neuroflow_hf.archive.dataset import file_of, frame_schema, read_metadata
from neuroflow_hf.archive.index import FOLDER, open_index
from neuroflow_hf.archive.query import image_query, text_query
from neuroflow_hf.archive.search import BLOCK, find_moments, search_index, similarities
from neuroflow_hf.archive.sheet import clock
from neuroflow_hf.video.overlay import fitted
from neuroflow_hf.video.reader import VideoReader, frame_at
from tests.cli.test_run import call, write_clip
from tests.conftest import PROCESSOR, TINY_TEXT, TINY_VISION, lively, make_stock_tower
from tests.vision.test_pipelines import PIPELINE_TEXT, make_processor

# --- the search itself ---------------------------------------------------------------------------------------------


def naive_moments(scores, lengths, seconds, count, gap):
    """`find_moments`, frame by frame: [(video, first, last, best, score)]."""
    rows = [(video, row) for video, length in enumerate(lengths) for row in range(length)]
    score = dict(zip(rows, scores, strict=True))
    median = sorted(scores)[(len(scores) - 1) // 2]
    found, free = [], set(rows)
    while free and len(found) < count:
        video, best = max(sorted(free), key=lambda row: score[row])
        if score[video, best] < median:
            break
        level, ends = (score[video, best] + median) / 2, []
        for step in (-1, 1):
            row = end = best
            while (video, row + step) in free:
                row += step
                near = row == end + step or abs(seconds[video][row] - seconds[video][end]) < gap
                if score[video, row] >= level and near:
                    end = row
            ends.append(end)
        found.append((video, ends[0], ends[1], best, score[video, best]))
        for row in range(lengths[video]):
            far = seconds[video][row] <= seconds[video][ends[0]] - gap
            far = far or seconds[video][row] >= seconds[video][ends[1]] + gap
            if not far or ends[0] <= row <= ends[1]:
                free.discard((video, row))
    return found


@given(
    st.lists(st.lists(st.integers(-8, 8), min_size=1, max_size=14), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=14, max_size=14),
    st.sampled_from([0, 1, 2, 5]),
    st.integers(1, 6),
)
def test_moments_are_those_of_the_naive_reference(videos, steps, gap, count):
    seconds = [torch.tensor(steps[: len(video)]).cumsum(0).double() for video in videos]
    scores, lengths = [value / 4 for video in videos for value in video], [len(video) for video in videos]
    found = find_moments(torch.tensor(scores), lengths, lambda video: seconds[video], count, gap)
    expected = naive_moments(scores, lengths, [times.tolist() for times in seconds], count, gap)
    assert [(moment.video, moment.first, moment.last, moment.best, moment.score) for moment in found] == expected


def test_similarities_are_cosines_of_every_row():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, 24, generator=generator).half() for rows in (1, BLOCK + 3, 2 * BLOCK, 5)]
    parts[3][2] = 0
    query = torch.randn(24, generator=generator)
    wanted = query.numpy()
    expected = [
        np.dot(row, wanted) / max(np.linalg.norm(row), 1e-12) for part in parts for row in part.double().numpy()
    ]
    expected = np.array(expected) / query.double().norm().item()
    np.testing.assert_allclose(similarities(parts, 7 * query).numpy(), expected, atol=1e-6)


def test_count_and_gap_out_of_range():
    for options in ({"count": 0}, {"gap": -1.0}, {"gap": float("nan")}):
        with pytest.raises(ValueError, match="expected a number of"):
            find_moments(torch.zeros(1), [1], lambda _: torch.zeros(1), **options)


# --- datasets ------------------------------------------------------------------------------------------------------


def save_siglip(folder, seed=0):
    """A tiny SigLIP with its processor."""
    torch.manual_seed(seed)
    config = SiglipConfig(text_config=SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT), vision_config=TINY_VISION)
    model = lively(SiglipModel(config))
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, two videos, and their dataset, which the command made."""
    world = tmp_path_factory.mktemp("world")
    save_siglip(world / "siglip")
    (world / "videos").mkdir()
    write_clip(world / "videos" / "long.mp4", 40, codec="libx264", options={"movflags": "faststart"})
    write_clip(world / "videos" / "short.mkv", 9)
    result = call("embed", world / "videos", "--out", world / "dataset", "--model", world / "siglip", "--fps", 5)
    assert result.exit_code == 0, result.output
    return world


@pytest.fixture
def dataset(world, tmp_path):
    """A copy of the dataset."""
    return shutil.copytree(world / "dataset", tmp_path / "dataset", ignore=shutil.ignore_patterns(FOLDER))


def embeddings_of(dataset):
    """All embeddings of a dataset in order of the files, [rows, D]."""
    return torch.tensor([row for file in sorted(dataset.glob("*.parquet")) for row in parquet_rows(file)])


def parquet_rows(file):
    return pq.read_table(file)["embedding"].to_pylist()


def test_the_index_is_what_the_files_hold(dataset):
    steps, open_files = [], len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    index = open_index(dataset, on_step=lambda *step: steps.append(step))
    assert open_files in (None, len(os.listdir("/proc/self/fd")))  # an archive has more files than may be open
    assert len(pq.read_table(dataset)) == sum(index.lengths)  # Parquet's readers do not see the copies
    assert torch.equal(torch.cat(index.embeddings), embeddings_of(dataset).half()) and len(steps) == 2
    before = {path: path.stat().st_mtime_ns for path in (dataset / FOLDER).iterdir()}
    open_index(dataset, on_step=lambda *step: steps.append(step))
    assert len(steps) == 2 and {path: path.stat().st_mtime_ns for path in (dataset / FOLDER).iterdir()} == before
    file = sorted(dataset.glob("*.parquet"))[1]
    table = pq.read_table(file)
    pq.write_table(table.slice(2), file)  # changed
    index = open_index(dataset)
    assert index.lengths[1] == len(table) - 2 and len(list((dataset / FOLDER).iterdir())) == 2
    assert torch.equal(torch.cat(index.embeddings), embeddings_of(dataset).half())


def test_datasets_that_cannot_be_searched(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_index(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet file"):
        open_index(tmp_path / "empty")
    file = next(dataset.glob("*.parquet"))
    pq.write_table(pq.read_table(file).slice(0, 0), tmp_path / "empty" / "no_rows.parquet")
    with pytest.raises(ValueError, match="holds no frame"):
        open_index(tmp_path / "empty")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "empty" / "no_rows.parquet")
    with pytest.raises(ValueError, match="is not a file of"):
        open_index(tmp_path / "empty")
    other = read_metadata(file) | {"weights": "another", "model": "other/siglip"}
    pq.write_table(pq.read_table(file).cast(frame_schema(32, False, other)), dataset / "zzz.parquet")
    with pytest.raises(ValueError, match=r"several checkpoints, .*siglip and other/siglip \(zzz\.parquet\)"):
        open_index(dataset)


def test_a_frame_as_query_is_found_where_it_is(world):
    index = open_index(world / "dataset")
    for place, file in enumerate(index.files):
        row = pq.read_table(file).to_pylist()[3]
        moment = search_index(index, index.embeddings[place][3], count=1, gap=0)[0]
        assert (moment["video"], moment["frame"], moment["score"]) == (row["video"], row["frame"], pytest.approx(1))
        assert moment["best"] == pytest.approx(row["seconds"]) and moment["start"] <= moment["best"] <= moment["end"]


def test_texts_and_pictures_are_embedded_as_stock_transformers_does(world, tmp_path):
    model, processor = SiglipModel.from_pretrained(world / "siglip").eval(), make_processor()
    metadata = open_index(world / "dataset").metadata
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    image.save(tmp_path / "picture.png")
    inputs = processor(text=["This is a photo of dog."], images=image, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    text = text_query(metadata, "dog")
    torch.testing.assert_close(text.embedding, output.text_embeds[0])
    cosine = (output.text_embeds @ output.image_embeds.T).item()
    assert text.confidence(cosine) == pytest.approx(output.logits_per_image.sigmoid().item(), rel=1e-4)
    picture = image_query(metadata, tmp_path / "picture.png")
    assert picture.confidence is None
    embedding = torch.nn.functional.normalize(picture.embedding, dim=0)
    torch.testing.assert_close(embedding, output.image_embeds[0], atol=1e-4, rtol=1e-3)


def test_a_picture_is_looked_for_in_a_dataset_of_another_tower(tmp_path):
    stock = make_stock_tower("dinov2")
    stock.save_pretrained(tmp_path / "dinov2")
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    clip = write_clip(tmp_path / "clip.mkv", 3)
    result = call("embed", clip, "--out", tmp_path / "dataset", "--model", tmp_path / "dinov2")
    assert result.exit_code == 0, result.output
    index = open_index(tmp_path / "dataset")
    Image.fromarray(next(iter(VideoReader(clip))).image).save(tmp_path / "first.png")
    found = search_index(index, image_query(index.metadata, tmp_path / "first.png").embedding, count=1, gap=0)
    assert found[0]["frame"] == 0 and found[0]["score"] == pytest.approx(1, abs=1e-4)


def test_other_checkpoints_are_refused_by_name(world, tmp_path):
    metadata = open_index(world / "dataset").metadata
    save_siglip(tmp_path / "other", seed=1)
    Image.new("RGB", (30, 20)).save(tmp_path / "picture.png")
    for query in (
        lambda **how: text_query(metadata, "dog", **how),
        lambda **how: image_query(metadata, tmp_path / "picture.png", **how),
    ):
        with pytest.raises(ValueError, match=r"other .* is another checkpoint than the dataset's, .*siglip"):
            query(source=str(tmp_path / "other"))
        assert query(source=str(world / "siglip")).embedding.shape == (32,)


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "ffv1"), ("a.avi", "mpeg4")])
def test_a_frame_is_found_by_its_time(tmp_path, name, codec):
    path = write_clip(tmp_path / name, 30, codec)
    frames = list(VideoReader(path))
    for place in (0, 1, 17, 29):
        frame = frame_at(path, place, frames[place].time)
        assert np.array_equal(frame.image, frames[place].image) and frame.index == place
    assert np.array_equal(frame_at(path, 3, 0.15).image, frames[3].image)  # a wrong time


def test_pictures_of_any_shape_fit():
    for shape in ((10, 10), (500, 20), (20, 500)):
        picture = fitted(np.full((*shape, 3), 200, np.uint8), 90, 160)
        assert picture.shape == (90, 160, 3) and (picture == 200).any()
    assert clock(3723.46) == "1:02:03.5" and clock(59.96) == "0:01:00.0"


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_json_and_a_sheet(world, tmp_path):
    sheet, query = tmp_path / "sheet.jpg", ("search", world / "dataset", "dog", "--gap", 0.5, "--count", 3)
    result = call(*query, "--out", sheet)
    assert result.exit_code == 0, result.output
    assert "25 frames of 2 videos" in result.output and "confidence" in result.output
    with Image.open(sheet) as picture:
        assert picture.format == "JPEG" and picture.width > 480
    result = call(*query, "--json")
    found = json.loads(result.stdout)
    assert found["text"] == "dog" and 1 <= len(found["moments"]) <= 3
    scores = [moment["score"] for moment in found["moments"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= moment["confidence"] <= 1 and Path(moment["video"]).exists() for moment in found["moments"])
    picture = tmp_path / "picture.png"
    Image.fromarray(next(iter(VideoReader(world / "videos" / "short.mkv"))).image).save(picture)
    result = call("search", world / "dataset", "--image", picture, "--json")
    moment = json.loads(result.stdout)["moments"][0]
    assert Path(moment["video"]).name == "short.mkv" and moment["score"] > 0.99 and "confidence" not in moment


def assert_refused(words, *arguments):
    result = call("search", *arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.output
    assert result.stderr.startswith("Error: ")


def test_what_the_command_refuses(world, tmp_path):
    dataset, text = world / "dataset", tmp_path / "a.txt"
    text.write_text("no picture")
    assert_refused("one of them", dataset)
    assert_refused("one of them", dataset, "dog", "--image", text)
    assert_refused("The text is empty", dataset, " ")
    assert_refused("is not a picture", dataset, "--image", text)
    assert_refused("There is no picture", dataset, "--image", tmp_path / "none.png")
    assert_refused("no name of a picture file", dataset, "dog", "--out", tmp_path / "a.parquet")
    assert_refused("no .parquet file", tmp_path, "dog")
    assert_refused("--template needs a text to search for", dataset, "--image", text, "--template", "{}")


def test_a_checkpoint_without_text_is_named(world, model_folder, tmp_path):
    options = ("--out", tmp_path / "dataset", "--model", model_folder)
    assert call("embed", world / "videos" / "short.mkv", *options).exit_code == 0
    assert_refused("reads no text, so texts cannot be looked for", tmp_path / "dataset", "dog")
    Image.new("RGB", (30, 20)).save(tmp_path / "picture.png")
    assert call("search", tmp_path / "dataset", "--image", tmp_path / "picture.png").exit_code == 0


def test_videos_that_are_gone_or_changed_have_no_picture(world, tmp_path):
    video, dataset = shutil.copy(world / "videos" / "short.mkv", tmp_path / "a.mkv"), tmp_path / "dataset"
    assert call("embed", video, "--out", dataset, "--model", world / "siglip").exit_code == 0
    assert file_of(dataset, video).exists()
    query = ("search", dataset, "dog", "--out", tmp_path / "sheet.jpg")
    write_clip(video, 12)
    result = call(*query)
    assert result.exit_code == 2 and "a.mkv changed since it was embedded" in result.stderr
    video.unlink()
    result = call(*query)
    assert result.exit_code == 2 and "is no longer there" in result.stderr and "9 frames of 1" in result.stdout
    assert not (tmp_path / "sheet.jpg").exists()
