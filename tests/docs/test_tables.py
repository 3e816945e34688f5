"""The tables of README and of the results' pages: what the script writes, from the presets of today."""

import json
from pathlib import Path

import pytest

from eval.docs.tables import BEFORE_CONTROLLER, BLOCKS, PAGES, filled
from neuroflow_hf import PRESETS, NeuroFlowGateConfig
from neuroflow_hf.utils.files import fill_block
from neuroflow_hf.utils.tables import markdown_table
from tests.vlms import MODELS

ROOT = Path(__file__).parents[2]


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


def test_tables_speak_of_baselines():
    for page in PAGES:
        lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        assert not any("control:" in line for line in lines), page


def presets_of(result):
    """The presets' options in a report; of a run, the default's."""
    report = json.loads((ROOT / f"eval/results/{result}.json").read_text(encoding="utf-8"))
    if "gate" in report:
        return {"balanced": report["gate"]}
    if isinstance(report["methods"], dict):
        return {name: report["methods"][name] for name in PRESETS}
    return {spec["name"]: spec["options"] for spec in report["methods"] if spec["family"] == "presets"}


@pytest.mark.parametrize("result", ["accuracy", "reaction", "fidelity", "vision_policies", "run", "run_labels"])
def test_figures_are_those_of_the_presets_of_today_or_said_to_be_older(result):
    today = PRESETS if len(presets_of(result)) > 1 else {"balanced": NeuroFlowGateConfig.from_options({}).to_dict()}
    assert (presets_of(result) == today) != (result in BEFORE_CONTROLLER)


def test_tables_of_older_presets_say_so():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name, (_, *results) in BLOCKS.items():
        block = text.split(f"<!-- figures:{name}:begin -->")[1].split("<!-- figures")[0]
        assert ("before the controller" in block) == bool(BEFORE_CONTROLLER.intersection(results)), name
