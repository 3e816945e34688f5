"""Which tokens to draft, how many, and whether drafting pays."""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from .lossless_config import NeuroFlowLosslessConfig

DraftWithModel = Callable[[int], list[int]]  # `length -> tokens`
LENGTHS = (1, 3, 7, 15, 31)  # with the last token, a verification feeds a power of two, which matrix products like
FIRST_LENGTH, FIRST_DRAFTS = 3, 2  # of the drafts that are made in any case, to time them
# the acceptance rates to start from, as if `FIRST_TRIED` draft tokens had been seen: of the bypassed model, and of a
# lookup by the tokens that it found; those of SmolLM2's texts
FIRST_RATES = (2 / 3, 0.2, 0.45, 0.55, 0.7)
FIRST_TRIED = 3.0
MEMORY = 0.8  # weight of what was seen before a draft, beside the draft


class Lookup:
    """Finds where the last `max_ngram` tokens of a growing text, or fewer, occurred before."""

    def __init__(self, max_ngram: int):
        self.max_ngram = max_ngram
        self.found: dict[tuple[int, ...], int] = {}  # n-gram: index of the token that followed it last
        self.seen = 0

    def find(self, tokens: list[int]) -> tuple[int, int]:
        """The length of the longest n-gram found, and where what followed it begins; (0, 0) for none."""
        for end in range(self.seen, len(tokens)):
            for length in range(1, min(self.max_ngram, end) + 1):
                self.found[tuple(tokens[end - length : end])] = end
        self.seen = len(tokens)
        for length in range(min(self.max_ngram, len(tokens)), 0, -1):
            start = self.found.get(tuple(tokens[len(tokens) - length :]))
            if start is not None:
                return length, start
        return 0, 0


def repeated(tokens: list[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on. If they reach the end of `tokens`, they repeat."""
    period = len(tokens) - start
    return [tokens[start + offset % period] for offset in range(count)]


def best_length(
    acceptance: float, draft_seconds: float, check_seconds: Callable[[int], float], lengths: Iterable[int]
) -> int:
    """
    The length of a draft that is expected to give the most tokens for its time, or 0 if drafting does not pay.

    A draft of n tokens keeps the i-th with probability acceptance^i, its verification gives one token more, and both
    take n * draft_seconds + check_seconds(n). In units of a step without a draft, a single token pays if its
    acceptance exceeds draft + (check - 1).

    Args:
        acceptance: the probability that a draft token is kept, if those before it are.
        draft_seconds: time to draft a token.
        check_seconds: time of a dense forward by its number of draft tokens; of 0: a step without a draft.
        lengths: the lengths to choose from, besides 0.
    """

    def speed(length: int) -> float:
        tokens = sum(acceptance**place for place in range(length + 1))
        return tokens / (length * draft_seconds + check_seconds(length))

    return max((0, *lengths), key=speed)  # the first of equals, so 0


def interpolated(points: Sequence[tuple[int, float]], place: int) -> float:
    """The value at a place: linear between points (place, value) in rising order, and beyond the last two."""
    if len(points) == 1:
        return points[0][1]
    after = min(max(1, bisect_left(points, (place,))), len(points) - 1)
    (before, low), (end, high) = points[after - 1 : after + 1]
    slope = (high - low) / (end - before)
    return high + (max(slope, 0.0) if place > end else slope) * (place - end)  # falling beyond the end would be noise


class Drafts:
    """
    Drafts by the drafter that the options name, of the length that pays best by the least times measured since the
    generation began: the first step has no draft, the next two drafts are made in any case.

    - A lookup that found more tokens is kept more often, so each length found has a running acceptance rate of its
      own. Where a lookup does not pay, it is still compared with the text, and may come to pay.
    - The bypassed model has one acceptance rate. Where it does not pay, it stays off.

    Args:
        options: options of the lossless generation.
        draft_with_model: `length -> tokens`, of the bypassed model.
        clock: seconds.
    """

    def __init__(
        self,
        options: NeuroFlowLosslessConfig,
        draft_with_model: DraftWithModel,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.options, self.draft_with_model, self.clock = options, draft_with_model, clock
        self.lookup = Lookup(options.max_ngram)
        self.lengths = sorted({min(length, options.max_draft) for length in LENGTHS})
        # draft tokens kept, and tried, by the number of tokens that a lookup found; of 0: the bypassed model's
        rates = [FIRST_RATES[min(found, len(FIRST_RATES) - 1)] for found in range(options.max_ngram + 1)]
        self.counts = [(rate * FIRST_TRIED, FIRST_TRIED) for rate in rates]
        self.found, self.begin = 0, 0  # tokens found for the last guess, and its place in the text
        self.guess: list[int] = []  # the last draft, or the first token of a lookup that was not used
        self.drafts = 0
        self.draft_seconds = math.inf  # least time of a draft token
        self.check_seconds: dict[int, float] = {}  # least time of a verification by its number of draft tokens
        self.checked_from = 0.0

    def next(self, tokens: list[int], limit: int) -> list[int]:
        """A draft of at most `limit` tokens to follow `tokens`; empty where nothing is found, or drafting is off."""
        self.learn(tokens)
        started, uses_lookup = self.clock(), self.options.drafter == "lookup"
        self.found, start = self.lookup.find(tokens) if uses_lookup else (0, 0)
        can_draft = self.found or self.options.drafter == "bypass"
        length = max(0, min(self.length(), limit)) if can_draft else 0
        if self.found:
            self.guess = repeated(tokens, start, max(1, length))
        else:
            self.guess = self.draft_with_model(length) if length else []
        self.begin, draft = len(tokens), self.guess[:length]
        self.checked_from = self.clock()
        if draft:
            self.drafts += 1
            self.draft_seconds = min(self.draft_seconds, (self.checked_from - started) / len(draft))
        return draft

    def length(self) -> int:
        """How many tokens to draft."""
        if self.options.draft_length:
            return self.options.draft_length
        if 0 not in self.check_seconds:
            return 0
        if self.drafts < FIRST_DRAFTS:
            return min(FIRST_LENGTH, self.options.max_draft)
        kept, tried = self.counts[self.found]
        times = sorted(self.check_seconds.items())
        return best_length(kept / tried, self.draft_seconds, lambda n: interpolated(times, n), self.lengths)

    def learn(self, tokens: list[int]) -> None:
        """Compare the last guess with the text. Its first wrong token was tried, too; those after it were not."""
        if self.guess:
            right = [token == guess for token, guess in zip(tokens[self.begin :], self.guess, strict=False)]
            kept, tried = self.counts[self.found]
            accepted = [*right, False].index(False)
            self.counts[self.found] = (MEMORY * kept + accepted, MEMORY * tried + min(accepted + 1, len(self.guess)))

    def record_check(self, drafted: int) -> None:
        """Take the time of the verification that ends now and began when the draft was there."""
        seconds = self.clock() - self.checked_from
        self.check_seconds[drafted] = min(seconds, self.check_seconds.get(drafted, math.inf))
