"""Which published findings about the bypass hold, from reports made by hand."""

import pytest

from eval.language.findings import drift_findings, interpolate
from eval.report import FAILS, HOLDS, UNKNOWN
from neuroflow_hf.drift.grid import published_configuration


def make_entry(pair="1->24", rate=0.2, drift=(0.0, 0.1, 0.7), margin=1.0, threshold=0.65, prompts=20, **more):
    """An entry of a report with these drifts in each task, a little different in each prompt."""

    def part(value):
        drifts = [max(0.0, value * (1 + place / 100)) for place in range(prompts)]
        return {
            "drift": drifts,
            "margin": [margin if drift else None for drift in drifts],
            "steps": [100] * prompts,
            "bypassed": [round(100 * rate)] * prompts,
        }

    parts = {task: part(value) for task, value in zip(("code", "structured", "prose"), drift, strict=True)}
    tasks = {
        task: {"drift": values["drift"][0], "drift_interval": [min(values["drift"]), max(values["drift"])]}
        for task, values in parts.items()
    }
    tasks["all"] = {"perplexity": {"tokens": 9, "dense": 4.0, "delta": 0.001, "interval": [0.0, 0.002]}}
    return {
        "name": f"{pair}, threshold {threshold:g}",
        "pair": pair,
        "guarded": False,
        "inverted": False,
        "options": {"target": "attention", "threshold": threshold},
        "tasks": tasks,
        "prompts": parts,
        **more,
    }


def verdicts(*entries, noise=(), timing=None):
    report = {"configurations": list(entries), "noise": list(noise), "timing": timing}
    return {found["claim"]: found["verdict"] for found in drift_findings(report, samples=200)}


def verdict_of(found, words):
    (verdict,) = [verdict for claim, verdict in found.items() if words in claim]
    return verdict


def test_the_published_figures_would_hold():
    last = make_entry("1->31", drift=(0.0, 0.2, 0.85))
    guarded = make_entry(rate=0.1, drift=(0.0, 0.0, 0.01), guarded=True)
    inverted = make_entry(rate=0.1, drift=(0.5, 0.6, 0.9), inverted=True)
    timing = {"configuration": "", "milliseconds": [(10.0, 10.0 + place / 100) for place in range(9)]}
    found = verdicts(make_entry(), last, guarded, inverted, timing=timing)
    assert len(found) == 11 and set(found.values()) == {HOLDS}


def test_the_contrary_would_not():
    first = make_entry(drift=(0.6, 0.3, 0.1), rate=0.9)
    first["tasks"]["all"]["perplexity"]["interval"] = [0.5, 0.6]
    last = make_entry("1->31", drift=(0.5, 0.2, 0.05), rate=0.9)
    guarded = make_entry(rate=0.1, drift=(0.9, 0.9, 0.9), guarded=True)
    inverted = make_entry(rate=0.1, drift=(0.0, 0.0, 0.01), inverted=True)
    timing = {"configuration": "", "milliseconds": [(20.0, 10.0)] * 5}
    assert set(verdicts(first, last, guarded, inverted, timing=timing).values()) == {FAILS}


def test_what_cannot_be_told():
    assert verdict_of(verdicts(make_entry(drift=(0.0, 0.1, 0.7))), "about a fifth") == HOLDS
    idle = make_entry()
    idle["prompts"]["code"]["bypassed"] = [0] * 20
    assert verdict_of(verdicts(idle), "1->24 does not change code") == UNKNOWN
    same = make_entry(drift=(0.0, 0.0, 0.0)), make_entry("1->31", drift=(0.0, 0.0, 0.0))
    found = verdicts(*same)
    assert verdict_of(found, "drifts more than") == UNKNOWN and verdict_of(found, "drifts least") == UNKNOWN
    assert verdicts() == {}


def test_what_rounding_does_is_no_drift():
    noise = make_entry(margin=0.5)
    noise["kind"] = "batch"
    drifting = make_entry(drift=(0.3, 0.3, 0.3), margin=0.4)
    assert verdict_of(verdicts(drifting, noise=[noise]), "1->24 does not change code") == HOLDS
    assert verdict_of(verdicts(drifting), "1->24 does not change code") == FAILS


def test_which_entry_stands_for_the_published_one():
    def chosen(*entries):
        return published_configuration({"configurations": entries, "noise": []})

    at_065, nearer = make_entry(rate=0.35), make_entry(rate=0.21, threshold=0.9)
    assert chosen(nearer, at_065) is at_065
    at_065 = make_entry(rate=0.8)
    assert chosen(nearer, at_065) is nearer
    assert chosen(make_entry(rate=0)) is None


def test_between_two_rates():
    curve = [(0.0, [0.0, 0.0]), (0.2, [0.1, 0.3]), (0.4, [0.1, 0.5])]
    assert interpolate(curve, 0.1) == pytest.approx([0.05, 0.15])
    assert interpolate(curve, 0.3) == pytest.approx([0.1, 0.4])
    with pytest.raises(ValueError, match=r"0\.5"):
        interpolate(curve, 0.5)
