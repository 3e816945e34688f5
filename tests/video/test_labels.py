"""Labels: scores as SigLIP's own, a timeline that smooths nothing, and a run that says both beside dense."""

import json
import math
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from transformers import SiglipConfig, SiglipForImageClassification, SiglipModel, SiglipTextConfig

from neuroflow_hf.loading import ModelLoadError, load_model, load_model_with_labels, load_text_model
from neuroflow_hf.utils.provenance import fingerprint
from neuroflow_hf.video.labels import check_labels, embed_labels, parse_labels, tokenize
from neuroflow_hf.video.plots import LABEL_COLOURS, plot_run
from neuroflow_hf.video.records import FrameRecord, agreement, caption_lines, label_line, percent, shortened, timeline
from neuroflow_hf.video.run_tables import timeline_rows
from tests.cli.test_run import ALL_FILES, assert_clean_error, call, count_frames, read_run
from tests.conftest import PROCESSOR, TINY_TEXT, TINY_VISION, lively
from tests.vision.test_pipelines import LABELS, PIPELINE_TEXT, make_processor

TEXT = ",".join(LABELS)


@pytest.fixture(scope="module")
def stock():
    """A tiny `SiglipModel` that tells labels apart. Do not change it."""
    torch.manual_seed(0)
    text = SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT)
    model = lively(SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_VISION)))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
        model.logit_bias.fill_(-2)
    return model


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
    """The model's checkpoint with its processor."""
    folder = tmp_path_factory.mktemp("siglip")
    stock.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds: 7 frames in the dark, 6 bright ones, 7 in the dark. The tiny model tells the two apart."""
    path = tmp_path_factory.mktemp("clip") / "lamp.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(20):
            image = np.full((48, 64, 3), 255 if 7 <= i < 13 else 0, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def image():
    """An image of the tiny model's size, so that nothing is resized; uint8 [24, 24, 3]."""
    return np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def copy_of(folder, to, without=()):
    """The files of `folder` in a new folder, some left out."""
    to.mkdir()
    for path in folder.iterdir():
        if path.name not in without:
            (to / path.name).write_bytes(path.read_bytes())
    return to


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["This is a photo of {}.", "{}"])
def test_logits_are_siglip_s(stock, folder, image, template):
    model, preprocess, tokenizer = load_text_model(folder, device="cpu")
    labels = embed_labels(model, tokenizer, LABELS, template)
    texts = tokenizer([template.format(name) for name in LABELS], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        pixel_values = preprocess(image)
        expected = stock(pixel_values=pixel_values, **texts).logits_per_image
        embedding = model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(labels.logits(embedding), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(labels.scores(embedding), expected.sigmoid(), rtol=0, atol=1e-5)
    name, score = labels.best(embedding[0])
    assert name == LABELS[expected[0].argmax()] and score == pytest.approx(expected.max().sigmoid().item(), abs=1e-5)


def test_the_tower_is_the_one_that_is_loaded_without_labels(folder):
    alone, _ = load_model(folder, device="cpu", resolution=32)
    tower, preprocess, labels = load_model_with_labels(folder, LABELS, device="cpu", resolution=32)
    assert fingerprint(tower) == fingerprint(alone) and type(tower) is type(alone) and not tower.training
    assert tower.config.name_or_path == alone.config.name_or_path == str(folder)
    assert preprocess.resolution == 32 and not labels.text_embeddings.requires_grad


def test_half_precision_gives_about_the_same(folder, image):
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        tower, preprocess, labels = load_model_with_labels(folder, LABELS, dtype=dtype, device="cpu")
        assert labels.text_embeddings.dtype == torch.float32
        with torch.no_grad():
            scores.append(labels.scores(tower(preprocess(image, dtype)).pooler_output[0]))
    torch.testing.assert_close(*scores, rtol=0, atol=0.05)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_labels_are_split_at_commas():
    assert parse_labels(" a dog,a cat , a,b") == ["a dog", "a cat", "a", "b"]
    check_labels(["a dog", "a cat"], "{}")


@pytest.mark.parametrize(
    ("names", "template", "words"),
    [
        ([], "{}", "no labels"),
        (["a dog", " "], "{}", "Label 2 of 2 is empty"),
        (["a dog", "a cat", "a dog"], "{}", "'a dog' is given twice"),
        (["a dog"], "This is a photo.", "one {} for the label"),
        (["a dog"], "{} and {}", "one {} for the label"),
    ],
)
def test_labels_that_cannot_be_used(names, template, words):
    with pytest.raises(ValueError, match=words):
        check_labels(names, template)


def test_labels_that_the_text_tower_cannot_tell_apart_or_read(folder):
    model, _, tokenizer = load_text_model(folder, device="cpu")
    with pytest.raises(ValueError, match="'cat' and 'cow' are the same to this model's tokenizer"):
        embed_labels(model, tokenizer, ["dog", "cat", "cow"])  # words it does not know
    with pytest.raises(ValueError, match="70 tokens, and the text tower reads 64"):
        embed_labels(model, tokenizer, ["dog " * 70], "{}")
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    with pytest.raises(ValueError, match="the text tower has 99"):
        embed_labels(model, tokenizer, ["word90"])


def test_checkpoints_that_read_no_text(stock, folder, model_folder, tmp_path):
    classifier = tmp_path / "classifier"
    torch.manual_seed(0)
    SiglipForImageClassification(stock.config).save_pretrained(classifier)
    (classifier / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for path, words in ((model_folder, "holds a vision tower alone"), (classifier, "no complete text tower")):
        with pytest.raises(ModelLoadError, match=rf"{words}.* Labels need a model that reads text"):
            load_text_model(path, device="cpu")
        load_model(path, device="cpu")
    bare = copy_of(folder, tmp_path / "bare", without=TOKENIZER_FILES)
    with pytest.raises(ModelLoadError, match="Cannot load a tokenizer from"):
        load_text_model(bare, device="cpu")


# --- over time -----------------------------------------------------------------------------------------------------

NAMES = ("a", "b")


def record(index, logits, dense=None, cost=0.25):
    return FrameRecord(
        index=index,
        time=index / 10,
        active=3,
        patches=12,
        cost=cost,
        milliseconds=1.0,
        embedding=torch.zeros(2),
        dense_embedding=None if dense is None else torch.zeros(2),
        dense_milliseconds=None if dense is None else 4.0,
        label_logits=torch.tensor(logits),
        dense_label_logits=None if dense is None else torch.tensor(dense),
    )


def test_the_timeline_puts_equal_labels_together_and_smooths_nothing():
    a, b = (1.0, 0.0), (-1.0, 3.0)
    stretches = timeline([record(i, logits) for i, logits in enumerate([a, (2.0, 0.0), b, a, a, a])], NAMES)
    assert [(s["label"], s["start"], s["end"], s["frames"]) for s in stretches] == [
        ("a", 0.0, 0.2, 2),
        ("b", 0.2, 0.3, 1),
        ("a", 0.3, 0.5, 3),
    ]
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1, 2, 3)]
    assert stretches[0]["confidence"] == pytest.approx((sigmoid[0] + sigmoid[1]) / 2, rel=1e-5)
    assert stretches[1]["confidence"] == pytest.approx(sigmoid[2], rel=1e-5)
    assert stretches[1]["share"] == pytest.approx(1 / (1 + math.exp(-4)), rel=1e-5)
    (one,) = timeline([record(7, a)], NAMES)
    assert one["start"] == one["end"] == 0.7 and one["frames"] == 1


def test_labels_whose_probabilities_round_to_one_are_still_ordered():
    (stretch,) = timeline([record(0, (60.0, 90.0))], NAMES)
    assert stretch["label"] == "b" and stretch["confidence"] == 1


def test_agreement_counts_the_stream_and_the_baselines():
    a, b = (1.0, 0.0), (0.0, 1.0)
    # dense says a, b, b, a on frames 0, 2, 4, 6; the stream a, b, a, a
    streamed, dense = [a, a, b, b, a, a, a, a], [a, None, b, None, b, None, a, None]
    records = [record(i, ours, theirs) for i, (ours, theirs) in enumerate(zip(streamed, dense, strict=True))]
    assert agreement(records, cost=0.25) == {
        "compared_frames": 3,
        "streamed": 2,
        "first_frame": 1,
        "held_at_cost": {"every": 4, "cost": 0.25, "compared_frames": 2, "agreed": 0},
    }
    alone = agreement(records[:1], cost=0.25)
    assert alone["compared_frames"] == alone["streamed"] == 0 and alone["held_at_cost"] is None
    assert agreement(records[1:2], cost=0.25)["compared_frames"] == 0


def test_a_frame_s_line_and_caption():
    line = label_line(record(0, (0.0, 2.0), dense=(1.0, 0.0)), ("a dog", "a cat"))
    assert (line["label"], line["dense_label"]) == ("a cat", "a dog")
    assert line["label_scores"] == pytest.approx({"a dog": 0.5, "a cat": 0.880797}, abs=1e-6)
    assert line["confidence"] == line["label_scores"]["a cat"] == line["share"]
    assert "dense_label" not in label_line(record(0, (0.0, 2.0)), NAMES)
    assert caption_lines(record(0, (0.0, 2.0)), NAMES)[1] == "label b 88.1%"


def test_small_probabilities_keep_their_digits_and_long_labels_their_beginning():
    assert [percent(value) for value in (1.0, 0.881, 0.01, 0.0042, 0.00003)] == [
        "100.0%",
        "88.1%",
        "1.0%",
        "0.42%",
        "<0.01%",
    ]
    assert shortened("short", 8) == "short" and shortened("much too long", 8) == "much..."


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compared", [True, False])
def test_the_plot_has_a_panel_for_labels_only_if_there_are_some(compared):
    scores = torch.tensor([(0.1, 0.01), (0.2, 0.02), (0.3, 0.001)])
    records = [record(i, row, dense=row if compared else None) for i, row in enumerate(scores.logit().tolist())]
    assert len(plot_run(records, "title").axes) == 1 + compared
    figure = plot_run(records, "title", ["costs $5", "_"])
    assert len(figure.axes) == 2 + compared
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [r"costs \$5", " _"]
    assert figure.axes[-1].get_ylim() == pytest.approx((0, 0.315))


def test_of_many_labels_the_highest_are_drawn():
    records = [record(i, [factor * number for number in range(30)]) for i, factor in enumerate((0.1, 0.0))]
    figure = plot_run(records, "title", [f"label {i}" for i in range(30)])
    figure.canvas.draw()
    panel = figure.axes[-1]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    count = len(LABEL_COLOURS)
    assert texts == [f"label {i}" for i in range(30 - count, 30)]
    assert len(panel.lines) == count and len({line.get_color() for line in panel.lines}) == count


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(clip, folder, tmp_path_factory):
    """A run with labels: (what was printed, its folder)."""
    out = tmp_path_factory.mktemp("runs") / "labelled"
    options = ("--threshold", 0.02, "--dense-every", 4, "--device", "cpu")
    result = call("run", clip, "--model", folder, "--out", out, "--labels", TEXT, *options)
    assert result.exit_code == 0, result.output
    return result.stdout, out


def test_the_files_of_a_run_say_the_same(finished, clip, folder):
    _, out = finished
    assert {path.name for path in out.iterdir()} == ALL_FILES and count_frames(out / "overlay.mp4") == 20
    summary, lines, tensors = read_run(out)
    found = summary["labels"]
    assert found["names"] == list(LABELS) and found["template"] == "This is a photo of {}."
    tower, _, labels = load_model_with_labels(folder, LABELS, device="cpu")
    assert summary["weights"] == fingerprint(tower)
    scores = labels.scores(tensors["embeddings"])
    torch.testing.assert_close(tensors["label_scores"], scores)
    for line, row in zip(lines, scores, strict=True):
        assert list(line["label_scores"]) == list(LABELS)
        assert list(line["label_scores"].values()) == pytest.approx(row.tolist(), rel=1e-4)
        assert line["label"] == LABELS[row.argmax()] and line["confidence"] == line["label_scores"][line["label"]]
        assert ("dense_label" in line) == ("cosine_to_dense" in line)
    assert [(s["label"], s["start"], s["end"], s["frames"]) for s in found["timeline"]] == [
        ("dog", 0.0, 0.7, 7),
        ("red circle", 0.7, 1.3, 6),
        ("dog", 1.3, 1.9, 7),
    ]
    told = [stretch["label"] for stretch in found["timeline"] for _ in range(stretch["frames"])]
    assert told == [line["label"] for line in lines]
    dense = labels.logits(tensors["dense_embeddings"]).argmax(-1)
    streamed = labels.logits(tensors["embeddings"])[::4].argmax(-1)
    counted = found["agreement"]
    assert counted["compared_frames"] == 4 and counted["streamed"] == int((dense == streamed)[1:].sum()) == 4
    assert counted["first_frame"] == int((dense[1:] == dense[0]).sum()) == 2


def test_what_is_printed_is_in_the_summary(finished):
    printed, out = finished
    found = read_run(out)[0]["labels"]
    for stretch in found["timeline"][:20]:
        expected = (
            stretch["label"],
            f"{stretch['start']:.1f} to {stretch['end']:.1f}",
            percent(stretch["confidence"]),
        )
        assert any(all(word in line for word in expected) for line in printed.splitlines())
    counted = found["agreement"]
    assert f"{counted['streamed']} of {counted['compared_frames']}" in printed
    for words in ("best label", "share among 3", "same label", "baseline: first frame repeated"):
        assert words in printed


def test_a_template_of_one_s_own_and_no_comparison(clip, folder, tmp_path):
    options = ("--labels", "dog", "--template", "a red {}", "--max-frames", 3, "--dense-every", 0, "--device", "cpu")
    result = call("run", clip, "--model", folder, "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    found = read_run(tmp_path)[0]["labels"]
    assert found["template"] == "a red {}" and found["agreement"]["compared_frames"] == 0
    (stretch,) = found["timeline"]
    assert (stretch["label"], stretch["frames"], stretch["share"]) == ("dog", 3, 1)
    assert "same label" not in result.stdout


def test_a_long_timeline_says_where_the_rest_is(clip, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("neuroflow_hf.cli.run.MOST_STRETCHES", 1)
    options = ("--labels", TEXT, "--no-overlay", "--device", "cpu")
    result = call("run", clip, "--model", folder, "--out", tmp_path, *options)
    assert len(read_run(tmp_path)[0]["labels"]["timeline"]) == 3
    assert "and 2 more" in result.stdout and f"{tmp_path / 'summary.json'}" in result.stdout.replace("\n", "")
    monkeypatch.undo()
    stretch = {"start": 0.0, "end": 0.1, "frames": 1, "label": "[bold]", "confidence": 0.5, "share": 0.5}
    _, rows = timeline_rows({"names": ["[bold]"], "timeline": [stretch] * 30})
    assert rows == [["[bold]", "0.0 to 0.1", "1", "50.0%", "50.0%"]] * 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "dog,,square"], ["Label 2 of 3 is empty"]),
        (["--labels", "dog", "--template", ""], ["template", "{}"]),
        (["--template", "a photo of {}"], ["--labels"]),
        (["--labels", "cat, cow"], ["'cat' and 'cow' are the same"]),
    ],
)
def test_labels_out_of_order_are_one_line(clip, folder, tmp_path, options, words):
    result = call("run", clip, "--model", folder, "--out", tmp_path / "out", *options)
    assert_clean_error(result, *words)
    assert not list(tmp_path.glob("out/*"))


def test_without_the_checkout_a_model_must_be_named(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("neuroflow_hf.loading.EMBEDDED_MODEL", tmp_path / "none")
    assert_clean_error(call("run", clip, "--out", tmp_path / "out", "--labels", TEXT), "checkout", "--model")


class GemmaTokenizerOfATest:
    """Keeps capitals, as Gemma's tokenizer does, which SigLIP 2 checkpoints come with."""

    def __call__(self, texts, **_):
        return {"input_ids": [[1 + ord(letter) % 50 for letter in text.ljust(4)[:4]] for text in texts]}


class TokenizerOfATest:
    """Another one that keeps capitals."""

    __call__ = GemmaTokenizerOfATest.__call__


def test_texts_for_siglip_2_are_lower_cased_and_others_are_not():
    config = SimpleNamespace(max_position_embeddings=4, vocab_size=60)
    capitals, lower = (tokenize(GemmaTokenizerOfATest(), [text], config)["input_ids"] for text in ("A Dog", "a dog"))
    assert torch.equal(capitals, lower)
    capitals, lower = (tokenize(TokenizerOfATest(), [text], config)["input_ids"] for text in ("A Dog", "a dog"))
    assert not torch.equal(capitals, lower)
