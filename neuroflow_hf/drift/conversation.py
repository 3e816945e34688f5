"""A conversation with a language model, whose KV cache is kept from one answer to the next."""

from collections.abc import Callable
from typing import Any

from transformers import Cache

from .chat_template import begin_messages, encode_rendered, render, require_unicode
from .continuation import Continuation, Decoding, continue_tokens

LEAST_ROOM = 16  # tokens that must be left for an answer


class Conversation:
    """
    Messages of a user and a model's answers. A new message is appended to the tokens that the model generated, so that
    only new tokens are computed.

    Args:
        model, tokenizer: a [`NeuroFlowPhi3ForCausalLM`], and its tokenizer, with a chat template.
        decoding: how answers are generated.
        system: the system message; None for the template's own, if it has one.

    Attributes:
        messages: the conversation so far, as the chat template takes it.
        tokens: its token ids, without the last end token.
        cache: the KV cache of the first of these tokens; None before the first answer.

    Raises:
        ValueError: for a tokenizer without a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding, system: str | None = None):
        if tokenizer.chat_template is None:
            raise ValueError("This tokenizer has no chat template. Use `neuroflow generate` to continue a text.")
        self.model, self.tokenizer, self.decoding, self.system = model, tokenizer, decoding, system
        self.reset()

    def reset(self):
        """Forget all but the system message."""
        self.messages = begin_messages(self.system)
        self.rendered, self.tokens = "", []  # the conversation as text and as token ids
        self.cache: Cache | None = None

    def ask(
        self, text: str, streamer: Any = None, is_stopped: Callable[[], bool] | None = None
    ) -> tuple[str, Continuation]:
        """
        Answer a message. The answer becomes part of the conversation, also if it was stopped; if an error is raised,
        the conversation is as before.

        Args:
            text: the user's message.
            streamer, is_stopped: as in `continue_tokens`.

        Returns:
            The answer's text, and its tokens and figures.

        Raises:
            ValueError: for a message that is not Unicode, that the template refuses, or that leaves no room for an
                answer.
        """
        require_unicode(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = render(self.tokenizer, messages)
        if self.tokens and rendered.startswith(self.rendered):
            tokens = self.tokens + encode_rendered(self.tokenizer, rendered[len(self.rendered) :])
        else:  # the template changed earlier messages
            self.cache, tokens = None, encode_rendered(self.tokenizer, rendered)
        room = self.model.config.max_position_embeddings
        if room - len(tokens) < LEAST_ROOM:
            raise ValueError(
                f"The conversation is full: with this message it has {len(tokens)} tokens, and the model has room for "
                f"{room}, of which an answer needs {LEAST_ROOM}."
            )
        cache, self.cache = self.cache, None  # after an error, layers of the cache may differ in length
        found = continue_tokens(self.model, self.tokenizer, tokens, self.decoding, cache, streamer, is_stopped)
        answer = self.tokenizer.decode(found.tokens, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.rendered = rendered + answer
        self.tokens = [*tokens, *found.tokens]
        if found.is_ended:  # the template adds its own
            self.tokens.pop()
        self.cache = found.cache
        return answer, found
