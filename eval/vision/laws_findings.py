"""
Which of the published observations hold, by rules, from what `laws_measure.py` found on each clip. Pure functions.

A law holds or does not hold only if an interval over clips says so; everything else cannot be told.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from eval.language.findings import finding
from eval.vision.clip_statistics import Estimate, correlation, difference, estimate, mean, rounded, share, shown
from eval.vision.composed_bench import ClipName, Figures
from eval.vision.laws_measure import DISTANCES, GROUPS, LAST_UPDATE_THRESHOLDS, MEMORY, SETTINGS, SWAPS, THRESHOLDS

TRAVELLING = ("crossing", "arc", "oscillating")
STAYING = ("still", "local")
PUBLISHED_SKIPS = (0.555, 0.663, 0.84)
PUBLISHED_TOP1 = (0.6960, 0.7045, 0.7155)
LEVEL_TOP1, LEVEL_COSINE = 0.03, 0.01
PUBLISHED_STABILITY = {"inactive": 0.83, "active": 0.41}
LEVEL_STABILITY = 0.05
PUBLISHED_SHIFT = 0.73

Measured = Sequence[tuple[ClipName, Figures]]


def after_first(values: np.ndarray) -> np.ndarray:
    """Without the first frame, which is dense in every method."""
    return np.asarray(values)[1:]


def right(figures: Figures, setting: str) -> np.ndarray:
    """Whether the best label is the right one, on the frames after the first on which something is seen."""
    label = after_first(figures["label"])
    return (after_first(figures[place_of(setting)]) == label)[label >= 0].astype(float)


def right_of_first(figures: Figures) -> np.ndarray:
    """As `right`, for the first frame's dense label repeated."""
    label = after_first(figures["label"])
    return (figures["dense place"][0] == label)[label >= 0].astype(float)


def place_of(setting: str) -> str:
    """The name of a setting's best labels among a clip's figures."""
    return "dense place" if setting == "dense" else f"{setting}: place"


def loss(figures: Figures, setting: str) -> np.ndarray:
    """`1 - cos` to dense, on the frames after the first."""
    return 1 - after_first(figures[f"{setting}: cosine"])


def loss_of_first(figures: Figures) -> np.ndarray:
    """As `loss`, for the first frame's dense embedding repeated."""
    return 1 - after_first(cosine_rows(figures["dense pooled"], figures["dense pooled"][:1]))


def loss_held(figures: Figures, cost: float) -> np.ndarray:
    """As `loss`, for dense every k frames, held between, at this cost: a mixture of the two nearest k."""
    every = max(1, int(np.ceil(1 / max(cost, 1e-3))))
    cheaper = loss_every(figures, every)
    if every == 1:
        return cheaper
    dearer, costs = loss_every(figures, every - 1), (1 / every, 1 / (every - 1))
    share = max(0.0, cost - costs[0]) / (costs[1] - costs[0])
    return share * dearer + (1 - share) * cheaper


def loss_every(figures: Figures, every: int) -> np.ndarray:
    """As `loss`, for dense every so many frames, held between; mean over phases."""
    pooled = figures["dense pooled"]
    index = np.arange(len(pooled))
    losses = []
    for phase in range(every):
        held = np.maximum.accumulate(np.where((index - phase) % every == 0, index, 0))
        losses.append(1 - cosine_rows(pooled, pooled[held]))
    return after_first(np.mean(losses, axis=0))


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of rows [T, D], or of one row with all: [T]."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def skip_of(measured: Measured, setting: str) -> float:
    """Mean skip rate after the first frame."""
    return float(np.concatenate([after_first(figures[f"{setting}: skip"]) for _, figures in measured]).mean())


def cost_of(measured: Measured, setting: str) -> float:
    """Mean cost after the first frame."""
    return float(np.concatenate([after_first(figures[f"{setting}: cost"]) for _, figures in measured]).mean())


def within(found: Estimate, low: float, high: float) -> bool:
    """Whether the interval lies inside."""
    return found.known and low <= found.low and found.high <= high


def outside(found: Estimate, low: float, high: float) -> bool:
    """Whether the interval lies beside it, on one side."""
    return found.known and (found.high < low or found.low > high)


