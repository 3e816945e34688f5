"""Guesses at the next tokens, and when they pay."""

import time
from dataclasses import dataclass, field

from .lossless_config import NeuroFlowLosslessConfig

FIRST_DRAFT = 2  # tokens drafted before it is known how long that takes, or to try again whether it pays
MEMORY = 0.9  # the weight of what was observed before, with every new observation
PRIOR_SHARE, PRIOR_WEIGHT = 0.7, 2.0  # of guesses that come true, until some were observed
LOOKUP_PRIORS = {1: 0.4, 2: 0.6}  # the same for lookups, by how many tokens were found; of more, as above
PRIOR_DRAFTING = 0.6  # seconds that a step of drafting takes, over a dense one's, until one was observed
PRIOR_CHECKING = {2: 1.1, 10: 1.5}  # the same of dense forwards over so many tokens, until some were observed
OUTLIER_FACTOR = 3.0  # what takes longer than this many times the mean was interrupted by something else
MIN_SPEEDUP = 1.1  # times the speed of the choice before must be expected of one: less is within what clocks can tell
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # tokens without a guess, where guessing does not pay


class Lookup:
    """
    What followed the last few tokens when they occurred before.

    Args:
        max_ngram: how many tokens, at most, are looked for.
    """

    def __init__(self, max_ngram: int):
        self.max_ngram = max_ngram
        self.found: dict[tuple[int, ...], int] = {}  # by tokens, where what followed them last begins
        self.seen = 0

    def propose(self, tokens: list[int], limit: int) -> tuple[int, list[int]]:
        """How many tokens were found again (0: none), and up to `limit` that followed; repetitions go on for ever."""
        for end in range(max(self.seen, 1), len(tokens)):
            for length in range(1, min(self.max_ngram, end) + 1):
                self.found[tuple(tokens[end - length : end])] = end
        self.seen = len(tokens)
        for length in range(min(self.max_ngram, len(tokens)), 0, -1):
            start = self.found.get(tuple(tokens[len(tokens) - length :]))
            if start is not None:
                period = len(tokens) - start
                return length, [tokens[start + offset % period] for offset in range(limit)]
        return 0, []


class AcceptanceRate:
    """How a drafter has done: the share of its guesses that came true, with older ones fading."""

    def __init__(self, prior: float = PRIOR_SHARE):
        self.right, self.tried = prior * PRIOR_WEIGHT, PRIOR_WEIGHT
        self.pause, self.waits_until = FIRST_PAUSE, 0

    @property
    def share(self) -> float:
        """The share of single guesses that came true, each given that those before it did."""
        return self.right / self.tried

    def learn(self, drafted: int, accepted: int):
        """Take in a draft's outcome; guesses after the first wrong one say nothing."""
        self.right = MEMORY * self.right + accepted
        self.tried = MEMORY * self.tried + accepted + (accepted < drafted)

    def expected(self, length: int) -> float:
        """Tokens expected of a step with a draft of this length; one comes by itself."""
        share = min(self.share, 0.999)
        return (1 - share ** (length + 1)) / (1 - share)


