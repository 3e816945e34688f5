"""
Baselines at a method's own cost: two settings can be mixed, so a family of baselines has a value at any cost.

Values are scene by scene, the same scenes for the method and for the baselines: differences are paired, and intervals
come from drawing scenes, because the frames of one scene are no independent answers.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from neuroflow_hf.evaluation.equal_cost import shares_at
from neuroflow_hf.evaluation.methods import MethodSpec
from neuroflow_hf.evaluation.statistics import Interval, middle, resamples

FEWEST_SCENES = 3  # with fewer, an interval says nothing
Statistic = Callable[[np.ndarray], np.ndarray]  # values of drawn scenes [R, S, m] to [R]


def families_of(specs: Sequence[MethodSpec]) -> dict[str, list[str]]:
    """
    The baselines' names by family. Each family goes from the first frame repeated, which costs nothing, to dense.
    """
    ends = {spec.kind: spec.name for spec in specs if spec.kind in ("first", "dense")}
    families: dict[str, list[str]] = {}
    for spec in specs:
        if spec.control and spec.kind != "first":
            families.setdefault(spec.family, [ends["first"]] if "first" in ends else []).append(spec.name)
    return {name: [*found, *([ends["dense"]] if "dense" in ends else [])] for name, found in families.items()}


def statistic_interval(
    values: np.ndarray, statistic: Statistic, baseline: Callable[[np.ndarray], np.ndarray] | None = None
) -> Interval | None:
    """
    A 95 % interval of a statistic of S scenes' values [S, m], or of its difference to a baseline's; None of fewer than
    FEWEST_SCENES. `baseline` takes the drawn scenes' places [R, S] to the baseline's statistic [R].
    """
    if len(values) < FEWEST_SCENES:
        return None
    drawn = resamples(len(values))
    draws = statistic(values[drawn])
    return middle(draws if baseline is None else draws - baseline(drawn))


def best_baseline(
    name: str,
    values: dict[str, np.ndarray],
    costs: dict[str, float],
    families: dict[str, list[str]],
    statistic: Statistic,
) -> dict | None:
    """
    A method against the best family of baselines at no more than its own cost, pooled over S scenes: a mixture of the
    two settings whose costs are nearest, or any cheaper setting, for more expense need not help. The best is chosen
    after the fact, which favours the baselines.

    Args:
        name: of the method.
        values: of each method and baseline, [S, m].
        costs: of each, mean over all.
        families: as of `families_of`.
        statistic: of drawn scenes, larger is better. Of a mixture of two baselines it is the mean of theirs, by their
            shares: a user has one of them.

    Returns:
        `value` and `control`, the statistic of the method and of the best baseline; `family` of that baseline;
        `difference` of both; and its `interval`, as of `statistic_interval`. None if there are no baselines.
    """

    def mixed(shares: list[tuple[float, str]], places) -> np.ndarray:
        return sum(share * statistic(values[one][places]) for share, one in shares)

    own, everything, found = statistic(values[name][None])[0], np.arange(len(values[name]))[None], []
    for family, members in families.items():
        mixture = [(share, members[at]) for share, at in shares_at([costs[one] for one in members], costs[name])]
        cheaper = [[(1.0, one)] for one in members if costs[one] <= costs[name]]
        found += [(mixed(shares, everything)[0], family, shares) for shares in (mixture, *cheaper)]
    found = [one for one in found if not math.isnan(one[0])]
    if not found or math.isnan(own):
        return None
    best, family, shares = max(found, key=lambda one: one[0])
    return {
        "value": float(own),
        "control": float(best),
        "family": family,
        "difference": float(own - best),
        "interval": statistic_interval(values[name], statistic, lambda drawn: mixed(shares, drawn)),
    }
