"""Which tokens to draft, how many, and whether drafting pays."""

import math
import time
from collections.abc import Callable, Iterable, Sequence

from .lossless_config import NeuroFlowLosslessConfig

DraftWithModel = Callable[[int], list[int]]  # `length -> tokens`
LENGTHS = (1, 3, 7, 15, 31)  # with the last token, a verification feeds a power of two, which matrix products like
FIRST_LENGTH = 3  # of the drafts whose times are the first to be known
FIRST_DRAFTS = 2
# the acceptance rates to start from, as if `FIRST_TRIED` draft tokens had been seen: of the bypassed model, and of a
# lookup by the tokens that it found; those of SmolLM2's texts
FIRST_RATES = (2 / 3, 0.2, 0.45, 0.55, 0.7)
FIRST_TRIED = 3.0
MEMORY = 0.8  # weight of what was seen before a draft, beside the draft


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

    def find(self, tokens: list[int]) -> tuple[int, int]:
        """The length of the longest n-gram found, and where what followed it begins; (0, 0) for none."""
        for end in range(max(self.seen, 1), len(tokens)):
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


class AcceptanceRate:
    """
    The share of draft tokens that are kept, if those before them are: a running mean over drafts.

    Args:
        first: the rate to start from.
    """

    def __init__(self, first: float):
        self.kept, self.tried = first * FIRST_TRIED, FIRST_TRIED

    @property
    def value(self) -> float:
        """The rate, 0 to 1."""
        return self.kept / self.tried

    def learn(self, drafted: int, accepted: int) -> None:
        """Take in how many tokens of a draft were kept. The first rejected one was tried, too; those after it not."""
        self.kept = MEMORY * self.kept + accepted
        self.tried = MEMORY * self.tried + min(accepted + 1, drafted)


def expected_speed(
    acceptance: float, draft_seconds: float, check_seconds: Callable[[int], float], length: int
) -> float:
    """Expected tokens per second with drafts of this length; arguments as of [`best_length`]."""
    tokens = sum(acceptance**place for place in range(length + 1))
    return tokens / (length * draft_seconds + check_seconds(length))


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
    # the first of equals, so 0
    return max((0, *lengths), key=lambda n: expected_speed(acceptance, draft_seconds, check_seconds, n))


def interpolated(points: Sequence[tuple[int, float]], place: int) -> float:
    """The value at a place: linear between points (place, value) in rising order, and beyond the last two."""
    if len(points) == 1:
        return points[0][1]
    after = next((index for index in range(1, len(points)) if place <= points[index][0]), len(points) - 1)
    (before, low), (end, high) = points[after - 1 : after + 1]
    if place > end:  # not less than there: that would be noise
        return high + max(high - low, 0.0) * (place - end) / (end - before)
    return low + (high - low) * (place - before) / (end - before)


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
        # by the tokens that a lookup found; of 0: the bypassed model's
        last = len(FIRST_RATES) - 1
        self.rates = [AcceptanceRate(FIRST_RATES[min(found, last)]) for found in range(options.max_ngram + 1)]
        self.found = 0  # tokens found for the last draft; 0 for one by the bypassed model
        self.drafts = 0
        self.draft_seconds = math.inf  # least time of a draft token
        self.check_seconds: dict[int, float] = {}  # least time of a verification by its number of draft tokens
        self.checked_from = 0.0
        self.expected: tuple[int, int] | None = None  # index in the text and token of a lookup that was not used

    def next(self, tokens: list[int], limit: int) -> list[int]:
        """A draft of at most `limit` tokens to follow `tokens`; empty where nothing is found, or drafting is off."""
        if self.expected is not None:
            index, token = self.expected
            self.rates[self.found].learn(1, int(tokens[index] == token))
            self.expected = None
        started, draft = self.clock(), []
        self.found, start = self.lookup.find(tokens) if self.options.drafter == "lookup" else (0, 0)
        length = min(self.length(), limit) if self.found or self.options.drafter == "bypass" else 0
        if self.found and length > 0:
            draft = repeated(tokens, start, length)
        elif self.found:
            self.expected = (len(tokens), tokens[start])
        elif length > 0:
            draft = self.draft_with_model(length)
        self.checked_from = self.clock()
        if draft:
            self.drafts += 1
            self.draft_seconds = min(self.draft_seconds, (self.checked_from - started) / len(draft))
        return draft

    def length(self) -> int:
        """How many tokens to draft by the lookup or the bypassed model."""
        if self.options.draft_length:
            return self.options.draft_length
        if 0 not in self.check_seconds:
            return 0
        if self.drafts < FIRST_DRAFTS:
            return min(FIRST_LENGTH, self.options.max_draft)
        return best_length(self.rates[self.found].value, self.seconds_of_draft, self.seconds_of_check, self.lengths)

    @property
    def seconds_of_draft(self) -> float:
        """Least time of a draft token; before the first, as if it took none."""
        return 0.0 if math.isinf(self.draft_seconds) else self.draft_seconds

    def seconds_of_check(self, drafted: int) -> float:
        """Time of a verification of so many draft tokens, by the measured ones around it."""
        return interpolated(sorted(self.check_seconds.items()), drafted)

    def record_check(self, drafted: int) -> None:
        """Take the time of the verification that ends now and began when the draft was there."""
        seconds = self.clock() - self.checked_from
        self.check_seconds[drafted] = min(seconds, self.check_seconds.get(drafted, math.inf))

    def learn(self, drafted: int, accepted: int) -> None:
        """Take in how many tokens of the last draft were kept."""
        if drafted:
            self.rates[self.found].learn(drafted, accepted)
