"""
What a stream with a `cost_budget` does with a frame: hold its last output, encode its active patches, or make it a
keyframe.

What costs no more than the stream may spend on one frame is done at once. What costs more is spaced evenly: something
of cost `c` comes after `c / allowance` frames, sooner if more has changed than usual by then. So a stream never spends
all it has on a few frames and then waits. In a debt of a dense frame, nothing is encoded.
"""

import math
from dataclasses import dataclass, fields

HORIZON = 32  # frames over which saved credit is spent, and debt paid back
# With more than this share of its patches active, a frame is better encoded as a keyframe, more seldom. Found, as the
# numbers below, by eval/vision/against_holding.py.
SPARSE_LIMIT = 0.5
CUT = 1.5  # a scene cut changes this much more in one frame than usual between keyframes
FORGETTING = 0.3  # weight of the latest value in a running mean

HOLD, SPARSE, KEYFRAME = "hold", "sparse", "keyframe"


@dataclass(frozen=True)
class Pace:
    """
    What the controller remembers of a stream.

    Args:
        waited (`int`): frames since patches were last encoded.
        since_keyframe (`int`): frames since the last keyframe.
        last_surprise (`float`): mean surprise of the last frame, if it was held; else 0.
        usual_surprise (`float`): running mean of the mean surprise of frames that were encoded after waiting; 0 before
            the first.
    """

    waited: int = 0
    since_keyframe: int = 0
    last_surprise: float = 0.0
    usual_surprise: float = 0.0

    @classmethod
    def from_dict(cls, values: dict) -> "Pace":
        """
        The pace that `dataclasses.asdict` made into plain values.

        Raises:
            ValueError: if they are something else.
        """
        known = isinstance(values, dict) and values.keys() == {field.name for field in fields(cls)}
        if not known or not all(type(value) in (int, float) and math.isfinite(value) for value in values.values()):
            raise ValueError(f"The state's pace is {values!r}; expected a finite number for each field of `Pace`.")
        return cls(**values)

    def is_cut(self, mean_surprise: float) -> bool:
        """Whether a frame with this mean surprise shows another scene than the one before."""
        return 0 < CUT * self.usual_surprise < mean_surprise - self.last_surprise

    def after(self, action: str, mean_surprise: float) -> "Pace":
        """The pace after a frame."""
        since = 0 if action == KEYFRAME else self.since_keyframe + 1
        usual = self.usual_surprise
        if action == HOLD:
            return Pace(self.waited + 1, since, mean_surprise, usual)
        if self.waited and not self.is_cut(mean_surprise):
            usual = usual + FORGETTING * (mean_surprise - usual) if usual else mean_surprise
        return Pace(0, since, 0.0, usual)


def choose(
    pace: Pace, rate: float, credit: float, active_fraction: float, mean_surprise: float, interval: int | None = None
) -> str:
    """
    What to do with a frame: `HOLD`, `SPARSE` or `KEYFRAME`.

    Args:
        pace: of the stream.
        rate: what a frame adds to the credit, less what looking at it costs.
        credit: what the stream has saved, in dense frames. Below 0 it is in debt.
        active_fraction: the share of active patches, which is about what encoding them costs.
        mean_surprise: over all patches.
        interval: a keyframe after so many frames without one, as soon as the credit pays for it; None for never.
    """
    allowance = rate + credit / HORIZON
    action, cost = (SPARSE, active_fraction) if active_fraction <= SPARSE_LIMIT else (KEYFRAME, 1.0)
    if interval is not None and pace.since_keyframe + 1 >= interval and credit >= 1:
        return KEYFRAME
    if credit <= -1:
        return HOLD  # where few patches cost much, as in mode `mlp`, `active_fraction` is too low an estimate
    if cost <= allowance:
        return action
    if action == KEYFRAME and pace.is_cut(mean_surprise):
        return KEYFRAME
    urgency = (mean_surprise / pace.usual_surprise) ** 0.5 if pace.usual_surprise else 1.0
    return action if credit > 0 and (pace.waited + 1) * allowance * urgency >= cost else HOLD
