"""Imports run one way, and saved models need five packages and nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.phi3_models import save_checkpoint

ROOT = Path(__file__).parents[1]
# each may import itself and what stands below it
LAYERS = [
    ("eval",),
    ("recipes",),
    ("neuroflow_hf.cli",),
    ("neuroflow_hf.app",),
    (
        "neuroflow_hf.distill",
        "neuroflow_hf.attachment",
        "neuroflow_hf.archive",
        "neuroflow_hf.cameras",
        "neuroflow_hf.export",
    ),
    ("neuroflow_hf.evaluation", "neuroflow_hf.drift"),
    ("neuroflow_hf.conversion",),
    ("neuroflow_hf.loading",),
    ("neuroflow_hf.video",),
    ("neuroflow_hf.vision", "neuroflow_hf.language"),
    ("neuroflow_hf.utils",),
]
SIBLINGS = {("neuroflow_hf.drift", "neuroflow_hf.evaluation")}  # drift takes its intervals from evaluation
MODEL_PACKAGES = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}
OPTIONAL = {"accelerate"}  # imported inside `try` where a model carries accelerate's hooks


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package, found = list(path.relative_to(ROOT).parts[:-1]), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> tuple[int, str] | None:
    """The layer's number, from the top, and the part of it that a module belongs to."""
    for number, parts in enumerate(LAYERS):
        for part in parts:
            if module == part or module.startswith(part + "."):
                return number, part
    return None


def wrong_imports(path: Path) -> list[str]:
    """What a file imports from above its own layer, or from beside it."""
    here = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here is None:
        return []
    wrong = []
    for module in sorted(imports_of(path)):
        there = layer_of(module)
        if there is None or there[1] == here[1] or there[0] > here[0] or (here[1], there[1]) in SIBLINGS:
            continue
        wrong.append(module)
    return wrong


SOURCES = [path for part in ("neuroflow_hf", "recipes", "eval") for path in sorted((ROOT / part).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    assert wrong_imports(path) == []
    assert "sys.path" not in path.read_text(encoding="utf-8")


def test_the_engine_names_no_vision_tower():
    """A tower's own files do; all others ask `tower.py`."""
    own = ("modeling_", "configuration_", "__init__")
    engine = [path for path in (ROOT / "neuroflow_hf" / "vision").glob("*.py") if not path.name.startswith(own)]
    assert len(engine) > 20
    for path in engine:
        assert not re.search("siglip|dinov2|clip(?!s|ped|ping)", path.read_text(encoding="utf-8"), re.IGNORECASE), path


def test_a_wrong_import_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    wrong = {
        "neuroflow_hf/vision/gate.py": "from ..video.reader import read_frames",
        "neuroflow_hf/language/bypass.py": "from ..vision.options import make_options",
        "neuroflow_hf/drift/run.py": "def f():\n    from ..cli import main",
        "neuroflow_hf/evaluation/run.py": "import recipes.hub",
        "neuroflow_hf/attachment/tower.py": "from ..distill.train import distill",
        "neuroflow_hf/video/run.py": "from ..archive.dataset import VideoFile",
        "neuroflow_hf/app/page.py": "from ..cli.main import app",
        "neuroflow_hf/archive/search.py": "from ..app.parts import Jobs",
        "recipes/hub.py": "from eval import report",
    }
    for name, source in wrong.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        assert wrong_imports(path), name


@pytest.mark.parametrize("family", ["vision", "language", "attachment"])
def test_models_need_five_packages(family):
    roots = set()
    for path in (ROOT / "neuroflow_hf" / family).glob("*.py"):
        roots |= {module.split(".")[0] for module in imports_of(path)}
    assert roots - set(sys.stdlib_module_names) - {"neuroflow_hf"} - OPTIONAL <= MODEL_PACKAGES


# One process for all questions: a new Python takes nine seconds for torch and transformers.
PROGRAM = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")

def tried(statement, missing):
    sys.modules[missing] = None
    try:
        exec(statement)
    except ImportError as error:
        return str(error)

answers = {}
connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo
socket.socket.connect = socket.getaddrinfo = refuse
import transformers
before = set(sys.modules)  # transformers may bring some extras itself
import neuroflow_hf
answers["import"] = sorted(set(sys.modules) - before)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo

from transformers import AutoModel, SiglipConfig
answers["stock class"] = AutoModel._model_mapping[SiglipConfig].__name__
before = set(sys.modules)
from neuroflow_hf.loading import *
load_language_model(sys.argv[1], device="cpu")
load_text_model(default_model(), device="cpu")
answers["loading"] = sorted(set(sys.modules) - before)

answers["without typer"] = tried("import neuroflow_hf.cli.main", "typer")
answers["without av"] = tried("from neuroflow_hf.video import VideoReader", "av")
answers["without pyarrow"] = tried("import neuroflow_hf.archive.dataset", "pyarrow")
answers["without gguf"] = tried("import neuroflow_hf.conversion.gguf_file", "gguf")
answers["without gradio"] = tried("import neuroflow_hf.app.page", "gradio")
del sys.modules["typer"], sys.modules["av"], sys.modules["pyarrow"], sys.modules["gguf"], sys.modules["gradio"]
answers["without ray"] = tried("import neuroflow_hf.archive.cluster", "ray")
import recipes.siglip_dinov2_small.build
answers["building the tower"] = sorted(sys.modules)
print(json.dumps(answers))
"""
EXTRAS = {"av", "PIL", "matplotlib", "typer", "rich", "onnx", "evaluate", "gguf"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a process of its own found about imports."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, save_checkpoint(tmp_path_factory.mktemp("phi3"))]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_the_package_is_light_and_offline(answers):
    """It opens no connection, loads none of the tools' libraries, and replaces no stock class."""
    assert "neuroflow_hf" in answers["import"]
    assert not (EXTRAS | {"peft", "datasets"}) & set(answers["import"])
    assert answers["stock class"] == "SiglipModel"


def test_loading_models_imports_no_extra(answers):
    assert "neuroflow_hf.loading" in answers["loading"]
    assert not EXTRAS & set(answers["loading"])


@pytest.mark.parametrize(
    "missing, extra",
    [
        *(("typer", "cli"), ("av", "video"), ("pyarrow", "archive"), ("ray", "cluster"), ("gguf", "convert")),
        ("gradio", "app"),
    ],
)
def test_a_missing_extra_is_named(answers, missing, extra):
    assert f'pip install "neuroflow-hf[{extra}]"' in answers[f"without {missing}"]


def test_building_the_tower_imports_onnx_late(answers):
    assert "recipes.siglip_dinov2_small.build" in answers["building the tower"]
    assert "onnx" not in answers["building the tower"]
