"""
Verdicts on the published findings about the bypass, each by a rule computed from a drift report.

Published: Y. Schmitt, "EMA-Gated Temporal Sequence Compression in Vision Transformers" (2026), section on language,
with Phi-3-mini-4k-instruct. The published script hands one mutable cache to both runs, so its figures are claims to
test.
"""

from eval.report import finding
from neuroflow_hf.drift.grid import FIRST, LAST, MATCHED_RATE, PUBLISHED_RATE, PUBLISHED_THRESHOLD
from neuroflow_hf.drift.metrics import share
from neuroflow_hf.drift.prompts import ALL
from neuroflow_hf.drift.report import total_of
from neuroflow_hf.evaluation.statistics import difference_interval, mean, mean_interval, zero_failure_bound

PUBLISHED_DRIFT = {FIRST: {"code": 0.0, "structured": 0.12, "prose": 0.66}, LAST: {"code": 0.0, "prose": 0.83}}
PUBLISHED_PERPLEXITY = 0.007 / 3.886  # relative
SAME_TIME = 1.05
ROUNDING = 1e-5  # rounding in float32 may swap logits that are closer than this


def drift_findings(report: dict, samples: int = 2000) -> list[dict]:
    """
    Every published claim that a report can test, with what was measured, the rule, and the verdict (see `finding`).

    Args:
        report: of `DriftEvaluation`.
        samples: of the bootstrap.
    """
    options = {"samples": samples}
    found = [rate_at_published_threshold(report)]
    for pair in (FIRST, LAST):
        if (entry := entry_of(report, pair)) is not None:
            found += [code_does_not_drift(report, pair, entry), prose_drifts(pair, entry)]
    first, last = entry_of(report, FIRST), entry_of(report, LAST)
    if first is not None:
        found += [
            tasks_in_order(first, options),
            perplexity_hardly_changes(first),
            no_faster(first),
            compared(f"{LAST} drifts more than {FIRST} (prose 83% and 66%)", first, last, options, expects_more=True),
            compared(
                "drift comes from bypassing where the model is undecided, so a guard avoids it",
                *(first, entry_of(report, FIRST, guarded=True), options),
                expects_more=False,
            ),
            compared(
                "an early layer is the better gate (inverted control)",
                *(first, entry_of(report, FIRST, inverted=True), options),
                expects_more=True,
            ),
        ]
    return [one for one in found if one is not None]


def entry_of(report: dict, pair: str, guarded: bool = False, inverted: bool = False) -> dict | None:
    """The entry of a pair's attention at the rate that all kinds are compared at; None if it bypasses nothing."""
    for entry in report["configurations"]:
        kind = entry["pair"], entry["options"]["target"], entry["guarded"], entry["inverted"], entry["asked_rate"]
        if kind == (pair, "attention", guarded, inverted, MATCHED_RATE) and rate_of(entry):
            return entry
    return None


def rate_at_published_threshold(report: dict) -> dict | None:
    """Whether the published threshold bypasses about the published share."""
    for entry in report["configurations"]:
        if entry["pair"] == FIRST and entry["asked_rate"] is None:
            rate = rate_of(entry)
            is_near = PUBLISHED_RATE / 2 <= rate <= 2 * PUBLISHED_RATE
            return finding(
                f"{FIRST} at threshold {PUBLISHED_THRESHOLD} bypasses about a fifth of the steps (21%)",
                "holds between half and twice that, and does not hold outside",
                f"{rate:.1%} of the steps",
                is_near,
                not is_near,
            )
    return None


def code_does_not_drift(report: dict, pair: str, entry: dict) -> dict | None:
    """Whether code is left as it is."""
    if "code" not in entry["prompts"]:
        return None
    limit = rounding_margin(report)
    margins = column(entry, "margin", "code")
    changed = sum(margin is not None and margin > limit for margin in margins)
    measured = f"{changed} of {len(margins)} texts change ({at_rate(entry, 'code')})"
    if not changed:
        measured += f"; so at most {zero_failure_bound(len(margins)):.0%} of such texts do"
    return finding(
        f"{pair} does not change code (drift 0%)",
        "holds if no text changes where dense's top-2 margin exceeds those that rounding overturned, and at least 1% "
        "of code's steps are bypassed; does not hold if one does",
        measured,
        not changed and rate_of(entry, "code") >= 0.01,
        changed > 0,
    )


