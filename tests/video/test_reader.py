import contextlib
import json
import os
import struct
import threading
import time
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from neuroflow_hf.video.prefetch import prefetch
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import (
    DamagedVideoError,
    VideoError,
    VideoReader,
    _Clock,
    bundled_clip,
    frame_at,
    read_frames,
)

FRAMES = 40
HEIGHT, WIDTH = 48, 64


def moving_picture(count=FRAMES, height=HEIGHT, width=WIDTH):
    """Uint8 [count, height, width, 3]: fixed noise with a square that moves, so that no two frames are alike."""
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8), count, axis=0)
    for i, frame in enumerate(frames):
        frame[8:24, i : i + 16] = 255 - 5 * i
    return frames


def write_video(
    path, codec="libx264", pix_fmt="yuv420p", frames=None, times=None, muxer=None, rotation=None, options=None
):
    """Write a video at 10 frames a second, or at `times` in milliseconds."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        frames = moving_picture() if frames is None else frames
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


FASTSTART = {"movflags": "faststart"}
KINDS = {
    "faststart.mp4": {"muxer": FASTSTART},
    "plain.mp4": {},
    "h264.mkv": {},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp8.webm": {"codec": "libvpx"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264.avi": {},
    "anim.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "fragmented.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov", "frag_duration": "1000000"}},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One small video of each kind: {name: path}."""
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, **settings) for name, settings in KINDS.items()}


def read_until_error(path):
    """(frames given out, the error or None, how many frames could not be decoded)."""
    frames, reader = [], VideoReader(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for frame in reader:
                frames.append(frame)
        except VideoError as error:
            return frames, error, reader.failed_frames
    return frames, None, reader.failed_frames


def seconds(frames):
    return [frame.time for frame in frames]


def assert_prefix(frames, whole):
    for got, expected in zip(frames, whole, strict=False):
        assert got.index == expected.index
        assert got.time == pytest.approx(expected.time)
        assert np.array_equal(got.image, expected.image)


# --- the clip and whole files --------------------------------------------------------------------------------------


def test_bundled_clip_is_what_the_readme_says():
    reader = VideoReader(bundled_clip())
    assert (reader.width, reader.height, reader.fps, reader.frame_count) == (768, 576, 10.0, 100)
    frames = list(reader)
    assert [frame.index for frame in frames] == list(range(100))
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(100)])
    assert all(frame.image.shape == (576, 768, 3) and frame.image.dtype == np.uint8 for frame in frames)
    assert bundled_clip().stat().st_size < 900_000


@pytest.mark.parametrize("name", KINDS)
def test_whole_files_of_all_kinds_are_read_to_the_end(videos, name):
    reader = VideoReader(videos[name])
    frames = list(reader)
    assert [frame.index for frame in frames] == list(range(FRAMES))
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(FRAMES)], abs=0.011)
    assert (reader.width, reader.height) == (WIDTH, HEIGHT)
    assert reader.fps == pytest.approx(10)
    assert reader.frame_count == FRAMES
    assert frames[5].image.flags.c_contiguous
    if name == "ffv1.mkv":  # lossless, up to the change to YUV and back: the frames are the ones written
        inside = (slice(10, 22), slice(10, 18))
        assert abs(frames[5].image[inside].astype(int) - moving_picture()[5][inside]).max() <= 4
    assert_prefix(list(reader), frames)  # a reader can be used twice


@pytest.mark.parametrize(
    ("start", "stride", "max_frames"), [(0, 1, None), (3, 1, None), (0, 7, None), (5, 3, 4), (39, 9, 2)]
)
def test_selection_takes_the_frames_of_range(videos, start, stride, max_frames):
    whole = list(read_frames(videos["faststart.mp4"]))
    reader = VideoReader(videos["faststart.mp4"], start=start, stride=stride, max_frames=max_frames)
    chosen = list(reader)
    expected = list(range(start, FRAMES, stride))[:max_frames]
    assert [frame.index for frame in chosen] == expected
    assert reader.expected_frames == len(expected)
    assert_prefix(chosen, [whole[i] for i in expected])


