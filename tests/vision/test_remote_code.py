"""Saved models load and stream where the package is not installed, from the code files saved with them."""

import ast
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipForImageClassification, SiglipTextConfig
from transformers.dynamic_module_utils import get_relative_imports

import neuroflow_hf
from neuroflow_hf import NeuroFlowSiglipForImageClassification, NeuroFlowStream
from tests.conftest import (
    TINY_TEXT,
    TINY_VISION,
    assert_close_in_norm,
    lively,
    make_stock_tower,
    random_video,
    wrap_tower,
)
from tests.loopback_hub import call_elsewhere

PACKAGE = Path(neuroflow_hf.__file__).parent
MODELING = (
    "vision/modeling_neuroflow_siglip.py",
    "vision/modeling_neuroflow_dinov2.py",
    "vision/modeling_neuroflow_dinov2_with_registers.py",
    "vision/modeling_neuroflow_clip.py",
    "language/modeling_neuroflow_phi3.py",
)
GATE = {"mode": "extrapolate", "threshold": 0.05, "sentinels": 0.1}
NUM_FRAMES, FRAMES_BEFORE_SAVING = 5, 2
OTHER_TOWERS = {"dinov2": MODELING[1], "registers": MODELING[2], "clip": MODELING[3]}
KINDS = ("dual", "vision", "classifier", *OTHER_TOWERS)
AUTO_CLASSES = {
    "dual": {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification", "AutoModelForImageClassification"},
    "vision": {"AutoConfig", "AutoModel"},
    "classifier": {
        "AutoConfig",
        "AutoModel",
        "AutoModelForZeroShotImageClassification",
        "AutoModelForImageClassification",
    },
} | {kind: {"AutoConfig", "AutoModel"} for kind in OTHER_TOWERS}


def stream_video(model, kind, frames, stream):
    """The embedding or logits, the cost and the active patches of every frame."""
    tensors = {}
    for index, pixel_values in enumerate(frames):
        forward = model.get_image_features if kind == "dual" else model
        output = forward(pixel_values=pixel_values, stream=stream)
        result = output.logits if kind == "classifier" else output.pooler_output
        tensors |= {
            f"{kind}.{index}.result": result.detach(),
            f"{kind}.{index}.cost": output.cost,
            f"{kind}.{index}.active": output.active_mask,
        }
    return tensors


@pytest.fixture(scope="module")
def models(model, vision):
    """One model of each kind. Do not change them."""
    torch.manual_seed(0)
    config = SiglipConfig(text_config=SiglipTextConfig(**TINY_TEXT), vision_config=TINY_VISION, num_labels=3)
    stock = lively(SiglipForImageClassification(config))
    classifier = NeuroFlowSiglipForImageClassification(
        NeuroFlowSiglipForImageClassification.config_class.from_dict(config.to_dict())
    )
    classifier.load_state_dict(stock.state_dict())
    others = {tower: wrap_tower(tower, make_stock_tower(tower)) for tower in OTHER_TOWERS}
    return {"dual": model, "vision": vision, "classifier": classifier.eval(), **others}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """A folder with the saved models, a video, and a stream of the dual model as it is after the first frames."""
    root = tmp_path_factory.mktemp("saved")
    for kind, model in models.items():
        before = dict(model.gate_options)
        model.config.gate = dict(GATE)
        model.save_pretrained(root / kind)
        model.config.gate = before
    frames = random_video(NUM_FRAMES, seed=3)
    save_file({"frames": torch.stack(frames)}, root / "video.safetensors")
    with torch.no_grad():
        stream = models["dual"].new_stream(**GATE)
        stream_video(models["dual"], "dual", frames[:FRAMES_BEFORE_SAVING], stream)
        stream.save(root / "stream.safetensors")
        texts = torch.arange(32).reshape(2, 16)
        logits = models["dual"](input_ids=texts, pixel_values=frames[0]).logits_per_image
        expected = {"zero_shot": logits}
        for kind, model in models.items():
            expected |= stream_video(model, kind, frames, model.new_stream(**GATE))
    save_file(expected, root / "expected.safetensors")
    return root


def use_models(models, kinds, video, stream_before, output):
    """Runs elsewhere: load the saved models, stream a video, continue a stream, save everything again."""
    import os

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForZeroShotImageClassification,
    )

    report = {"gates": {}, "modules": {}, "refusals": []}
    for auto_class in (AutoConfig, AutoModel, AutoModelForImageClassification):
        try:
            auto_class.from_pretrained(os.path.join(models, "dual"))
        except ValueError as error:
            report["refusals"].append(str(error))

    frames = load_file(video)["frames"].unbind(0)
    tensors = {}
    for kind in kinds:
        auto_class = AutoModelForImageClassification if kind == "classifier" else AutoModel
        folder = os.path.join(models, kind)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        report["gates"][kind] = config.gate
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        report["modules"][kind] = [type(model).__module__, type(model.config).__module__, type(config).__module__]
        forward = model.get_image_features if kind == "dual" else model
        with torch.no_grad():
            stream = model.new_stream()  # the gate's options come with the model
            for index, pixel_values in enumerate(frames):
                result = forward(pixel_values=pixel_values, stream=stream)
                tensors[f"{kind}.{index}.result"] = result.logits if kind == "classifier" else result.pooler_output
                tensors[f"{kind}.{index}.cost"] = result.cost
                tensors[f"{kind}.{index}.active"] = result.active_mask
        model.save_pretrained(os.path.join(output, kind))

    dual = AutoModelForZeroShotImageClassification.from_pretrained(
        os.path.join(models, "dual"), trust_remote_code=True
    ).eval()
    with torch.no_grad():
        texts = torch.arange(32).reshape(2, 16)
        tensors["zero_shot"] = dual(input_ids=texts, pixel_values=frames[0]).logits_per_image
        # one stream by the class's `load`, one by the state, both from where the other process left it
        loaded = type(dual.new_stream()).load(stream_before)
        by_state = dual.new_stream(threshold=loaded.gate.threshold)
        by_state.load_state_dict(loaded.state_dict())
        start = loaded.frames[0]
        for index in range(start, len(frames)):
            if index == start + 1:
                loaded.save(os.path.join(output, "stream.safetensors"))
            for name, stream in (("loaded", loaded), ("by_state", by_state)):
                result = dual.get_image_features(pixel_values=frames[index], stream=stream)
                tensors[f"{name}.{index}.result"] = result.pooler_output
                tensors[f"{name}.{index}.cost"] = result.cost
                tensors[f"{name}.{index}.active"] = result.active_mask
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, os.path.join(output, "out.safetensors"))
    return report


