"""
Verdicts on the published findings about the bypass, each by a rule computed from a drift report.

Published: Y. Schmitt, "EMA-Gated Temporal Sequence Compression in Vision Transformers" (2026), section on language,
with Phi-3-mini-4k-instruct. The published script hands one mutable cache to both runs, so its figures are
claims to test.
"""

import itertools
from collections.abc import Sequence

from eval.report import finding
from neuroflow_hf.drift.grid import (
    FIRST,
    LAST,
    PUBLISHED_THRESHOLD,
    entries_of_family,
    is_near_published,
    published_configuration,
)
from neuroflow_hf.drift.metrics import beyond_rounding, column, rate_of
from neuroflow_hf.drift.tables import description, summary_table
from neuroflow_hf.evaluation.statistics import (
    bootstrap_interval,
    difference_interval,
    mean,
    paired_interval,
    quantile,
)
from neuroflow_hf.utils.tables import Table, markdown_table

PUBLISHED_DRIFT = {FIRST: {"code": 0.0, "structured": 0.12, "prose": 0.66}, LAST: {"code": 0.0, "prose": 0.83}}
PUBLISHED_PERPLEXITY = 0.007 / 3.886  # relative
SAME_TIME = (0.95, 1.05)


def drift_findings(report: dict, samples: int = 2000, seed: int = 0) -> list[dict]:
    """
    Every published claim with what was measured here, the rule, and the verdict.

    Args:
        report: of `DriftEvaluation`.
        samples, seed: of the bootstrap.

    Returns:
        Dicts of texts: `claim`, `measured`, `rule`, `verdict` (see `finding`).
    """
    options = {"samples": samples, "seed": seed}
    found = [
        rate_at_published_threshold(report),
        *(code_does_not_drift(report, pair) for pair in (FIRST, LAST)),
        tasks_in_order(report, options),
        *(prose_drifts(report, pair) for pair in (FIRST, LAST)),
        last_layer_drifts_more(report, options),
        perplexity_hardly_changes(report),
        no_faster(report, options),
        guard_spares_drift(report, options),
        inverted_is_worse(report, options),
    ]
    return [finding for finding in found if finding is not None]


# --- claims --------------------------------------------------------------------------------------------------------


def rate_at_published_threshold(report: dict) -> dict | None:
    """Whether the published threshold bypasses about the published share."""
    entries = {entry["options"]["threshold"]: rate_of(entry) for entry in entries_of_family(report, FIRST)}
    if PUBLISHED_THRESHOLD not in entries:
        return None
    rate = entries[PUBLISHED_THRESHOLD]
    return finding(
        f"{FIRST} at threshold 0.65 bypasses about a fifth of the steps (21%)",
        "holds between half and twice that, and does not hold outside",
        f"{rate:.1%} of the steps",
        is_near_published(rate),
        True,
    )


def code_does_not_drift(report: dict, pair: str) -> dict | None:
    """Whether code is left as it is at about the published rate."""
    entry = published_configuration(report, pair)
    if entry is None or "code" not in entry["prompts"]:
        return None
    number, rate = beyond_rounding(report, entry, "code"), rate_of(entry, "code")
    prompts = len(column(entry, "drift", "code"))
    measured = f"{number} of {prompts} prompts diverge beyond rounding ({entry['name']}, {rate:.1%} bypassed in code)"
    if not number and prompts:
        measured += f"; so at most {min(1, 3 / prompts):.1%} of such prompts do, by 95%"
    return finding(
        f"{pair} does not change code (drift 0%)",
        "holds if no prompt's text diverges where dense's top-2 margin exceeds that of the noise floor; cannot be "
        "told if less than 1% of code's steps are bypassed",
        measured,
        number == 0 and rate >= 0.01,
        number > 0,
    )