@pytest.mark.parametrize(
    ("every", "expected"),
    [(0.05, range(FRAMES)), (0.1, range(FRAMES)), (0.25, [0, 3, 5, 8, 10]), (1, range(0, 40, 10))],
)
def test_of_each_interval_the_first_frame_is_taken(videos, every, expected):
    chosen = [frame.index for frame in VideoReader(videos["faststart.mp4"], every=every)]
    assert chosen[: len(expected)] == list(expected)


@pytest.mark.parametrize("bad", [{"start": -1}, {"stride": 0}, {"max_frames": 0}, {"every": 0}])
def test_selection_out_of_range_is_refused(videos, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VideoReader(videos["plain.mp4"], **bad)


def test_start_past_the_end_is_refused(videos):
    with pytest.raises(VideoError, match="expected less than 40"):
        list(read_frames(videos["plain.mp4"], start=FRAMES))
    with pytest.raises(VideoError, match="expected less than 40"):  # a time that no frame has
        frame_at(videos["plain.mp4"], FRAMES, 1000.0)


ORIENTATIONS = {
    (1, 0, 0, 1): lambda image: image,
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (0, -1, 1, 0): lambda image: np.rot90(image),
    (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).transpose(1, 0, 2),
}


def three_corners():
    """A picture without symmetry: bright at the upper left, grey at the upper right, dark elsewhere."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:16, :16], image[:16, 48:] = 255, 120
    return image


def set_display_matrix(path, a, b, c, d, scale=1):
    """Write a display matrix into the track header of an mp4 file."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    values = (int(value * scale * 65536) for value in (a, b, c, d))
    a, b, c, d = values
    struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_frames_are_turned_and_mirrored_as_players_show_them(tmp_path, matrix):
    image = three_corners()
    path = write_video(tmp_path / "phone.mp4", frames=[image] * 4)
    expected = ORIENTATIONS[matrix](image).astype(int)
    for scale in (1, 0.5):
        set_display_matrix(path, *matrix, scale=scale)
        reader = VideoReader(path)
        frames = list(reader)
        assert len(frames) == 4 and (reader.height, reader.width) == expected.shape[:2]
        for frame in frames:
            assert frame.image.shape == expected.shape and frame.image.flags.c_contiguous
            assert np.abs(frame.image - expected).mean() < 8


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_rotation_of_a_photo_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(three_corners()).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as photo:
        expected = np.asarray(ImageOps.exif_transpose(photo)).astype(int)
    (frame,) = VideoReader(tmp_path / "photo.jpg")
    assert frame.image.shape == expected.shape and np.abs(frame.image - expected).mean() < 8


def test_odd_rotation_is_refused(tmp_path):
    path = write_video(tmp_path / "tilted.mp4", rotation=45)
    with pytest.raises(VideoError, match="45 degrees"):
        VideoReader(path)


# --- segments ------------------------------------------------------------------------------------------------------


SEEKABLE = {
    "a.mp4": {"g": "10", "bf": "2"},
    "open.mp4": {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"},
    "open.mkv": {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"},
}


@pytest.mark.parametrize("every", [None, 0.3])
@pytest.mark.parametrize("name", SEEKABLE)
def test_segments_put_together_are_the_video(tmp_path, name, every):
    reader = VideoReader(write_video(tmp_path / name, options=SEEKABLE[name]), every=every)
    segments, whole = reader.segments(9 if every is None else 3), list(reader)
    assert 3 <= len(segments) <= 4 and sum(segment.frames for segment in segments) == reader.frame_count == FRAMES
    before, found = 0, []
    for segment in segments:
        found += [replace(frame, index=before + frame.index) for frame in reader.read(segment)]
        before += reader.decoded_frames
        assert reader.decoded_frames == segment.frames and reader.failed_frames == 0
    assert len(found) == len(whole)
    assert_prefix(found, whole)


@pytest.mark.parametrize("name", ["plain.mp4", "h264.avi", "cut.mkv", "raw.h264", "a.ts"])
def test_files_that_cannot_be_cut_are_one_segment(videos, tmp_path, name):
    path = tmp_path / name
    if name in ("raw.h264", "a.ts"):
        write_video(path, options={"g": "5"})
    elif name == "cut.mkv":
        path.write_bytes(videos["ffv1.mkv"].read_bytes()[:-1000])
    else:  # with one keyframe, and without times
        path = videos[name]
    (segment,) = VideoReader(path).segments(5)
    assert segment.begin is None and segment.end is None and segment.frames > 30


# --- names ---------------------------------------------------------------------------------------------------------


NAMES = ["cam-2024-01-01T12:30:00.mp4", "file:x.mp4", "http:x.mp4", "-x.mp4", "%03d.mp4", "#1.mp4", "a?b=c&d.mp4"]
NAMES += ["pipe:0", "concat:a|b.mp4", "[a]*.mp4", "$a$.mp4", "a\nb.mp4", "cam:1/clip.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_is_the_name_of_a_file(tmp_path, monkeypatch, videos, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    os.link(videos["plain.mp4"], name)
    for path in (name, Path(name), tmp_path / name):
        assert len(list(read_frames(path, max_frames=2))) == 2


def test_urls_are_not_opened():
    for url in ("rtsp://camera/stream", Path("http://localhost/clip.mp4")):
        with pytest.raises(FileNotFoundError, match="URLs are not opened"):
            VideoReader(url)


# --- files that are no video ---------------------------------------------------------------------------------------


def test_files_that_are_not_videos(tmp_path):
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a picture\n" * 100)
    (tmp_path / "notes.mp4").write_text("not a picture\n" * 100)
    expected = {"sound.wav": "no video", "empty.mp4": "empty", "notes.txt": "no video", "notes.mp4": "not a video"}
    for name, words in expected.items():
        with pytest.raises(VideoError, match=words) as caught:
            VideoReader(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(VideoError, match="directory"):
        VideoReader(tmp_path)
    with pytest.raises(VideoError, match="device"):
        VideoReader("/dev/null")
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4"):
        VideoReader(tmp_path / "nothing.mp4")


def test_a_picture_is_a_video_of_one_frame_and_animated_webp_is_named(tmp_path):
    images = [Image.fromarray(image) for image in moving_picture(3)]
    images[0].save(tmp_path / "photo.webp")
    images[0].save(tmp_path / "animated.webp", save_all=True, append_images=images[1:])
    (frame,) = VideoReader(tmp_path / "photo.webp")
    assert (frame.index, frame.time) == (0, 0)
    with pytest.raises(VideoError, match="animated WebP"):
        VideoReader(tmp_path / "animated.webp")


def test_size_change_is_refused_after_the_good_frames(tmp_path):
    first = write_video(tmp_path / "a.h264", frames=moving_picture(6))
    second = write_video(tmp_path / "b.h264", frames=moving_picture(6, 32, 80))
    both = tmp_path / "both.h264"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    frames, error, _ = read_until_error(both)
    assert [frame.image.shape for frame in frames] == [(HEIGHT, WIDTH, 3)] * 6
    assert "at 0.24 s" in str(error) and "80x32" in str(error) and "64x48" in str(error)


# --- damage --------------------------------------------------------------------------------------------------------


CAN_BE_CUT = ["faststart.mp4", "h264.mkv", "ffv1.mkv", "vp8.webm", "mjpeg.avi", "h264.avi"]


@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_a_cut_file_gives_its_frames_and_then_says_where_it_ends(videos, tmp_path, name):
    whole = {round(frame.time, 3): frame.image for frame in read_frames(videos[name])}
    data = videos[name].read_bytes()
    counts = []
    for percent in (60, 75, 90):
        cut = tmp_path / name
        cut.write_bytes(data[: len(data) * percent // 100])
        if name == "h264.avi" and percent == 60:  # inside its only keyframe
            with pytest.raises(VideoError, match="no frame can be decoded"):
                VideoReader(cut)
            continue
        frames, error, failed = read_until_error(cut)
        assert isinstance(error, DamagedVideoError) and failed == 0
        assert f"after frame {len(frames) - 1} ({frames[-1].time:.2f} s)" in str(error)
        assert [frame.index for frame in frames] == list(range(len(frames)))
        assert seconds(frames) == sorted(seconds(frames))
        if name != "h264.avi":  # it has no time stamps, and frames between the last ones are cut off
            for frame in frames:
                assert np.array_equal(frame.image, whole[round(frame.time, 3)])
        counts.append(len(frames))
    assert counts == sorted(counts)
    assert counts[-1] > FRAMES // 2


def write_talk(path, frames, samples, codec="ffv1", muxer=None):
    """A video at 10 frames a second with sound of 8000 samples a second."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        video = container.add_stream(codec, rate=10)
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(sound.encode(frame))
        for image in moving_picture(frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    return path


def test_a_cut_between_pictures_is_noticed(tmp_path):
    path = write_talk(tmp_path / "talk.mp4", 10, 16000, codec="mpeg4", muxer=FASTSTART)
    assert len(list(VideoReader(path))) == 10
    path.write_bytes(path.read_bytes()[:-1000])  # inside the sound, which lies before the last pictures
    frames, error, _ = read_until_error(path)
    assert len(frames) == 1 and isinstance(error, DamagedVideoError)


def iter_into(kept, iterator):
    """Move the items of `iterator` into `kept` one by one, so that they are there when it raises."""
    for item in iterator:
        kept.append(item)


@pytest.mark.parametrize("broken", [[7], [0, 1], [38, 39], [5, 20, 21, 33]])
def test_frames_that_cannot_be_decoded_are_left_out_and_counted(tmp_path, broken):
    path = write_video(tmp_path / "whole.mov", codec="png", pix_fmt="rgb24")  # each frame stands for itself
    whole = list(read_frames(path))
    with av.open(str(path)) as container:
        packets = [(packet.pts, bytes(packet)) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for place in broken:
        content = packets[place][1]
        at = data.index(content)
        data[at : at + len(content)] = bytes(255 - byte for byte in content)
    path.write_bytes(data)
    reader = VideoReader(path)
    with pytest.warns(UserWarning, match=rf"whole\.mov: {len(broken)} of its frames cannot") as caught:
        frames = list(reader)
    assert len(caught) == 1 and reader.failed_frames == len(broken)
    assert reader.frame_count == FRAMES
    kept = [frame for frame in whole if frame.index not in broken]
    assert len(frames) == len(kept)
    for frame, expected in zip(frames, kept, strict=True):
        assert np.array_equal(frame.image, expected.image)
        assert frame.time == pytest.approx(expected.time - kept[0].time, abs=0.0011)


@pytest.mark.parametrize("name", ["faststart.mp4", "h264.mkv"])
def test_broken_bytes_in_the_middle_are_counted(videos, tmp_path, name):
    whole = list(read_frames(videos[name]))
    data = bytearray(videos[name].read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 2000] = bytes(byte ^ 0x5A for byte in data[middle : middle + 2000])
    broken = tmp_path / name
    broken.write_bytes(data)
    frames, error, failed = read_until_error(broken)
    assert error is None and failed > 0
    assert 0 < len(frames) < FRAMES
    assert_prefix(frames[:8], whole)


def test_a_frame_that_the_decoder_patched_up_is_not_given_out(videos, tmp_path):
    data = videos["h264.mkv"].read_bytes()
    lost = 0
    for percent in range(50, 90, 4):
        broken = bytearray(data)
        broken[len(data) * percent // 100] ^= 0x5A
        path = tmp_path / "broken.mkv"
        path.write_bytes(broken)
        frames, error, failed = read_until_error(path)
        assert error is None and len(frames) + failed <= FRAMES
        lost += failed  # some changed bytes still decode
    assert lost > 0


# --- whole files that look damaged ---------------------------------------------------------------------------------


def write_segment(path, first, codec, clock):
    """20 frames, levels of grey from `first` on, as a transport stream whose time stamps begin at frame `clock`."""
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for place in range(20):
            image = np.full((HEIGHT, WIDTH, 3), 4 * (first + place), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = clock + place
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
@pytest.mark.parametrize("goes_on", [True, False], ids=["clock goes on", "clock set back"])
def test_joined_transport_streams_are_whole(tmp_path, codec, goes_on):
    segments = [write_segment(tmp_path / f"{place}.ts", 20 * place, codec, 20 * place * goes_on) for place in range(3)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(segments))
    reader = VideoReader(joined)
    frames = list(reader)
    levels = [frame.image.mean() / 4 for frame in frames]
    assert levels == pytest.approx(list(range(60)), abs=1)
    assert reader.failed_frames == 0 and reader.expected_frames == 60
    # no time goes back, and each joint is off by a frame at most
    assert seconds(frames) == pytest.approx([place / 25 for place in range(60)], abs=2.01 / 25)
    assert seconds(frames) == sorted(seconds(frames))


def copy_packets(source, target, first=0, options=None):
    """Write a video's packets from number `first` on to another file, without decoding them."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux(video=0) if packet.size][first:]:
            packet.stream = stream
            new.mux(packet)
    return target


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mpeg2video"])
def test_a_recording_begins_with_its_first_keyframe(tmp_path, codec, ending):
    never = "0" if codec == "libx264" else "1000000000"  # a keyframe because of a cut
    with av.open(str(tmp_path / "whole.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": "12", "bf": "0", "sc_threshold": never})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for image in moving_picture():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    whole = list(read_frames(tmp_path / "whole.mkv"))
    reader = VideoReader(copy_packets(tmp_path / "whole.mkv", tmp_path / f"cut.{ending}", first=3))
    frames = list(reader)
    assert len(frames) == reader.expected_frames == reader.frame_count == FRAMES - 12 and reader.failed_frames == 0
    assert [frame.index for frame in frames] == list(range(FRAMES - 12))
    assert seconds(frames) == pytest.approx([i / 10 for i in range(FRAMES - 12)], abs=0.011)
    for frame, expected in zip(frames, whole[12:], strict=True):
        assert np.array_equal(frame.image, expected.image)


def test_a_last_picture_that_stays_is_not_damage(tmp_path):
    path = write_video(tmp_path / "screen.webm", codec="libvpx", frames=moving_picture(20))
    data = bytearray(path.read_bytes().replace(b"DURATION", b"RECORDER"))  # browsers write no such tag
    length = data.index(b"\x44\x89\x88") + 3  # the file's, in milliseconds
    struct.pack_into(">d", data, length, 7000.0)
    path.write_bytes(data)
    reader = VideoReader(path)
    assert len(list(reader)) == reader.expected_frames == 20


def test_an_edit_list_leaves_frames_out(tmp_path):
    whole = list(read_frames(write_video(tmp_path / "whole.mp4")))
    # time stamps below 0 make the muxer write an edit list that begins at 0
    path = write_video(tmp_path / "trimmed.mp4", times=[100 * (i - 10) for i in range(FRAMES)])
    reader = VideoReader(path)
    frames = list(reader)
    assert len(frames) == reader.expected_frames == reader.frame_count == FRAMES - 10
    assert seconds(frames) == pytest.approx([i / 10 for i in range(FRAMES - 10)])
    assert np.abs(frames[0].image.astype(int) - whole[10].image).mean() < 4


# --- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offset"),
    [("v.mkv", -700), ("v.ts", -700), ("v.mkv", 3_600_000), ("v.ts", 3_600_000), ("v.mov", 3_600_000)],
)
def test_time_and_length_are_the_pictures(tmp_path, name, offset):
    reader = VideoReader(
        write_video(tmp_path / name, times=[offset + 100 * i for i in range(26)], frames=moving_picture(26))
    )
    frames = list(reader)
    assert seconds(frames) == pytest.approx([i / 10 for i in range(26)], abs=0.011)
    assert reader.expected_frames == reader.frame_count == 26 and reader.fps == pytest.approx(10)


@pytest.mark.parametrize("name", ["raw.h264", "raw.mjpeg"])
def test_frames_without_time_stamps_follow_each_other(tmp_path, name):
    codec = {"codec": "mjpeg", "pix_fmt": "yuvj420p"} if name == "raw.mjpeg" else {}
    reader = VideoReader(write_video(tmp_path / name, **codec))
    assert seconds(list(reader)) == pytest.approx([i / 25 for i in range(FRAMES)])
    assert reader.expected_frames == FRAMES


@pytest.mark.parametrize(
    ("stamps", "times"),
    [
        ([70, 80, 100], [0, 1, 3]),
        ([-20, -10, 0], [0, 1, 2]),
        ([None, None, None], [0, 1, 2]),
        ([None, 50, 60], [0, 1, 2]),
        ([50, None, 80], [0, 1, 3]),
        ([50, 60, 0, 10, None, 40], [0, 1, 2, 3, 4, 6]),  # set back
        ([50, 60, 60, 70], [0, 1, 1, 2]),
        ([50, 60, 55, 70], [0, 1, 2, 3.5]),
        ([50, 60, 3_000_000], [0, 1, 299_995]),
    ],
)
def test_time_never_goes_back(stamps, times):
    stream = SimpleNamespace(time_base=Fraction(1, 10), average_rate=Fraction(1), guessed_rate=None)
    clock = _Clock(SimpleNamespace(format=SimpleNamespace(name="mpegts")), stream)
    assert [clock.time(stamp) for stamp in stamps] == times


UNEVEN = [sum(50 + i % 7 * 40 for i in range(n)) for n in range(FRAMES)]
LONG_END = [100 * i for i in range(FRAMES - 1)] + [15000]


@pytest.mark.parametrize("times", [UNEVEN, LONG_END], ids=["uneven", "long end"])
@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi"])
def test_variable_rate_is_not_damage(tmp_path, name, times):
    codec = {"codec": "mjpeg", "pix_fmt": "yuvj420p"} if name == "v.avi" else {}
    frames = list(read_frames(write_video(tmp_path / name, times=times, **codec)))
    assert [frame.time for frame in frames] == pytest.approx([t / 1000 for t in times], abs=0.02)


# --- pixel values --------------------------------------------------------------------------------------------------


def clip_frame(height=576, width=768):
    """A real frame, cropped."""
    return np.ascontiguousarray(next(read_frames(bundled_clip())).image[:height, :width])


def noise(height, width):
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


IMAGES = {
    "clip": clip_frame,
    "clip, square": lambda: clip_frame(500, 500),
    "noise, wide": lambda: noise(90, 160),
    "noise, square": lambda: noise(97, 97),
}


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("resolution", [32, 97, 448])
def test_pixels_match_the_hugging_face_processor(image, resolution, resample):
    image = IMAGES[image]()
    reference = SiglipImageProcessorPil(
        size={"height": resolution, "width": resolution},
        resample=resample,
        image_mean=[0.2, 0.5, 0.7],
        image_std=[0.5, 0.25, 0.3],
    )
    expected = reference(image, return_tensors="pt")["pixel_values"]
    pixels = Preprocessor.from_image_processor(reference)(image)
    assert pixels.shape == expected.shape == (1, 3, resolution, resolution)
    assert pixels.dtype == expected.dtype == torch.float32
    assert pixels.is_contiguous()
    levels = (pixels - expected).abs() * 255 * torch.tensor([0.5, 0.25, 0.3]).view(1, 3, 1, 1)
    # One grey level off in a few values of a thousand (bilinear at ratios full of ties: of a hundred); overshoots of
    # the bicubic filter carry that to two levels in a few values of a million.
    assert levels.max() <= 2.01
    assert (levels > 1.01).float().mean() <= 1e-5
    assert (levels > 0.01).float().mean() <= (0.01 if resample == Image.Resampling.BICUBIC else 0.03)


def test_tall_frames_are_resized_along_rows_first():
    # Pillow 13 resizes columns first where the height shrinks more; older Pillow and torchvision never do.
    image = clip_frame(576, 200)
    rows = Image.fromarray(image).resize((96, 576), Image.Resampling.BICUBIC)
    expected = np.asarray(rows.resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    resized = Preprocessor(96).resize(image)[0].permute(1, 2, 0).numpy()
    assert np.abs(resized - expected).max() <= 1
    library = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resized - library).mean() < 0.5


def test_settings_that_switch_steps_off():
    image = clip_frame(96, 96)
    raw = SiglipImageProcessorPil(size={"height": 96, "width": 96}, do_rescale=False, do_normalize=False)
    pixels = Preprocessor.from_image_processor(raw)(image)
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(image).float())
    scaled = SiglipImageProcessorPil(size={"height": 96, "width": 96}, rescale_factor=1 / 100, do_normalize=False)
    torch.testing.assert_close(Preprocessor.from_image_processor(scaled)(image), pixels / 100)


def test_all_kinds_of_arrays_give_the_same_pixels():
    image = clip_frame(120, 80)
    preprocess = Preprocessor(32)
    expected = preprocess(image)
    read_only = image.copy()
    read_only.flags.writeable = False
    assert torch.equal(preprocess(read_only), expected)
    assert torch.equal(preprocess(image[::-1].copy()[::-1]), expected)
    assert torch.equal(preprocess(torch.from_numpy(image)), expected)
    assert torch.equal(preprocess(Image.fromarray(image)), expected)
    assert torch.equal(preprocess(image, dtype=torch.bfloat16), expected.bfloat16())
    assert preprocess(image, device="meta").device.type == "meta"
    grey = Image.fromarray(image).convert("L")
    for wrong in (image.astype(np.float32), image[..., :1], image[None], image[:0], grey):
        with pytest.raises(ValueError, match="uint8 RGB frame"):
            preprocess(wrong)


def test_from_pretrained_reads_the_saved_settings(tmp_path):
    saved = SiglipImageProcessorPil(
        size={"height": 48, "width": 48}, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    saved.save_pretrained(tmp_path)
    loaded = Preprocessor.from_pretrained(tmp_path)
    assert loaded == Preprocessor(48, "bilinear", 1 / 255, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocessor.from_pretrained(tmp_path, resolution=96).resolution == 96
    holder = SimpleNamespace(image_processor=saved)
    assert Preprocessor.from_image_processor(holder) == loaded


@pytest.mark.parametrize("crop", [24, {"height": 24, "width": 24}])
@pytest.mark.parametrize("kind", ["BitImageProcessor", "CLIPImageProcessorFast"])
def test_a_frame_is_seen_whole_where_the_centre_would_be_cut_out(tmp_path, kind, crop):
    settings = {"do_center_crop": True, "crop_size": crop, "size": {"shortest_edge": 32}, "resample": 3}
    settings |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    for name, is_taken in ((kind, True), ("SiglipImageProcessor", False)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"image_processor_type": name}))
        if is_taken:
            assert Preprocessor.from_pretrained(tmp_path).resolution == 24
        else:
            with pytest.raises(ValueError, match="do_center_crop"):
                Preprocessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resample": Image.Resampling.LANCZOS}, "bicubic"),
        ({"size": {"shortest_edge": 224}}, "square"),
        ({"size": {"height": 224, "width": 112}}, "square"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": False}, "do_resize"),
    ],
)
def test_settings_outside_resize_rescale_normalise_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Preprocessor.from_image_processor(SiglipImageProcessorPil(**settings))


@pytest.mark.parametrize("bad", [{"resolution": 0}, {"resolution": 2.5}, {"image_std": (1.0, 0.0, 1.0)}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Preprocessor(**{"resolution": 32, **bad})


# --- working ahead -------------------------------------------------------------------------------------------------


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("neuroflow-prefetch")]


@pytest.fixture
def no_thread_left():
    yield
    assert prefetch_threads() == []


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("depth", [1, 4, 100])
def test_prefetch_gives_all_items_in_order(depth):
    assert list(prefetch(range(50), depth)) == list(range(50))
    assert list(prefetch([], depth)) == []


@pytest.mark.usefixtures("no_thread_left")
def test_prefetch_runs_ahead_but_not_far():
    made = []

    def source():
        for i in range(100):
            made.append(i)
            yield i

    with contextlib.closing(prefetch(source(), depth=3)) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(made) == 4  # one taken, three ahead


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("error", [DamagedVideoError("cut"), KeyboardInterrupt()])
def test_prefetch_raises_after_the_good_items(error):
    def source():
        yield from range(3)
        raise error

    got = []
    with pytest.raises(type(error)) as caught:
        iter_into(got, prefetch(source(), depth=1))
    assert caught.value is error
    assert got == [0, 1, 2]


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("error", [GeneratorExit, KeyboardInterrupt])
def test_prefetch_stops_its_thread_when_the_consumer_leaves(depth, error):
    closed_in = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed_in.append(threading.current_thread().name)

    for taken in (1, 5):
        with pytest.raises(error), contextlib.closing(prefetch(endless(), depth)) as items:
            for _ in range(taken):
                next(items)
            assert len(prefetch_threads()) == 1
            raise error
        assert prefetch_threads() == []
    assert [name.startswith("neuroflow-prefetch") for name in closed_in] == [True, True]


@pytest.mark.usefixtures("no_thread_left")
def test_prefetch_never_started_has_no_thread():
    prefetch(range(3)).close()
