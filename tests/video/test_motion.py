"""Motion masks and moving objects: against plain loops, on moving squares with known truth, and in a run."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuroflow_hf.video.labels import Labels
from neuroflow_hf.video.motion import motion_mask, without_small_regions
from neuroflow_hf.video.objects import (
    MovingObject,
    connected_objects,
    object_line,
    with_embeddings,
)
from neuroflow_hf.video.overlay import MOVING, outline_objects
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import VideoReader
from neuroflow_hf.video.run import run_video
from tests.cli.test_run import call, write_clip
from tests.conftest import GATED_MODES, GRID, IMAGE_SIZE, PATCH_SIZE


def naive_regions(mask):
    """The connected regions of one mask [h, w], each a set of places."""
    left = {(row, column) for row, column in np.argwhere(mask)}
    while left:
        region = edge = {left.pop()}
        while edge:
            near = {
                (row + down, column + right) for row, column in edge for down in (-1, 0, 1) for right in (-1, 0, 1)
            }
            edge = near & left
            region, left = region | edge, left - edge
        yield region


@st.composite
def masks(draw):
    batch, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed, share = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.1, 0.35, 0.5, 0.8]))
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < share


@given(masks(), st.integers(1, 5))
def test_small_regions_go_and_others_stay(mask, least):
    kept = without_small_regions(mask, least)
    for before, after in zip(mask.numpy(), kept.numpy(), strict=True):
        expected = [region for region in naive_regions(before) if len(region) >= least]
        assert set(map(tuple, np.argwhere(after))) == set().union(*expected)


# --- moving squares ------------------------------------------------------------------------------------------------


def moving_squares(num_frames, places):
    """
    Frames [1, 3, 24, 24] of noise that stands still, with squares of 2x2 patches before it, and where they are, bool
    [6, 6]. `places(t)`: row and column of each, in patches.
    """
    generator = torch.Generator().manual_seed(0)
    ground = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    square = 3 * torch.randn(3, 2 * PATCH_SIZE, 2 * PATCH_SIZE, generator=generator)
    for time in range(num_frames):
        frame, truth = ground.clone(), torch.zeros(GRID, dtype=torch.bool)
        for row, column in places(time):
            top, left = row * PATCH_SIZE, column * PATCH_SIZE
            frame[0, :, top : top + 2 * PATCH_SIZE, left : left + 2 * PATCH_SIZE] = square
            truth[row : row + 2, column : column + 2] = True
        yield frame, truth


def run_squares(vision, places, num_frames=4, **gate):
    """Outputs, truths and the stream's gate."""
    stream = vision.new_stream(**gate)
    frames, truths = zip(*moving_squares(num_frames, places), strict=True)
    with torch.no_grad():
        return [vision(pixel_values=frame, stream=stream) for frame in frames], truths, stream.gate


@pytest.mark.parametrize("mode", GATED_MODES)
@pytest.mark.parametrize("options", [{}, {"dilate": 1}, {"max_age": 3}, {"keyframe_interval": 2}])
def test_what_changed_is_where_the_square_is_and_where_it_was(vision, mode, options):
    outputs, truths, gate = run_squares(vision, lambda time: [(2, time)], mode=mode, **options)
    assert not motion_mask(outputs[0], gate).any()
    for before, now, output in zip(truths, truths[1:], outputs[1:], strict=False):
        assert torch.equal(motion_mask(output, gate)[0], before | now)


@pytest.mark.parametrize("preset", ["faithful", "balanced", "thrifty"])
def test_sentinels_and_held_frames_do_not_move(vision, preset):
    outputs, truths, gate = run_squares(vision, lambda time: [(2, time)], preset=preset)
    encoded = truths[0]  # where the square was when patches were last encoded
    for now, output in zip(truths[1:], outputs[1:], strict=False):
        changed = encoded | now
        assert torch.equal(motion_mask(output, gate)[0], changed)
        assert not torch.equal(output.active_mask[0], changed)
        if output.active_mask.any():
            encoded = now