def tasks_in_order(report: dict, options: dict) -> dict | None:
    """Whether code drifts less than structured text, and that less than prose."""
    entry = published_configuration(report)
    tasks = ("code", "structured", "prose")
    if entry is None or any(task not in entry["prompts"] for task in tasks):
        return None
    drifts = [column(entry, "drift", task) for task in tasks]
    steps = [difference_interval(drifts[place + 1], drifts[place], **options) for place in (0, 1)]
    means = ", ".join(f"{task} {mean(drift):.1%}" for task, drift in zip(tasks, drifts, strict=True))
    return finding(
        "code drifts least, prose most (0%, 12%, 66%)",
        "holds if the intervals of both differences are above 0, does not hold if either is below",
        f"{means} ({entry['name']})",
        all(low > 0 for low, _ in steps),
        any(high < 0 for _, high in steps),
    )


def prose_drifts(report: dict, pair: str) -> dict | None:
    """Whether most of prose changes at about the published rate."""
    entry = published_configuration(report, pair)
    if entry is None or "prose" not in entry["prompts"]:
        return None
    figures = entry["tasks"]["prose"]
    low, high = figures["drift_interval"]
    return finding(
        f"{pair} changes most of prose (drift {PUBLISHED_DRIFT[pair]['prose']:.0%})",
        "holds if the interval of the drift is above 50%, does not hold if it is below",
        f"{figures['drift']:.1%} ({low:.1%} to {high:.1%}; {entry['name']}, {rate_of(entry, 'prose'):.1%} bypassed)",
        low > 0.5,
        high < 0.5,
    )


def last_layer_drifts_more(report: dict, options: dict) -> dict | None:
    """Whether reusing the last layer's output drifts more than that at three quarters of the depth."""
    lasts = {entry["options"]["threshold"]: entry for entry in entries_of_family(report, LAST)}
    pairs = [(entry, lasts.get(entry["options"]["threshold"])) for entry in entries_of_family(report, FIRST)]
    pairs = [(first, last) for first, last in pairs if last is not None and rate_of(first) and rate_of(last)]
    if not pairs:
        return None
    differences = averaged(
        [
            [more - less for less, more in zip(column(first, "drift"), column(last, "drift"), strict=True)]
            for first, last in pairs
        ]
    )
    return compared(
        f"{LAST} drifts more than {FIRST} (prose 83% and 66%)",
        f"mean difference of drift, prompt by prompt, over the {len(pairs)} thresholds of both",
        differences,
        options,
        more=True,
    )


def perplexity_hardly_changes(report: dict) -> dict | None:
    """Whether perplexity grows by no more than the published share."""
    entry = published_configuration(report)
    if entry is None:
        return None
    figures = next(reversed(entry["tasks"].values()))["perplexity"]
    if not figures["interval"]:
        return None
    low, high = (end / figures["dense"] for end in figures["interval"])
    return finding(
        "perplexity grows by 0.2% at a bypass of 21% (3.886 by 0.007)",
        "holds if the interval of the relative growth is below 0.2%, does not hold if it is above",
        f"{figures['delta'] / figures['dense']:+.2%} ({low:+.2%} to {high:+.2%}; dense {figures['dense']:.3f}; "
        f"{entry['name']}, {rate_of(entry):.1%} bypassed)",
        high <= PUBLISHED_PERPLEXITY,
        low > PUBLISHED_PERPLEXITY,
    )


def no_faster(report: dict, options: dict) -> dict | None:
    """Whether a bypass of one layer's attention leaves the time as it is."""
    if report["timing"] is None:
        return None
    pairs = report["timing"]["milliseconds"]
    interval = bootstrap_interval(pairs, lambda sums: sums[:, 0] / sums[:, 1], **options)
    ratio = quantile([dense / bypass for dense, bypass in pairs], 0.5)
    low, high = interval
    least, most = SAME_TIME
    return finding(
        "the bypass makes generation no faster (1.000x)",
        f"holds if the interval of the ratio lies within {least} to {most}, does not hold if it lies outside",
        f"{ratio:.3f}x, median of {len(pairs)} prompts ({low:.3f} to {high:.3f}; {report['timing']['configuration']})",
        least <= low and high <= most,
        high < least or low > most,
    )


