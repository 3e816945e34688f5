"""Accuracy, reaction and fidelity: their arithmetic, and from composed clips to the reports on a tiny model."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from eval.docs.cells import rows_shown
from eval.docs.fidelity import fidelity_table
from eval.docs.labels import accuracy_table, reaction_table
from eval.recordings import Recorder, RecordSettings, Scene
from eval.vision import accuracy, evidence, fidelity, reaction
from neuroflow_hf.evaluation.methods import MethodSpec
from neuroflow_hf.evaluation.settings import DENSE, FIRST
from neuroflow_hf.video.preprocess import Preprocessor
from recipes import composed_clips
from recipes.composed_clips import MOTIONS, specify
from tests.conftest import IMAGE_SIZE

COLOURS = {"apple": (250, 10, 10), "boat": (10, 250, 10), "cat": (10, 10, 250), "dog": (250, 250, 10)}
FRAMES = 40


@pytest.fixture(scope="module")
def material():
    """Plain rectangles that are called apple, boat, cat and dog, and a photograph of grey noise."""
    drawings = {
        name: [SimpleNamespace(picture=Image.new("RGBA", (60, 48), (*colour, 255)))]
        for name, colour in COLOURS.items()
    }
    grey = np.random.default_rng(0).integers(90, 160, (120, 160, 1), dtype=np.uint8).repeat(3, axis=2)
    return SimpleNamespace(drawings=drawings, grounds=[SimpleNamespace(picture=Image.fromarray(grey))])


# --- controls at equal cost ---

SPECS = [
    DENSE,
    FIRST,
    MethodSpec("ours", "ours", "stream"),
    MethodSpec("k 2", "every k", "every", {"k": 2}, control=True),
    MethodSpec("k 4", "every k", "every", {"k": 4}, control=True),
    MethodSpec("small", "smaller", "smaller", {}, control=True),
]
COSTS = {"dense": 1.0, FIRST.name: 0.0, "ours": 0.4, "k 2": 0.5, "k 4": 0.25, "small": 0.4}


def mean(values):
    return values.mean((1, 2))


def test_a_control_between_two_settings_is_their_mixture():
    families = evidence.families_of(SPECS)
    assert families == {
        "every k": [FIRST.name, "k 2", "k 4", "dense"],
        "smaller": [FIRST.name, "small", "dense"],
    }
    by_name = {"dense": 1.0, FIRST.name: 0.0, "ours": 0.7, "k 2": 0.8, "k 4": 0.4, "small": 0.5}
    values = {name: np.full((5, 3), value) for name, value in by_name.items()}
    found = evidence.best_baseline("ours", values, COSTS, families, mean)
    assert found["family"] == "every k"
    assert found["control"] == pytest.approx(0.4 * 0.4 + 0.6 * 0.8)
    assert found["difference"] == pytest.approx(0.7 - 0.64)
    assert found["interval"] == pytest.approx((found["difference"], found["difference"]))


def test_a_cheaper_control_that_is_better_is_not_passed_over():
    families = evidence.families_of(SPECS)
    by_name = {"dense": 0.6, FIRST.name: 0.0, "ours": 0.7, "k 2": 0.5, "k 4": 0.9, "small": 0.5}
    values = {name: np.full((5, 3), value) for name, value in by_name.items()}
    found = evidence.best_baseline("ours", values, COSTS, families, mean)
    assert found["family"] == "every k" and found["control"] == pytest.approx(0.9)


def test_intervals_come_from_scenes_and_are_paired():
    rng = np.random.default_rng(0)
    level = rng.uniform(0, 1, (12, 1))  # of the scenes, which differ a lot
    theirs = level + rng.normal(0, 0.001, (12, 50))
    ours = theirs + 0.05
    low, high = evidence.statistic_interval(ours, mean, lambda drawn: mean(theirs[drawn]))
    assert low == pytest.approx(0.05) and high == pytest.approx(0.05)
    low, high = evidence.statistic_interval(ours, mean)
    assert high - low > 0.1  # the 600 frames are no 600 independent answers
    assert evidence.statistic_interval(ours[:2], mean) is None
    assert evidence.best_baseline("ours", {"ours": ours}, {"ours": 0.3}, {}, mean) is None


# --- accuracy ---


def test_right_is_who_scores_higher_than_all_others():
    texts = torch.eye(4)
    embeddings = torch.tensor([[3.0, 2, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    places = torch.tensor([1, 0, 3])
    assert accuracy.is_right(embeddings, texts, places, 1).tolist() == [False, False, True]
    assert accuracy.is_right(embeddings, texts, places, 2).tolist() == [True, True, True]


def test_each_clip_counts_as_much_and_empty_ones_do_not():
    values = np.array([[[1.0], [0.5], [np.nan]]])
    assert evidence.mean_of_scenes(values).tolist() == [0.75]


# --- reaction ---


def labels(text):
    return {number: {"a": "apple", "b": "boat", "-": "nothing"}[letter] for number, letter in enumerate(text)}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("aaaabbbb", (0, False, False)),
        ("aaaaaabb", (2, False, False)),
        ("aaaa-bab", (1, False, False)),
        ("aaaaaaaa", (4, True, False)),
        ("abbbabbb", (1, False, True)),
    ],
)
def test_a_delay_ends_with_the_first_right_label(said, expected):
    found = reaction.delay_after(reaction.Event(4, "boat", 4), labels(said))
    assert (found.frames, found.censored, found.already) == expected


def test_events_have_room_and_windows_end_at_the_next():
    scene = Scene("s", lambda: iter(()), (None,) * 30 + ("cat",) * 25 + ("dog",) * 5 + ("cat",) * 40)
    found = reaction.events_of(scene, RecordSettings(after=20))
    assert [(event.frame, event.label, event.frames) for event in found] == [(30, "cat", 21)]


# --- fidelity ---


def test_the_trend_is_the_slope_per_thousand_frames():
    frames = np.tile(np.arange(1, 2000, 8), (4, 1))
    level = np.array([[0.99], [0.95], [0.9], [0.97]])
    rng = np.random.default_rng(0)
    falling = level - 2e-6 * frames + rng.normal(0, 1e-4, frames.shape)
    assert fidelity.slope(frames, falling) == pytest.approx(-2e-3, abs=1e-4)
    low, high = fidelity.slope_interval(frames, falling, resamples=200)
    assert low < -2e-3 < high < 0
    low, high = fidelity.slope_interval(frames, level + rng.normal(0, 1e-3, frames.shape), resamples=200)
    assert low < 0 < high
    assert fidelity.slope_interval(frames[:, :90], falling[:, :90]) is None


# --- all of it ---


def test_quick_runs_and_few_settings_have_fewer_methods(vision):
    everything, few, quick, baselines = (
        evidence.methods_of(vision, *how)
        for how in ((False, False, True), (False, True, True), (True, False, True), (False, False, False))
    )
    for specs in (everything, few, quick, baselines):
        assert len({spec.name for spec in specs}) == len(specs)
    assert len(everything) > len(few) > len(quick)
    assert {spec.family for spec in everything} == {spec.family for spec in few} | {"extrapolate"}
    slow = {spec.family for spec in few if spec.options.get("mode") in evidence.SLOW_MODES}
    assert len(slow) == 1 and {spec.family for spec in quick} == {spec.family for spec in few} - slow
    assert baselines == [spec for spec in everything if spec.control or spec.family in (DENSE.family, "presets")]


def test_a_scene_is_known_by_what_it_shows(material):
    scenes = [
        evidence.composed_scene(specify(material, motion, number, frames=FRAMES, side=48, seed=seed))
        for motion, number, seed in itertools.product(("crossing", "replaced"), (0, 1), (0, 1))
    ]
    assert len({scene.identity for scene in scenes}) == len(scenes)
    again = evidence.composed_scene(specify(material, "crossing", 0, frames=FRAMES, side=48, seed=0))
    assert again.identity == scenes[0].identity
    assert len(list(scenes[0].frames())) == scenes[0].count == FRAMES and scenes[0].changes


@pytest.fixture(scope="module")
def recorded(vision, material, tmp_path_factory):
    """A tiny model's recordings of two clips of each motion, with labels that dense recognises."""
    batches = evidence.composed_batches(material, 2, FRAMES, side=48)
    some = ("dense", FIRST.name, "balanced", "every 3", "every 8", "ToMe 3, constant")
    specs = [spec for spec in evidence.methods_of(vision, False, False, True) if spec.name in some]
    names = [*COLOURS, evidence.NOTHING]
    preprocess = Preprocessor(IMAGE_SIZE)
    mean_of: dict[str, list] = {name: [] for name in names}
    with torch.inference_mode():
        for scene in itertools.chain(*batches):
            for image, label in itertools.islice(zip(scene.frames(), scene.labels, strict=True), 0, None, 4):
                embedding = vision(pixel_values=preprocess(image)).pooler_output[0]
                mean_of[label or evidence.NOTHING].append(embedding)
    everything = torch.stack(list(itertools.chain(*mean_of.values()))).mean(0)
    texts = functional.normalize(
        torch.stack([torch.stack(mean_of[name]).mean(0) - everything for name in names]), dim=-1
    )
    recorder = Recorder(vision, preprocess, tmp_path_factory.mktemp("recordings"), RecordSettings(dense_every=2))
    return evidence.record_evidence(recorder, batches, specs, (names, texts))


