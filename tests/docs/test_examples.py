"""The examples in README and in the guides: Python runs as it stands, commands exist with their options."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from neuroflow_hf.cli.main import app
from neuroflow_hf.conversion import smollm2
from tests.conftest import make_stock_tower
from tests.phi3_models import save_checkpoint
from tests.vlms import MODELS

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs/index.md",
    ROOT / "docs/getting-started.md",
    *sorted((ROOT / "docs/guides").glob("*.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
ABSENT = "<!-- needs a checkpoint that is not here -->"
PACKAGES = {"exporting.md": ("onnxscript", "onnxruntime")}  # of an extra, for a page's examples
BLOCK = re.compile(rf"({ABSENT}\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """A page's blocks in a language, without those that are marked as needing a checkpoint that is not here."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for absent, name, code in found if name == language and not absent]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache with a tiny model of as many layers in SmolLM2's place."""
    folder = tmp_path_factory.mktemp("cache")
    save_checkpoint(folder / smollm2.FOLDER, num_hidden_layers=30)
    return folder


@pytest.fixture
def checkout(tmp_path, cache, monkeypatch):
    """A folder to work in that has the repository's models and nothing else."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROFLOW_CACHE", str(cache))


def save_tiny_models(page: Path):
    """Tiny models in the folders from which a page's examples load checkpoints that are not here."""
    make_stock_tower("siglip", num_hidden_layers=2).save_pretrained("path/to/siglip")
    for name, tiny in MODELS.items():
        folder = f"path/to/{name.lower().replace(' ', '-')}"
        if f'"{folder}"' in page.read_text(encoding="utf-8"):
            tiny.build().float().save_pretrained(folder)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_examples_run_and_show_true_shapes(page, checkout, capsys):
    for package in PACKAGES.get(page.name, ()):
        pytest.importorskip(package, reason="needs the extra `export`")
    names = {}
    save_tiny_models(page)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
        for expression, shape in re.findall(r"^(\S+\.shape)  # (\([\d, ]+\))", block, re.MULTILINE):
            assert tuple(eval(expression, names)) == eval(shape)
    if page.name == "README.md":  # a cost for each frame, and a saved stream
        assert capsys.readouterr().out.count("cost") == 5
        assert Path("stream.safetensors").exists()


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 12 * 1024


COMMAND = re.compile(r"^(?:neuroflow|.*-m neuroflow_hf\.cli) (.*)$", re.MULTILINE)
LINES = [
    (name, line)
    for name, page in zip(NAMES, PAGES, strict=True)
    for text in blocks(page, "bash")
    for line in COMMAND.findall(text)
]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_commands_exist_with_their_options(page, line):
    name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments).close()


def test_there_are_commands_on_most_pages():
    assert len({page for page, _ in LINES}) >= 5 and len(LINES) >= 15
