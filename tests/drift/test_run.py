"""The drift evaluation on tiny models: dense against dense, batches, caches, what is continued."""

import json

import pytest
import torch
from PIL import Image

from eval.docs.language import drift_table, findings_table
from eval.language.findings import drift_findings
from eval.report import FAILS, HOLDS, UNKNOWN
from neuroflow_hf import NeuroFlowPhi3ForCausalLM
from neuroflow_hf.drift.decode import FED_WITH_BYPASS, Batch, DriftBench, decode, feed_densely, make_batches
from neuroflow_hf.drift.metrics import COLUMNS
from neuroflow_hf.drift.prompts import Prompt
from neuroflow_hf.drift.report import drift_markdown, plot_drift, summary_table
from neuroflow_hf.drift.run import LEAST, DriftEvaluation, DriftSettings
from neuroflow_hf.utils.plots import save_plot
from tests.phi3_models import make_ours, make_tokenizer

TEXTS = ["the quick brown fox", "hello", "a b c", "one two three four five six seven", "xylem", "jumps over"]
PROMPTS = [Prompt(text, task) for task in ("code", "structured", "prose") for text in TEXTS[:2]]
SETTINGS = DriftSettings(new_tokens=6, batch_size=5, samples=50)
BYPASS = {"gate_layer": 1, "cache_layers": [2], "target": "block"}
FIVE = {"num_hidden_layers": 5}


def make_rows():
    return [make_tokenizer()(text)["input_ids"] for text in TEXTS]


def make_bench(model, **options):
    rows = make_rows()
    sizes = {"new_tokens": 10, "forced_tokens": 3, "batch_size": 4}
    return DriftBench(model, rows, ["code"] * len(rows), **sizes | options)


def share_of(model, share):
    """A threshold that this share of the steps reaches."""
    similarity = [value for value, _ in make_bench(model).similarity(1, range(len(TEXTS)))]
    return torch.tensor(similarity).quantile(1 - share).item()


# --- against dense -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [None, (1, 0), (2, 3)])
def test_dense_against_dense_does_not_drift(shape):
    bench = make_bench(make_ours())
    for record in bench.measure(False, batches=shape and make_batches(bench.rows, *shape, scored=3)):
        assert record.drift == 0 and record.first_divergence is None and record.forced_divergent == 0
        assert max(record.kl) < 1e-6 and record.bypassed == 0
        assert record.nll == pytest.approx(record.dense_nll, abs=1e-3)


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_a_threshold_above_1_does_not_drift(target):
    records = make_bench(make_ours()).measure(BYPASS | {"target": target, "threshold": 1.5})
    assert all(record.drift == 0 and record.bypassed == 0 and record.steps == 9 for record in records)
    assert all(max(record.kl) == 0 and record.nll == record.dense_nll for record in records)


def test_a_bypass_of_every_step_drifts():
    records = make_bench(make_ours()).measure(BYPASS | {"threshold": -1})
    assert all(record.bypassed == record.steps for record in records)
    assert sum(record.drift for record in records) > 0 and sum(map(sum, (r.kl for r in records))) > 0
    assert all(record.nll != record.dense_nll for record in records if record.forced_steps)
    for record in records:
        assert (record.margin is None) == (record.first_divergence is None)


def test_the_configurations_own_options_play_no_part():
    plain, other = make_ours(), make_ours(bypass=BYPASS | {"threshold": -1, "guard_entropy": 0.5})
    options = BYPASS | {"threshold": share_of(plain, 0.4)}
    assert make_bench(plain).measure(options) == make_bench(other).measure(options)


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_runs_continue_from_a_prompt_that_was_fed_densely(kind):
    model = make_ours(kind)
    options = BYPASS | {"threshold": share_of(model, 0.5)}
    (batch,) = make_batches(make_rows(), 9)
    run = decode(model, batch, 8, options)
    assert 0 < run.bypassed.sum() < run.bypassed.numel()
    opening = Batch(batch.indices, batch.ids[:, :-4], batch.mask[:, :-4])
    batch.opening = opening
    feed_densely(model, batch)
    for part, alone in ((batch, run), (opening, decode(model, Batch([], opening.ids, opening.mask), 8, options))):
        length = part.cache.get_seq_length()
        assert length == part.ids.shape[1] - FED_WITH_BYPASS
        again = decode(model, part, 8, options)
        assert part.cache.get_seq_length() == length  # runs continue from copies
        assert torch.equal(again.tokens, alone.tokens) and torch.equal(again.bypassed, alone.bypassed)


