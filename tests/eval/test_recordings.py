"""Recordings: what is sampled, what is kept, what is recorded anew, and by several processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval import recordings as eval_record
from eval.recordings import (
    Recorder,
    RecordSettings,
    Scene,
    drawn_frames,
    passes_of,
    sampled_frames,
)
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.evaluation import recordings as stored
from neuroflow_hf.evaluation.methods import MethodSpec
from neuroflow_hf.evaluation.settings import DENSE, FIRST
from neuroflow_hf.video.preprocess import Preprocessor
from tests.conftest import IMAGE_SIZE
from tests.processes import call_in_two

PREPROCESS = Preprocessor(IMAGE_SIZE)
SETTINGS = RecordSettings(dense_every=4, before=2, after=3)
CONTEXT = MethodSpec("context", "context", "stream", {"mode": "context", "threshold": 0.01})
EVERY = MethodSpec("every 5", "every k", "every", {"k": 5}, control=True)
SMALLER = MethodSpec("16 px", "smaller input", "smaller", {"resolution": 16}, control=True)
SPECS = [DENSE, CONTEXT, FIRST, EVERY, SMALLER]
COUNT = 24


def make_scene(seed, count=COUNT, change=10):
    """Grey noise in which a stripe moves; another thing is seen from frame `change` on."""
    still = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)

    def frames():
        for number in range(count):
            image = still.copy()
            image[:, number % IMAGE_SIZE] = 255
            yield image

    labels = (None,) * change + ("cat",) * (count - change)
    return Scene(f"scene {seed}", frames, labels, identity=str(seed), group="stripe")


SCENES = [make_scene(seed, change=8 + seed) for seed in range(3)]


def make_recorder(vision, folder, **options):
    return Recorder(vision, PREPROCESS, folder, **{"settings": SETTINGS, **options})


def test_one_frame_of_every_few_is_drawn_and_never_the_first():
    scene = make_scene(0, 1000)
    drawn = drawn_frames(scene, RecordSettings(dense_every=8))
    assert drawn.sum() == 125 and not drawn[0]
    assert (drawn.reshape(125, 8).sum(1) == 1).all()
    assert len(set(np.flatnonzero(drawn) % 8)) == 8  # no period that methods could share
    np.testing.assert_array_equal(drawn, drawn_frames(scene, RecordSettings(dense_every=8)))
    assert not np.array_equal(drawn, drawn_frames(make_scene(1, 1000), RecordSettings(dense_every=8)))
    assert drawn_frames(scene, RecordSettings(dense_every=1)).sum() == 999


def test_all_frames_around_changes_are_sampled():
    scene, settings = make_scene(0, 100, 50), RecordSettings()
    around = sampled_frames(scene, settings) & ~drawn_frames(scene, settings)
    assert sampled_frames(scene, settings)[46:91].all() and not around[:46].any() and not around[91:].any()
    many = replace(scene, labels=tuple("ab"[frame // 100 % 2] for frame in range(1000)))
    settings = RecordSettings(dense_every=1000, before=1, after=0, most_changes=3)
    sampled = sampled_frames(many, settings) & ~drawn_frames(many, settings)
    assert set(np.flatnonzero(sampled)) <= {99, 100, 499, 500, 899, 900} and sampled.sum() >= 5


def recorded(vision, folder, scenes, specs):
    """Record methods, and load them: by method, a recording for each scene."""
    recorder = make_recorder(vision, folder)
    recorder.run([scenes], specs)
    return {spec.name: recorder.load(scenes, spec) for spec in specs}


def test_a_recording_holds_what_methods_give(vision, tmp_path):
    found = recorded(vision, tmp_path, SCENES, SPECS)
    frames = [list(scene.frames()) for scene in SCENES]
    pixels = [torch.cat([PREPROCESS(frames[b][t]) for b in range(3)]) for t in range(COUNT)]
    with torch.inference_mode():
        dense = torch.stack([vision(pixel_values=frame).pooler_output for frame in pixels])
        stream = vision.new_stream(batch_size=3, **CONTEXT.options)
        outputs = [vision(pixel_values=frame, stream=stream) for frame in pixels]
    streamed = torch.stack([output.pooler_output for output in outputs])
    costs = torch.stack([output.cost for output in outputs])
    for column, scene in enumerate(SCENES):
        for name, expected in (("dense", dense), ("context", streamed)):
            one = found[name][column]
            assert one.frames.tolist() == np.flatnonzero(sampled_frames(scene, SETTINGS)).tolist()
            assert one.frames[one.drawn].tolist() == np.flatnonzero(drawn_frames(scene, SETTINGS)).tolist()
            torch.testing.assert_close(one.embeddings, expected[one.frames, column], atol=2e-3, rtol=2e-3)
        assert torch.equal(found["context"][column].cost, costs[:, column])
        first = found[FIRST.name][column].embeddings
        assert torch.equal(first, first[:1].expand_as(first))
        assert found["context"][column].nbytes[1:].unique().tolist() == [stream.nbytes // 3]
        assert found["dense"][column].cost.unique().tolist() == [1.0]
        assert found["16 px"][column].cost.shape == (COUNT,)
        assert found["16 px"][column].cost.unique().numel() == 1
    assert found["context"][0].about["settings"]["dense_every"] == 4


def test_scenes_of_one_batch_are_as_alone(vision, tmp_path):
    together = recorded(vision, tmp_path, SCENES, [CONTEXT])["context"]
    for scene, one in zip(SCENES, together, strict=True):
        (alone,) = recorded(vision, tmp_path, [scene], [CONTEXT])["context"]
        torch.testing.assert_close(one.embeddings, alone.embeddings, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(one.cost, alone.cost)


@pytest.fixture
def passes(monkeypatch):
    """The names of what was recorded, pass by pass."""
    done = []
    recording = eval_record.record

    def counted(model, preprocess, scenes, specs, *rest):
        done.append([spec.name for spec in specs])
        return recording(model, preprocess, scenes, specs, *rest)

    monkeypatch.setattr(eval_record, "record", counted)
    return done


def test_what_is_there_is_not_recorded_again(vision, tmp_path, passes):
    recorder = make_recorder(vision, tmp_path)
    recorder.run([SCENES], SPECS)
    together = ["dense", FIRST.name, "every 5"]
    assert sorted(passes) == sorted([together, ["context"], ["16 px"]])
    before = {spec.name: recorder.load(SCENES, spec) for spec in SPECS}
    passes.clear()
    recorder.run([SCENES], SPECS)
    assert passes == []
    recorder.path(SCENES, CONTEXT).unlink()  # as after a stop in the middle
    recorder.run([SCENES], SPECS)
    assert passes == [["context"]]
    for spec in SPECS:
        for after, one in zip(recorder.load(SCENES, spec), before[spec.name], strict=True):
            assert torch.equal(after.embeddings, one.embeddings) and torch.equal(after.cost, one.cost)


def test_what_was_recorded_with_something_else_is_not_used(vision, tmp_path, monkeypatch):
    recorder = make_recorder(vision, tmp_path)
    path = recorder.path(SCENES, CONTEXT)
    assert recorder.path(SCENES, replace(CONTEXT, family="another curve")) == path
    others = [
        recorder.path(SCENES, replace(CONTEXT, options={"mode": "context", "threshold": 0.02})),
        recorder.path(SCENES[:2], CONTEXT),
        recorder.path([replace(SCENES[0], identity="repainted"), *SCENES[1:]], CONTEXT),
        make_recorder(vision, tmp_path, settings=RecordSettings(dense_every=5)).path(SCENES, CONTEXT),
        Recorder(vision, Preprocessor(IMAGE_SIZE, "bilinear"), tmp_path, SETTINGS).path(SCENES, CONTEXT),
    ]
    monkeypatch.setattr(stored, "model_version", lambda *names: "edited")
    others.append(recorder.path(SCENES, CONTEXT))
    for name, other in (("fingerprint", "trained on"), ("version", "0.0")):
        monkeypatch.setattr(stored, name, lambda _, other=other: other)
        others.append(make_recorder(vision, tmp_path).path(SCENES, CONTEXT))
    assert len({path, *others}) == 9


def test_a_pass_that_fails_leaves_nothing_behind(vision, tmp_path):
    def broken():
        yield from list(make_scene(0).frames())[:5]

    recorder = make_recorder(vision, tmp_path)
    with pytest.raises(ValueError, match="longer"):
        recorder.run([[replace(SCENES[0], frames=broken)]], [DENSE])
    assert list(tmp_path.iterdir()) == []


def test_a_scene_that_goes_on_is_refused(vision, tmp_path):
    longer = replace(SCENES[0], labels=SCENES[0].labels[:20])
    with pytest.raises(ValueError, match="shorter"):
        make_recorder(vision, tmp_path).run([[longer]], [DENSE])


def test_methods_that_hold_dense_frames_are_recorded_together():
    assert [[spec.name for spec in together] for together in passes_of(SPECS)] == [
        ["dense", FIRST.name, "every 5"],
        ["context"],
        ["16 px"],
    ]


BATCHES = [SCENES, [make_scene(7)]]


def record_a_share(model, folder):
    """What one of two processes does."""
    recorder = make_recorder(NeuroFlowSiglipVisionModel.from_pretrained(model).eval(), folder)
    mine = recorder.run(BATCHES, SPECS)
    print(recorder.processes.index, recorder.processes.count, mine)
    assert not recorder.jobs(BATCHES, SPECS)  # they wait for each other


def test_two_processes_record_what_one_records(vision, tmp_path):
    vision.save_pretrained(tmp_path / "model")
    one = make_recorder(vision, tmp_path / "one")
    one.run(BATCHES, SPECS)
    printed = call_in_two(record_a_share, tmp_path / "model", tmp_path / "two")
    done = [[int(word) for word in line.split()] for line in printed]
    assert [line[:2] for line in done] == [[0, 2], [1, 2]]
    assert sum(line[2] for line in done) == 6 and min(line[2] for line in done) >= 1
    two = make_recorder(vision, tmp_path / "two")
    assert not two.jobs(BATCHES, SPECS)
    for scenes in BATCHES:
        for spec in SPECS:
            for before, after in zip(one.load(scenes, spec), two.load(scenes, spec), strict=True):
                torch.testing.assert_close(after.embeddings, before.embeddings, atol=2e-3, rtol=2e-3)
                assert torch.equal(after.cost, before.cost)
