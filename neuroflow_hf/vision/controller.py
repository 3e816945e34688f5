"""
What a stream with a `cost_budget` does with a frame: hold its last output, encode its active patches, or make it a
keyframe.

What costs no more than the stream may spend on one frame is done at once. What costs more is spaced evenly: something
of cost `c` comes after `c / allowance` frames, sooner if more has changed than usual by then. The allowance is the
long-run rate where half of the reserve is saved, more above that, and less below. So in steady motion about half of it
is kept, and a cut or a burst is answered at once. In a debt of a dense frame, nothing is encoded.
"""

import math
from dataclasses import dataclass, fields

STEERING = 0.125  # the allowance is this much higher with a full reserve than with none, in dense frames
# With more than this share of its patches active, a frame is better encoded as a keyframe, more seldom. Found, as the
# other numbers, by eval/vision/vision_policies.py.
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
            the first in a scene.
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
        if self.is_cut(mean_surprise):
            usual = 0.0  # of the next scene, nothing is known
        elif self.waited:
            usual = usual + FORGETTING * (mean_surprise - usual) if usual else mean_surprise
        return Pace(0, since, 0.0, usual)


def choose(
    pace: Pace,
    rate: float,
    credit: float,
    reserve: float,
    active_fraction: float,
    mean_surprise: float,
    interval: int | None = None,
) -> str:
    """
    What to do with a frame: `HOLD`, `SPARSE` or `KEYFRAME`.

    Args:
        pace: of the stream.
        rate: what a frame adds to the credit, less what looking at it costs.
        credit: what the stream has saved, in dense frames. Below 0 it is in debt.
        reserve: the most that it can save.
        active_fraction: the share of active patches, which is about what encoding them costs.
        mean_surprise: over all patches.
        interval: a keyframe after so many frames without one, as soon as the credit pays for it; None for never.
    """
    allowance = rate + STEERING * (credit / reserve - 0.5)
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
