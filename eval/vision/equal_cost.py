"""
Controls at a method's own cost: between two settings anybody can mix, so a family of controls has a value at any cost.

Everything is taken scene by scene, the same for the method and for the controls: differences are paired, and intervals
come from drawing scenes, for the frames of one scene are no independent answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from neuroflow_hf.evaluation.equal_cost import ranked_at
from neuroflow_hf.evaluation.methods import MethodSpec
from neuroflow_hf.evaluation.statistics import middle, resamples

RESAMPLES = 2000
FEWEST_SCENES = 3  # of fewer, drawing says nothing
Statistic = Callable[[np.ndarray], np.ndarray]  # values of drawn scenes [R, S, m] to [R]


def families_of(specs: Sequence[MethodSpec]) -> dict[str, list[str]]:
    """
    The controls' names by family. Each family goes from the first frame repeated, which costs nothing, to dense.
    """
    ends = {spec.kind: spec.name for spec in specs if spec.kind in ("first", "dense")}
    families: dict[str, list[str]] = {}
    for spec in specs:
        if spec.control and spec.kind != "first":
            families.setdefault(spec.family, [ends["first"]] if "first" in ends else []).append(spec.name)
    return {name: [*found, *([ends["dense"]] if "dense" in ends else [])] for name, found in families.items()}


@dataclass(frozen=True)
class Compared:
    """
    A method against the best control at its cost; better is larger.

    Attributes:
        value, control: the statistic of both.
        family: of that control: the best one, chosen after the fact, which favours the controls.
        difference: of both.
        interval: 95 %, of the difference, from drawing scenes; None of fewer than FEWEST_SCENES.
    """

    value: float
    control: float
    family: str
    difference: float
    interval: tuple[float, float] | None

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "value": self.value,
            "control": self.control,
            "family": self.family,
            "difference": self.difference,
            "interval": None if self.interval is None else list(self.interval),
        }


def statistic_interval(
    values: np.ndarray, statistic: Statistic, baseline: np.ndarray | None = None
) -> tuple[float, float] | None:
    """
    An interval of a statistic of S scenes' values [S, m], or of its difference to that of a baseline [S, m] of the
    same scenes; None of fewer than FEWEST_SCENES.
    """
    if len(values) < FEWEST_SCENES:
        return None
    drawn = resamples(len(values), RESAMPLES)
    draws = statistic(values[drawn])
    return middle(draws if baseline is None else draws - statistic(baseline[drawn]))


def best_control(
    name: str,
    values: dict[str, np.ndarray],
    costs: dict[str, float],
    families: dict[str, list[str]],
    statistic: Statistic,
) -> Compared | None:
    """
    A method against the best family of controls at no more than its own cost, pooled over S scenes: a mixture of the
    two settings whose costs are nearest, or any cheaper setting, for more expense need not help.

    Args:
        name: of the method.
        values: of each method and control, [S, m].
        costs: of each, mean over all.
        families: as of `families_of`.
        statistic: of drawn scenes, larger is better. Of a mixture of two controls it is the mean of theirs, by their
            shares: a user has one of them.

    Returns:
        None if there are no controls.
    """

    def value_of(one: str, drawn: np.ndarray | None = None):
        return statistic(values[one][None])[0] if drawn is None else statistic(values[one][drawn])

    own, ranked = value_of(name), ranked_at(families, costs[name], costs.__getitem__, value_of)
    if not ranked or math.isnan(own):
        return None
    control, best = ranked[-1]
    interval = None
    if len(values[name]) >= FEWEST_SCENES:
        drawn = resamples(len(values[name]), RESAMPLES)
        interval = middle(value_of(name, drawn) - best.mean(lambda one: value_of(one, drawn)))
    return Compared(float(own), control, best.family, float(own - control), interval)
