"""Recordings: what is sampled, what is kept, what is recorded anew, and by several processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import recordings as eval_record
from eval.recordings import (
    Recorder,
    RecordSettings,
    Scene,
    drawn_frames,
    frames_around_changes,
    passes_of,
    record,
)
from neuroflow_hf.evaluation import recordings as stored
from neuroflow_hf.evaluation.methods import MethodSpec
from neuroflow_hf.evaluation.settings import DENSE, FIRST
from neuroflow_hf.video.preprocess import Preprocessor
from tests.conftest import IMAGE_SIZE

PREPROCESS = Preprocessor(IMAGE_SIZE)
SETTINGS = RecordSettings(dense_every=4, before=2, after=3)
CONTEXT = MethodSpec("context", "context", "stream", {"mode": "context", "threshold": 0.01})
EVERY = MethodSpec("every 5", "every k", "every", {"k": 5}, control=True)
MERGED = MethodSpec("ToMe 4", "ToMe", "merged", {"r": 4}, control=True)
SPECS = [DENSE, CONTEXT, FIRST, EVERY, MERGED]
COUNT = 24


def make_scene(seed, count=COUNT, change=10):
    """Grey noise in which a stripe moves; another thing is seen from frame `change` on."""
    still = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)

    def frames():
        for number in range(count):
            image = still.copy()
            image[:, number % IMAGE_SIZE] = 255
            yield image, None if number < change else "cat"

    return Scene(f"scene {seed}", count, frames, (change,), identity=str(seed), group="stripe")


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
    around = frames_around_changes(make_scene(0, 100, 50), RecordSettings())
    assert np.flatnonzero(around).tolist() == list(range(46, 91))
    many = replace(make_scene(0, 1000), changes=tuple(range(20, 1000, 100)))
    around = frames_around_changes(many, RecordSettings(before=1, after=0, most_changes=3))
    assert np.flatnonzero(around).tolist() == [19, 20, 419, 420, 919, 920]


def test_a_recording_holds_what_methods_give(vision):
    found = {recording.spec.name: recording for recording in record(vision, PREPROCESS, SCENES, SPECS, SETTINGS)}
    frames = [list(scene.frames()) for scene in SCENES]
    pixels = [torch.cat([PREPROCESS(frames[b][t][0]) for b in range(3)]) for t in range(COUNT)]
    with torch.inference_mode():
        dense = torch.stack([vision(pixel_values=frame).pooler_output for frame in pixels])
        stream = vision.new_stream(batch_size=3, **CONTEXT.options)
        outputs = [vision(pixel_values=frame, stream=stream) for frame in pixels]
    streamed = torch.stack([output.pooler_output for output in outputs])
    for column, scene in enumerate(SCENES):
        sampled = drawn_frames(scene, SETTINGS) | frames_around_changes(scene, SETTINGS)
        for name, expected in (("dense", dense), ("context", streamed)):
            places, embeddings = found[name].of(scene.name)
            assert places.tolist() == np.flatnonzero(sampled).tolist()
            torch.testing.assert_close(embeddings, expected[places, column], atol=2e-3, rtol=2e-3)
            places, embeddings = found[name].of(scene.name, drawn=True)
            assert places.tolist() == np.flatnonzero(drawn_frames(scene, SETTINGS)).tolist()
            torch.testing.assert_close(embeddings, expected[places, column], atol=2e-3, rtol=2e-3)
        assert found["context"].labels_of(scene.name) == [label for _, label in frames[column]]
        assert torch.equal(found["context"].cost_of(scene.name), torch.stack([one.cost for one in outputs])[:, column])
        _, first = found[FIRST.name].of(scene.name)
        assert torch.equal(first, first[:1].expand_as(first))
    assert found["context"].nbytes[1:].unique().tolist() == [stream.nbytes]
    assert found["dense"].cost.unique().tolist() == [1.0]
    assert found["ToMe 4"].cost.shape == (COUNT, 3) and found["ToMe 4"].cost.unique().numel() == 1
    assert found["context"].about["settings"]["dense_every"] == 4


def test_scenes_of_one_batch_are_as_alone(vision):
    together = record(vision, PREPROCESS, SCENES, [CONTEXT], SETTINGS)[0]
    for scene in SCENES:
        alone = record(vision, PREPROCESS, [scene], [CONTEXT], SETTINGS)[0]
        torch.testing.assert_close(together.of(scene.name)[1], alone.of(scene.name)[1], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(together.cost_of(scene.name), alone.cost_of(scene.name))


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
    assert sorted(passes) == sorted([together, ["context"], ["ToMe 4"]])
    before = {spec.name: recorder.load(SCENES, spec) for spec in SPECS}
    passes.clear()
    recorder.run([SCENES], SPECS)
    assert passes == []
    recorder.path(SCENES, CONTEXT).unlink()  # as after a stop in the middle
    recorder.run([SCENES], SPECS)
    assert passes == [["context"]]
    for spec in SPECS:
        after = recorder.load(SCENES, spec)
        assert torch.equal(after.embeddings, before[spec.name].embeddings)
        assert torch.equal(after.cost, before[spec.name].cost)
        assert after.spec == spec and after.scenes == tuple(scene.name for scene in SCENES)


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
    monkeypatch.setattr(stored, "fingerprint", lambda tower: "trained on")
    others.append(make_recorder(vision, tmp_path).path(SCENES, CONTEXT))
    assert len({path, *others}) == 8
    with pytest.raises(FileNotFoundError, match="context is not recorded"):
        recorder.load(SCENES, CONTEXT)


def test_a_pass_that_fails_leaves_nothing_behind(vision, tmp_path):
    def broken():
        yield from list(make_scene(0).frames())[:5]

    recorder = make_recorder(vision, tmp_path)
    with pytest.raises(ValueError, match="Scene scene 0 ends after 5 frames; expected 24"):
        recorder.run([[replace(SCENES[0], frames=broken)]], [DENSE])
    assert list(tmp_path.iterdir()) == []


def test_scenes_that_cannot_be_recorded_together_are_refused(vision, tmp_path):
    recorder = make_recorder(vision, tmp_path)
    with pytest.raises(ValueError, match=r"\[24, 30\] frames"):
        recorder.run([[SCENES[0], make_scene(5, 30)]], [DENSE])
    with pytest.raises(ValueError, match="one name"):
        recorder.run([[SCENES[0], SCENES[0]]], [DENSE])
    longer = replace(SCENES[0], count=20)
    with pytest.raises(ValueError, match="goes on after 20 frames"):
        recorder.run([[longer]], [DENSE])
    with pytest.raises(ValueError, match="`dense_every` is 0"):
        RecordSettings(dense_every=0)


def test_methods_that_hold_dense_frames_are_recorded_together():
    assert [[spec.name for spec in together] for together in passes_of(SPECS)] == [
        ["dense", FIRST.name, "every 5"],
        ["context"],
        ["ToMe 4"],
    ]


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from neuroflow_hf import NeuroFlowSiglipVisionModel
from tests.eval.test_recordings import PREPROCESS, SCENES, SETTINGS, SPECS, make_scene
from eval.recordings import Recorder
model = NeuroFlowSiglipVisionModel.from_pretrained(sys.argv[1]).eval()
recorder = Recorder(model, PREPROCESS, Path(sys.argv[2]), SETTINGS)
mine = recorder.run([SCENES, [make_scene(7)]], SPECS)
# one write, for the line of the other process must not come between
sys.stdout.write(f"{{recorder.processes.index}} of {{recorder.processes.count}} did {{mine}}\\n")
assert not recorder.missing(SCENES, SPECS)  # all of them wait for each other
"""


def test_two_processes_record_what_one_records(vision, tmp_path):
    folder, script, root = tmp_path / "model", tmp_path / "script.py", Path(__file__).parents[2]
    vision.save_pretrained(folder)
    script.write_text(SCRIPT.format())
    one = make_recorder(vision, tmp_path / "one")
    batches = [SCENES, [make_scene(7)]]
    one.run(batches, SPECS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    run = subprocess.run(
        [*launch, str(folder), str(tmp_path / "two")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    done = [line.split() for line in run.stdout.splitlines()]
    assert sorted(line[0] for line in done) == ["0", "1"]
    assert sum(int(line[-1]) for line in done) == 6 and min(int(line[-1]) for line in done) >= 1
    two = make_recorder(vision, tmp_path / "two")
    assert not two.jobs(batches, SPECS)
    for scenes in batches:
        for spec in SPECS:
            before, after = one.load(scenes, spec), two.load(scenes, spec)
            torch.testing.assert_close(after.embeddings, before.embeddings, atol=2e-3, rtol=2e-3)
            assert torch.equal(after.cost, before.cost) and torch.equal(after.labels, before.labels)
