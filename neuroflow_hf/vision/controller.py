"""
What a stream with a `cost_budget` or a `min_fidelity` does with a frame: hold its last output, encode its active
patches, or make it a keyframe.

Under a budget, what costs no more than the stream may spend on one frame is done at once. What costs more is spaced
evenly: it waits until the allowances of the frames since patches were last encoded pay for it, less long if more has
changed than usual by then. What they pay too much counts for the next time. The allowance is the long-run rate where
half of the reserve is saved, more above that, and less below. So in steady motion about half of it is kept, and a cut
or a burst is answered at once. Once a scene has come to rest, what is above half pays for a keyframe: sparse frames
leave errors, which would stay as long as nothing moves. In a debt of a dense frame, nothing is encoded.
"""

import math
from dataclasses import dataclass, field, replace

from .error_estimate import ErrorEstimate

STEERING = 0.125  # the allowance is this much higher with a full reserve than with none, in dense frames
# With more than this share of its patches active, a frame is better encoded as a keyframe, more seldom. Found, as the
# other numbers, by eval/vision/vision_policies.py.
SPARSE_LIMIT = 0.5
CUT = 1.5  # a scene cut changes this much more in one frame than usual between keyframes
NEW_SCENE = 0.3  # mean surprise of a cut where nothing is usual: just after another, or in a scene at rest
REST = 3  # frames in a row without an active patch: a scene at rest. Cameras often repeat one or two frames.
FORGETTING = 0.3  # weight of the latest value in a running mean

HOLD, SPARSE, KEYFRAME = "hold", "sparse", "keyframe"


def allowance_of(rate: float, credit: float, reserve: float) -> float:
    """
    What a stream may spend on a frame, in dense frames.

    Args:
        rate: what a frame adds to the credit, less what looking at it costs.
        credit: what the stream has saved. Below 0 it is in debt.
        reserve: the most that it can save.
    """
    return rate + STEERING * (credit / reserve - 0.5)


@dataclass(frozen=True)
class Changes:
    """
    What the gate sees of a frame.

    Args:
        active_fraction (`float`): the share of active patches, which is about what encoding them costs.
        mean_surprise (`float`): over all patches.
        active_surprise (`float`): the active patches' part of it.
    """

    active_fraction: float
    mean_surprise: float
    active_surprise: float

    @property
    def best_encoded(self) -> tuple[str, float]:
        """How the frame is best encoded, and about what that costs."""
        return (SPARSE, self.active_fraction) if self.active_fraction <= SPARSE_LIMIT else (KEYFRAME, 1.0)