@pytest.fixture(scope="module")
def visit(saved, tmp_path_factory):
    """What a process without the package made of the saved models: its report, and the folder it wrote."""
    output = tmp_path_factory.mktemp("output")
    report = call_elsewhere(
        use_models,
        tmp_path_factory.mktemp("elsewhere"),
        models=saved,
        kinds=list(KINDS),
        video=saved / "video.safetensors",
        stream_before=saved / "stream.safetensors",
        output=output,
    )
    return report, output


def assert_same(actual, expected):
    """
    Masks equal, numbers equal to float32 rounding: the weights lie at other addresses in the other process, so
    products may be summed in another order. Seen: 1.2e-6 at 0.5.
    """
    assert_close_in_norm(actual, expected, 2e-6 if expected.is_floating_point() else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_names_the_auto_classes_and_writes_all_code(saved, kind):
    auto_map = json.loads((saved / kind / "config.json").read_text())["auto_map"]
    assert set(auto_map) == AUTO_CLASSES[kind]
    for reference in auto_map.values():
        module, _, name = reference.partition(".")
        assert f"class {name}(" in (saved / kind / f"{module}.py").read_text()
    modeling = OTHER_TOWERS.get(kind, MODELING[0])
    assert {path.name for path in (saved / kind).glob("*.py")} == copied_files(modeling)


def test_the_video_makes_the_gate_choose(saved):
    expected = load_file(saved / "expected.safetensors")
    for kind in KINDS:
        for index in range(1, NUM_FRAMES):
            active = expected[f"{kind}.{index}.active"]
            assert 0 < active.sum() < active.numel()


@pytest.mark.parametrize("kind", [*KINDS, "zero_shot"])
def test_streams_alike_without_the_package(kind, saved, visit):
    report, output = visit
    expected, actual = load_file(saved / "expected.safetensors"), load_file(output / "out.safetensors")
    names = [name for name in expected if name.startswith(kind)]
    assert names
    for name in names:
        assert_same(actual[name], expected[name])
    if kind in KINDS:
        assert report["gates"][kind] == dict(GATE)
        assert all(module.startswith("transformers_modules.") for module in report["modules"][kind])


@pytest.mark.parametrize("way", ["loaded", "by_state"])
def test_streams_continue_from_one_process_to_the_next(way, saved, visit):
    expected = load_file(saved / "expected.safetensors")
    actual = load_file(visit[1] / "out.safetensors")
    for index in range(FRAMES_BEFORE_SAVING, NUM_FRAMES):
        for field in ("result", "cost", "active"):
            assert_same(actual[f"{way}.{index}.{field}"], expected[f"dual.{index}.{field}"])
    assert f"{way}.{FRAMES_BEFORE_SAVING - 1}.result" not in actual


def test_a_stream_comes_back_from_the_other_process(visit, saved, models):
    frames = load_file(saved / "video.safetensors")["frames"].unbind(0)
    stream = NeuroFlowStream.load(visit[1] / "stream.safetensors")
    start = FRAMES_BEFORE_SAVING + 1
    assert stream.frames == [start]
    expected = load_file(saved / "expected.safetensors")
    for index in range(start, NUM_FRAMES):
        with torch.no_grad():
            output = models["dual"].get_image_features(pixel_values=frames[index], stream=stream)
        assert_same(output.pooler_output, expected[f"dual.{index}.result"])


def config_of(folder):
    """The stored configuration, without the `dtype` that transformers adds to sub-configurations once reloaded."""
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config.get(part, {}).pop("dtype", None)
    return config


def test_saving_elsewhere_writes_the_same_files(visit, saved):
    """So what the other process saved loads as what was saved here does."""
    for kind in KINDS:
        folder = visit[1] / kind
        assert {path.name for path in folder.iterdir()} == {path.name for path in (saved / kind).iterdir()}
        for path in [*(saved / kind).glob("*.py"), saved / kind / "model.safetensors"]:
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert config_of(folder) == config_of(saved / kind)


def test_untrusted_code_is_not_run(visit):
    refusals = visit[0]["refusals"]
    assert len(refusals) == 3
    assert all("trust_remote_code=True" in message for message in refusals)


# The files that are copied. transformers finds them with a regular expression and copies them flat.


def problems_with(source: str) -> list[str]:
    """What keeps a file of this source from being copied, or from working where the package is not installed."""
    problems, relative, absolute = [], set(), set()
    tree = ast.parse(source)
    optional = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if id(node) not in optional:  # transformers asks for what is imported outside of `try`
                absolute.add(node.module)
            if node.module == "__future__" and any(alias.name == "annotations" for alias in node.names):
                problems.append("postponed annotations")
        elif isinstance(node, ast.ImportFrom):
            if node.level > 1 or node.module is None or "." in node.module:
                problems.append("relative import of something but a file beside it")
            relative.add(node.module)
    # those that use the files have the dependencies of transformers' own models, and no others
    known = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    problems += [f"import of {name}" for name in sorted(absolute) if name.partition(".")[0] not in known]
    if found_by_transformers(source) != relative:
        problems.append("the scanner finds other relative imports than Python")
    return problems


def found_by_transformers(source: str) -> set[str]:
    """The relative imports that transformers' scanner sees."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source.py"
        path.write_text(source)
        return set(get_relative_imports(path))


def travelling_files(modeling: str = MODELING[0]) -> set[Path]:
    """The files that a modeling file needs, itself included, by Python's own view of their imports."""
    waiting, found = [PACKAGE / modeling], set()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            tree = ast.parse(path.read_text())
            waiting += [
                path.parent / f"{node.module}.py"
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.level
            ]
    return found


def copied_files(modeling: str = MODELING[0]) -> set[str]:
    """Names of the files that are saved with a model."""
    return {path.name for path in travelling_files(modeling)}


@pytest.mark.parametrize("modeling", MODELING)
def test_copied_files_can_be_copied(modeling):
    files = travelling_files(modeling)
    assert {path.parent for path in files} == {(PACKAGE / modeling).parent}  # copied flat
    for path in files:
        assert problems_with(path.read_text()) == [], path


@pytest.mark.parametrize(
    "source",
    [
        "from . import gating",
        "from .sub.gating import cosine",
        "from ..gating import cosine",
        "from neuroflow_hf.gating import cosine",
        "import neuroflow_hf",
        "import numpy",
        "from __future__ import annotations",
        '"""\nfrom .gating import cosine\n"""',
        "x = 1; from .gating import cosine",
    ],
)
def test_the_check_of_copied_files_notices(source):
    assert problems_with(source)


@pytest.mark.parametrize(
    "source", ["from .gating import (\n    cosine,\n)", "def f():\n    from .gating import cosine", "import torch.nn"]
)
def test_the_check_of_copied_files_lets_through(source):
    assert problems_with(source) == []
