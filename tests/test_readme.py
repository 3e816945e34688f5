"""README's examples, run in order as they stand, with the checkpoint that lies in the repository; and its figures."""

import json
import re
from pathlib import Path

import pytest

from eval.docs.fill_readme import BLOCKS
from neuroflow_hf import PRESETS, NeuroFlowGateConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder to work in that has the repository's models and nothing else."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)


def test_python_examples_run_and_say_true_shapes(checkout, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        for expression, shape in re.findall(r"^(\S+\.shape)  # (\([\d, ]+\))", block, re.MULTILINE):
            assert tuple(eval(expression, names)) == eval(shape)
    assert capsys.readouterr().out.count("cost") == 5
    assert Path("stream.safetensors").exists()


@pytest.mark.parametrize("name", BLOCKS)
def test_figures_are_those_of_the_results(name):
    table, *results = BLOCKS[name]
    reports = [json.loads((ROOT / f"eval/results/{result}.json").read_text(encoding="utf-8")) for result in results]
    assert table(*reports) in (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert report["gate"] == NeuroFlowGateConfig.from_options({}).to_dict()
