"""The cost budget of a stream: a token bucket whose unit is the cost of a dense frame."""

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports this module
    from .gate_config import NeuroFlowGateConfig

# A frame may overdraw the credit by the cost of one dense frame, and a keyframe by its number by one more. Debt beyond
# that, which only a change of options can cause, is forgiven.
MAX_DEBT = 2.0
SPARE = 1.25  # a lifted budget over the least cost: some is left for patches that change


@dataclass(frozen=True)
class CostBudget:
    """
    What a stream may spend. Credit is in dense frames' worth; a stream with none left holds its last output.

    Args:
        rate (`float`, *optional*): credit that every frame adds, the cost per frame in the long run. None: no limit.
        burst (`float`): the most credit that is saved up, and what a stream starts with.
    """

    rate: float | None
    burst: float

    def allows_encoding(self, credit: float) -> bool:
        """Whether a stream with this credit may encode patches on the coming frame."""
        return self.rate is None or credit > 0

    def credit_after(self, credit: float, frame: int, cost: float) -> float:
        """
        The credit after a frame of this number and cost. The first frame is free. Any T frames after it spend at most
        `rate * T + burst + 1`, since one frame may overdraw, and 1 more with a `keyframe_interval`, whose keyframes
        do not wait for credit.
        """
        if self.rate is None or frame == 0:
            return float(self.burst)
        return max(min(credit - cost + self.rate, float(self.burst)), -MAX_DEBT)


def least_cost(keyframe_interval: int | None, looking: float) -> float:
    """
    What a stream costs per frame if nothing changes: looking at every frame, the share `looking` of a dense frame, and
    a keyframe every `keyframe_interval` frames.
    """
    return looking + (0 if keyframe_interval is None else (1 - looking) / keyframe_interval)


def with_affordable_budget(gate: "NeuroFlowGateConfig", looking: float) -> "NeuroFlowGateConfig":
    """
    The gate with a `cost_budget` that pays for its `least_cost`; with a smaller one, debt would never end. A budget
    that comes from a preset is lifted, with a warning: on very small models, looking at a frame costs a large share of
    encoding it.

    Args:
        gate: the options; not changed.
        looking: the cost of a frame with nothing active, over that of a dense frame.

    Raises:
        ValueError: if the user set the budget.
    """
    if gate.cost_budget is None or gate.everything_active or not gate.needs_surprise:
        return gate
    least = least_cost(gate.keyframe_interval, looking)
    if gate.cost_budget > least:
        return gate
    keyframes = "" if gate.keyframe_interval is None else f" and a keyframe every {gate.keyframe_interval} frames"
    reason = f"looking at every frame{keyframes} costs {least:.3g} of dense"
    if gate.cost_budget != gate.preset_budget:
        raise ValueError(
            f"Gate option `cost_budget` is {gate.cost_budget}, and {reason}; raise the budget, or lift it with None."
        )
    lifted = copy.copy(gate)
    lifted.cost_budget = lifted.preset_budget = min(1.0, SPARE * least)
    warnings.warn(
        f"The preset's `cost_budget` of {gate.cost_budget} is lifted to {lifted.cost_budget:.3g} for this stream: on "
        f"so small a model, {reason}. Set `cost_budget` to choose another value.",
        stacklevel=2,
    )
    return lifted


def is_affordable(cost_budget: float | None, keyframe_interval: int | None) -> bool:
    """Whether a budget pays for one keyframe in every `keyframe_interval` frames, if there are both."""
    return cost_budget is None or keyframe_interval is None or cost_budget * keyframe_interval > 1


def without_conflict(preset: dict, named: dict) -> dict:
    """A preset's options without the budget or interval that conflicts with the interval or budget that is named."""
    budget, interval = ({**preset, **named}.get(name) for name in ("cost_budget", "keyframe_interval"))
    if is_affordable(budget, interval):
        return preset
    dropped = {"cost_budget", "keyframe_interval"} - named.keys()
    return {name: value for name, value in preset.items() if name not in dropped}
