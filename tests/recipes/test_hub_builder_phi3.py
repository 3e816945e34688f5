"""What `python -m recipes.hub` writes of language models generates where the package is not installed."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from recipes import hub
from tests.loopback_hub import LoopbackHub, call_elsewhere
from tests.phi3_models import adopt, make_stock, make_tokenizer
from tests.vision.test_remote_code import copied_files

PROMPT, NEW = "hello world", 9
GENERATION = {"max_new_tokens": NEW, "bos_token_id": 1, "pad_token_id": 0}


def make_model(tied=False):
    """A stock model in half precision, of the tokenizer's vocabulary."""
    return make_stock("window", vocab_size=len(make_tokenizer()), tie_word_embeddings=tied).half()


def make_source(stock, folder):
    """A folder as under `models/`, with a tiny stock language model, its tokenizer and a card."""
    stock.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def stock(request):
    """Two heads: one of its own, and the embeddings."""
    return make_model(request.param)


@pytest.fixture
def source(stock, tmp_path):
    """The stock model's folder."""
    return make_source(stock, tmp_path / "models" / "tiny")


def use(names, prompt):
    """Runs elsewhere, without the package: tokenizer, pipeline, and generation of all kinds, of each repository."""
    import builtins

    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    asked, found = [], []
    ask, builtins.input = input, lambda text="": asked.append(text) or "n"
    for name in names:
        AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # needs no code, and does not ask about it
    builtins.input = ask
    for name in names:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
        kept = str(model.dtype)
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        pipe = pipeline("text-generation", model=name, trust_remote_code=True, dtype="float32")
        model = model.float()
        texts = [
            pipe(prompt, do_sample=False)[0]["generated_text"],  # it samples unless told
            tokenizer.decode(model.generate(tokens)[0], skip_special_tokens=True),
            tokenizer.decode(model.generate(tokens, lossless=True)[0], skip_special_tokens=True),
        ]
        classes = [type(model).__name__, type(pipe.model).__name__]
        found.append({"dtype": kept, "classes": classes, "texts": texts, "ids": tokens[0].tolist()})
    return {"asked": asked, "found": found}


def test_repositories_generate_without_the_package(tmp_path):
    """One with a head of its own from a folder, one with tied embeddings from a hub."""
    models, built = [make_model(tied) for tied in (False, True)], []
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    files |= {"README.md", "LICENSE", "THIRD_PARTY_NOTICES.md", *copied_files("language/modeling_neuroflow_phi3.py")}
    for name, model in zip(("untied", "tied"), models, strict=True):
        built.append(hub.build_hub_repository(make_source(model, tmp_path / name), tmp_path / "out" / name))
        assert {path.name for path in built[-1].iterdir()} == files
    with LoopbackHub() as served:
        with served.reached_from_here():
            HfApi().create_repo("user/tiny")
            HfApi().upload_folder(folder_path=built[1], repo_id="user/tiny")
        names = [str(built[0]), "user/tiny"]
        answer = call_elsewhere(use, tmp_path / "elsewhere", hub=served.url, names=names, prompt=PROMPT)
    assert set(served.files("user/tiny")) >= files
    assert answer["asked"] == []
    tokenizer = make_tokenizer()
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    for model, found in zip(models, answer["found"], strict=True):
        text = tokenizer.decode(model.float().generate(tokens, max_new_tokens=NEW)[0], skip_special_tokens=True)
        classes = 2 * ["NeuroFlowPhi3ForCausalLM"]
        assert found == {"dtype": "torch.float16", "classes": classes, "texts": 3 * [text], "ids": tokens[0].tolist()}


def test_weights_and_options_are_kept(source, stock, tmp_path):
    config = json.loads((source / "config.json").read_text())
    bypass = {"cache_layers": [2], "threshold": 0.5}
    (source / "config.json").write_text(json.dumps(config | {"bypass": bypass, "dtype": "float32"}))
    repository = hub.build_hub_repository(source, tmp_path / "out")
    expected, written = (load_file(folder / "model.safetensors") for folder in (source, repository))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert all(tensor.dtype == torch.float16 for tensor in written.values())
    config = json.loads((repository / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["bypass"]) == ("neuroflow_phi3", "float16", bypass)
    generation = json.loads((repository / "generation_config.json").read_text())
    assert generation.items() >= GENERATION.items()


def test_a_saved_model_of_ours_is_taken_too(source, stock, tmp_path):
    adopt(stock).half().save_pretrained(source)
    repository = hub.build_hub_repository(source, tmp_path / "out")
    assert json.loads((repository / "config.json").read_text())["architectures"] == ["NeuroFlowPhi3ForCausalLM"]


def test_generation_options_beside_the_card_go_before_the_recipe_s(source, tmp_path, monkeypatch):
    made = tmp_path / "made"
    source.rename(made)
    source.mkdir()
    (source / "README.md").write_text("# The card")
    (source / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    monkeypatch.setitem(hub.RECIPES, "tiny", lambda: made)
    repository = hub.build_hub_repository(source, tmp_path / "out")
    assert json.loads((repository / "generation_config.json").read_text())["max_new_tokens"] == 3
    assert (repository / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (["tokenizer.json"], "needs a tokenizer (tokenizer.json or tokenizer.model), and"),
        (["tokenizer_config.json", "tokenizer.json"], "a tokenizer's configuration (tokenizer_config.json)"),
    ],
)
@pytest.mark.parametrize("stock", [False], indirect=True)
def test_what_is_missing_is_named(source, removed, named, tmp_path):
    for name in removed:
        (source / name).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        hub.build_hub_repository(source, tmp_path / "out" / "tiny")
    assert named in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stock", [False], indirect=True)
def test_weights_at_random_are_not_published(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .* lm_head\.weight"):
        hub.build_hub_repository(source, tmp_path / "out")


@pytest.mark.parametrize("stock", [False], indirect=True)
def test_other_heads_are_refused(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Phi3ForTokenClassification"]}))
    with pytest.raises(ValueError, match="Phi3ForTokenClassification"):
        hub.build_hub_repository(source, tmp_path / "out")
