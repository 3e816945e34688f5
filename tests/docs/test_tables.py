"""The tables of README and of the results' pages: what the script writes, from the presets of today."""

import json
from pathlib import Path

import pytest

from eval.docs.tables import BLOCKS, PAGES, filled
from neuroflow_hf import PRESETS, NeuroFlowGateConfig
from neuroflow_hf.utils.files import fill_block
from neuroflow_hf.utils.tables import markdown_table
from tests.vlms import MODELS

ROOT = Path(__file__).parents[2]
ADDED_OPTIONS = {"summary_tokens": 0}  # since the runs, with the value that changes nothing
REMOVED_OPTIONS = {"tolerance", "tolerance_tilt", "spread_layers"}  # of the removed mode `propagate`, in recorded runs


def test_pages_are_as_the_script_writes_them():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert filled(text) == text, page


def test_the_models_that_attach_is_tested_on_are_listed():
    page = (ROOT / "docs/guides/vlms.md").read_text(encoding="utf-8")
    columns = ["model", "class", "reads of the tower", "asked by"]
    rows = [
        [name, *(f"`{cell}`" for cell in (tiny.model_class, tiny.reads, tiny.call))] for name, tiny in MODELS.items()
    ]
    assert page == fill_block(page, "tested models", markdown_table((columns, rows)))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_table_stands_on_a_page(name):
    assert sum(f"<!-- figures:{name}:begin -->" in page.read_text(encoding="utf-8") for page in PAGES) == 1


def test_tables_speak_of_baselines_and_leave_the_removed_mode_out():
    for page in PAGES:
        lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        assert not any("control:" in line or "propagate" in line for line in lines), page


@pytest.mark.parametrize("result", ["accuracy", "reaction", "fidelity"])
def test_figures_are_those_of_the_presets_of_today(result):
    report = json.loads((ROOT / f"eval/results/{result}.json").read_text(encoding="utf-8"))
    measured = {spec["name"]: spec["options"] for spec in report["methods"] if spec["family"] == "presets"}
    assert measured == PRESETS


def test_figures_on_footage_are_those_of_the_presets_of_today():
    methods = json.loads((ROOT / "eval/results/vision_policies.json").read_text(encoding="utf-8"))["methods"]
    assert {name: methods[name] for name in PRESETS} == PRESETS


@pytest.mark.parametrize("result", ["run", "run_labels"])
def test_the_runs_are_of_the_default_of_today(result):
    report = json.loads((ROOT / f"eval/results/{result}.json").read_text(encoding="utf-8"))
    measured = {name: value for name, value in report["gate"].items() if name not in REMOVED_OPTIONS}
    assert ADDED_OPTIONS | measured == NeuroFlowGateConfig.from_options({}).to_dict()
