"""How motion masks are judged: truth, boxes and controls on hand-made cases, and a tiny model's clips."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.vision.composed_bench import Clip, measure_clips
from eval.vision.motion_masks import (
    MASK_COLUMNS,
    OBJECT_COLUMNS,
    box_iou,
    box_of,
    expected,
    labels_table,
    mask_iou,
    mask_row,
    masks_table,
    matches,
    measure_motion,
    moving_boxes,
    objects_table,
    patch_mask,
    pixel_differences,
)
from neuroflow_hf.utils.processes import Processes
from recipes.composed_clips import Truth
from tests.clip_bench import TinyBench
from tests.conftest import GRID


def square(top, left, side=8, of=24):
    mask = np.zeros((of, of), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def clip_of(*masks, motion="crossing"):
    """A clip of one actor with these masks [24, 24], one a frame."""
    truths = tuple(Truth(("cat",), mask[None], (mask.sum() / 64,)) for mask in masks)
    return Clip(SimpleNamespace(motion=motion), None, truths, None)


def test_change_is_what_is_covered_now_or_was_before_and_what_stands_still_is_neither():
    clip = clip_of(square(0, 0), square(0, 8), square(0, 8))
    thing, change = expected(clip, 1, GRID)
    assert thing.sum() == 4 and thing[:2, 2:4].all()
    assert change.sum() == 8 and change[:2, :4].all()
    assert expected(clip, 2, GRID) == (None, None)
    thing, change = expected(clip_of(square(0, 0), np.zeros((24, 24), bool)), 1, GRID)
    assert thing is None and change.sum() == 4


def test_where_the_camera_moves_everything_changes():
    thing, change = expected(clip_of(square(0, 0), square(0, 0), motion="moving camera"), 1, GRID)
    assert thing.sum() == 4 and change.all()


def test_only_things_that_moved_and_are_seen_have_boxes():
    clip = clip_of(square(0, 0), square(0, 8), square(0, 8), square(0, 22))
    assert moving_boxes(clip, 1, GRID) == [(0, (0, 2, 2, 4))]
    assert moving_boxes(clip, 2, GRID) == []
    assert moving_boxes(clip, 3, GRID) == []  # a quarter of it is left in the picture


def test_masks_of_pixels_and_patches():
    mask = np.random.default_rng(0).random((5, 6)) < 0.4
    pixels = mask.repeat(4, axis=0).repeat(4, axis=1)
    for least_share in (0.0, 0.5, 0.99):
        assert np.array_equal(patch_mask(pixels, (5, 6), least_share), mask)
    pixels = np.zeros((8, 8), dtype=bool)
    pixels[3:5, 0:4] = True  # in two patches, half a row of pixels in each
    assert patch_mask(pixels, (2, 2)).tolist() == [[True, False], [True, False]]
    assert not patch_mask(pixels, (2, 2), 0.25).any()


def test_intersection_over_union():
    one, other, nothing = (torch.tensor([row], dtype=torch.bool) for row in ([1, 1, 0], [0, 1, 1], [0, 0, 0]))
    assert mask_iou(one, other) == pytest.approx(1 / 3)
    assert [mask_iou(one, one), mask_iou(nothing, nothing), mask_iou(one, nothing)] == [1, 1, 0]


def test_boxes_and_their_overlap():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1, 2], mask[3, 4] = True, True
    assert box_of(mask) == (1, 2, 4, 5)
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 2, 2), (0, 1, 2, 3)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0 == box_iou((0, 0, 1, 1), (0, 2, 1, 3))


def test_every_box_is_matched_once_and_the_best_pairs_first():
    boxes = [(0, 0, 2, 2), (4, 4, 6, 6)]
    assert matches([(0, 0, 2, 3), (0, 0, 2, 2), (4, 4, 6, 6)], boxes) == [(1, 0), (2, 1)]
    assert matches([(0, 0, 6, 6)], [(0, 0, 1, 1)]) == []
    assert matches([], boxes) == [] == matches(boxes, [])


def test_a_masks_row_has_what_applies():
    thing, change = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    thing[0, 0], change[0] = True, True
    assert mask_row(change, thing, change) == (0.5, 1.0, pytest.approx(np.nan, nan_ok=True))
    row = mask_row(thing, None, None)
    assert np.isnan(row[:2]).all() and row[2] == 0.25


def test_pixel_differences_are_by_patch():
    images = np.zeros((2, 24, 24, 3), dtype=np.uint8)
    images[1, :4, 4:8] = 60
    found = pixel_differences(images, GRID)
    assert found.shape == (1, *GRID) and found[0, 0, 1] == 60 and found.sum() == 60


def test_clips_are_measured_and_controls_do_what_they_must(model, tmp_path):
    measured = measure_clips(
        TinyBench(model), measure_motion, 1, 16, Processes(), tmp_path, motions=("crossing", "still", "several")
    )
    clips = {motion: [figures] for motion, figures in measured}
    every = [figures for _, figures in measured]
    everything = masks_table(every)["everything"]
    assert everything["false share"]["value"] == 1 and 0 < everything["thing"]["value"] < 1
    assert everything["thing"]["value"] <= everything["change"]["value"]
    still, own = (masks_table(clips[name])["context, last_update, 0.01"] for name in ("still", "crossing"))
    assert still["false share"]["value"] == 0 and still["thing"]["value"] is None
    assert own["change"]["value"] > 0.3
    objects = objects_table(every)["everything"]
    assert objects_table(clips["still"])["everything"]["things"] == 0 < objects["things"]
    assert objects["matched"] <= objects["things"]
    for row in labels_table(every).values():
        assert row["object"]["value"] is None or 0 <= row["object"]["value"] <= 1
    assert set(MASK_COLUMNS) <= set(own) and set(OBJECT_COLUMNS) <= set(objects)


def mean_brightness(bench, clip):
    """A measurement that takes no time."""
    return {"mean": clip.images.mean((1, 2, 3))}


def test_an_interrupted_measurement_is_continued(model, tmp_path, monkeypatch):
    bench, composed = TinyBench(model), []

    def interrupted(motion, number, frames):
        composed.append(motion)
        if len(composed) == 2:
            raise KeyboardInterrupt
        return TinyBench.clip(bench, motion, number, frames)

    monkeypatch.setattr(bench, "clip", interrupted)
    arguments = (bench, mean_brightness, 1, 16, Processes(), tmp_path, ("still", "crossing", "several"))
    with pytest.raises(KeyboardInterrupt):
        measure_clips(*arguments)
    continued = measure_clips(*arguments)
    assert composed == ["still", "crossing", "crossing", "several"]
    again = measure_clips(*arguments)
    assert len(composed) == 4
    for (_, one), (_, other) in zip(continued, again, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)
    bench.weights = "others"  # and nothing is taken for what it is not
    measure_clips(*arguments)
    assert len(composed) == 7


def test_readmes_table_is_made_of_the_report(model, tmp_path):
    from eval.docs.labels import motion_table

    measured = measure_clips(
        TinyBench(model), measure_motion, 1, 16, Processes(), tmp_path, motions=("crossing", "still")
    )
    clips = [figures for _, figures in measured]
    report = {
        "command": "python -m eval.vision.motion_masks",
        "clips": {"in_all": 2, "frames": 16},
        "labels_known": 4,
        "least_iou": 0.3,
        "masks": masks_table(clips),
        "objects": objects_table(clips),
        "labels": labels_table(clips),
    }
    lines = motion_table(report).splitlines()
    assert {line.count("|") for line in lines[:9]} == {10} and not lines[9]
    assert "baseline: everything | " in lines[7] and " | 100% | " in lines[7]
