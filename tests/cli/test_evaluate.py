"""`neuroflow eval` on tiny models and videos: figures, what is continued, what is refused, two processes."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig

from neuroflow_hf.evaluation import recordings
from neuroflow_hf.evaluation import run as eval_run
from neuroflow_hf.evaluation.datasets import VideoSet, find_videos
from neuroflow_hf.evaluation.methods import Dense, MethodSpec, Step
from neuroflow_hf.evaluation.run import Evaluation, load_checkpoint
from neuroflow_hf.evaluation.settings import DENSE, FIRST
from tests.cli.test_run import assert_clean_error, call, write_clip
from tests.conftest import PROCESSOR, TINY_TEXT, TINY_VISION, lively
from tests.processes import call_in_two, neuroflow
from tests.vision.test_pipelines import PIPELINE_TEXT, make_processor

FRAMES = 6
FILES = {"report.json", "report.md", "fidelity_over_cost.png", "accuracy_over_cost.png", "model_card.md", "records"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SigLIP checkpoint with its processor and a card."""
    torch.manual_seed(0)
    text = SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT)
    model = lively(SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_VISION)))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    folder = tmp_path_factory.mktemp("models") / "tiny-siglip"
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nA text that stays.\n")
    return folder


@pytest.fixture(scope="module")
def vision_folder(stock_vision, tmp_path_factory):
    """A tiny vision tower alone."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vision"
    stock_vision.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos of three classes, one more that is damaged, and a file that is no video."""
    root = tmp_path_factory.mktemp("data") / "ClipSet"
    for seed, name in enumerate(("Dog/a", "Dog/b", "RedCircle/a", "RedCircle/b", "green_square/a")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(root / f"{name}.mkv", FRAMES, seed=seed)
    whole = write_clip(root / "Dog" / "cut.mkv", 30, seed=7).read_bytes()
    (root / "Dog" / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (root / "Dog" / "notes.avi").write_text("no video\n" * 20)
    return root


def run(out, videos, model, *options):
    arguments = ("eval", *([videos] if videos else []), "--model", model, "--out", out, "--device", "cpu")
    return call(*arguments, "--methods", "balanced", "--quick", *options)


def report_of(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(videos, folder, tmp_path_factory):
    """A whole evaluation with true labels: (result of the command, its folder)."""
    out = tmp_path_factory.mktemp("eval") / "out"
    result = run(out, videos, folder)
    assert result.exit_code == 0, result.output
    return result, out


def entry_of(report, name):
    return next(entry for entry in report["methods"] if entry["name"] == name)


def test_settings_of_a_configuration_come_along(videos, folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"gate": {"mode": "context", "threshold": 0.5}}))
    result = run(tmp_path / "out", videos / "Dog" / "a.mkv", folder, "--config", tmp_path)
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    entry = entry_of(report, "own settings")
    assert entry["options"]["threshold"] == 0.5 and entry["beside"] and not entry["control"]
    assert "own settings" in (tmp_path / "out" / "report.md").read_text()
    assert "own settings" in result.stdout
    missing = run(tmp_path / "out", videos / "Dog" / "a.mkv", folder, "--config", tmp_path / "none")
    assert missing.exit_code != 0 and "neuroflow tune" in missing.stderr


# --- what it gives -------------------------------------------------------------------------------------------------


def test_all_files_are_there(finished, folder):
    result, out = finished
    assert {path.name for path in out.iterdir()} == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert Image.open(out / name).format == "PNG"
    assert "Written to" in result.stdout and "Skipped 2 of 7 videos" in result.stderr
    assert not list(out.rglob("*.part"))
    assert (folder / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n\nA text that stays.\n"


def test_the_report_says_what_was_run(finished):
    report = report_of(finished[1])
    assert report["videos"]["count"] == 7 and report["videos"]["measured"] == 5
    assert report["videos"]["frames"] == 5 * (FRAMES - 1)
    assert {one["name"] for one in report["videos"]["skipped"]} == {"Dog/cut.mkv", "Dog/notes.avi"}
    assert report["labels"]["names"] == ["dog", "red circle", "green square"] and report["labels"]["true"]
    assert report["truths"] == ["dog", "dog", "red circle", "red circle", "green square"]
    assert report["model"]["name"] == "tiny-siglip" and report["model"]["grid"] == [6, 6]
    assert report["versions"]["torch"] == torch.__version__ and len(report["model"]["weights"]) == 16
    assert report["command"] and report["settings"]["seed"] == 0 and "commit" in report


def test_figures_are_beside_the_baselines(finished):
    report = report_of(finished[1])
    dense, ours, first = (entry_of(report, name) for name in ("dense", "balanced", "first frame repeated"))
    assert dense["figures"]["cost"] == 1 and dense["figures"]["cosine"]["min"] == pytest.approx(1)
    assert first["figures"]["cost"] == 0 and first["figures"]["cosine"]["mean"] < 1
    assert 0 < ours["figures"]["cost"] < 2
    assert set(ours["beside"]) == {"mean", "p5", "p1", "agreement", "top1"}
    for question, found in ours["beside"].items():
        assert found["control"] == max(found["controls"].values()), question
        assert found["difference"] == pytest.approx(found["value"] - found["control"])
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
        assert {"every k", "surprise", "pixel difference", "first frame"} <= set(found["controls"])
    families = {entry["family"] for entry in report["methods"] if entry["control"]}
    within = {"surprise over 0.02, budget", "surprise over 0.1, budget"}
    holds = {"first frame", "every k", "surprise", "pixel difference", *within}
    assert holds | {"smaller input"} == families
    accuracy = ours["figures"]["accuracy"]
    answers = [figures["label"] for figures in ours["videos"]]
    right = sum(answer == truth for answer, truth in zip(answers, report["truths"], strict=True))
    assert accuracy["top1"] == right / 5 and "top5" not in accuracy
    assert accuracy["top1_interval"][0] <= accuracy["top1"] <= accuracy["top1_interval"][1]
    assert "top1_mcnemar" in accuracy and "top1_retention" in accuracy


def test_the_markdown_says_what_the_json_says(finished):
    report, text = report_of(finished[1]), (finished[1] / "report.md").read_text()
    ours = entry_of(report, "balanced")
    for figure in (f"{ours['figures']['cost']:.3f}", f"{ours['figures']['cosine']['p5']:.4f}", "Skipped: 2 of 7"):
        assert figure in text
    assert ours["beside"]["p5"]["best"] in text and "`Dog/cut.mkv`" in text
    assert f"{ours['figures']['cosine']['mean']:.4f}" in finished[0].stdout


def test_the_card_keeps_its_text_and_has_the_figures(finished, videos, folder):
    text = (finished[1] / "model_card.md").read_text()
    assert not any(str(place.parent) in text for place in (videos, folder, finished[1]))
    card = ModelCard.load(finished[1] / "model_card.md")
    assert "A text that stays." in card.text and card.data.license == "mit" and card.data.model_name == "tiny-siglip"
    found = {one.metric_name: one for one in card.data.eval_results}
    report = report_of(finished[1])
    ours = entry_of(report, "balanced")["figures"]
    assert found["top-1 accuracy, balanced"].metric_value == round(ours["accuracy"]["top1"], 6)
    assert found["cosine to dense, mean, balanced"].metric_value == round(ours["cosine"]["mean"], 6)
    assert found["multiply-adds, dense = 1, balanced"].dataset_name == "ClipSet"


def test_the_figures_are_the_model_s(finished, videos, folder):
    """The recorded cost and cosine are what the model gives outside of the evaluation."""
    from neuroflow_hf.loading import load_model
    from neuroflow_hf.video.reader import read_frames

    model, preprocess = load_model(folder, device="cpu")
    stream, costs, cosines = model.new_stream(preset="balanced"), [], []
    with torch.inference_mode():
        for frame in read_frames(videos / "Dog" / "a.mkv"):
            pixels = preprocess(frame.image)
            output, dense = model(pixel_values=pixels, stream=stream), model(pixel_values=pixels)
            costs.append(output.cost.item())
            cosines.append(torch.cosine_similarity(output.pooler_output, dense.pooler_output).item())
    figures = entry_of(report_of(finished[1]), "balanced")["videos"][0]
    assert figures["cost"] == pytest.approx(np.mean(costs[1:]), rel=1e-4)
    assert figures["cosine_mean"] == pytest.approx(np.mean(cosines[1:]), abs=1e-5)


# --- continuing ----------------------------------------------------------------------------------------------------


def without_run(report):
    """A report without what says when and where it was made."""
    return {name: value for name, value in report.items() if name not in ("command", "commit", "processes", "machine")}


def test_what_was_recorded_is_not_made_again(finished, videos, folder, monkeypatch):
    _, out = finished
    before = report_of(out)
    record, made = eval_run.record, []

    def counted(checkpoint, reader, specs):
        made.append(reader.path.name)
        return record(checkpoint, reader, specs)

    monkeypatch.setattr(eval_run, "record", counted)
    assert run(out, videos, folder).exit_code == 0
    assert set(made) == {"cut.mkv"}  # is tried again, and fails again
    assert without_run(report_of(out)) == without_run(before)


def test_ctrl_c_keeps_what_is_done(videos, folder, finished, tmp_path, monkeypatch):
    record, count = eval_run.record, []

    def interrupted(checkpoint, reader, specs):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return record(checkpoint, reader, specs)

    monkeypatch.setattr(eval_run, "record", interrupted)
    stopped = run(tmp_path, videos, folder)
    assert stopped.exit_code == 130 and "the same command continues" in stopped.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    assert kept and not (tmp_path / "report.json").exists()
    monkeypatch.setattr(eval_run, "record", record)
    assert run(tmp_path, videos, folder).exit_code == 0
    assert all((tmp_path / "records" / name).stat().st_mtime_ns == time for name, time in kept.items())
    timed = {"milliseconds"}
    one, two = (comparable(report_of(out), timed) for out in (tmp_path, finished[1]))
    assert one == two


def comparable(report, without):
    """The figures of a report, without those of these names."""

    def stripped(value):
        if isinstance(value, dict):
            return {name: stripped(part) for name, part in value.items() if name not in without}
        return [stripped(part) for part in value] if isinstance(value, list) else value

    return stripped([report["methods"], report["videos"], report["labels"], report["truths"]])


def test_other_options_are_measured_anew_and_damaged_records_too(videos, folder, tmp_path):
    clip = videos / "Dog" / "a.mkv"
    assert run(tmp_path, clip, folder).exit_code == 0
    records = set((tmp_path / "records").iterdir())
    assert run(tmp_path, clip, folder, "--stride", 2).exit_code == 0
    assert len(set((tmp_path / "records").iterdir())) == 2 * len(records)
    assert report_of(tmp_path)["videos"]["frames"] == 2
    assert "one of every 2, 2 frames in all" in (tmp_path / "report.md").read_text()
    for path in records:
        path.write_bytes(b"broken")
    assert run(tmp_path, clip, folder).exit_code == 0
    assert all(path.stat().st_size > 100 for path in records)


def test_what_is_held_is_stored_without_embeddings_and_is_denses_of_its_last_frame(videos, folder, tmp_path):
    clip = find_videos(videos / "Dog" / "a.mkv").videos[0]
    checkpoint = load_checkpoint(folder, device="cpu")
    every = MethodSpec("every 2", "every k", "every", {"k": 2}, True)
    job = Evaluation(checkpoint, VideoSet("one", (clip,)), tmp_path, [DENSE, every, FIRST])
    recordings = job.recordings_of(clip, lambda what: None)
    dense, held, first = (recordings[spec.name] for spec in (DENSE, every, FIRST))
    assert held.embeddings.numel() == 0 == first.embeddings.numel()
    assert torch.equal(held.embeddings_of(dense), dense.embeddings[[0, 0, 2, 2, 4, 4]])
    assert torch.equal(first.embeddings_of(dense), dense.embeddings[[0] * FRAMES])
    assert dense.embeddings_of(dense) is dense.embeddings
    again = job.recordings_of(clip, lambda what: None)
    assert torch.equal(again[every.name].embeddings_of(again[DENSE.name]), held.embeddings_of(dense))


def test_a_recording_is_of_the_libraries_that_the_report_names(videos, folder, tmp_path, monkeypatch):
    clip = find_videos(videos / "Dog" / "a.mkv")
    checkpoint = load_checkpoint(folder, device="cpu")

    def path():
        return Evaluation(checkpoint, clip, tmp_path, [DENSE]).store.path("a", DENSE, video="abc")

    before = path()
    assert path() == before
    monkeypatch.setattr(recordings, "version", lambda name: "0.0")
    assert path() != before


def test_embeddings_that_are_not_finite_are_refused(videos, folder, tmp_path, monkeypatch):
    clip = find_videos(videos / "Dog" / "a.mkv")
    checkpoint = load_checkpoint(folder, device="cpu")
    step = Step(torch.full((1, 4), math.nan), torch.ones(1), torch.zeros(1))
    monkeypatch.setattr(Dense, "step", lambda self, pixels: step)
    job = Evaluation(checkpoint, clip, tmp_path, [DENSE])
    with pytest.raises(ValueError, match=r"dense gives an embedding with NaN.*frame 0 of .*a\.mkv.*--dtype"):
        job.run()


# --- labels or none ------------------------------------------------------------------------------------------------


def test_labels_without_truth_are_compared_with_dense(videos, folder, tmp_path):
    result = run(tmp_path, videos / "Dog", folder, "--labels", "dog, red circle", "--no-card")
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path)
    assert not report["labels"]["true"] and report["truths"] == []
    ours = entry_of(report, "balanced")
    assert 0 <= ours["figures"]["agreement"] <= 1 and "accuracy" not in ours["figures"]
    assert entry_of(report, "dense")["figures"]["agreement"] == 1
    assert not (tmp_path / "model_card.md").exists()


def test_a_checkpoint_without_text_tower(videos, vision_folder, tmp_path):
    result = run(tmp_path, videos, vision_folder)
    assert result.exit_code == 0, result.output
    assert "no text tower" in result.stdout
    report = report_of(tmp_path)
    assert report["labels"]["names"] == [] and "agreement" not in entry_of(report, "balanced")["figures"]
    assert not (tmp_path / "accuracy_over_cost.png").exists()
    card = ModelCard.load(tmp_path / "model_card.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    # labels that were asked for are not left out silently
    refused = run(tmp_path, videos / "Dog", vision_folder, "--labels", "dog, red circle")
    assert_clean_error(refused, "vision tower alone")


def test_the_card_is_written_into_the_checkpoint_on_demand(videos, vision_folder, tmp_path):
    result = run(tmp_path, videos / "Dog" / "a.mkv", vision_folder, "--write-card")
    assert result.exit_code == 0, result.output
    assert (vision_folder / "README.md").read_bytes() == (tmp_path / "model_card.md").read_bytes()
    (vision_folder / "README.md").unlink()


def test_another_resolution_and_type(videos, folder, tmp_path):
    options = ("--resolution", 32, "--dtype", "bfloat16", "--no-card")
    assert run(tmp_path, videos / "Dog" / "a.mkv", folder, *options).exit_code == 0
    report = report_of(tmp_path)
    assert report["model"]["grid"] == [8, 8] and report["model"]["dtype"] == "bfloat16"
    sides = [entry["options"]["resolution"] for entry in report["methods"] if entry["kind"] == "smaller"]
    assert sides and all(side < 32 and side % 4 == 0 for side in sides)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--labels", "dog, cat"), "lacks 'red circle'"),
        (("--labels", "dog, dog"), "lacks"),
        (("--methods", "blanced"), "no method 'blanced'"),
        (("--frames", 1), "`frames` is 1"),
        (("--stride", 0), "`stride` is 0"),
        (("--dtype", "int8"), "dtype is 'int8'"),
        (("--resolution", 2), "one patch"),
        (("--no-truth", "--labels", "dog"), "single label, 'dog'"),
        (("--no-truth", "--labels", ""), "is empty"),
        (("--no-card", "--write-card"), "not both"),
        (("--no-truth", "--template", "{}"), "--template"),
    ],
)
def test_what_does_not_fit_is_said(videos, folder, tmp_path, options, words):
    assert_clean_error(run(tmp_path / "out", videos, folder, *options), words)


def test_no_videos(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_clean_error(run(tmp_path / "out", tmp_path / "empty", folder), "no video in")
    assert_clean_error(run(tmp_path / "out", tmp_path / "nowhere", folder), "nowhere")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"")
    assert_clean_error(run(tmp_path / "out", tmp_path / "broken", folder), "None of the 1 videos", "a.mp4")
    one = write_clip(tmp_path / "one.mkv", 1)
    assert_clean_error(run(tmp_path / "out", one, folder), "single frame")


# --- several processes ---------------------------------------------------------------------------------------------


def test_two_processes_give_what_one_gives(videos, folder, finished, tmp_path):
    options = ["--model", folder, "--out", tmp_path / "two", "--device", "cpu", "--methods", "balanced", "--quick"]
    printed = call_in_two(neuroflow, "eval", videos, *options)
    assert [text.count("Written to") for text in printed] == [1, 0]
    report = report_of(tmp_path / "two")
    assert report["processes"] == 2
    assert comparable(report, {"milliseconds"}) == comparable(report_of(finished[1]), {"milliseconds"})
