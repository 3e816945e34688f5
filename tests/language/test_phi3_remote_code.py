"""Saved and pushed language models generate alike where the package is not installed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.loopback_hub import LoopbackHub, call_elsewhere
from tests.phi3_models import make_ours, random_ids
from tests.vision.test_remote_code import copied_files

BYPASS = {"gate_layer": 0, "cache_layers": [1, 3], "threshold": 0.3, "target": "block"}
LOSSLESS = {"drafter": "bypass", "draft_length": 3}
NEW = 12


def use(names, bare, ids, output, lossless, new):
    """
    Runs elsewhere, without the package: generate with each of the models, save it, and load it once more. `names` and
    `bare` are names or folders by place, and the bare decoders'.
    """
    import os

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    ids, reports = load_file(ids)["ids"], {}
    for place, name in names.items():
        config = AutoConfig.from_pretrained(name, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
        reports[place] = {
            "bypass": config.bypass,
            "modules": [type(model).__module__, type(config).__module__],
            "bare": type(AutoModel.from_pretrained(bare[place], trust_remote_code=True)).__name__,
        }
        tensors = {}
        for trip in ("first", "second"):
            generated = model.generate(ids, max_new_tokens=new, return_dict_in_generate=True)
            tensors[f"{trip}.bypassed"] = generated.sequences
            tensors[f"{trip}.mask"] = model.bypass_statistics(generated.past_key_values).bypassed_mask
            drafted = model.generate(ids, max_new_tokens=new, lossless=lossless, return_dict_in_generate=True)
            tensors[f"{trip}.lossless"] = drafted.sequences
            reports[place][f"{trip}.drafted"] = drafted.lossless.drafted
            with torch.no_grad():
                tensors[f"{trip}.logits"] = model(ids, bypass=False).logits
            again = os.path.join(output, place)
            model.save_pretrained(again)
            model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, os.path.join(output, f"{place}.safetensors"))
    return reports


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model, a folder with it saved, its bare decoder and the prompt, and what is expected of it."""
    root = tmp_path_factory.mktemp("saved")
    model, ids = make_ours("window", bypass=BYPASS), random_ids(1, 6)
    model.save_pretrained(root / "model")
    model.model.save_pretrained(root / "bare")
    save_file({"ids": ids}, root / "ids.safetensors")
    output = model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
    with torch.no_grad():
        expected = {
            "bypassed": output.sequences,
            "mask": model.bypass_statistics(output.past_key_values).bypassed_mask,
            "lossless": model.generate(ids, max_new_tokens=NEW, bypass=False),
            "logits": model(ids, bypass=False).logits,
        }
    assert 0 < expected["mask"].sum() < NEW - 1
    return model, root, expected


@pytest.fixture(scope="module")
def visits(saved, tmp_path_factory):
    """The other process's reports, the files that it loaded by place, and the folder that it wrote."""
    (model, root, _), output = saved, tmp_path_factory.mktemp("elsewhere")
    with LoopbackHub() as hub:
        with hub.reached_from_here():
            model.push_to_hub("user/tiny-phi3")
        reports = call_elsewhere(
            use,
            output,
            hub=hub.url,
            names={"folder": str(root / "model"), "hub": "user/tiny-phi3"},
            bare={"folder": str(root / "bare"), "hub": "user/tiny-phi3"},
            ids=root / "ids.safetensors",
            output=output,
            lossless=LOSSLESS,
            new=NEW,
        )
    assert [request for request in hub.unknown if "user/" in request] == []
    files = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    return reports, {"folder": files, "hub": hub.files("user/tiny-phi3")}, output


@pytest.fixture(params=["folder", "hub"])
def visit(request, visits):
    """Of one place: the report, the tensors, the files that were loaded, and the folder with the model saved again."""
    reports, files, output = visits
    place = request.param
    return reports[place], load_file(output / f"{place}.safetensors"), files[place], output / place


@pytest.mark.parametrize("trip", ["first", "second"])
def test_generates_alike(visit, saved, trip):
    report, tensors, _, _ = visit
    for name, expected in saved[2].items():
        torch.testing.assert_close(tensors[f"{trip}.{name}"], expected)
    assert report[f"{trip}.drafted"] > 0


def test_comes_from_the_code_that_was_saved(visit):
    report, _, files, again = visit
    assert all(module.startswith("transformers_modules.") for module in report["modules"])
    assert report["bypass"] == BYPASS
    assert report["bare"] == "NeuroFlowPhi3Model"
    needed = copied_files("language/modeling_neuroflow_phi3.py")
    for names in (set(files), {path.name for path in again.iterdir()}):
        assert {name for name in names if name.endswith(".py")} == needed
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert json.loads((again / "config.json").read_text())["auto_map"] == auto_map