def above(found: Estimate, level: float = 0.0) -> bool:
    """Whether the interval lies above."""
    return found.known and found.low > level


def below(found: Estimate, level: float = 0.0) -> bool:
    """Whether the interval lies below."""
    return found.known and found.high < level


# --- tables ----------------------------------------------------------------------------------------------------------


def settings_table(measured: Measured) -> dict[str, dict]:
    """Each setting over all clips, beside dense and the first frame repeated."""
    every = [figures for _, figures in measured]
    table = {
        "dense": {"skip": 0.0, "cost": 1.0, "top1": rounded(mean([right(one, "dense") for one in every]))},
        "control: first frame repeated": {
            "skip": 1.0,
            "cost": 0.0,
            "loss": rounded(mean([loss_of_first(one) for one in every])),
            "top1": rounded(mean([right_of_first(one) for one in every])),
        },
    }
    for setting in SETTINGS:
        cost = cost_of(measured, setting)
        table[setting] = {
            "skip": skip_of(measured, setting),
            "cost": cost,
            "loss": rounded(mean([loss(one, setting) for one in every])),
            "loss of dense held at that cost": rounded(mean([loss_held(one, cost) for one in every])),
            "top1": rounded(mean([right(one, setting) for one in every])),
            "top1 less dense's": rounded(mean([right(one, setting) - right(one, "dense") for one in every])),
            "entropy less dense's": rounded(mean([entropy_change(one, setting) for one in every])),
        }
    return table


def motions_table(measured: Measured) -> dict[str, dict]:
    """The published method by motion, beside the first frame repeated."""
    table = {}
    for motion in dict.fromkeys(name.motion for name, _ in measured):
        every = [figures for name, figures in measured if name.motion == motion]
        table[motion] = {
            "clips": len(every),
            "travelled": float(np.concatenate([after_first(one["travelled"]) for one in every]).mean()),
            "skip": float(np.concatenate([after_first(one[f"{MEMORY}: skip"]) for one in every]).mean()),
            "loss": rounded(mean([loss(one, MEMORY) for one in every])),
            "loss of first frame repeated": rounded(mean([loss_of_first(one) for one in every])),
            "top1, dense": rounded(mean([right(one, "dense") for one in every])),
            "top1": rounded(mean([right(one, MEMORY) for one in every])),
            "entropy less dense's": rounded(mean([entropy_change(one, MEMORY) for one in every])),
        }
    return table


def stability_table(measured: Measured) -> dict[str, dict]:
    """Cosines of the last layer's features between frames, by what says a patch is active and by distance."""
    rows = ["gate, 1", *(f"change, {distance}" for distance in DISTANCES)]
    table: dict[str, dict] = {
        row: {
            "inactive": rounded(stability_of(measured, place, 0)),
            "active": rounded(stability_of(measured, place, 2)),
        }
        for place, row in enumerate(rows)
    }
    table["control: another patch of the same frame"] = {"all": rounded(mean([one["floor"] for _, one in measured]))}
    return table


def stability_of(measured: Measured, row: int, first: int) -> Estimate:
    """Mean cosine of one kind of patches: `first` is 0 for inactive, 2 for active."""
    rows = [tuple(figures["stability"][row, first : first + 2]) for _, figures in measured]
    return estimate([row for row in rows if row[1]], lambda total: total[:, 0] / total[:, 1])


def swaps_table(measured: Measured) -> dict[str, dict]:
    """By how much the pooled cosine grows with one group of patches dense, and how far these are from dense's."""
    table = {}
    for place, name in enumerate(SWAPS):
        table[name] = {"gain": rounded(mean([gain(one, name) for _, one in measured]))}
        if place < len(GROUPS):
            table[name]["patches' 1 - cos"] = rounded(
                mean([after_first(one["swap: shift"][:, place]) for _, one in measured])
            )
    table["everything"] = {"gain": rounded(mean([loss(one, MEMORY) for _, one in measured]))}
    context = [loss(one, MEMORY) - loss(one, "context") for _, one in measured]
    table["control: active patches encoded in context"] = {"gain": rounded(mean(context))}
    return table


