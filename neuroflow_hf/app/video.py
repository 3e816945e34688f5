"""The tab *Video*: what `neuroflow run` makes of an upload or of a clip that ships here."""

import functools
import html
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from ..loading import load_model_with_labels
from ..utils.tables import Table
from ..video import run_tables
from ..video.labels import parse_labels
from ..video.overlay import LEGEND
from ..video.reader import VideoError, VideoReader, bundled_clip, labelled_clip
from ..video.run import run_video
from ..vision.gate_config import PRESETS
from .parts import IN_TURN, Jobs, two_buttons

MOST_FRAMES, MOST_PIXELS = 600, 4096 * 2304  # of an upload: what lies beyond is left out, or refused
CLIPS = [
    ("A dog, a bicycle and a cat on a lawn", labelled_clip(), "a dog, a bicycle, a cat, nothing"),
    ("People on a walkway", bundled_clip(), "a person, nothing"),
]


def video_tab(jobs: Jobs, source: str | Path, device: str):
    """Build the tab."""

    @functools.lru_cache(maxsize=1)
    def load(names: tuple[str, ...] | None) -> tuple:
        return load_model_with_labels(source, names, device=device)

    def run(
        video: str | None,
        preset: str,
        labels: str,
        most: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, as Gradio finds it
    ) -> tuple:
        with jobs.job(request, progress) as on_step:
            reader = open_upload(video, int(most))
            model, preprocess, embedded = load(tuple(parse_labels(labels)) if labels.strip() else None)
            frames = reader.expected_frames

            def on_frame(record: Any):
                on_step(f"frame {record.index + 1} of {frames}, cost {record.cost:.2f}", record.index + 1, frames)

            out = Path(tempfile.mkdtemp(prefix="run-", dir=jobs.folder))
            name = Path(source).name
            how = {"labels": embedded, "model_name": name, "on_frame": on_frame}
            summary = run_video(reader, model, preprocess, out, {"preset": preset}, **how)
            if summary["status"] == "damaged":
                gr.Warning(f"{jobs.message(VideoError(summary['message']))} The frames before are shown.")
        left_out = max(0, reader.frame_count - frames)
        files = [str(out / name) for name in summary["files"]]
        return str(out / "overlay.mp4"), run_in_html(summary, out, left_out), files

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            video = gr.Video(label="Video", sources=["upload"], height=240)
            labels = gr.Textbox(label="Labels", info="separated by commas; may be empty", render=False)
            rows = [[str(path), names] for _, path, names in CLIPS]
            gr.Examples(rows, [video, labels], example_labels=[title for title, *_ in CLIPS], label="Clips")
            labels.render()
            preset = gr.Radio(list(PRESETS), value="balanced", label="Preset")
            most = gr.Slider(10, MOST_FRAMES, 120, step=10, label="Frames at most")
            with gr.Row():
                start, cancel = two_buttons("Run")
        with gr.Column(scale=3, min_width=300):
            overlay = gr.Video(show_label=False, autoplay=True, loop=True, interactive=False)
            figures = gr.HTML()
            with gr.Accordion("Files", open=False):
                files = gr.Files(show_label=False, interactive=False)
    running = start.click(
        run, [video, preset, labels, most], [overlay, figures, files], show_progress_on=overlay, **IN_TURN
    )
    cancel.click(jobs.cancel, cancels=running, queue=False, api_visibility="private")


def open_upload(video: str | None, most: int) -> VideoReader:
    """A reader of at most `most` frames; ValueError without a video, and for frames of more than `MOST_PIXELS`."""
    if video is None:
        raise ValueError("There is no video; upload one, or choose a clip.")
    reader = VideoReader(video, max_frames=min(most, MOST_FRAMES))
    if reader.width * reader.height > MOST_PIXELS:
        raise ValueError(f"The frames are {reader.width}x{reader.height}; the page takes at most 4096x2304.")
    return reader


def run_in_html(summary: dict, out: Path, left_out: int = 0) -> str:
    """Plot and figures of a run; `left_out` frames of the video came after those that were used."""
    plot = f'<img src="gradio_api/file={quote(str(out / "plot.png"))}" alt="cost, cosine to dense, labels over time">'
    tables = [run_tables.per_frame_rows(summary)]
    lines = [f"{left_out} later frames were left out."] if left_out else []
    if summary["compared_frames"]:
        tables.insert(0, run_tables.comparison_rows(summary))
        lines.append(run_tables.baseline_note(summary))
    if "labels" in summary:
        tables.append(run_tables.timeline_rows(summary["labels"]))
    lines = [f"Above: {LEGEND}.", *lines, *run_tables.figures_in_words(summary), run_tables.settings_in_words(summary)]
    paragraphs = (f"<p>{html.escape(line)}</p>" for line in lines if line)
    return "".join([f'<div class="scrolls">{plot}</div>', *map(table_in_html, tables), *paragraphs])


def table_in_html(table: Table) -> str:
    """Headers and rows as HTML, in a box that scrolls where the page is narrow."""
    headers, rows = table

    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    lines = line(headers, "th") + "".join(line(row, "td") for row in rows)
    return f'<div class="scrolls"><table>{lines}</table></div>'