def test_texts_end_where_the_model_ends_them():
    model = make_ours()
    (batch,) = make_batches(make_rows(), 9)
    free = decode(model, batch, 10).tokens
    end = free[0, 4].item()
    bench = make_bench(model, ends={end}, batch_size=9)
    texts = [bench.dense[place].tokens for place in batch.indices]
    assert any(len(text) < 10 for text in texts)
    for row, text in zip(free.tolist(), texts, strict=True):
        assert text == (row[: row.index(end) + 1] if end in row else row)
    for record, place in zip(bench.measure(BYPASS | {"threshold": 1.5}), range(6), strict=True):
        assert record.drift == 0 and record.steps == len(bench.dense[place].tokens) - 1


def test_dense_and_bypass_have_caches_of_their_own(monkeypatch):
    """No cache is used by two runs, and dense's answer is the same after a bypass."""
    model, used = make_ours(), []
    forward = NeuroFlowPhi3ForCausalLM.forward

    def watched(self, *args, past_key_values=None, bypass=None, **kwargs):
        output = forward(self, *args, past_key_values=past_key_values, bypass=bypass, **kwargs)
        used.append((output.past_key_values, bypass is not False))  # kept, so that no address comes twice
        return output

    monkeypatch.setattr(NeuroFlowPhi3ForCausalLM, "forward", watched)
    bench = make_bench(model)
    bench.measure(BYPASS | {"threshold": -1})
    kinds = {}
    for cache, bypassed in used:
        kinds.setdefault(id(cache), set()).add(bypassed)
    assert all(len(kind) == 1 for kind in kinds.values())
    assert {True, False} == set().union(*kinds.values())
    again = make_bench(model)
    for index, before in bench.dense.items():
        after = again.dense[index]
        assert torch.equal(before.logits, after.logits) and before.tokens == after.tokens


# --- the report ----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate_here(tmp_path):
    """Runs the evaluation on the tiny model, in an empty folder: the report, and what was done for it."""
    model, tokenizer, path = make_ours(**FIVE), make_tokenizer(), tmp_path / "drift.json"

    def run(**options):
        done = []
        arguments = {
            "settings": SETTINGS,
            "prompts": PROMPTS,
            "on_step": lambda what, *_: None if done[-1:] == [what] else done.append(what),
            **options,
        }
        report = DriftEvaluation(model, tokenizer, path=path, **arguments).run()
        assert json.loads(path.read_text()) == json.loads(json.dumps(report))
        return report, done

    return run


