"""The tab *Search*: moments of an embedded dataset that fit a text, with their pictures, to play from there."""

import functools
import html
from pathlib import Path
from urllib.parse import quote

import gradio as gr
import numpy as np

from ..archive.dataset import read_metadata
from ..archive.embed import embed_videos
from ..archive.index import open_index
from ..archive.query import load_for_texts, text_query
from ..archive.search import search_index
from ..archive.sheet import CELL, clock, moment_picture, require_unchanged, span
from ..loading import load_model
from ..video.reader import VideoError, bundled_clip, labelled_clip
from ..video.records import percent
from .parts import IN_TURN, Jobs, OnStep, two_buttons

MOST_MOMENTS = 24


def search_tab(jobs: Jobs, source: str | Path | None, dataset: Path | None, device: str):
    """
    Build the tab. Without a dataset, one of the clips that ship here is made when somebody searches; without a source,
    its checkpoint is the one that it names.
    """
    folder = dataset or jobs.folder / "clips"

    @functools.lru_cache(maxsize=1)
    def load(first_file: Path, modified: int) -> tuple:
        return load_for_texts(read_metadata(first_file), source and str(source), device)

    def search(
        text: str,
        count: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, as Gradio finds it
    ) -> tuple:
        with jobs.job(request, progress) as on_step:
            if dataset is None and not folder.exists():
                embed_clips(folder, source, device, on_step)
            index = open_index(folder, on_step)
            first = index.files[0]
            loaded = load(first, first.stat().st_mtime_ns)
            query = text_query(index.metadata, text, loaded=loaded)
            moments = search_index(index, query.embedding, min(int(count), MOST_MOMENTS))
            pictures = []
            for place, moment in enumerate(moments):
                on_step("reading pictures", place, len(moments))
                pictures.append(picture_with_caption(folder, moment, query.confidence(moment["score"])))
        note = f"The best moments of {sum(index.lengths)} frames of {len(index.files)} videos. Choose one to play it."
        return pictures, note, moments, ""

    def play(moments: list[dict], event: gr.SelectData, request: gr.Request) -> str:
        with jobs.job(request, lambda *_, **__: None):
            moment = moments[event.index]
            require_unchanged(folder, Path(moment["video"]))
        gr.set_static_paths([moment["video"]])  # served from its place, and no other file beside it
        return player(moment)

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            text = gr.Textbox(label="What to look for", placeholder="a dog", submit_btn=False)
            count = gr.Slider(1, MOST_MOMENTS, 8, step=1, label="Moments at most")
            with gr.Row():
                start, cancel = two_buttons("Search")
            place = f"Dataset: {dataset}" if dataset else "No dataset was given: the two clips that ship are searched."
            note = gr.Markdown(place)
            video = gr.HTML()
        with gr.Column(scale=3, min_width=300):
            gallery = gr.Gallery(
                show_label=False, columns=2, allow_preview=False, interactive=False, buttons=[], elem_classes="moments"
            )
    moments = gr.State([])
    outputs = [gallery, note, moments, video]
    running = gr.on(
        [start.click, text.submit], search, [text, count], outputs, show_progress_on=gallery, trigger_mode="once",
        **IN_TURN,
    )  # fmt: skip
    cancel.click(jobs.cancel, cancels=running, queue=False, api_visibility="private")
    gallery.select(play, moments, video, scroll_to_output=True, **IN_TURN)


def embed_clips(folder: Path, source: str | Path, device: str, on_step: OnStep):
    """Embed the clips that ship here."""
    model, preprocess = load_model(source, device=device)
    clips = [bundled_clip(), labelled_clip()]
    embed_videos(clips, model, preprocess, folder, every=0.25, model_name=str(source), on_step=on_step)


def picture_with_caption(dataset: Path, moment: dict, confidence: float) -> tuple[np.ndarray, str]:
    """A moment's best frame, uint8 RGB [*CELL, 3], or grey where its video is gone or changed; and its caption."""
    caption = f"{percent(confidence)}: {Path(moment['video']).name}, {span(moment)}"
    try:
        return moment_picture(dataset, moment), caption
    except (FileNotFoundError, VideoError):
        return np.full((*CELL, 3), 128, np.uint8), f"{caption} (the video is gone or changed)"


def player(moment: dict) -> str:
    """A video element, as HTML, that plays a moment's video from the moment's begin."""
    name, place = Path(moment["video"]).name, f"gradio_api/file={quote(moment['video'])}#t={moment['start']:.2f}"
    title = html.escape(f"{name} from {clock(moment['start'])}")
    return f'<p>{title}</p><video src="{html.escape(place)}" controls autoplay muted playsinline></video>'