def rows_of(report):
    return {row["name"]: row for row in report["results"]}


def test_from_clips_to_accuracy(recorded):
    report = accuracy.accuracy_report(recorded)
    rows = rows_of(report)
    assert set(rows) == {spec.name for spec in recorded.specs}
    assert rows["dense"]["top1"]["difference"] == 0 and rows["dense"]["cost"] == 1
    assert rows["dense"]["top1"]["accuracy"] > 0.3
    assert rows[FIRST.name]["cost"] == 0
    assert set(rows["balanced"]["motions"]) == set(MOTIONS)
    for row in rows.values():
        assert row["top1"]["accuracy"] <= row["top5"]["accuracy"] == 1  # of five labels
        assert row["motions"]["still"]["top1"]["interval"] is None
        low, high = row["top1"]["interval"]
        assert low <= row["top1"]["difference"] <= high
    assert {"control", "family", "difference", "interval"} == set(rows["balanced"]["top1"]["best control"])
    assert report["frames_counted"] > 200 and report["recorded"]["dtype"] == "float32"
    assert len(report["recorded"]["machines"]) == 1
    assert "| `balanced` |" in accuracy_table(report)
    assert len(accuracy.plot_accuracy(recorded, report).axes) == 2 + len(MOTIONS)


def test_from_clips_to_reaction(recorded):
    report = reaction.reaction_report(recorded)
    assert report["own"]["events"] + report["own"]["left_out"] > 5 and report["own"]["events"]
    rows = rows_of(report["own"])
    assert rows["dense"]["delay"] == 0 and rows["dense"]["censored"] == 0
    assert rows[FIRST.name]["delay"] > 0 and rows[FIRST.name]["censored"] > 0
    assert rows["balanced"]["best control"]["difference"] == pytest.approx(
        rows["balanced"]["delay"] - rows["balanced"]["best control"]["control"], abs=2e-6
    )
    assert "| `balanced` |" in reaction_table(report)


