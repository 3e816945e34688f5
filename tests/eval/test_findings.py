"""Which published findings about the bypass hold, from reports made by hand."""

from eval.language.findings import drift_findings
from eval.report import FAILS, HOLDS, UNKNOWN


def make_entry(pair="1->24", rate=0.2, drift=(0.0, 0.1, 0.7), margin=1.0, asked=0.2, prompts=20, **more):
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
    entry = {"name": pair, "pair": pair, "guarded": False, "inverted": False, "asked_rate": asked}
    entry |= {"options": {"target": "attention"}, "tasks": tasks, "prompts": parts, "weights_left_out": 0.01}
    return entry | more


def verdicts(*entries, noise=()):
    report = {"configurations": list(entries), "noise": list(noise)}
    return {found["claim"]: found["verdict"] for found in drift_findings(report, samples=200)}


def verdict_of(found, words):
    (verdict,) = [verdict for claim, verdict in found.items() if words in claim]
    return verdict


def test_the_published_figures_would_hold():
    last = make_entry("1->31", drift=(0.0, 0.2, 0.85))
    guarded = make_entry(drift=(0.0, 0.0, 0.01), guarded=True)
    inverted = make_entry(drift=(0.5, 0.6, 0.9), inverted=True)
    found = verdicts(make_entry(), make_entry(asked=None), last, guarded, inverted)
    assert len(found) == 11 and set(found.values()) == {HOLDS}


def test_the_contrary_would_not():
    first = make_entry(drift=(0.6, 0.3, 0.1), weights_left_out=0.9)
    first["tasks"]["all"]["perplexity"]["interval"] = [0.5, 0.6]
    last = make_entry("1->31", drift=(0.5, 0.2, 0.05))
    guarded = make_entry(drift=(0.9, 0.9, 0.9), guarded=True)
    inverted = make_entry(drift=(0.0, 0.0, 0.01), inverted=True)
    found = verdicts(first, make_entry(asked=None, rate=0.9), last, guarded, inverted)
    assert len(found) == 11 and set(found.values()) == {FAILS}


def test_what_cannot_be_told():
    idle = make_entry()
    idle["prompts"]["code"]["bypassed"] = [0] * 20
    assert verdict_of(verdicts(idle), "1->24 does not change code") == UNKNOWN
    found = verdicts(make_entry(drift=(0.0, 0.0, 0.0)), make_entry("1->31", drift=(0.0, 0.0, 0.0)))
    assert verdict_of(found, "drifts more than") == UNKNOWN and verdict_of(found, "drifts least") == UNKNOWN
    assert verdicts() == {} and verdicts(make_entry(rate=0)) == {}


def test_what_rounding_does_is_no_drift():
    noise = make_entry(margin=0.5) | {"kind": "batch"}
    drifting = make_entry(drift=(0.3, 0.3, 0.3), margin=0.4)
    assert verdict_of(verdicts(drifting, noise=[noise]), "1->24 does not change code") == HOLDS
    assert verdict_of(verdicts(drifting), "1->24 does not change code") == FAILS