def test_against_the_running_mean_it_is_where_the_square_is(vision):
    # it passes over patches that were background for long
    outputs, truths, gate = run_squares(
        vision, lambda time: [] if time < 3 else [(2, time - 3)], 7, mode="context", reference="ema", ema_rate=0.01
    )
    for truth, output in zip(truths[3:], outputs[3:], strict=True):
        assert torch.equal(motion_mask(output, gate, threshold=0.3)[0], truth)


def test_a_square_that_appears_and_goes(vision):
    outputs, truths, gate = run_squares(vision, lambda time: [(0, 0)] if time == 2 else [], 5, mode="context")
    assert [bool(motion_mask(output, gate).any()) for output in outputs] == [False, False, True, True, False]
    assert torch.equal(motion_mask(outputs[3], gate)[0], truths[2])


def test_single_patches_are_left_out_unless_asked_for(vision):
    stream = vision.new_stream(mode="context")
    frame = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vision(pixel_values=frame, stream=stream)
        frame[..., 8:12, 8:12] += 1
        output = vision(pixel_values=frame, stream=stream)
    assert not motion_mask(output, stream.gate).any()
    assert motion_mask(output, stream.gate, least_patches=1).nonzero().tolist() == [[0, 2, 2]]


def test_streams_and_clips_are_told_apart(vision):
    frames = torch.cat([frame for frame, _ in moving_squares(4, lambda time: [(2, time)])])
    still = frames[:1].expand(4, -1, -1, -1)
    stream = vision.new_stream(batch_size=2, mode="context")
    with torch.no_grad():
        output = vision.get_video_features(torch.stack((frames, still)), stream)
    found = motion_mask(output, stream.gate)
    assert found.shape == (2, 4, *GRID)
    assert found[0, 1:].flatten(1).any(-1).all() and not found[:, 0].any() and not found[1].any()


def test_global_motion_is_subtracted(vision):
    outputs, _, gate = run_squares(
        vision, lambda time: [(2, time)], 2, mode="context", global_motion_norm=True, threshold=0.01
    )
    surprise = outputs[1].surprise[0]
    expected = without_small_regions(surprise - surprise.mean() > 0.01, 2)
    assert torch.equal(motion_mask(outputs[1], gate)[0], expected)


def test_what_was_not_looked_at_has_no_motion_mask(vision):
    for mode in ("dense", "hold"):
        outputs, _, gate = run_squares(vision, lambda time: [], 2, mode=mode)
        with pytest.raises(ValueError, match=f"mode '{mode}' did not compare the frame"):
            motion_mask(outputs[1], gate)
    outputs, _, gate = run_squares(vision, lambda time: [(0, time)], 2, mode="context", threshold=-1)
    with pytest.raises(ValueError, match="so everything moves"):
        motion_mask(outputs[1], gate)
    assert motion_mask(outputs[1], gate, threshold=0.01).any()
    with pytest.raises(ValueError, match="`least_patches` is 0"):
        motion_mask(outputs[1], gate, threshold=0.01, least_patches=0)


# --- objects -------------------------------------------------------------------------------------------------------


def test_the_largest_object_comes_first():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 3, 0] = mask[0, 2:, 3:] = True
    first, second = connected_objects(mask)
    assert [item.patches for item in first] == [6, 1, 1] and second == []
    assert [item.box for item in first] == [(2, 3, 4, 6), (0, 0, 1, 1), (3, 0, 4, 1)]
    with pytest.raises(ValueError, match="streams, grid rows, grid columns"):
        connected_objects(mask[0])


def test_embeddings_are_the_heads_of_the_objects_patches(model, vision):
    outputs, _, gate = run_squares(vision, lambda time: [(2, time)], 2, mode="context")
    (objects,) = connected_objects(motion_mask(outputs[1], gate))
    tokens = outputs[1].last_hidden_state[0]
    (found,) = with_embeddings(vision, tokens, objects)
    with torch.no_grad():
        expected = vision.head(tokens.view(*GRID, -1)[objects[0].mask].unsqueeze(0))[0]
    torch.testing.assert_close(found.embedding, expected)
    everything = MovingObject(torch.ones(GRID, dtype=torch.bool), (0, 0, *GRID))
    torch.testing.assert_close(
        with_embeddings(vision, tokens, [everything])[0].embedding, outputs[1].pooler_output[0], atol=1e-5, rtol=1e-4
    )
    assert with_embeddings(model, tokens, []) == []
    labels = Labels(("a", "b"), "{}", torch.stack([-expected, expected]) / expected.norm(), 5.0, -1.0)
    (found,) = with_embeddings(vision, tokens, objects, labels)
    assert found.label == "b" and found.score == pytest.approx(torch.tensor(4.0).sigmoid().item())