class RunningLinearFit:
    """Running least squares of y over x: where a line through what was seen lies, which never falls."""

    def __init__(self):
        self.weight = self.x = self.y = self.xx = self.xy = 0.0

    def learn(self, x: float, y: float):
        """Take in a point; older ones fade."""
        self.weight, self.x, self.y = MEMORY * self.weight + 1, MEMORY * self.x + x, MEMORY * self.y + y
        self.xx, self.xy = MEMORY * self.xx + x * x, MEMORY * self.xy + x * y

    def at(self, x: float) -> float:
        """The line's height; at the mean of what was seen, while that has but one x."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 1e-6 else 0.0
        return mean_y + max(0.0, slope) * (x - mean_x)


class LatencyModel:
    """
    Seconds that a dense forward over n tokens takes, and one step of drafting. The step from one token to two is one
    of its own (masks, other kernels), and each further token adds little, so those over several lie on a line.

    Args:
        prior_drafting: seconds of a step of drafting over a dense one's, until one was observed.
    """

    def __init__(self, prior_drafting: float = PRIOR_DRAFTING):
        self.prior_drafting = prior_drafting
        self.plain_steps = 0
        self.single: float | None = None
        self.several = RunningLinearFit()
        self.drafting: float | None = None

    def checked(self, tokens: int, seconds: float):
        """Take in a dense forward."""
        if tokens == 1:
            self.plain_steps += 1  # the first two: the very first may be slow for reasons of its own
            first = self.plain_steps <= 2
            self.single = min(seconds, self.single or seconds) if first else blend(self.single, seconds)
        elif self.single is not None:
            self.several.learn(tokens, min(seconds, OUTLIER_FACTOR * self.checking(tokens - 1)))

    def drafted(self, steps: int, seconds: float):
        """Take in some steps of drafting."""
        if steps:
            self.drafting = blend(self.drafting, seconds / steps)

    def checking(self, length: int) -> float:
        """Expected for checking a draft of this length."""
        if not self.several.weight:
            for tokens, ratio in PRIOR_CHECKING.items():
                self.several.learn(tokens, ratio * self.single)
        return max(self.single, self.several.at(length + 1))

    def seconds(self, length: int, drafts: bool) -> float:
        """Expected for a step with a draft of this length."""
        drafting = self.prior_drafting * self.single if self.drafting is None else self.drafting
        return self.checking(length) + (length * drafting if drafts else 0.0)


def blend(before: float | None, now: float) -> float:
    """A running mean, which one interruption does not move far."""
    return now if before is None else MEMORY * before + (1 - MEMORY) * min(now, OUTLIER_FACTOR * before)


@dataclass
class Draft:
    """Tokens guessed, and what `Drafts.learn` wants to know again: who guessed, by which record."""

    tokens: list[int] = field(default_factory=list)
    source: str = "none"
    record: AcceptanceRate | None = None


class Drafts:
    """
    Chooses who drafts and how many tokens, so that the most tokens per second are expected.

    Args:
        options: of the lossless generation.
        draft_with_bypass: `(token, length) -> tokens`, the bypassed model's continuation.
        prior_drafting: as in `LatencyModel`.
    """

    def __init__(self, options: NeuroFlowLosslessConfig, draft_with_bypass, prior_drafting: float = PRIOR_DRAFTING):
        self.options, self.draft_with_bypass = options, draft_with_bypass
        self.lookup = Lookup(options.max_ngram)
        self.records: dict[str, AcceptanceRate] = {}
        self.pace = LatencyModel(prior_drafting)

    def next(self, tokens: list[int], limit: int) -> Draft:
        """A draft of at most `limit` tokens to follow `tokens`; often an empty one."""
        options = self.options
        if limit < 1 or options.drafter == "none":
            return Draft()
        if options.draft_length is None and self.pace.plain_steps < 2:
            return Draft()  # nothing to compare with yet
        candidates = []
        if options.looks_up:
            length, found = self.lookup.propose(tokens, min(limit, options.draft_length or options.max_lookup))
            if found:
                record = self.record(f"lookup {length}", LOOKUP_PRIORS.get(length, PRIOR_SHARE))
                candidates.append(("lookup", record, len(found)))
        if options.bypasses:
            most = FIRST_DRAFT if self.pace.drafting is None else options.max_draft
            candidates.append(("bypass", self.record("bypass"), min(limit, options.draft_length or most)))
        fixed = options.draft_length is not None
        choice = next(iter(candidates), None) if fixed else self.best(candidates, len(tokens))
        if choice is None:
            return Draft()
        source, record, length = choice
        if source == "lookup":
            return Draft(found[:length], source, record)
        start = time.perf_counter()
        drafted = self.draft_with_bypass(tokens[-1], length)
        self.pace.drafted(len(drafted), time.perf_counter() - start)
        return Draft(drafted, source, record)

    def best(self, candidates: list, position: int) -> tuple[str, AcceptanceRate, int] | None:
        """
        Of candidates `(source, record, most tokens)`, the one and the length with the most expected tokens per
        second; None if that is not to draft. A later one must be MIN_SPEEDUP more than an earlier one.
        """
        chosen, trial = None, None
        plain = fastest = MIN_SPEEDUP / self.pace.single
        for source, record, most in candidates:
            rates = {
                length: record.expected(length) / self.pace.seconds(length, source == "bypass")
                for length in range(1, most + 1)
            }
            length = max(rates, key=rates.get)
            if rates[length] > plain:
                record.pause, record.waits_until = FIRST_PAUSE, 0
            elif position >= record.waits_until:  # try again, now and then: texts change
                if record.waits_until > 0:
                    trial = (source, record, min(FIRST_DRAFT, most))
                record.waits_until = position + record.pause
                record.pause = min(2 * record.pause, LONGEST_PAUSE)
            if rates[length] > fastest:
                chosen, fastest = (source, record, length), MIN_SPEEDUP * rates[length]
        return chosen or trial  # trials are for where nothing is known to pay

    def record(self, name: str, prior: float = PRIOR_SHARE) -> AcceptanceRate:
        """A drafter's record, by its name and, for lookups, by how much was found."""
        return self.records.setdefault(name, AcceptanceRate(prior))

    def learn(self, draft: Draft, accepted: int, seconds: float):
        """Take in that so many of a draft's tokens came true, and that checking them took so long."""
        self.pace.checked(len(draft.tokens) + 1, seconds)
        if draft.tokens:
            draft.record.learn(len(draft.tokens), accepted)
