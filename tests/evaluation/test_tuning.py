import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import neuroflow_hf.evaluation.tuning
from neuroflow_hf import NeuroFlowGateConfig, NeuroFlowSiglipModel, NeuroFlowSiglipVisionModel
from neuroflow_hf.evaluation.tuning import (
    FAMILIES,
    TRIGGERED_HOLDS,
    Point,
    Requirement,
    choose,
    fitting_interval,
    hold_by_the_clock,
    most_faithful,
    nearest,
    plan_stretches,
    tune_video,
)
from neuroflow_hf.evaluation.tuning_report import checkpoint_config, setting_words, tuning_sentences, tuning_table
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import VideoReader
from tests.cli.test_run import assert_clean_error, call, write_clip
from tests.conftest import PROCESSOR

RUNGS = [
    {"mode": "context", "threshold": 0.3},
    {"mode": "context", "threshold": 0.01, "keyframe_interval": 6},
    {"mode": "context", "threshold": 0.001, "keyframe_interval": 2},
]
ALL_FILES = {"config.json", "tune.json", "curve.png"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "square.mkv", frames=40)


@pytest.fixture(scope="module")
def checkpoints(stock_folder, stock_vision, tmp_path_factory):
    """Folders of the tiny model with its text tower and of its vision tower alone."""
    dual, vision = tmp_path_factory.mktemp("dual"), tmp_path_factory.mktemp("vision")
    shutil.copytree(stock_folder, dual, dirs_exist_ok=True)
    stock_vision.save_pretrained(vision)
    for folder in (dual, vision):
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return {"dual": dual, "vision": vision}


@pytest.fixture
def few_candidates(candidates, monkeypatch):
    candidates(context=RUNGS)
    monkeypatch.setattr(neuroflow_hf.evaluation.tuning, "TRIGGERED_HOLDS", TRIGGERED_HOLDS[2::3])


@pytest.fixture
def candidates(monkeypatch):
    """A function that sets the families to measure."""
    return lambda **families: monkeypatch.setattr(neuroflow_hf.evaluation.tuning, "FAMILIES", families)


def tune(clip, model, frames=24, **how):
    return tune_video(VideoReader(clip), model, Preprocessor(resolution=24), frames=frames, **how)


def point(cost, *cosines, control=False, **options):
    """A point whose stretches have these cosines, a list of frames for each."""
    values = [np.array(frames, dtype=float) for frames in cosines]
    return Point("any", {"mode": "context", **options}, cost, values, 1.0, control)


