"""The tab *Text*: an answer of the dense model beside one with a bypass, the tokens that differ marked."""

import functools
import html
import itertools
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import gradio as gr

from ..conversion.smollm2 import NAME, smollm2_folder
from ..drift.calibrate import PROMPTS, with_threshold
from ..drift.chat_template import encode_text
from ..drift.continuation import Decoding, comparison_in_words, continue_tokens, figures_in_words
from ..loading import load_language_model
from .parts import IN_TURN, Jobs, OnStep, two_buttons

MOST_TOKENS = 256


def text_tab(jobs: Jobs, source: str | Path, device: str):
    """Build the tab; SmolLM2 is fetched when somebody first generates with it."""

    @functools.lru_cache(maxsize=1)
    def load() -> tuple:
        return load_language_model(source, device=device)

    def fetch(on_step: OnStep) -> tuple:
        nonlocal source
        if source == NAME:
            source = smollm2_folder(on_step)
        return load()

    def generate(
        prompt: str,
        rate: float,
        target: str,
        most: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, as Gradio finds it
    ) -> tuple:
        with jobs.job(request, progress) as on_step:
            if not prompt.strip():
                raise ValueError("The prompt is empty; expected some text.")
            model, tokenizer = fetch(on_step)
            own = {"rate": rate, "target": target}
            show = functools.partial(on_step, "choosing the threshold", total=len(PROMPTS))
            own = with_threshold(model, tokenizer, own, on_prompts=show)
            ids, most = encode_text(tokenizer, prompt), min(int(most), MOST_TOKENS)
            ways = {"dense": Decoding(most), "bypass": Decoding(most, bypass=own)}
            continue_tokens(model, tokenizer, ids, Decoding(2))  # warm up
            dense, bypassed = found = [
                continue_tokens(model, tokenizer, ids, way, is_stopped=counter(name, most, on_step))
                for name, way in ways.items()
            ]
        runs = differing(dense.tokens, bypassed.tokens)
        texts = [
            text_in_html(marked_text(tokenizer, part.tokens, parts)) for part, parts in zip(found, runs, strict=True)
        ]
        notes = [
            f"**{name.capitalize()}**: {' '.join(figures_in_words(model, part, way))}"
            for part, (name, way) in zip(found, ways.items(), strict=True)
        ]
        notes.append(f"{comparison_in_words(dense, bypassed)} Tokens that differ are marked.")
        return *texts, "\n\n".join(notes)

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox("Explain what a hash map is.", label="Prompt", lines=4)
            rate = gr.Slider(0.05, 1, 0.2, step=0.05, label="Share of steps to bypass")
            target = gr.Radio(["attention", "mlp", "block"], value="attention", label="Reused output")
            most = gr.Slider(8, MOST_TOKENS, 64, step=8, label="New tokens at most")
            with gr.Row():
                start, cancel = two_buttons("Generate")
            if source == NAME:
                gr.Markdown("The model is SmolLM2-135M-Instruct; if it is not here, its 93 MB are fetched first.")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                columns = []
                for name in ("Dense", "Bypass"):
                    with gr.Column(min_width=280):
                        gr.Markdown(f"### {name}")
                        columns.append(gr.HTML(min_height=200))
            drift = gr.Markdown()
    inputs = [prompt, rate, target, most]
    running = start.click(generate, inputs, [*columns, drift], show_progress_on=columns, **IN_TURN)
    cancel.click(jobs.cancel, cancels=running, queue=False, api_visibility="private")


def counter(name: str, most: int, on_step: OnStep) -> Callable[[], bool]:
    """What a generation asks after each token, to show the progress; it never stops the text itself."""
    numbers = itertools.count(1)

    def is_stopped() -> bool:
        done = next(numbers)
        on_step(f"{name}: token {done} of at most {most}", done, most)
        return False

    return is_stopped


def differing(dense: Sequence[int], other: Sequence[int]) -> tuple[list[tuple[int, bool]], ...]:
    """
    Two texts in runs of tokens, each with its end and whether it differs: whether it is outside the runs that both
    have in the same order. An inserted token marks itself, and not all that follow.
    """
    steps = SequenceMatcher(None, dense, other, autojunk=False).get_opcodes()
    return tuple([(step[end], step[0] != "equal") for step in steps] for end in (2, 4))


def marked_text(tokenizer: Any, tokens: Sequence[int], runs: Sequence[tuple[int, bool]]) -> list[tuple[str, bool]]:
    """
    A text in pieces, each with whether it differs. Pieces are cut out of the decoded whole, since tokens alone may
    lack spaces or be parts of a character; such a character belongs to the piece in which it is complete.
    """
    pieces, before = [], ""
    for end, differs in runs:
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if end < len(tokens):
            text = text.rstrip("\ufffd")  # of a character that is not complete
        pieces.append((text[len(before) :], differs))
        before = text
    return [piece for piece in pieces if piece[0]]


def text_in_html(pieces: Sequence[tuple[str, bool]]) -> str:
    """The pieces of a text; Gradio's `HighlightedText` drops empty lines."""
    marked = (f"<mark>{html.escape(text)}</mark>" if differs else html.escape(text) for text, differs in pieces)
    return f'<div class="answer">{"".join(marked)}</div>'