def test_from_clips_to_fidelity(recorded):
    report = fidelity.fidelity_report(recorded)
    rows = rows_of(report)
    assert "dense" not in rows
    assert all(row["bytes_constant"] for row in rows.values())
    assert rows["balanced"]["bytes"] > 10_000 > rows[FIRST.name]["bytes"]
    for row in rows.values():
        assert row["p1"] <= row["p5"] <= row["mean"] <= 1
    assert rows["balanced"]["p5"] > rows[FIRST.name]["p5"]
    best = rows["balanced"]["best control"]
    assert rows["balanced"]["p5"] == pytest.approx(best["control"] + best["difference"], abs=1e-6)
    assert "| `balanced` |" in fidelity_table(report)
    changing = [place for place, scene in enumerate(recorded.scenes) if scene.changes]
    assert 0 < len(changing) < len(recorded.scenes)
    costs = [recorded.costs([place])["balanced"] for place in changing]
    assert rows["balanced"]["changing"]["cost"] == pytest.approx(sum(costs) / len(costs), abs=1e-6)


def test_the_command_records_writes_and_continues(vision, material, tmp_path, monkeypatch, capsys):
    texts = ([*COLOURS, evidence.NOTHING], functional.normalize(torch.randn(5, 32), dim=-1))
    monkeypatch.setattr(evidence, "load_text_model", lambda *_, **__: (vision, Preprocessor(IMAGE_SIZE), None))
    monkeypatch.setattr(evidence, "load_material", lambda: {"held out": material})
    monkeypatch.setattr(evidence, "text_embeddings", lambda *_: texts)
    monkeypatch.setattr(evidence, "default_tower_dir", lambda: tmp_path / "cache" / "tower")
    monkeypatch.setattr(composed_clips, "MOTIONS", {name: MOTIONS[name] for name in ("still", "crossing")})
    specs = [DENSE, FIRST, MethodSpec("every 4", "every k", "every", {"k": 4}, control=True)]
    monkeypatch.setattr(evidence, "methods_of", lambda *_: specs)
    arguments = (accuracy.accuracy_report, accuracy_table, "accuracy", accuracy.plot_accuracy)
    main = evidence.command(*arguments, clips=1, frames=16)
    output = tmp_path / "out" / "accuracy.json"
    for _ in range(2):
        main(output=output)
        shown = capsys.readouterr()
        assert "every 4" in shown.out
    assert "pass" not in shown.err
    assert {path.name for path in output.parent.iterdir()} == {"accuracy.json", "accuracy.png"}
    assert set(rows_of(json.loads(output.read_text()))) == {"dense", FIRST.name, "every 4"}