def test_a_whole_report(evaluate_here, tmp_path):
    report, _ = evaluate_here()
    names = [entry["name"] for entry in report["configurations"]]
    assert [entry["kind"] for entry in report["noise"]] == ["batch", "dtype"]
    assert report["noise"][0]["tasks"]["all"]["drift"] == 0
    assert report["prompts"]["of_task"] == {"code": 2, "structured": 2, "prose": 2}
    assert report["model"]["layers"] == 5 and report["versions"]["torch"] == torch.__version__
    assert report["settings"]["seed"] == 0 and report["machine"]["threads"] == torch.get_num_threads()
    assert len(report["commits"]) <= 1
    for entry in [*report["noise"], *report["configurations"]]:
        assert list(entry["tasks"]) == ["code", "structured", "prose", "all"]
        assert all(set(part) == set(COLUMNS) and len(part["drift"]) == 2 for part in entry["prompts"].values())
    by_name = {entry["name"]: entry["tasks"]["all"]["bypass_rate"] for entry in report["configurations"]}
    # thresholds come from the two prompts of each task alone, which are all there are
    rates = [by_name[f"1->4, attention, for {rate}%"] for rate in (5, 20, 50)]
    assert rates == sorted(rates) and rates[0] < 0.2 < rates[2]
    findings = drift_findings(report, samples=50)
    assert findings and {found["verdict"] for found in findings} <= {HOLDS, FAILS, UNKNOWN}
    save_plot(plot_drift(report), tmp_path / "a.png")
    assert {path.name for path in tmp_path.iterdir()} == {"drift.json", "a.png"}
    assert all(row[0] in drift_markdown(report) for row in summary_table(report)[1])
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert "dense, bfloat16" in drift_table(report)
    assert all(found["claim"] in findings_table({**report, "findings": findings}) for found in findings)
    # what is missing is measured, in its place, and nothing else is
    del report["configurations"][4]
    (tmp_path / "drift.json").write_text(json.dumps(report))
    again, done = evaluate_here()
    assert [entry["name"] for entry in again["configurations"]] == names
    assert done == ["dense", names[4], "done"]


def test_progress_is_reported_after_every_batch(evaluate_here):
    steps = []
    evaluate_here(own=[{"threshold": 0.5}], on_step=lambda *step: steps.append(step))
    configuration = [step[1:] for step in steps if step[0].endswith("threshold 0.5")]
    assert configuration == [(0, 6), (5, 6), (6, 6)] and steps[-1] == ("done", 1, 1)
    assert all(done <= total for _, done, total in steps)


def test_an_interrupted_run_is_continued(evaluate_here, monkeypatch):
    own = [{"threshold": -1}]
    measure, count = DriftBench.measure, []

    def interrupted(self, *args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(DriftBench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_here(own=own)
    monkeypatch.setattr(DriftBench, "measure", measure)
    report, done = evaluate_here(own=own)
    assert "1->3, attention, threshold -1" not in done and "dense, another batch shape" in done
    again, done = evaluate_here(own=own)
    assert done == ["done"] and again == json.loads(json.dumps(report))  # not even dense was run
    both, done = evaluate_here(own=[{"threshold": 0.5}])
    assert "dense, bfloat16" not in done and len(both["configurations"]) == 2
    assert "dense, bfloat16" in evaluate_here(own=own, fresh=True)[1]
    assert "dense, bfloat16" in evaluate_here(own=own, prompts=PROMPTS[:1])[1]


def test_a_damaged_file_is_begun_anew(evaluate_here, tmp_path):
    (tmp_path / "drift.json").write_text("{")
    assert len(evaluate_here(own=[{"threshold": 0.5}])[0]["configurations"]) == 1


def test_a_single_task_has_no_sum(evaluate_here):
    report, _ = evaluate_here(own=[{"threshold": 0.5}], prompts=[Prompt("hello there"), Prompt("a")])
    (entry,) = report["configurations"]
    assert list(entry["tasks"]) == ["own"] and drift_findings(report, 50) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"own": [{"gate_layer": 9}]}, "layer 9; the model has 5 layers"),
        ({"settings": DriftSettings(new_tokens=256)}, "room for 256"),
        ({"prompts": [Prompt("")]}, "no token"),
    ],
)
def test_bad_input(evaluate_here, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_here(**options)


@pytest.mark.parametrize("name", LEAST)
def test_settings_out_of_range(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0"):
        DriftSettings(**{name: 0})


def test_long_prompts_are_cut(evaluate_here):
    settings = DriftSettings(new_tokens=4, max_prompt_tokens=3, samples=20)
    report, _ = evaluate_here(own=[{"threshold": 0.5}], settings=settings)
    assert report["prompts"]["cut"] == 6 and report["prompts"]["tokens"] <= 3 * len(PROMPTS)
