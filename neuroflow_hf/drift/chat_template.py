"""Texts and conversations as token ids, with the tokenizer's chat template where it has one."""

import itertools
from typing import Any

from jinja2 import TemplateError


def encode_text(tokenizer: Any, text: str, system: str | None = None, raw: bool = False) -> list[int]:
    """
    The token ids of a prompt: the text as a user's message in the tokenizer's chat template, followed by the beginning
    of an answer. Without a template, or with `raw`, the text itself, to be continued. `system` is the system message;
    None for the template's own, if it has one.

    Raises:
        ValueError: for a system message without a template, or one that the template refuses; for a text that is not
            Unicode, or has no tokens.
    """
    require_unicode(text)
    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise ValueError(
                "A system message needs a chat template, and the text is continued as it is; leave one of them out."
                if raw
                else "This tokenizer has no chat template, so there can be no system message."
            )
        ids = tokenizer(text)["input_ids"]
    else:
        messages = [*begin_messages(system), {"role": "user", "content": text}]
        ids = encode_rendered(tokenizer, render(tokenizer, messages))
    if not ids:
        raise ValueError(f"The prompt {text[:40]!r} has no tokens; expected some text.")
    return ids


def require_unicode(text: str):
    """Raise a ValueError for a text with surrogates, as Python makes them of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The text is not UTF-8, at character {error.start}.") from error


def begin_messages(system: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """
    A conversation in the tokenizer's chat template, up to the beginning of the next answer. Control tokens in the
    messages get a space inside, so that the model reads them as text. ValueError if the template refuses the messages.
    """
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    safe = [dict(found) for found in messages]
    for found, token in itertools.product(safe, control | set(tokenizer.all_special_tokens)):
        found["content"] = found["content"].replace(token, f"{token[0]} {token[1:]}")
    try:
        return tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"The tokenizer's chat template refuses this conversation: {error}") from error


def encode_rendered(tokenizer: Any, rendered: str) -> list[int]:
    """The token ids of a rendered template, which has its own control tokens."""
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]