def gain(figures: Figures, name: str) -> np.ndarray:
    """Gains of one of SWAPS, after the first frame; 0 where the group has no patches."""
    return np.nan_to_num(after_first(figures["swap: gain"][:, SWAPS.index(name)]))


def entropy_change(figures: Figures, setting: str) -> np.ndarray:
    """The head's entropy less dense's on the same frame."""
    return after_first(figures[f"{setting}: entropy"] - figures["dense entropy"])


# --- laws ------------------------------------------------------------------------------------------------------------


def findings(measured: Measured) -> list[dict]:
    """All laws that these clips can speak of."""
    every: list[Callable[[Measured], list[dict]]] = [
        saturation,
        displacement,
        entropy_follows_loss,
        inactive_patches_are_stable,
        shift_costs_more,
        ghosts_cost,
    ]
    return [found for law in every for found in law(measured)]


def saturation(measured: Measured) -> list[dict]:
    """Whether accuracy and fidelity hardly depend on how much is skipped."""
    every = [figures for _, figures in measured]
    skips = {f"ema {threshold:g}": skip_of(measured, f"ema {threshold:g}") for threshold in THRESHOLDS}
    least, most = (
        min(skips, key=lambda setting: abs(skips[setting] - published))
        for published in (PUBLISHED_SKIPS[0], PUBLISHED_SKIPS[-1])
    )
    two, apart = least != most, "cannot be told of one setting"
    top1 = mean([right(one, most) - right(one, least) for one in every])
    fidelity = mean([loss(one, most) - loss(one, least) for one in every])
    control = mean([right_of_first(one) - right(one, most) for one in every])
    where = f"{least}: {skips[least]:.1%} skipped, {most}: {skips[most]:.1%}"
    found = [
        finding(
            "accuracy hardly depends on the skip rate (69.6 / 70.45 / 71.55% at 55.5 / 66.3 / 84.0% skip)",
            f"holds if the interval of the difference lies within {LEVEL_TOP1:.0%}, not if beside it; {apart}",
            f"{shown(top1, '{:+.2f}', 100)} points of top-1 ({where})",
            two and within(top1, -LEVEL_TOP1, LEVEL_TOP1),
            two and outside(top1, -LEVEL_TOP1, LEVEL_TOP1),
        ),
        finding(
            "fidelity hardly depends on the skip rate",
            f"holds if the interval of the difference of `1 - cos` lies within {LEVEL_COSINE}, not if beside; {apart}",
            f"{shown(fidelity, '{:+.4f}')} ({where})",
            two and within(fidelity, -LEVEL_COSINE, LEVEL_COSINE),
            two and outside(fidelity, -LEVEL_COSINE, LEVEL_COSINE),
        ),
    ]
    for one in found:
        one["control"] = f"first frame repeated, 100% skipped: {shown(control, '{:+.2f}', 100)} points to {most}"
    return found


def displacement(measured: Measured) -> list[dict]:
    """Whether the published method loses most where things travel."""
    travelling = [figures for name, figures in measured if name.motion in TRAVELLING]
    staying = [figures for name, figures in measured if name.motion in STAYING]
    if not travelling or not staying:
        return []

    def lost(figures):
        return right(figures, "dense") - right(figures, MEMORY)

    def lost_by_first(figures):
        return right(figures, "dense") - right_of_first(figures)

    points = difference([*map(lost, travelling)], [*map(lost, staying)])
    points_first = difference([*map(lost_by_first, travelling)], [*map(lost_by_first, staying)])
    error = difference([loss(one, MEMORY) for one in travelling], [loss(one, MEMORY) for one in staying])
    error_first = difference([loss_of_first(one) for one in travelling], [loss_of_first(one) for one in staying])
    moved = [figures for name, figures in measured if name.motion in (*TRAVELLING, *STAYING)]
    along = correlation([after_first(one["travelled"]) for one in moved], [loss(one, MEMORY) for one in moved])
    along_first = correlation([after_first(one["travelled"]) for one in moved], [loss_of_first(one) for one in moved])
    groups = f"{', '.join(TRAVELLING)} to {', '.join(STAYING)}"
    rule = "holds if the interval is above 0, does not hold if it is below"
    claims = [
        (
            "accuracy is lost where things travel across the frame (published: 29 to 43 points)",
            points,
            f"{shown(points, '{:+.1f}', 100)} points more lost ({groups})",
            f"first frame repeated: {shown(points_first, '{:+.1f}', 100)} points",
        ),
        (
            "fidelity is lost where things travel across the frame",
            error,
            f"{shown(error, '{:+.4f}')} of `1 - cos` ({groups})",
            f"first frame repeated: {shown(error_first, '{:+.4f}')}",
        ),
        (
            "the further a thing is from where it was, the more is lost",
            along,
            f"rank correlation of distance and `1 - cos` {shown(along, '{:+.2f}')}",
            f"first frame repeated: {shown(along_first, '{:+.2f}')}",
        ),
    ]
    return [
        {**finding(claim, rule, said, above(found), below(found)), "control": control}
        for claim, found, said, control in claims
    ]