def guard_spares_drift(report: dict, options: dict) -> dict | None:
    """Whether most drift comes from steps at which the model is undecided: a guard then spares it, at equal rates."""
    differences = against_curve(report, guarded=True)
    return differences and compared(
        "drift comes from bypassing where the model is undecided",
        "mean difference of drift, prompt by prompt, of the guarded bypass to the unguarded one at the same rate "
        "(interpolated)",
        differences,
        options,
        more=False,
    )


def inverted_is_worse(report: dict, options: dict) -> dict | None:
    """Whether the gate has to come before what it decides about."""
    differences = against_curve(report, inverted=True)
    return differences and compared(
        "an early layer is the better gate (inverted control)",
        "mean difference of drift, prompt by prompt, of the inverted control to the published direction at the same "
        "rate (interpolated)",
        differences,
        options,
        more=True,
    )


# --- comparing -----------------------------------------------------------------------------------------------------


def compared(claim: str, what: str, differences: Sequence[float], options: dict, more: bool) -> dict:
    """A finding by the interval of differences of drift, one for each prompt, expected above 0 (`more`) or below."""
    interval = paired_interval(differences, [0.0] * len(differences), **options)
    low, high = interval
    expected, opposite = ("above", "below") if more else ("below", "above")
    return finding(
        claim,
        f"{what}: holds if its interval is {expected} 0, does not hold if it is {opposite}",
        f"{100 * mean(differences):+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})",
        low > 0 if more else high < 0,
        high < 0 if more else low > 0,
    )


def averaged(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean over rows of equal length, place by place."""
    return [mean(values) for values in zip(*rows, strict=True)]


def against_curve(report: dict, **kind) -> list[float] | None:
    """
    By how much each prompt drifts more under entries of this kind than under the plain bypass of the same attention
    layers at the same rate, on average over the entries whose rate the plain ones reach. None if there are none.
    """
    rows = []
    for pair in (FIRST, LAST):
        curve = drift_curve(entries_of_family(report, pair))
        for entry in entries_of_family(report, pair, **kind):
            rate = rate_of(entry)
            if 0 < rate <= curve[-1][0]:
                usual = interpolate(curve, rate)
                rows.append([drift - base for drift, base in zip(column(entry, "drift"), usual, strict=True)])
    return averaged(rows) if rows else None


def drift_curve(entries: Sequence[dict]) -> list[tuple[float, list[float]]]:
    """Rate and every prompt's drift, by rising rate, from no bypass and no drift on."""
    points = {rate_of(entry): column(entry, "drift") for entry in entries}
    rates = sorted(rate for rate in points if rate > 0)
    prompts = len(points[rates[0]]) if rates else 0
    return [(0.0, [0.0] * prompts), *((rate, points[rate]) for rate in rates)]


def interpolate(curve: Sequence[tuple[float, list[float]]], rate: float) -> list[float]:
    """Every prompt's drift at a rate on a curve, between its points in a straight line."""
    for (low, before), (high, after) in itertools.pairwise(curve):
        if low <= rate <= high:
            weight = (rate - low) / (high - low)
            return [(1 - weight) * first + weight * second for first, second in zip(before, after, strict=True)]
    raise ValueError(f"The rate {rate} is not on the curve, which ends at {curve[-1][0]}.")


# --- tables --------------------------------------------------------------------------------------------------------


def findings_table(report: dict) -> Table:
    """Headers and rows: a published finding in each row, with what was measured, and the verdict."""
    rows = [[found[name] for name in ("claim", "measured", "verdict", "rule")] for found in report["findings"]]
    return ["published", "measured here", "verdict", "rule"], rows


def readme_table(report: dict) -> str:
    """
    The table of README: the noise floor, the published thresholds, the targets near a rate of a fifth, the findings.
    """
    wanted = [
        entry
        for entry in report["configurations"]
        if entry["asked_rate"] in (None, 0.2) or (entry["guarded"] and entry["asked_rate"] == 1.0)
    ]
    parts = [
        markdown_table(summary_table(report, [*report["noise"], *wanted])),
        f"`{report['command']}`: {description(report)}",
        markdown_table(
            (
                ["published finding", "measured on this checkpoint", "verdict"],
                [row[:3] for row in findings_table(report)[1]],
            )
        ),
    ]
    return "\n\n".join(parts)