def test_features_of_other_patches_are_refused(vision):
    outputs, _, gate = run_squares(vision, lambda time: [(2, time)], 2, mode="eliminate")
    (objects,) = connected_objects(motion_mask(outputs[1], gate))
    with pytest.raises(ValueError, match="the grid 36 patches; expected"):
        with_embeddings(vision, outputs[1].last_hidden_state[0], objects)
    with pytest.raises(ValueError, match="no pooling head"):
        with_embeddings(torch.nn.Linear(1, 1), outputs[1].last_hidden_state[0], objects)


def test_boxes_in_pixels():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2:4, 1:6] = True
    ((item,),) = connected_objects(mask.unsqueeze(0))
    assert object_line(item, 60, 120, covered=0.5)["box"] == [10, 10, 60, 20]
    assert object_line(item, 60, 120) == {"box": [20, 20, 120, 40], "patches": 10}
    json.dumps(object_line(item, 60, 120))


# --- the run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A bright square of 12 pixels moves by 2 a frame over noise of 64x48 that stands still."""
    return write_clip(tmp_path_factory.mktemp("clip") / "square.mkv", frames=8)


def test_a_run_finds_the_square_and_labels_it(clip, vision, tmp_path):
    labels = Labels(("a dog", "a cat"), "{}", torch.eye(2, 32), 5.0, -1.0)
    how = {"objects": True, "labels": labels, "dense_every": 0}
    run_video(VideoReader(clip), vision, Preprocessor(resolution=24), tmp_path, {"mode": "context"}, **how)
    lines = [json.loads(line) for line in (tmp_path / "frames.jsonl").read_text().splitlines()]
    assert lines[0]["objects"] == []
    for place, line in enumerate(lines[1:], start=1):
        left, top, right, bottom = line["objects"][0]["box"]
        # whole patches, which are 10.7 x 8 pixels, around where it is and was
        assert left <= 2 * place and 2 * place + 12 <= right and top <= 16 and bottom >= 28
        assert right - left <= 43 and bottom - top <= 32
        assert all(item["label"] in labels.names and 0 < item["confidence"] < 1 for item in line["objects"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["objects"]["frames"] == 7 and summary["objects"]["per_frame"]["min"] == 0


@pytest.mark.parametrize("options", [{"mode": "dense"}, {"mode": "hold"}, {"mode": "context", "threshold": -1}])
def test_a_gate_that_does_not_look_finds_no_objects(clip, vision, tmp_path, options):
    with pytest.raises(ValueError, match="with these options it does not look"):
        run_video(VideoReader(clip), vision, Preprocessor(resolution=24), tmp_path, options, objects=True)
    assert not list(tmp_path.iterdir())


def test_boxes_are_drawn_where_they_are_and_captions_inside_the_picture():
    picture = np.zeros((240, 480, 3), dtype=np.uint8)
    drawn = outline_objects(picture, [((20, 30, 60, 50), "")], scale=2)
    blue = (drawn == MOVING).all(-1)
    rows, columns = np.nonzero(blue)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 99, 40, 119)
    assert not blue[64:96, 44:116].any() and not picture.any()
    for box in [(0, 0, 30, 20), (460, 0, 480, 20), (0, 230, 20, 240), (470, 230, 480, 240)]:
        drawn = outline_objects(picture, [(box, "a caption")], 1)
        text = (drawn == MOVING).all(-1).sum() - (outline_objects(picture, [(box, "")], 1) == MOVING).all(-1).sum()
        assert text > 300


def test_the_command_finds_objects(clip, model_folder, tmp_path):
    result = call("run", clip, "--model", model_folder, "--out", tmp_path, "--mode", "context", "--objects")
    assert result.exit_code == 0, result.output
    assert "Moving objects: on 7 of 8 frames" in result.stdout