def test_readmes_table_of_delays_says_what_is_looked_at():
    row = {"name": "every 4", "family": "every k", "control": True, "cost": 0.25, "delay": 3.0, "interval": None}
    row["censored"] = 2
    ours = row | {"name": "balanced", "family": "presets", "control": False}
    table = reaction_table(
        {
            "command": "python -m eval.vision.reaction",
            "recorded": {"settings": {"after": 40}},
            "own": {"results": [ours, row], "events": 9, "scenes": 4, "dense_delay": 1.5, "left_out": 1},
        }
    )
    assert "| *baseline:* every 4 | 0.250 | 3.0 | 2 |  |  |" in table
    assert "events not followed in time" in table and "41 frames from an event on" in table
    assert "lower bound" in table and "{" not in table


def test_a_table_shows_the_defaults_and_the_controls_at_their_cost():
    def row(name, family, cost, control=False):
        return {"name": name, "family": family, "cost": cost, "control": control}

    presets = [row("thrifty", "presets", 0.1), row("balanced", "presets", 0.2)]
    modes = [row("context, 0.01", "context", 0.3), row("context, 0.05", "context", 0.2)]
    controls = [row(f"every {k}", "every k", 1 / k, True) for k in (2, 4, 5, 8)]
    shown = [one["name"] for one in rows_shown([*presets, *modes, *controls])]
    assert shown == ["thrifty", "balanced", "context, 0.01", "every 5"]