def prose_drifts(pair: str, entry: dict) -> dict | None:
    """Whether most of prose changes."""
    if "prose" not in entry["prompts"]:
        return None
    figures = entry["tasks"]["prose"]
    low, high = figures["drift_interval"]
    return finding(
        f"{pair} changes most of prose (drift {PUBLISHED_DRIFT[pair]['prose']:.0%})",
        "holds if the interval of the drift is above 50%, does not hold if it is below",
        f"{figures['drift']:.1%} ({low:.1%} to {high:.1%}; {at_rate(entry, 'prose')})",
        low > 0.5,
        high < 0.5,
    )


def tasks_in_order(entry: dict, options: dict) -> dict | None:
    """Whether code drifts less than structured text, and that less than prose."""
    tasks = ("code", "structured", "prose")
    if any(task not in entry["prompts"] for task in tasks):
        return None
    drifts = [column(entry, "drift", task) for task in tasks]
    steps = [difference_interval(drifts[place + 1], drifts[place], **options) for place in (0, 1)]
    return finding(
        "code drifts least, prose most (0%, 12%, 66%)",
        "holds if the intervals of both differences are above 0, does not hold if either is below",
        ", ".join(f"{task} {mean(drift):.1%}" for task, drift in zip(tasks, drifts, strict=True)),
        all(low > 0 for low, _ in steps),
        any(high < 0 for _, high in steps),
    )


def perplexity_hardly_changes(entry: dict) -> dict | None:
    """Whether perplexity grows by no more than the published share."""
    figures = total_of(entry)["perplexity"]
    if not figures["interval"]:
        return None
    low, high = (end / figures["dense"] for end in figures["interval"])
    return finding(
        "perplexity grows by 0.2% at a bypass of 21% (3.886 by 0.007)",
        "holds if the interval of the relative growth is below 0.2%, does not hold if it is above",
        f"{figures['delta'] / figures['dense']:+.2%} ({low:+.2%} to {high:+.2%}; dense {figures['dense']:.2f})",
        high <= PUBLISHED_PERPLEXITY,
        low > PUBLISHED_PERPLEXITY,
    )


def no_faster(entry: dict) -> dict:
    """Whether a bypass of one layer's attention can save time: at most as much as it saves weights."""
    most = 1 / (1 - rate_of(entry) * entry["weights_left_out"])
    return finding(
        "the bypass makes generation no faster (1.000x)",
        f"holds if all steps together use at most {SAME_TIME:.2f} times fewer weights than dense",
        f"at most {most:.4f}x: a bypassed step leaves out {entry['weights_left_out']:.2%} of the weights",
        most <= SAME_TIME,
        most > SAME_TIME,
    )


def compared(claim: str, first: dict, other: dict | None, options: dict, expects_more: bool) -> dict | None:
    """A finding by the differences of drift between two entries, prompt by prompt, expected above 0 or below."""
    if other is None:
        return None
    differences = [more - less for less, more in zip(column(first, "drift"), column(other, "drift"), strict=True)]
    low, high = mean_interval(differences, **options)
    expected, opposite = ("above", "below") if expects_more else ("below", "above")
    return finding(
        claim,
        f"difference of drift, prompt by prompt: holds if its interval is {expected} 0, does not hold if it is "
        f"{opposite}",
        f"{100 * mean(differences):+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}; {rate_of(other):.1%} and "
        f"{rate_of(first):.1%} bypassed)",
        low > 0 if expects_more else high < 0,
        high < 0 if expects_more else low > 0,
    )


def at_rate(entry: dict, task: str) -> str:
    """Which bypass an entry is, with its rate in a task."""
    return f"{entry['name']}: {rate_of(entry, task):.1%} bypassed"


def rounding_margin(report: dict) -> float:
    """The largest margin between logits that another batch shape overturned; at least `ROUNDING`."""
    noise = [entry for entry in report["noise"] if entry["kind"] == "batch"]
    return max([ROUNDING, *(margin for entry in noise for margin in column(entry, "margin") if margin is not None)])


def column(entry: dict, name: str, task: str = ALL) -> list:
    """A figure of an entry's prompts, of one task, or of all tasks one after the other."""
    found = entry["prompts"]
    return [value for part in (found if task == ALL else [task]) for value in found[part][name]]


def rate_of(entry: dict, task: str = ALL) -> float:
    """The share of steps bypassed, in one task or all; 0 without steps."""
    return share(sum(column(entry, "bypassed", task)), sum(column(entry, "steps", task))) or 0.0
