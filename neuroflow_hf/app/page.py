"""The page, and the server for it. Nothing is loaded from the network, and nothing is sent there."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from gradio.themes.utils.fonts import LocalFont

from ..conversion.smollm2 import NAME
from ..loading import default_model
from .parts import Jobs
from .search import search_tab
from .text import text_tab
from .video import video_tab

TITLE = "neuroflow"
MOST_UPLOADED = "200mb"
# Gradio's file with weight 600 lacks most letters
FONTS = (LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")
KEPT_SECONDS = 3600  # what visitors upload and make is deleted then
STYLE = """
.html-container { padding: 0 }
.scrolls { overflow-x: auto; margin-bottom: 0.8em }
.scrolls img { width: 100%; min-width: 640px }
.scrolls table { border: 0; border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
.scrolls tr { border: 0; border-bottom: 1px solid var(--border-color-primary) }
.scrolls th, .scrolls td { border: 0; padding: 0.2em 0.6em; text-align: right; white-space: nowrap }
.scrolls th { font-family: var(--font); font-weight: 700 }
.scrolls th:first-child, .scrolls td:first-child { text-align: left; white-space: normal; min-width: 8em }
video { max-width: 100% }
.answer { white-space: pre-wrap; overflow-wrap: break-word; margin-bottom: 0.8em }
.answer mark { background: #fdba74; color: #111827 }
.moments .grid-wrap { max-height: none }
.moments .thumbnail-lg { aspect-ratio: 16 / 9 }
.moments .caption-label { white-space: normal; max-width: 100% }
@media (max-width: 640px) { .moments .grid-container { grid-template-columns: 1fr } }
"""


def build_page(
    model: str | Path | None, language_model: str | Path, dataset: Path | None, device: str, folder: Path
) -> gr.Blocks:
    """The page with its three tabs, see `serve`; `folder` is for what visitors make."""
    jobs, source = Jobs(folder), model or default_model()
    with gr.Blocks(analytics_enabled=False, title=TITLE, delete_cache=(KEPT_SECONDS // 6, KEPT_SECONDS)) as page:
        gr.Markdown("# neuroflow\nVideo and text without computing again what did not change.")
        with gr.Tab("Video"):
            video_tab(jobs, source, device)
        with gr.Tab("Search"):
            search_tab(jobs, model if dataset else source, dataset, device)
        with gr.Tab("Text"):
            text_tab(jobs, language_model, device)
        page.unload(jobs.cancel)
    return page.queue(max_size=20)


def serve(
    model: str | Path | None = None,
    language_model: str | Path = NAME,
    dataset: Path | None = None,
    device: str = "auto",
    host: str | None = None,
    port: int | None = None,
    on_ready: Callable[[str], object] = print,
):
    """
    Serve the page until Ctrl-C. Models are loaded when somebody first uses them.

    Args:
        model: folder or Hub name of a vision checkpoint; None for the small SigLIP in the checkout.
        language_model: folder or Hub name of a Phi-3 checkpoint, or `"smollm2"`.
        dataset: a folder that `neuroflow embed` wrote; None to search in the clips that ship here.
        device: as in `load_model`.
        host, port: to listen on; None for Gradio's own choice, which a Hub Space sets.
        on_ready: called with a sentence that has the address.

    Raises:
        ModelLoadError: without `model`, in an installed package.
        OSError: if it cannot listen there.
    """
    with tempfile.TemporaryDirectory(prefix="neuroflow-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # all that Gradio may serve, besides what is named one by one
        page = build_page(model, language_model, dataset, device, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                mcp_server=False,
                run_history=False,
                footer_links=[],
                max_file_size=MOST_UPLOADED,
                css=STYLE,
                theme=gr.themes.Default(font=FONTS),
            )
        except OSError as error:
            raise OSError(f"Cannot listen on {host or 'this machine'}, port {port}; name another --port.") from error
        try:
            on_ready(f"The page is at {address} until Ctrl-C.")
            page.block_thread()
        finally:
            page.close(verbose=False)