def entropy_follows_loss(measured: Measured) -> list[dict]:
    """Whether the pooling head's attention tells of what is lost."""
    every = [figures for _, figures in measured]
    found = []
    for setting in (MEMORY, "eliminate"):
        changes, losses = [entropy_change(one, setting) for one in every], [loss(one, setting) for one in every]
        along = correlation([np.abs(change) for change in changes], losses)
        tokens = [after_first(one[f"{setting}: skip"]) for one in every]
        control = correlation([1 - skip for skip in tokens], losses)
        moved = mean(changes)
        found.append(
            {
                **finding(
                    f"the more the pooling head's entropy differs from dense's, the more is lost ({setting})",
                    "holds if the interval of the rank correlation over frames is above 0, does not hold if below",
                    f"{shown(along, '{:+.2f}')}; entropy {shown(moved, '{:+.3f}')} nats to dense's",
                    above(along),
                    below(along),
                ),
                "control": f"correlation of loss with the share of active patches: {shown(control, '{:+.2f}')}",
            }
        )
    return found


def inactive_patches_are_stable(measured: Measured) -> list[dict]:
    """Whether the last layer's features stay where the gate sees no change."""
    inactive, active = stability_of(measured, 0, 0), stability_of(measured, 0, 2)
    floor = mean([one["floor"] for _, one in measured])
    rows = []
    for _, one in measured:
        sums_of = one["stability"][0]
        if sums_of[1] and sums_of[3]:
            rows.append((sums_of[0], sums_of[1], sums_of[2], sums_of[3]))
    apart = estimate(rows, lambda total: total[:, 0] / total[:, 1] - total[:, 2] / total[:, 3])
    far = stability_of(measured, len(DISTANCES), 0)
    control = (
        f"inactive over {DISTANCES[-1]} frames: {shown(far, '{:.3f}')}; another patch of the same frame: "
        f"{shown(floor, '{:.3f}')}"
    )
    found = [
        finding(
            "the last layer changes less in inactive patches than in active ones",
            "holds if the interval of the difference of cosines between neighbouring frames is above 0",
            f"{shown(apart, '{:+.3f}')}",
            above(apart),
            below(apart),
        )
    ]
    for kind, value in (("inactive", inactive), ("active", active)):
        published = PUBLISHED_STABILITY[kind]
        limits = (published - LEVEL_STABILITY, published + LEVEL_STABILITY)
        found.append(
            finding(
                f"{kind} patches' cosine between frames is {published}",
                f"holds if the interval lies within {LEVEL_STABILITY} of it, does not hold if beside that",
                shown(value, "{:.3f}"),
                within(value, *limits),
                outside(value, *limits),
            )
        )
    return [{**one, "control": control} for one in found]


