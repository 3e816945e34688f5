"""Composed clips: every kind of motion does what it says, and the truth is that of the pixels."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from recipes.composed_clips import (
    LEAST_VISIBLE,
    MOTIONS,
    frame,
    frames,
    path_offset,
    right_labels,
    scene,
    specify,
    truth,
    view,
)

SIDE = 64
COLOURS = {"apple": (250, 10, 10), "boat": (10, 250, 10), "cat": (10, 10, 250), "dog": (250, 250, 10)}


@pytest.fixture(scope="module")
def material():
    """Plain rectangles that are called apple, boat, cat and dog, and a photograph of grey noise."""
    drawings = {
        name: [SimpleNamespace(picture=Image.new("RGBA", size, (*colour, 255))) for size in ((60, 48), (40, 60))]
        for name, colour in COLOURS.items()
    }
    grey = np.random.default_rng(0).integers(90, 160, (120, 160, 1), dtype=np.uint8).repeat(3, axis=2)
    return SimpleNamespace(drawings=drawings, grounds=[SimpleNamespace(picture=Image.fromarray(grey))])


def clip(material, motion, number=0, count=64, **options):
    return specify(material, motion, number, frames=count, side=SIDE, **options)


def label_changes(spec):
    """The frames on which another label is right than on the frame before."""
    shown = right_labels(spec)
    return tuple(number for number in range(1, spec.frames) if shown[number] != shown[number - 1])


def middles(spec):
    """Row and column of the middle of what is visible, [frames, 2]; NaN where nothing is."""
    found = []
    for number in range(spec.frames):
        rows, columns = np.nonzero(truth(spec, number).masks.any(0))
        found.append((rows.mean(), columns.mean()) if len(rows) else (np.nan, np.nan))
    return np.array(found)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_frame_depends_on_seed_motion_and_numbers_alone(material, motion):
    spec, again = clip(material, motion, 3), clip(material, motion, 3)
    streamed = list(itertools.islice(frames(spec), 30))
    for number in (29, 0, 13):
        image, known = frame(again, number)
        assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, streamed[number])
        np.testing.assert_array_equal(known.masks, truth(spec, number).masks)
    other, elsewhere = clip(material, motion, 4), clip(material, motion, 3, seed=1)
    assert not np.array_equal(frame(other, 0)[0], streamed[0])
    assert not np.array_equal(frame(elsewhere, 0)[0], streamed[0])


@pytest.mark.parametrize("motion", [*MOTIONS][:9])
def test_the_mask_is_where_the_picture_is_not_the_ground(material, motion):
    for number in range(3):
        spec = clip(material, motion, number)
        for at in range(0, 64, 7):
            image, known = frame(spec, at)
            ground = frame(replace(spec, actors=()), at)[0]
            np.testing.assert_array_equal(known.masks.any(0), (image != ground).any(-1))
            colours = [COLOURS[thing] for thing in known.things]
            for mask, colour in zip(known.masks, colours, strict=True):
                assert (image[mask] == colour).all()
            assert known.masks.sum(0).max() <= 1


def test_half_of_the_opacity_counts_as_there(material):
    fading = Image.new("RGBA", (60, 60), (255, 255, 255, 100))
    solid = Image.new("RGBA", (30, 60), (255, 255, 255, 200))
    fading.paste(solid, (0, 0))
    material = SimpleNamespace(drawings={"apple": [SimpleNamespace(picture=fading)]}, grounds=material.grounds)
    spec = clip(material, "still")
    known = truth(spec, 0)
    width = spec.actors[0].cut.shape[1]
    columns = np.nonzero(known.masks.any((0, 1)))[0]
    assert abs(columns.max() + 1 - columns.min() - width / 2) <= 1
    assert known.visible == (1.0,) and known.label == "apple"


def test_still_things_and_grounds_do_not_change(material):
    spec = clip(material, "still")
    first = frame(spec, 0)[0]
    assert all(np.array_equal(first, image) for image in frames(spec))
    assert label_changes(spec) == ()


def test_a_local_motion_is_small_and_never_ends(material):
    for number in range(4):
        path = middles(clip(material, "local", number))
        assert (np.ptp(path, axis=0) <= 0.1 * SIDE + 1).all() and np.ptp(path[:, 1]) >= 1
        assert np.abs(np.diff(path, axis=0)).sum(1)[-24:].max() > 0


def test_what_crosses_comes_and_goes_at_one_speed(material):
    spec = clip(material, "crossing", count=200)
    shares = np.array([truth(spec, number).visible[0] for number in range(200)])
    assert shares.max() == 1 and shares.min() < 0.15
    offsets = np.array([path_offset(spec.actors[0], number)[1] for number in range(200)])
    steps = np.diff(offsets)
    assert np.isclose(steps[steps > 0], 2 / spec.actors[0].period).all() and (steps < 0).sum() >= 3
    changes = label_changes(spec)
    for at in changes:
        before, after = truth(spec, at - 1), truth(spec, at)
        assert (before.visible[0] >= LEAST_VISIBLE) != (after.visible[0] >= LEAST_VISIBLE)
        assert {before.label, after.label} == {None, spec.actors[0].thing}
    assert len(changes) >= 5


def test_an_arc_is_highest_in_its_middle(material):
    spec = clip(material, "arc", count=200)
    path = middles(spec)
    assert np.ptp(path[:, 1]) > 0.4 * SIDE and np.ptp(path[:, 0]) > 0.15 * SIDE
    ends = path[:, 1].min(), path[:, 1].max()
    middle = np.abs(path[:, 1] - np.mean(ends)) < 2
    outside = (np.abs(path[:, 1] - ends[0]) < 2) | (np.abs(path[:, 1] - ends[1]) < 2)
    assert path[middle, 0].max() < path[outside, 0].min()


def test_what_oscillates_turns_back_and_keeps_its_height(material):
    spec = clip(material, "oscillating", count=200)
    offsets = np.array([path_offset(spec.actors[0], number)[1] for number in range(200)])
    turns = (np.diff(np.sign(np.diff(offsets))) != 0).sum()
    assert turns >= 5 and spec.actors[0].reach[0] == 0
    assert np.ptp(middles(spec)[:, 1]) > 0.3 * SIDE


@pytest.mark.parametrize("motion, labels", [("entering", (False, True)), ("leaving", (True, False))])
@pytest.mark.parametrize("count", [16, 64, 300])
def test_what_enters_stays_and_what_leaves_is_gone(material, motion, labels, count):
    for number in range(5):
        spec = clip(material, motion, number, count)
        (event,) = label_changes(spec)
        assert 0 < event < count - 1
        thing = spec.actors[0].thing
        seen = [truth(spec, at).label for at in (0, event - 1, event, count - 1)]
        assert seen == [thing if there else None for there in (labels[0], labels[0], labels[1], labels[1])]
        ends = [truth(spec, at).visible[0] for at in (0, count - 1)]
        assert ends == [float(there) for there in labels]
        shares = [truth(spec, at).visible[0] for at in range(count)]
        assert shares == sorted(shares, reverse=motion == "leaving")


def test_one_thing_is_replaced_by_another_at_once(material):
    spec = clip(material, "replaced")
    (event,) = label_changes(spec)
    before, after = truth(spec, event - 1), truth(spec, event)
    assert (before.label, after.label) == tuple(actor.thing for actor in spec.actors)
    assert before.label != after.label and before.visible == (1.0, 0.0) and after.visible == (0.0, 1.0)
    assert np.array_equal(frame(spec, 0)[0], frame(spec, event - 1)[0])
    assert np.array_equal(frame(spec, event)[0], frame(spec, spec.frames - 1)[0])


def test_several_are_three_things_that_move_each_in_its_own_way(material):
    spec = clip(material, "several")
    assert len({actor.thing for actor in spec.actors}) == 3
    assert {actor.path for actor in spec.actors} == {"crossing", "oscillating", "local"}
    most = max((truth(spec, number) for number in range(64)), key=lambda known: len(known.seen))
    assert len(most.seen) >= 2 and most.label == most.seen[0]
    pixels = {thing: mask.sum() for thing, mask in zip(most.things, most.masks, strict=True)}
    assert pixels[most.label] == max(pixels.values())


def test_the_camera_moves_and_the_thing_stays_in_the_scene(material):
    spec = clip(material, "moving camera", count=100)
    views = np.array([view(spec, number) for number in range(100)])
    assert (np.ptp(views, axis=0) > 3).all() and views.min() >= 0
    assert (views + SIDE <= len(spec.ground)).all()
    corners = []
    for number in range(100):
        rows, columns = np.nonzero(truth(spec, number).masks.any(0))
        if truth(spec, number).visible[0] == 1:
            corners.append((rows.min() + views[number, 0], columns.min() + views[number, 1]))
    assert len(corners) > 20 and len(set(corners)) == 1
    changed = (scene(spec, 0) != scene(spec, 8)).any(-1)
    assert changed.mean() > 0.5


def test_light_falls_slowly_and_comes_back(material):
    spec = clip(material, "light drift", count=600)
    still = replace(spec, drift=0.0)
    half = spec.drift_period // 2
    light = [frame(spec, number)[0].mean() / frame(still, number)[0].mean() for number in range(half)]
    assert light[0] == pytest.approx(1) and light[-1] == pytest.approx(1 - spec.drift, abs=0.02)
    assert max(np.abs(np.diff(light))) < 0.01 and (np.diff(light[5:]) < 0.001).all()
    assert frame(spec, spec.drift_period - 1)[0].mean() / frame(still, 0)[0].mean() == pytest.approx(1, abs=0.01)


def test_lamps_flicker_to_both_sides_and_nothing_else_changes(material):
    spec = clip(material, "flicker")
    light = np.array([image.mean() for image in frames(spec)]) / frame(replace(spec, flicker=0.0), 0)[0].mean()
    assert light.max() > 1 + 0.8 * spec.flicker and light.min() < 1 - 0.8 * spec.flicker
    assert label_changes(spec) == ()


def test_noise_is_new_in_every_frame_and_as_strong_as_it_says(material):
    spec = clip(material, "noise")
    clean = frame(replace(spec, noise=0.0), 0)[0].astype(float)
    inside = (clean > 60) & (clean < 200)  # nothing is cut off there
    noise = [(frame(spec, number)[0] - clean)[inside] for number in (0, 1)]
    assert noise[0].std() == pytest.approx(spec.noise, rel=0.1) == noise[1].std()
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.1


def test_compression_leaves_its_marks_less_on_every_twelfth_frame(material):
    spec = clip(material, "compression")
    errors = [
        np.abs(frame(spec, number)[0].astype(int) - frame(replace(spec, quality=0), number)[0]).mean()
        for number in range(36)
    ]
    assert min(errors) > 0
    assert max(errors[::12]) < min(error for number, error in enumerate(errors) if number % 12)


def test_the_last_frame_of_a_long_clip_costs_as_little_as_the_first(material):
    spec = clip(material, "crossing", count=10_000)
    image, known = frame(spec, 9_999)
    assert image.shape == (SIDE, SIDE, 3) and known.masks.shape == (1, SIDE, SIDE)