@dataclass(frozen=True)
class Pace:
    """
    What the controller remembers of a stream.

    Args:
        paid (`float`): what the allowances of the frames since patches were last encoded pay for.
        since_keyframe (`int`): frames since the last keyframe.
        last_surprise (`float`): mean surprise of the last frame, if it was held; else 0.
        usual_surprise (`float`): running mean of the mean surprise of frames that were encoded after waiting; 0 before
            the first in a scene.
        after_cut (`bool`): whether that is still unknown of the scene after a cut.
        unchanged (`int`): frames without an active patch up to the last one.
        error (`ErrorEstimate`): how far the output is from dense.
    """

    paid: float = 0.0
    since_keyframe: int = 0
    last_surprise: float = 0.0
    usual_surprise: float = 0.0
    after_cut: bool = False
    unchanged: int = 0
    error: ErrorEstimate = field(default_factory=ErrorEstimate)

    @classmethod
    def from_dict(cls, values: dict) -> "Pace":
        """
        The pace that `dataclasses.asdict` made into plain values.

        Raises:
            ValueError: if they are something else.
        """
        try:
            pace = cls(**{**values, "error": ErrorEstimate(**values["error"])})
            numbers = [*vars(pace.error).values(), *(vars(pace)[name] for name in values if name != "error")]
        except (TypeError, KeyError):
            numbers = [None]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
            raise ValueError(f"The state's pace is {values!r}; expected a finite number for each field of `Pace`.")
        return pace

    def is_cut(self, mean_surprise: float) -> bool:
        """Whether a frame with this mean surprise shows another scene than the one before."""
        least = CUT * self.usual_surprise
        if not least:
            least = NEW_SCENE if self.after_cut or self.unchanged else math.inf
        return mean_surprise - self.last_surprise > least

    def is_at_rest(self, changes: Changes) -> bool:
        """Whether nothing changes any more, and what was encoded sparsely is still remembered."""
        return changes.active_fraction == 0 and self.unchanged + 1 >= REST and self.error.encoded > 0

    def after(self, action: str, changes: Changes, allowance: float) -> "Pace":
        """The pace after a frame; arguments as of [`choose`]."""
        surprise, paid = changes.mean_surprise, self.paid + allowance
        pace = replace(
            self,
            since_keyframe=0 if action == KEYFRAME else self.since_keyframe + 1,
            unchanged=0 if changes.active_fraction else self.unchanged + 1,
        )
        if action == HOLD:
            return replace(pace, paid=paid, last_surprise=surprise, error=self.error.after_hold())
        if self.is_cut(surprise):
            pace = replace(pace, usual_surprise=0.0, after_cut=True)
        elif self.last_surprise and changes.active_fraction:  # a scene at rest did not wait to be encoded
            usual = self.usual_surprise
            usual = usual + FORGETTING * (surprise - usual) if usual else surprise
            pace = replace(pace, usual_surprise=usual, after_cut=False)
        if action == KEYFRAME:
            error, cost = self.error.after_keyframe(surprise), 1.0
        else:
            error, cost = self.error.after_sparse(changes.active_surprise), changes.active_fraction
        return replace(pace, paid=max(min(paid - cost, allowance), 0.0), last_surprise=0.0, error=error)


def least_action(error: ErrorEstimate, changes: Changes, min_fidelity: float) -> str:
    """The cheapest action after which the estimated cosine to dense is at least `min_fidelity`."""
    allowed = 1 - min_fidelity
    if error.if_held(changes.mean_surprise) <= allowed:
        return HOLD
    action, _ = changes.best_encoded
    if action == SPARSE and error.if_sparse(changes.mean_surprise, changes.active_surprise) <= allowed:
        return SPARSE
    return KEYFRAME


def choose(
    pace: Pace,
    changes: Changes,
    allowance: float,
    credit: float,
    reserve: float,
    interval: int | None = None,
    min_fidelity: float | None = None,
) -> str:
    """
    What to do with a frame: `HOLD`, `SPARSE` or `KEYFRAME`.

    Args:
        pace: of the stream.
        changes: on this frame.
        allowance: as of [`allowance_of`]; at least 1 without a budget.
        credit: what the stream has saved, in dense frames. Below 0 it is in debt.
        reserve: the most that it can save.
        interval: a keyframe after so many frames without one, as soon as the credit pays for it; None for never.
        min_fidelity: cosine to dense to keep. No more is done than that needs, and no less if a keyframe may be paid.
    """
    action, cost = changes.best_encoded
    if interval is not None and pace.since_keyframe + 1 >= interval and credit >= 1:
        return KEYFRAME
    if min_fidelity is not None:
        least = least_action(pace.error, changes, min_fidelity)
        if least == HOLD or allowance >= 1:
            return least
    if credit <= -1:
        return HOLD  # where few patches cost much, as in mode `mlp`, `active_fraction` is too low an estimate
    if pace.is_at_rest(changes) and credit >= reserve / 2 + 1:
        return KEYFRAME
    if cost <= allowance:
        return action
    if action == KEYFRAME and pace.is_cut(changes.mean_surprise):
        return KEYFRAME
    urgency = (changes.mean_surprise / pace.usual_surprise) ** 0.5 if pace.usual_surprise else 1.0
    return action if credit > 0 and (pace.paid + allowance) * urgency >= cost else HOLD
