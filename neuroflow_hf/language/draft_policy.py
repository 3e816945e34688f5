"""Which tokens to draft, and how many."""

from collections.abc import Callable

from .lossless_config import NeuroFlowLosslessConfig

DraftWithBypass = Callable[[int, int], list[int]]  # `(token, length) -> tokens`
FIRST_LENGTH = 4  # tokens in a generation's first draft


class Lookup:
    """
    Drafts what followed the last few tokens when they occurred before, as prompt lookup does.

    Args:
        max_ngram: the most tokens to search for.
    """

    def __init__(self, max_ngram: int):
        self.max_ngram = max_ngram
        self.found: dict[tuple[int, ...], int] = {}  # n-gram: index of the token that followed it last
        self.seen = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """
        `limit` tokens that followed the longest n-gram found, or none. If they reach the end of `tokens`, they repeat.
        """
        for end in range(max(self.seen, 1), len(tokens)):
            for length in range(1, min(self.max_ngram, end) + 1):
                self.found[tuple(tokens[end - length : end])] = end
        self.seen = len(tokens)
        for length in range(min(self.max_ngram, len(tokens)), 0, -1):
            start = self.found.get(tuple(tokens[len(tokens) - length :]))
            if start is not None:
                period = len(tokens) - start
                return [tokens[start + offset % period] for offset in range(limit)]
        return []


class Drafts:
    """
    Drafts by the drafter that the options name. The length follows transformers' heuristic for assisted generation:
    two tokens more after a draft that was accepted whole, one less after any other.

    Args:
        options: options of the lossless generation.
        draft_with_bypass: `(token, length) -> tokens`, the bypassed model's continuation.
    """

    def __init__(self, options: NeuroFlowLosslessConfig, draft_with_bypass: DraftWithBypass):
        self.options, self.draft_with_bypass = options, draft_with_bypass
        self.lookup = Lookup(options.max_ngram)
        self.max_length = options.max_lookup if options.drafter == "lookup" else options.max_draft
        self.length = min(FIRST_LENGTH, self.max_length)

    def next(self, tokens: list[int], limit: int) -> list[int]:
        """A draft of at most `limit` tokens to follow `tokens`; empty where nothing is found."""
        length = min(limit, self.options.draft_length or self.length)
        if length < 1 or self.options.drafter == "none":
            return []
        if self.options.drafter == "lookup":
            return self.lookup.propose(tokens, length)
        return self.draft_with_bypass(tokens[-1], length)

    def learn(self, drafted: int, accepted: int) -> None:
        """Adapt the length to a draft's outcome."""
        if drafted:
            longer = self.length + (2 if accepted == drafted else -1)
            self.length = min(max(1, longer), self.max_length)
