"""The training loop: what it learns, going on after a stop, several processes, and what it refuses."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import neuroflow_hf.distill.train as loop
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.distill import DistillSettings, distill
from neuroflow_hf.distill.clips import Clip, ClipSet, split_clips
from neuroflow_hf.distill.losses import SMALL_ANGLE, angle_loss, cosines, embedding_loss
from neuroflow_hf.distill.measure import HeldOut, improvement
from neuroflow_hf.distill.report import write_report
from neuroflow_hf.video.preprocess import Preprocessor
from tests.cli.test_run import write_clip
from tests.conftest import assert_close_in_norm
from tests.processes import call_in_two

ROOT = Path(__file__).parents[2]
PREPROCESS = Preprocessor(24)
TINY = DistillSettings(
    summary_tokens=4, rank=4, clip_frames=4, frame_stride=1, keyframe_ages=(2, 4), batch=2, steps=6,
    evaluate_every=3, learning_rate=1e-2, thresholds=(0.001, 0.01),
)  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [write_clip(folder / f"{number}.mkv", frames=count) for number, count in enumerate((20, 16))]


def run(vision, videos, out, settings=TINY, **options):
    return distill(videos, vision, PREPROCESS, out, settings, base="tiny", **options)


def weights_in(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("mode", ["eliminate", "reconstruct", "context", "extrapolate"])
def test_sparse_frames_come_closer_to_dense_and_the_model_stays(vision, videos, tmp_path, mode):
    before = {name: value.clone() for name, value in vision.state_dict().items()}
    settings = dataclasses.replace(
        TINY, mode=mode, steps=30, evaluate_every=10, summary_tokens=4 if mode in ("eliminate", "reconstruct") else 0
    )
    result = run(vision, videos, tmp_path, settings)
    assert result.finished and len(result.losses) == 30 and list(result.held_out) == [0, 10, 20, 30]
    found = [measured["what changed"].mean for measured in result.held_out.values()]
    assert max(found) > found[0]
    assert vision.sparse_adapter is None
    assert all(torch.equal(value, before[name]) for name, value in vision.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vision.parameters())
    vision.save_pretrained(tmp_path / "base")
    loaded = NeuroFlowSiglipVisionModel.from_pretrained(tmp_path / "base", sparse_adapter=tmp_path)
    assert loaded.new_stream().gate.mode == mode
    assert {value.dtype for value in weights_in(tmp_path).values()} == {torch.float16}


def test_what_is_written_is_what_was_measured(vision, videos, tmp_path, monkeypatch):
    train_step = loop.train_step

    def spoiling(student, *arguments):
        loss = train_step(student, *arguments)
        if arguments[-1] >= 4:
            student.set_weights({name: 100 * value for name, value in student.weights().items()})
        return loss

    monkeypatch.setattr(loop, "train_step", spoiling)
    result = run(vision, videos, tmp_path, dataclasses.replace(TINY, evaluate_every=1))
    assert 0 < result.best_step < 5
    vision.save_pretrained(tmp_path / "base")
    loaded = NeuroFlowSiglipVisionModel.from_pretrained(tmp_path / "base", sparse_adapter=tmp_path)
    clips = ClipSet(videos, None, vision, PREPROCESS, TINY, tmp_path / "cache")
    for share, figures in loop.measure(loaded, clips).items():
        written = result.held_out[result.best_step][share]
        assert figures.mean == pytest.approx(written.mean, abs=1e-4)  # half precision


def test_a_stopped_distillation_goes_on_to_the_same_result(vision, videos, tmp_path, monkeypatch):
    whole = run(vision, videos, tmp_path / "whole")
    step, done = loop.train_step, []

    def failing(*arguments):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return step(*arguments)

    always = dataclasses.replace(TINY, checkpoint_seconds=-1)
    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(vision, videos, tmp_path / "stopped", always)
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    taught = []
    monkeypatch.setattr(loop, "train_step", lambda *arguments: taught.append(1) or step(*arguments))
    result = run(vision, videos, tmp_path / "stopped", always)
    assert len(taught) == 2
    assert result.losses == whole.losses and result.held_out == whole.held_out
    ours, theirs = weights_in(tmp_path / "stopped"), weights_in(tmp_path / "whole")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # a finished one trains no more
    again = run(vision, videos, tmp_path / "stopped", always)
    assert len(taught) == 2 and again.losses == result.losses


def test_a_full_disk_leaves_the_last_checkpoint(vision, videos, tmp_path, monkeypatch):
    write, calls = loop.write_whole, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(loop, "write_whole", full)
    always = dataclasses.replace(TINY, checkpoint_seconds=-1)
    with pytest.raises(OSError, match="No space"):
        run(vision, videos, tmp_path, always)
    monkeypatch.setattr(loop, "write_whole", write)
    steps = []
    result = run(vision, videos, tmp_path, always, on_step=lambda what, done, total, figures: steps.append(done))
    assert result.finished and min(step for step in steps[2:]) == 3  # two videos, then the third step


def test_a_folder_of_another_distillation_is_refused(vision, videos, tmp_path):
    run(vision, videos, tmp_path)
    with pytest.raises(ValueError, match="other settings, videos or weights"):
        run(vision, videos, tmp_path, dataclasses.replace(TINY, rank=2))
    run(vision, videos[:1], tmp_path / "parted", held_out=videos[1:])
    with pytest.raises(ValueError, match="other settings, videos or weights"):  # the same videos change places
        run(vision, videos[1:], tmp_path / "parted", held_out=videos[:1])
    for content in (b"nothing", (tmp_path / "state.safetensors").read_bytes()[:-1000]):
        (tmp_path / "state.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.safetensors is damaged"):
            run(vision, videos, tmp_path)


def one_step(folder, out, videos):
    """One step of two batches, and its state; for several processes."""
    model = NeuroFlowSiglipVisionModel.from_pretrained(folder).eval()
    settings = dataclasses.replace(TINY, accumulate=2, steps=1)
    distill(videos, model, PREPROCESS, out, settings, base="tiny")


def test_two_processes_give_the_gradient_of_one(vision, videos, tmp_path):
    vision.save_pretrained(tmp_path / "base")
    one_step(tmp_path / "base", tmp_path / "one", videos)
    call_in_two(one_step, tmp_path / "base", tmp_path / "two", videos)
    one, two = (load_file(tmp_path / out / "state.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    # after one step, Adam's mean of gradients is a tenth of the gradient; its steps would enlarge what is near 0
    gradients = [name for name in one if name.endswith("exp_avg")]
    assert len(gradients) == 2 * 6 * 3 and any(one[name].any() for name in gradients)  # of six maps in three layers
    for name in gradients:
        assert_close_in_norm(two[name], one[name], rtol=1e-5, atol=1e-9)


def test_the_published_recipe_trains_all_weights(vision, videos, tmp_path):
    recipe = DistillSettings.published(clip_frames=4, frame_stride=1, steps=4, evaluate_every=2)
    result = run(vision, videos, tmp_path, recipe)
    student = NeuroFlowSiglipVisionModel.from_pretrained(tmp_path)
    assert result.finished and student.sparse_adapter is None
    changed = [
        name for name, value in student.state_dict().items() if not torch.equal(value, vision.state_dict()[name])
    ]
    assert "embeddings.patch_embedding.weight" in changed and "head.probe" in changed


def test_the_report_can_be_read_and_looked_at(vision, videos, tmp_path):
    result = run(vision, videos, tmp_path)
    names = write_report(result, tmp_path, "tiny", "neuroflow distill")
    report = json.loads((tmp_path / "distill.json").read_text())
    assert len(report["losses"]) == TINY.steps
    assert report["held_out"]["0"] == {share: dataclasses.asdict(item) for share, item in result.held_out[0].items()}
    figures = result.held_out[0]["what changed"]
    assert len(figures.by_clip) == result.held_out_clips and np.mean(figures.by_clip) == pytest.approx(figures.mean)
    assert all((tmp_path / name).stat().st_size > 0 for name in names)
    assert "keyframe repeated" in (tmp_path / "README.md").read_text()


@pytest.mark.gpu
def test_on_a_gpu(vision, videos, tmp_path):
    result = run(
        copy.deepcopy(vision).cuda(), videos, tmp_path, dataclasses.replace(TINY, steps=30, evaluate_every=10)
    )
    assert improvement(result.held_out[0], result.held_out[result.best_step]) > 0
    assert weights_in(tmp_path)


def test_what_harms_at_one_activity_is_not_an_improvement():
    def figures(few, all_that_changed):
        return {name: HeldOut(mean, 0, 0, 0, 0) for name, mean in (("few", few), ("all", all_that_changed))}

    before = figures(0.8, 0.98)
    assert improvement(before, before) == 0
    assert improvement(before, figures(0.9, 0.99)) == pytest.approx(math.log(2))
    assert improvement(before, figures(0.8, 0.99)) == pytest.approx(math.log(2) / 2)
    assert improvement(before, figures(0.99, 0.97)) == -math.inf


# --- clips -----------------------------------------------------------------------------------------------------------


def test_held_out_clips_share_no_frame_with_training_clips():
    settings = DistillSettings(clip_frames=6)

    def frames(clips):
        return {(clip.video, number) for clip in clips for number in range(clip.start, clip.start + clip.count)}

    for lengths in ([40, 30], [40] * 7, [12, 5, 13]):
        training, held_out, short = split_clips(lengths, len(lengths), None, settings)
        assert training and held_out and not frames(training) & frames(held_out)
        assert short == [place for place, length in enumerate(lengths) if length < 6]
    training, held_out, _ = split_clips([40, 30], 1, ["other.mp4"], settings)
    assert {clip.video for clip in training} == {0} and {clip.video for clip in held_out} == {1}


def test_the_cache_holds_what_the_dense_model_gives(vision, videos, tmp_path):
    settings = dataclasses.replace(TINY, resolutions=(24, 32))
    clips = ClipSet(videos, None, vision, PREPROCESS, settings, tmp_path)
    for side in (24, 32):
        batch = clips.batch([Clip(0, 3, 2), Clip(1, 0, 2)], side)
        pixels = clips.preprocess_at(side).normalise(batch.frames[1])
        with torch.no_grad():
            dense = vision(pixels, interpolate_pos_encoding=side != 24)
        torch.testing.assert_close(batch.teacher[1], dense.pooler_output, rtol=2e-3, atol=2e-3)
    assert clips.draw(np.random.default_rng(0)).frames.shape[:2] == (4, 2)


def test_some_clips_have_a_budget_and_in_others_the_threshold_decides():
    settings = DistillSettings(active_shares=(0.02, 0.5), summary_tokens=0)
    gates = [settings.draw_gate(np.random.default_rng(number), 256) for number in range(200)]
    budgets = [gate.token_budget for gate in gates if gate.token_budget is not None]
    assert 60 < len(budgets) < 140 and min(budgets) >= 5 and max(budgets) <= 128
    assert sum(budget < 26 for budget in budgets) > len(budgets) / 3  # a logarithmic scale
    assert all(settings.thresholds[0] <= gate.threshold <= settings.thresholds[1] for gate in gates)
    unlimited = dataclasses.replace(settings, active_shares=None)
    assert unlimited.draw_gate(np.random.default_rng(0), 256).token_budget is None


# --- losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_0_at_the_teacher_and_above_elsewhere():
    torch.manual_seed(0)
    teacher = torch.randn(3, 8, dtype=torch.float64)
    away = teacher + torch.randn_like(teacher)
    assert embedding_loss(teacher, teacher, 1, 0.5).abs() < 1e-12
    expected = (away - teacher).square().mean() + 0.5 * (1 - cosines(away, teacher)).mean()
    torch.testing.assert_close(embedding_loss(away, teacher, 1, 0.5), expected)
    angles = cosines(away, teacher).acos()
    torch.testing.assert_close(angle_loss(away, teacher), (1 + angles / SMALL_ANGLE).log().mean())
    assert angle_loss(2 * teacher, teacher) < 0.1 < angle_loss(away, teacher)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "dense"}, "`dense` cannot be distilled"),
        ({"mode": "hold"}, "`hold` cannot be distilled"),
        ({"method": "dora"}, "expected one of lora, full"),
        ({"targets": ("q_proj", "head")}, "expected some of q_proj"),
        ({"steps": 0}, "`steps` is 0"),
        ({"thresholds": (0.3, 0.1)}, "the smaller end first"),
        ({"active_shares": (0.0, 0.5)}, "above 0"),
        ({"active_shares": (0.5, 1.5)}, "at most 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillSettings(**options)


def test_videos_too_short_for_a_clip_are_named(vision, videos, tmp_path):
    short = write_clip(tmp_path / "short.mkv", frames=3)
    result = run(vision, [*videos, short], tmp_path / "out")
    assert result.short_videos == ["short.mkv"]
    with pytest.raises(ValueError, match=r"No training video has a clip of 4 frames"):
        run(vision, [short], tmp_path / "none")


def test_half_precision_is_refused(vision, videos, tmp_path):
    with pytest.raises(ValueError, match="needs float32 weights"):
        run(NeuroFlowSiglipVisionModel(vision.config).half(), videos, tmp_path)