# --- baselines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_holding_is_what_mode_hold_does(vision, every):
    images = torch.randn(9, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = vision(pixel_values=images).pooler_output
        stream = vision.new_stream(mode="hold", keyframe_interval=every)
        held = torch.cat([vision(pixel_values=image[None], stream=stream).pooler_output for image in images])
    found = hold_by_the_clock([dense, dense[:every]], every, dense_milliseconds=10.0)
    counted = 9 // every * every
    expected = torch.cosine_similarity(held, dense)[:counted].double().numpy()
    np.testing.assert_allclose(found.cosines[0], expected, atol=1e-5)
    assert len(found.cosines[1]) == every
    assert found.control and found.cost == 1 / every and found.milliseconds == 10 / every


def test_intervals_are_made_to_fit_a_stretch():
    assert [fitting_interval(every, 40) for every in (None, 100, 24, 12, 6, 3, 1)] == [40, 40, 20, 13, 5, 3, 1]
    for length in (2, 12, 33, 40):
        for wanted in range(1, 60):
            assert 1 <= fitting_interval(wanted, length) <= length


# --- the choice ----------------------------------------------------------------------------------------------------


def test_the_cheapest_that_is_faithful_enough():
    points = [point(0.1, [0.98]), point(0.2, [0.991]), point(0.3, [0.995]), point(0.2, [0.992])]
    assert choose(points, Requirement(min_cosine=0.99)) is points[3]  # as cheap as another, and closer
    assert choose(points, Requirement(min_cosine=0.994)) is points[2]
    assert choose(points, Requirement(min_cosine=0.999)) is None
    assert nearest(points, Requirement(min_cosine=0.999)) is points[2]


def test_the_most_faithful_that_is_cheap_enough():
    points = [point(0.1, [0.98]), point(0.2, [0.991]), point(0.3, [0.995])]
    assert choose(points, Requirement(max_cost=0.2)) is points[1]
    assert choose(points, Requirement(max_cost=0.05)) is None
    assert nearest(points, Requirement(max_cost=0.05)) is points[0]


def test_baselines_compete_and_dense_does_not_count_as_saving():
    ours, control, dense = point(0.2, [0.991]), point(0.1, [0.992], control=True), point(1.0, [1.0])
    assert choose([ours, control, dense], Requirement(min_cosine=0.99)) is control
    assert choose([ours, dense], Requirement(min_cosine=0.99)) is ours
    assert choose([ours, dense], Requirement(min_cosine=0.999)) is None
    assert nearest([ours, dense], Requirement(min_cosine=0.999)) is ours
    assert most_faithful([ours, control], Requirement(min_cosine=0.99)) is control


def test_the_statistic_decides():
    steady, lapse = point(0.2, [0.98] * 20), point(0.1, [0.999] * 19 + [0.5])
    assert choose([steady, lapse], Requirement(min_cosine=0.97, statistic="min")) is steady
    assert choose([steady, lapse], Requirement(min_cosine=0.97, statistic="mean")) is lapse


def test_figures_are_of_all_frames_and_of_the_worst_stretch():
    two = point(0.1, [1.0, 0.8], [0.6])
    assert two.fidelity("mean") == pytest.approx(0.8) and two.fidelity("min") == 0.6
    assert two.worst_fidelity("mean") == 0.6


# --- measuring -----------------------------------------------------------------------------------------------------


def test_stretches_are_spread_over_the_video():
    assert plan_stretches(1000, 120, 3) == [range(0, 40), range(480, 520), range(960, 1000)]
    assert plan_stretches(100, 120, 3) == [range(0, 33), range(34, 67), range(67, 100)]
    assert plan_stretches(20, 120, 3) == [range(0, 20)]  # too short to be divided
    assert plan_stretches(500, 60, 1) == [range(0, 60)]


def test_the_candidates_are_settings_and_go_from_frugal_to_faithful():
    for rungs in [*FAMILIES.values(), TRIGGERED_HOLDS]:
        for options in rungs:
            NeuroFlowGateConfig.from_options(options)
        # presets turn more dials than one
        for name in ("threshold", "keyframe_surprise"):
            values = [options[name] for options in rungs if name in options]
            assert values == sorted(values, reverse=True)


def test_a_budget_is_measured_as_in_the_long_run(clip, vision, candidates):
    """Not as a stream that has its reserve to spend; and on stretches too short for a budget there is none."""
    options = {"mode": "context", "keyframe_surprise": 0.0, "threshold": 0.0, "cost_budget": 0.3}
    candidates(one=[options], presets=FAMILIES["presets"])
    result = tune(clip, vision, stretches=1, max_cost=0.9)
    found = next(one for one in result.points if one.family == "one")
    assert 0.25 < found.cost < 0.36
    short = tune(clip, vision, frames=8, stretches=1, max_cost=0.9)
    found = next(one for one in short.points if one.family == "presets")
    assert found.options["cost_budget"] is None and found.options["keyframe_interval"] == 8


def test_a_point_is_what_a_stream_gives(clip, vision, candidates):
    options = {"mode": "context", "threshold": 0.02, "keyframe_interval": 6}
    steps = []
    candidates(one=[options])
    result = tune(clip, vision, max_cost=0.9, stretches=2, on_step=lambda *step: steps.append(step))
    (found,) = [point for point in result.points if point.family == "one"]
    assert result.frames == [list(range(12)), list(range(28, 40))] and result.measured_frames == 24
    images, costs = [Preprocessor(resolution=24)(frame.image) for frame in VideoReader(clip)], []
    for place, indices in enumerate(result.frames):
        stream = vision.new_stream(**options)
        with torch.no_grad():
            outputs = [vision(pixel_values=images[index], stream=stream) for index in indices]
            dense = [vision(pixel_values=images[index]).pooler_output for index in indices]
        pairs = zip(outputs, dense, strict=True)
        cosines = [torch.cosine_similarity(output.pooler_output, other).item() for output, other in pairs]
        np.testing.assert_allclose(found.cosines[place], cosines, atol=1e-5)
        costs += [output.cost.item() for output in outputs]
    assert found.cost == pytest.approx(np.mean(costs))
    assert steps[0] == ("reading", 1, 40) and steps[-1] == ("one", 24, 24)
    assert result.chosen in result.points


def test_the_models_own_gate_does_not_count(clip, stock_vision, candidates):
    candidates(context=RUNGS[:1])
    own = NeuroFlowSiglipVisionModel.from_siglip(stock_vision, mode="hold", token_budget=1)
    plain = NeuroFlowSiglipVisionModel.from_siglip(stock_vision)
    one, other = ([point.cost for point in tune(clip, model, 12, max_cost=0.5).points] for model in (own, plain))
    assert one == other


def test_the_climb_stops_where_it_can_no_longer_win(clip, vision, candidates):
    candidates(context=RUNGS)

    def thresholds(**bound):
        result = tune(clip, vision, **bound)
        return [point.options["threshold"] for point in result.points if not point.control]

    assert thresholds(min_cosine=0.01) == [0.3] == thresholds(max_cost=0.01)
    assert thresholds(min_cosine=1 - 1e-12) == [0.3, 0.01, 0.001]


def test_a_video_of_one_frame_is_refused(vision, tmp_path):
    with pytest.raises(ValueError, match="single frame"):
        tune(write_clip(tmp_path / "one.mkv", frames=1), vision, max_cost=0.5)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dual", "vision"])
def test_the_written_configuration_is_taken_everywhere(kind, clip, checkpoints, few_candidates, tmp_path):
    out, checkpoint = tmp_path / "tuned", checkpoints[kind]
    result = call("tune", clip, "--model", checkpoint, "--out", out, "--max-cost", 0.6, "--frames", 24)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == ALL_FILES
    report = json.loads((out / "tune.json").read_text())
    chosen = report["points"][report["chosen"]]
    assert chosen["cost"] <= 0.6 and report["requirement"]["max_cost"] == 0.6
    assert report["model"] == str(checkpoint) and report["versions"]["torch"] == torch.__version__
    assert setting_words(chosen["options"]) in result.stdout
    with Image.open(out / "curve.png") as picture:
        picture.verify()

    classes = [NeuroFlowSiglipVisionModel, *([NeuroFlowSiglipModel] if kind == "dual" else [])]
    gate = NeuroFlowGateConfig.from_options(chosen["options"])
    for model_class in classes:
        model = model_class.from_pretrained(checkpoint, config=out)
        assert model.new_stream().gate == gate
        assert torch.equal(next(model.parameters()), next(model_class.from_pretrained(checkpoint).parameters()))
    assert type(checkpoint_config(checkpoint)) is classes[-1].config_class

    how = ("--model", checkpoint, "--config", out, "--out", tmp_path / "run", "--no-overlay", "--dilate", 2)
    again = call("run", clip, *how)
    assert again.exit_code == 0, again.output
    ran = json.loads((tmp_path / "run" / "summary.json").read_text())["gate"]
    assert ran == gate.to_dict() | {"dilate": 2}


def test_what_cannot_be_reached_is_said_and_no_configuration_is_left(clip, checkpoints, few_candidates, tmp_path):
    options = ("tune", clip, "--model", checkpoints["vision"], "--out", tmp_path, "--frames", 24)
    assert call(*options, "--min-cosine", 0.01).exit_code == 0
    assert (tmp_path / "config.json").exists()
    result = call(*options, "--max-cost", 0.0001)
    assert result.exit_code == 3
    assert {path.name for path in tmp_path.iterdir()} == ALL_FILES - {"config.json"}
    assert "No setting meets the requirement" in result.stdout and "nearest" in result.stdout


def test_the_words_say_who_won():
    class Stub:
        requirement = Requirement(min_cosine=0.99)
        frames = [list(range(3)), list(range(5, 8))]
        measured_frames, dense_milliseconds = 6, 9.0

        def __init__(self, *points):
            self.points = list(points)
            self.chosen = choose(self.points, self.requirement)

    ours = point(0.2, [0.995], [0.992], threshold=0.5)
    control = point(0.1, [0.995], [0.991], control=True, keyframe_interval=10)
    expensive = point(0.25, [0.999], [0.999], control=True, keyframe_interval=4)
    won, lost, none = Stub(ours, expensive), Stub(ours, control), Stub(point(0.2, [0.5], [0.5]))
    assert not any("baseline wins" in sentence for sentence in tuning_sentences(won))
    assert tuning_sentences(won)[0] == "chosen: context, threshold 0.5"
    assert any("A baseline wins" in words and "threshold 0.5" in words for words in tuning_sentences(lost))
    assert any("No setting meets" in words for words in tuning_sentences(none))
    assert [row[0] for row in tuning_table(won)[1]] == ["chosen", "best baseline that meets it", "dense"]
    assert [row[0] for row in tuning_table(lost)[1]] == ["chosen", "best of the others", "dense"]
    assert [row[0] for row in tuning_table(none)[1]] == ["nearest", "dense"]
    assert tuning_table(won)[1][0][1:] == ["0.200", "0.9935", "0.9921", "0.9920", "0.9920", "1.0"]


def test_a_stopped_tuning_names_the_best_so_far(clip, checkpoints, few_candidates, tmp_path, monkeypatch):
    measure = neuroflow_hf.evaluation.tuning.Bench.measure

    def interrupted(bench, family, options, control=False):
        if not control:
            signal.raise_signal(signal.SIGTERM)
        return measure(bench, family, options, control)

    monkeypatch.setattr(neuroflow_hf.evaluation.tuning.Bench, "measure", interrupted)
    options = ("--model", checkpoints["vision"], "--out", tmp_path, "--frames", 24, "--max-cost", 0.5)
    result = call("tune", clip, *options)
    assert result.exit_code == 130 and "settings were measured before" in result.stderr
    report = json.loads((tmp_path / "tune.json").read_text())
    assert report["interrupted"] and sum(not point["control"] for point in report["points"]) == 1
    assert (tmp_path / "config.json").exists()


def test_ctrl_c_before_dense_is_measured_writes_nothing(clip, checkpoints, tmp_path, monkeypatch):
    def interrupted(bench):
        raise KeyboardInterrupt

    monkeypatch.setattr(neuroflow_hf.evaluation.tuning.Bench, "measure_dense", interrupted)
    result = call("tune", clip, "--model", checkpoints["vision"], "--out", tmp_path / "out", "--max-cost", 0.5)
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["exactly one", "--min-cosine", "--max-cost"]),
        (["--min-cosine", 0.9, "--max-cost", 0.1], ["exactly one"]),
        (["--min-cosine", 1.5], ["min_cosine", "1.5"]),
        (["--max-cost", "nan"], ["above 0 and below 1"]),
        (["--max-cost", 0.1, "--statistic", "p50"], ["statistic", "p50", "mean, p5, min"]),
        (["--max-cost", 0.1, "--frames", 1], ["frames", "at least 2"]),
        (["--max-cost", 0.1, "--dtype", "float8"], ["float8"]),
        (["--max-cost", 0.1, "--device", "abacus"], ["abacus"]),
        (["--max-cost", 0.1, "--resolution", 3], ["one patch, 4 pixels"]),
        (["--max-cost", 0.1, "--stride", 0], ["stride"]),
        (["--max-cost", 0.1, "--model", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_values_out_of_range(clip, checkpoints, tmp_path, options, words):
    result = call("tune", clip, "--model", checkpoints["vision"], "--out", tmp_path / "out", *options)
    assert_clean_error(result, *words)
    assert not list(tmp_path.glob("out/*"))


def test_of_a_video_that_is_cut_short_whole_stretches_are_measured(checkpoints, few_candidates, tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", frames=60, codec="libx264", options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(0.8 * whole.stat().st_size)])
    result = call("tune", cut, "--model", checkpoints["vision"], "--out", tmp_path / "out", "--max-cost", 0.5)
    assert result.exit_code == 0, result.output
    assert 12 <= json.loads((tmp_path / "out" / "tune.json").read_text())["measured_frames"] < 60


# --- the configuration for `run` -----------------------------------------------------------------------------------


def test_configurations_that_hold_no_gate(clip, checkpoints, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text(json.dumps({"gate": {"treshold": 1}}))
    stock = checkpoints["vision"]
    for path, words in (
        (tmp_path / "gone.json", ["gone.json"]),
        (tmp_path, ["config.json"]),
        (tmp_path / "broken.json", ["broken.json", "not JSON"]),
        (tmp_path / "list.json", ["list.json", "no gate"]),
        (tmp_path / "unknown.json", ["unknown.json", "Did you mean `threshold`"]),
        (stock, ["no gate", "neuroflow tune"]),
    ):
        result = call("run", clip, "--model", stock, "--out", tmp_path / "out", "--config", path)
        assert_clean_error(result, *words)
    result = call("run", clip, "--model", stock, "--out", tmp_path / "out", "--config", stock, "--preset", "thrifty")
    assert_clean_error(result, "--config or --preset")
    assert not (tmp_path / "out").exists()
