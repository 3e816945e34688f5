"""The cost budget of a stream: a token bucket whose unit is the cost of a dense frame."""

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports this module
    from .gate_config import NeuroFlowGateConfig

# A frame may overdraw the credit by the cost of one dense frame, and a scene cut by one more. Debt beyond that, which
# only a change of options can cause, is forgiven.
MAX_DEBT = 2.0
SPARE = 1.25  # a lifted budget over the cost of looking: some is left for patches that change


@dataclass(frozen=True)
class CostBudget:
    """
    What a stream may spend. Credit is in dense frames' worth.

    Args:
        rate (`float`, *optional*): credit that every frame adds, the cost per frame in the long run. None: no limit.
        burst (`float`): the most credit that is saved up, and what a stream starts with.
    """

    rate: float | None
    burst: float

    def allows_encoding(self, credit: float) -> bool:
        """Whether a stream with this credit may make a keyframe of the coming frame because of what it shows."""
        return self.rate is None or credit > 0

    def credit_after(self, credit: float, frame: int, cost: float) -> float:
        """
        The credit after a frame of this number and cost. The first frame is free. Any T frames after it spend at most
        `rate * T + burst + MAX_DEBT`.
        """
        if self.rate is None or frame == 0:
            return float(self.burst)
        return max(min(credit - cost + self.rate, float(self.burst)), -MAX_DEBT)


def with_affordable_budget(gate: "NeuroFlowGateConfig", looking: float) -> "NeuroFlowGateConfig":
    """
    The gate with a `cost_budget` that pays for looking at every frame; with a smaller one, debt would never end. A
    budget that comes from a preset is lifted, with a warning: on very small models, looking at a frame costs a large
    share of encoding it.

    Args:
        gate: the options; not changed.
        looking: the cost of a frame with nothing active, over that of a dense frame.

    Raises:
        ValueError: if the user set the budget.
    """
    if gate.cost_budget is None or not gate.is_paced or gate.cost_budget > looking:
        return gate
    reason = f"looking at every frame costs {looking:.3g} of dense"
    if gate.cost_budget != gate.preset_budget:
        raise ValueError(
            f"Gate option `cost_budget` is {gate.cost_budget}, and {reason}; raise the budget, or lift it with None."
        )
    lifted = copy.copy(gate)
    lifted.cost_budget = lifted.preset_budget = min(1.0, SPARE * looking)
    warnings.warn(
        f"The preset's `cost_budget` of {gate.cost_budget} is lifted to {lifted.cost_budget:.3g} for this stream: on "
        f"so small a model, {reason}. Set `cost_budget` to choose another value.",
        stacklevel=2,
    )
    return lifted
