"""README's examples, run in order as they stand, with a tiny model in the vision tower's place."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_TEXT, TINY_VISION, lively
from fill_readme import DRIFT, controls_table, delays_table, drift_block, policies_table, run_table, speed_table
from test_pipelines import PIPELINE_TEXT, make_processor
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

ROOT = Path(__file__).parent.parent
TOWER = ".cache/neuroflow/siglip-dinov2-small"
WHOLE = "path/to/siglip"


@pytest.fixture
def tower(tmp_path, monkeypatch):
    """
    An empty folder to work in, with a tiny checkpoint of the tower's shape where README expects the tower, and one
    with text where it names a checkpoint.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=384,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=6,
        image_size=224,
        patch_size=14,
    )
    lively(SiglipVisionModel(config)).save_pretrained(TOWER)
    SiglipImageProcessorPil().save_pretrained(TOWER)
    text = SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT)
    lively(SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_VISION))).save_pretrained(WHOLE)
    processor = make_processor()
    processor.tokenizer.add_tokens(["person", "car", "an", "empty", "street"])
    processor.save_pretrained(WHOLE)


def test_python_examples_run_and_say_true_shapes(tower, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        for expression, shape in re.findall(r"^(\S+\.shape)  # (\([\d, ]+\))", block, re.MULTILINE):
            assert tuple(eval(expression, names)) == eval(shape)
    assert capsys.readouterr().out.count("cost") == 5
    assert Path("stream.safetensors").exists()


@pytest.mark.parametrize(
    "table, result",
    [
        (controls_table, "vision_controls"),
        (policies_table, "vision_policies"),
        (delays_table, "vision_policies"),
        (speed_table, "benchmark_vision"),
        (run_table, "run"),
        *([(drift_block, "token_drift")] if DRIFT.exists() else []),
    ],
)
def test_figures_are_those_of_the_results(table, result):
    report = json.loads((ROOT / f"eval/results/{result}.json").read_text(encoding="utf-8"))
    assert table(report) in (ROOT / "README.md").read_text(encoding="utf-8")