def shift_costs_more(measured: Measured) -> list[dict]:
    """Whether encoding active patches without their surroundings costs more than that inactive ones are stale."""
    every = [figures for _, figures in measured]
    of_active, of_stored = ([gain(one, name) for one in every] for name in ("active", "all stored"))
    both = share(of_active, of_stored)
    alone = [gain(one, "active") + gain(one, "stored sparse") for one in every]
    with_echo = share(alone, [gain(one, "stored dense") for one in every])
    random = mean([gain(one, "random as many as active") for one in every])
    active = mean(of_active)
    said = (
        f"{shown(both, '{:.0%}')} of the gain by swapping either for dense's; with what was encoded so on earlier "
        f"frames {shown(with_echo, '{:.0%}')}"
    )
    control = f"gain by active patches {shown(active)}, by as many random ones {shown(random)}"
    return [
        {
            **finding(
                "the shift of active patches costs more than the staleness of inactive ones",
                "holds if the interval of the shift's share is above one half, does not hold if below",
                said,
                above(both, 0.5),
                below(both, 0.5),
            ),
            "control": control,
        },
        {
            **finding(
                f"the shift of active patches is {PUBLISHED_SHIFT:.0%} of the gap",
                "holds if the interval of its share lies within 10 points of that, does not hold if beside them",
                said,
                within(both, PUBLISHED_SHIFT - 0.1, PUBLISHED_SHIFT + 0.1),
                outside(both, PUBLISHED_SHIFT - 0.1, PUBLISHED_SHIFT + 0.1),
            ),
            "control": control,
        },
    ]


def ghosts_cost(measured: Measured) -> list[dict]:
    """Whether the running mean leaves ghosts that a reference without a past would not, at the same cost."""
    left = [(name, figures) for name, figures in measured if after_first(figures["gone"]).any()]
    if not left:
        return []
    mixed, weights, costs = equal_cost(left)
    after = [after_first(figures["gone"]) for _, figures in left]
    every = [figures for _, figures in left]

    def agree(figures, setting):
        return (after_first(figures[f"{setting}: place"]) == after_first(figures["dense place"])).astype(float)

    def gained(part, frames):
        values = [
            sum(weight * part(one, setting) for setting, weight in zip(mixed, weights, strict=True))
            - part(one, MEMORY)
            for one in every
        ]
        return mean([value[chosen] for value, chosen in zip(values, frames, strict=True)])

    def cosine(figures, setting):
        return after_first(figures[f"{setting}: cosine"])

    others = [~chosen for chosen in after]
    fidelity, labels = gained(cosine, after), gained(agree, after)
    where = (
        f"{len(left)} clips, {sum(int(chosen.sum()) for chosen in after)} frames; {' and '.join(mixed)} at cost "
        f"{costs[1]:.3f}, {MEMORY} at {costs[0]:.3f}"
    )
    rule = "holds if the interval of what `last_update` gains is above 0, does not hold if it is below"
    return [
        {
            **finding(
                "a running mean keeps ghosts of what has left: fidelity",
                rule,
                f"{shown(fidelity, '{:+.4f}')} of cosine ({where})",
                above(fidelity),
                below(fidelity),
            ),
            "control": f"on the other frames of these clips: {shown(gained(cosine, others), '{:+.4f}')}",
        },
        {
            **finding(
                "a running mean keeps ghosts of what has left: labels",
                rule,
                f"{shown(labels, '{:+.1f}', 100)} points of agreement with dense ({where})",
                above(labels),
                below(labels),
            ),
            "control": f"on the other frames of these clips: {shown(gained(agree, others), '{:+.1f}', 100)} points",
        },
    ]


def equal_cost(measured: Measured) -> tuple[list[str], list[float], tuple[float, float]]:
    """
    The `last_update` settings whose mixture costs what MEMORY costs: their names, weights, and both costs. If all cost
    less, the dearest; if all cost more, the cheapest.
    """
    target = cost_of(measured, MEMORY)
    costs = {f"last_update {level:g}": 0.0 for level in LAST_UPDATE_THRESHOLDS}
    for setting in costs:
        costs[setting] = cost_of(measured, setting)
    ordered = sorted(costs, key=costs.get)
    for low, high in itertools.pairwise(ordered):
        if costs[low] <= target <= costs[high] and costs[high] > costs[low]:
            weight = (costs[high] - target) / (costs[high] - costs[low])
            return [low, high], [weight, 1 - weight], (target, target)
    nearest = ordered[-1] if costs[ordered[-1]] < target else ordered[0]
    return [nearest], [1.0], (target, costs[nearest])
