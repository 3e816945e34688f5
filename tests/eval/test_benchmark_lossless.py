"""The benchmark of lossless generation on a tiny model: what it writes and continues. No time is asserted."""

import json

import pytest
import typer

from eval.docs.language import lossless_table
from eval.language import benchmark_lossless
from eval.language.benchmark_lossless import DRAFTERS, STOCK, divergence, main
from tests.phi3_models import adopt, make_stock, make_tokenizer, random_ids

TASKS = ("code", "structured", "prose")


@pytest.fixture
def bench(tmp_path):
    """Runs the benchmark on a tiny model and two prompts per task: what is in the file then."""
    tokenizer = make_tokenizer()
    make_stock(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    rows = [{"task": task, "prompt": f"{task} {word}"} for task in TASKS for word in ("one", "two")]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.json"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**options):
        given = {"limit": None, "new_tokens": 20, "turns": 2, "fresh": False}
        main(model=tmp_path / "tiny", prompts=prompts, output=output, **given | options)
        return json.loads(output.read_text())

    return run


def test_all_variants_are_timed_and_said(bench, capsys):
    report = bench()
    assert [case["task"] for case in report["cases"]] == list(TASKS) * 2
    assert list(report["summary"]) == [*sorted(TASKS), "all"]
    for case in report["cases"]:
        assert tuple(case["variants"]) == (*STOCK, *DRAFTERS)
        assert all(len(entry[clock]) == 2 for clock in ("processor", "wall") for entry in case["variants"].values())
    for rows in report["summary"].values():
        for variant, row in rows.items():
            assert row["divergences"]["others"] == 0
            for clock in ("processor", "wall"):
                assert row[clock]["tokens_per_second"] > 0
                low, high = row[clock]["times_dense"]["interval"]
                assert low <= row[clock]["times_dense"]["median"] <= high
            assert ("acceptance" in row) == (variant == "lookup")
    assert report["versions"]["torch"]
    table = lossless_table(report)
    assert all(f"| {task} | {variant} |" in table for task in (*TASKS, "all") for variant in (*STOCK, *DRAFTERS))
    assert "6 prompts" in table
    assert "tokens/s" in capsys.readouterr().out


def test_an_interrupted_run_is_continued(bench, monkeypatch):
    measured, measure = [], benchmark_lossless.measure

    def counting(model, ids, *args):
        measured.append(ids.shape[1])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(model, ids, *args)

    monkeypatch.setattr(benchmark_lossless, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        bench(turns=1)
    report = bench(turns=1)
    assert len(measured) == 3 + 4
    assert len({case["number"] for case in report["cases"]}) == len(report["cases"]) == 6
    bench(turns=1)
    assert len(measured) == 3 + 4
    bench(turns=2, limit=1)  # other settings
    assert len(measured) == 3 + 4 + 3


def test_a_wrong_text_ends_with_an_error(bench, monkeypatch, capsys):
    generate = benchmark_lossless.generate

    def wrong(model, ids, variant, *args):
        found = generate(model, ids, variant, *args)
        if variant == "lookup":
            found["tokens"][3] = (found["tokens"][3] + 1) % 20
        return found

    monkeypatch.setattr(benchmark_lossless, "generate", wrong)
    with pytest.raises(typer.Exit):
        bench(limit=1, turns=1)
    assert "by more than rounding" in capsys.readouterr().out


def test_where_texts_part():
    model, ids = adopt(make_stock()), random_ids()
    assert divergence(model, ids, [3, 4], [3, 4]) is None
    found = divergence(model, ids, [3, 4, 5], [3, 4])
    assert found["at"] == 2
    assert found["margin"] > 0
    assert not found["within_rounding"]
