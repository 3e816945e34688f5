"""What the page's tabs are made of, without a browser."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroflow_hf.app import video as video_part
from neuroflow_hf.app.parts import Jobs
from neuroflow_hf.app.search import picture_with_caption, player
from neuroflow_hf.app.text import differing, marked_text, text_in_html
from neuroflow_hf.app.video import open_upload, run_in_html, table_in_html
from neuroflow_hf.video.reader import VideoError
from tests.cli.test_run import write_clip

TOKENS = st.lists(st.integers(0, 3), max_size=12)

# --- texts ---------------------------------------------------------------------------------------------------------


@given(TOKENS, TOKENS)
def test_tokens_that_are_not_marked_are_the_same_in_the_same_order(dense, other):
    kept = []
    for tokens, runs in zip((dense, other), differing(dense, other), strict=True):
        begins = [0, *(end for end, _ in runs)]
        assert begins == sorted(begins) and begins[-1] == len(tokens)
        parts = [tokens[begin:end] for begin, (end, differs) in zip(begins, runs, strict=False) if not differs]
        kept.append(list(itertools.chain(*parts)))
    assert kept[0] == kept[1]
    assert (kept == [dense, other]) == (dense == other)


def test_an_inserted_token_marks_itself_alone():
    runs = differing([5, 6, 7, 8], [5, 9, 6, 7, 8])
    assert runs == ([(1, False), (1, True), (4, False)], [(1, False), (2, True), (5, False)])


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may take several."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode(errors="replace")


class Words:
    """A tokenizer that puts spaces between words only, as sentencepiece does: alone, a word has none."""

    def decode(self, tokens, skip_special_tokens):
        return " ".join(f"w{token}" for token in tokens)


@given(st.text(alphabet="aé€😀 \n", min_size=1, max_size=8), st.data())
def test_pieces_join_to_the_text(text, data):
    tokens = list(text.encode())
    marks = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    pieces = marked_text(Bytes(), tokens, list(enumerate(marks, start=1)))
    assert "".join(piece for piece, _ in pieces) == text
    assert all("\ufffd" not in piece for piece, _ in pieces)


def test_pieces_keep_the_spaces_between_them():
    pieces = marked_text(Words(), [1, 2, 3, 4], [(1, False), (3, True), (4, False)])
    assert pieces == [("w1", False), (" w2 w3", True), (" w4", False)]
    assert text_in_html([*pieces, ("<p>", False)]) == '<div class="answer">w1<mark> w2 w3</mark> w4&lt;p&gt;</div>'
    assert marked_text(Words(), [], []) == []


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_of_a_run_are_html_without_the_visitors_tags():
    table = table_in_html((("<b>",), [("<script>",)]))
    assert "<th>&lt;b&gt;</th>" in table and "<td>&lt;script&gt;</td>" in table
    spread = dict.fromkeys(("mean", "median", "p5", "p95", "min", "max"), 0.5)
    stretch = {"start": 0.0, "end": 0.4, "frames": 5, "label": "<i>", "confidence": 0.25, "share": 1.0}
    summary = {
        "video": {"name": "a.mp4", "width": 64, "height": 48},
        "gate": {"mode": "extrapolate", "reference": "last_update"},
        "grid": [6, 6],
        "model": "<tiny>",
        "resolution": 24,
        "dtype": "float32",
        "device": "cpu",
        "torch_threads": 1,
        "frames": 5,
        "sampled_frames": 0,
        "compared_frames": 0,
        "compared_keyframes": 0,
        "keyframes": 1,
        "skip_rate": spread,
        "cost": spread,
        "milliseconds_per_frame": {"streamed": spread, "dense": None},
        "speed_up": None,
        "stream_bytes": 0,
        "wall_clock_seconds": 1.0,
        "labels": {"names": ["<i>"], "timeline": [stretch]},
    }
    page = run_in_html(summary, Path("/a b"), left_out=7)
    assert 'src="gradio_api/file=/a%20b/plot.png"' in page
    cells = ["&lt;i&gt;", "0.0 to 0.4", "5", "25.0%"]
    assert re.search(r"\s*".join(f"<td>{cell}</td>" for cell in cells), page)
    assert "7 later frames were left out." in page
    assert "<i>" not in page and "<tiny>" not in page and "baseline" not in page


# --- uploads -------------------------------------------------------------------------------------------------------


def test_uploads_are_limited_in_length_and_size(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "a.mkv", 20)
    assert open_upload(clip, 8).expected_frames == 8
    monkeypatch.setattr(video_part, "MOST_FRAMES", 12)
    assert open_upload(clip, 1000).expected_frames == 12
    monkeypatch.setattr(video_part, "MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match="64x48"):
        open_upload(clip, 8)
    with pytest.raises(ValueError, match="upload one"):
        open_upload(None, 8)


# --- moments -------------------------------------------------------------------------------------------------------


def test_a_moment_without_its_video_is_grey(tmp_path):
    moment = {"video": str(tmp_path / "gone.mp4"), "frame": 3, "best": 0.5, "start": 0.0, "end": 1.0}
    picture, caption = picture_with_caption(tmp_path, moment, 0.5)
    assert caption == "50.0%: gone.mp4, 0:00:00.0 to 0:00:01.0 (the video is gone or changed)"
    assert picture.dtype == np.uint8 and (picture == 128).all()


def test_a_video_of_any_name_is_played_from_the_moment():
    page = player({"video": '/a b/#1 "q" <x>\'s.mp4', "start": 3.5})
    assert 'src="gradio_api/file=/a%20b/%231%20%22q%22%20%3Cx%3E%27s.mp4#t=3.50"' in page
    assert "&lt;x&gt;" in page and "<x>" not in page


# --- jobs ----------------------------------------------------------------------------------------------------------


def visitor(name):
    return SimpleNamespace(session_hash=name)


def run(jobs, body, who="ann"):
    with jobs.job(visitor(who), lambda *args, **options: None) as on_step:
        body(on_step)


def test_errors_are_one_line_without_the_pages_own_folder(tmp_path):
    def fail(on_step):
        raise VideoError(f"{tmp_path}/0a1b/<b>.mp4 is\nnot a video")

    with pytest.raises(gr.Error) as caught:
        run(Jobs(tmp_path), fail)
    assert caught.value.message == "&lt;b&gt;.mp4 is not a video"


def test_mistakes_of_the_program_are_not_shown(tmp_path):
    with pytest.raises(KeyError):
        run(Jobs(tmp_path), lambda on_step: {}["secret"])


def test_only_the_visitor_whose_job_runs_cancels_it(tmp_path):
    jobs, steps = Jobs(tmp_path), []

    def work(on_step):
        jobs.cancel(visitor("bob"))
        on_step("one", 1, 2)
        steps.append(1)
        jobs.cancel(visitor("ann"))
        on_step("two", 2, 2)
        steps.append(2)

    with pytest.raises(gr.Error) as caught:
        run(jobs, work)
    assert caught.value.title == "Cancelled" and steps == [1]
    jobs.cancel(visitor("ann"))  # too late: it stops no other job
    run(jobs, lambda on_step: on_step("three", 1, None))
