"""The embedded Phi-3's recipe: texts, split, tokenizer, training, judging; nothing is downloaded."""

import functools
import itertools
import json
import tomllib

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import Phi3ForCausalLM

from eval.language.ngrams import NGrams
from recipes import packages
from recipes.phi3_nano import sources
from recipes.phi3_nano.judge import judge, share_of_words, words_of
from recipes.phi3_nano.model import Reuse, anchors, drafting_layers, make_model
from recipes.phi3_nano.prompts import draw_prompts, function_prefixes
from recipes.phi3_nano.sources import Document
from recipes.phi3_nano.split import MOST_SHARED, shared_share, shingles, split
from recipes.phi3_nano.structured import compat_texts, definition_texts, metadata_texts, toml_tables
from recipes.phi3_nano.tokenizer import END_OF_TEXT, train_tokenizer
from recipes.phi3_nano.train import NextTokenLoss, Recipe, can_compile, draw_rows, make_optimizers, reused_rows, train
from tests.conftest import assert_close_in_norm
from tests.phi3_models import FLOAT32

HEAD = 'def double(values):\n    """Twice of each."""'


def sentence(number: int) -> str:
    """Words that no other number gives."""
    return " ".join(f"word{number}x{place}" for place in range(60))


# --- split -----------------------------------------------------------------------------------------------------------


def test_held_out_files_share_no_text_with_the_training():
    documents = [Document("prose", f"book/{number}", sentence(number)) for number in range(400)]
    documents += [Document("prose", f"copy/{number}", sentence(number).upper()) for number in range(400)]
    # half of another text, in most of these files
    documents += [
        Document("prose", f"half/{number}", sentence(number)[: len(sentence(number)) // 2] + sentence(1000 + number))
        for number in range(200)
    ]
    training, held_out, left_out = split(documents)
    assert len(training) + len(held_out) + len(left_out) == len(documents)
    assert 5 <= len(held_out) <= 30
    known = set().union(*(shingles(document.text) for document in training))
    assert all(shared_share(document.text, known) <= MOST_SHARED["prose"] for document in held_out)
    assert not {document.text.lower() for document in training} & {document.text.lower() for document in held_out}
    assert {document.source.split("/")[0] for document in left_out} >= {"copy", "half"}
    assert split(documents)[1] == held_out


def test_white_space_and_case_hide_no_copy():
    assert shared_share("A b  C d" * 9, shingles("a B c\nD" * 9)) == 1
    assert shared_share(sentence(1), shingles(sentence(2))) == 0


# --- texts -----------------------------------------------------------------------------------------------------------


def test_tables_are_what_they_say():
    metadata = (
        'Name: x\nVersion: 1.0\nSummary: It\'s "x"\nClassifier: A :: B\nProject-URL: Home, https://x.org\n'
        "Requires-Dist: y>=2\nRequires-Dist: z; extra == 'more'\nProvides-Extra: more\n\ntext"
    )
    found = dict(metadata_texts(metadata))
    parsed = tomllib.loads(found["pyproject.toml"])
    assert parsed["project"]["dependencies"] == ["y>=2"]
    assert parsed["project"]["optional-dependencies"] == {"more": ["z"]}
    assert parsed["project"]["description"] == 'It\'s "x"'
    assert json.loads(found["json"])["urls"] == {"Home": "https://x.org"}
    assert toml_tables({"a": {}, "b": {"c d": "e"}}) == '[b]\n"c d" = "e"'


def test_definitions_come_once_in_three_forms():
    entries = "".join(
        f'w{number}\n    n 1: meaning {number}; "an example" [syn: {{other}}]\n      2: second\n           {number}\n'
        f"synonym{number}\n    n 1: meaning {number}\n"
        for number in range(300)
    )
    found = dict(definition_texts(entries))
    assert {place.rsplit(".", 1)[1] for place in found} == {"json", "csv", "toml"}
    assert "synonym" not in "".join(found.values()) and "example" not in "".join(found.values())
    first = json.loads(next(text for place, text in found.items() if place.endswith("json")))
    assert first[:2] == [
        {"word": "w0", "part": "noun", "definition": "meaning 0"},
        {"word": "w0", "part": "noun", "definition": "second 0"},
    ]


def test_compatibility_is_pruned():
    said = {
        "support": {"chrome": [{"version_added": "2"}], "ie": {"version_added": "1"}},
        "status": {"deprecated": False},
    }
    empty = {"css": {"properties": {}}, "html": {"elements": {}}, "javascript": {"builtins": {}}}
    empty |= {"http": {"headers": {}}, "webextensions": {"api": {}}}
    ((place, text),) = compat_texts({"api": {"Thing": {"__compat": said, "part": {"__compat": said}}}, **empty})
    assert place == "api/Thing"
    assert json.loads(text)["Thing"]["part"]["support"] == {"chrome": "2"}


def test_strings_of_r_are_read():
    content = b"X\n\x00\x00\x00\x10" + b"".join(
        b"\x00\x04\x00\x09" + len(text).to_bytes(4, "big") + text for text in (b"EMMA", b"", b"one")
    )
    assert sources.r_strings(content + b"\x00\x00\x00\xfe") == ["EMMA", "", "one"]


@pytest.mark.parametrize(
    "text, fits",
    [("def f():\n    pass\n", True), ("x = 1\n", False), ("def f(:\n", False), ("def f():\n\tpass\n", False)],
)
def test_code_is_what_parses(text, fits):
    assert sources.is_written_code(text) == fits


def test_every_package_is_pinned_and_credited():
    for name, row in sources.packages().items():
        assert len(row["sha256"]) == 64 and row["version"] and row["licence"] and row["author"], name


def test_a_package_with_another_hash_is_refused(tmp_path):
    (tmp_path / "x-1.tgz").write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-256"):
        packages.fetch(packages.npm_package("x", "1", "0" * 64), tmp_path)


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm"):
        packages.fetch(packages.npm_package("@scope/x", "1", "0" * 64), tmp_path)
    assert packages.npm_package("@scope/x", "1", "").filename == "scope-x-1.tgz"
    assert packages.debian_package("x", "1:2", "").filename == "x_1%3a2_all.deb"


# --- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    code = "class Thing:\n    def method(self, other):\n        return self.value + other.value\n\n\n"
    return train_tokenizer([code * 20, "The end of the text. " * 50], size=400)


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n        return x\n", "a\tb \n\n\n  c  \n", "Zürich 東京 ☃\r\n12345", " leading", "", "self._x[0]"],
)
def test_the_tokenizer_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_indentation_is_cheap_and_texts_get_no_extra_tokens(tokenizer):
    assert len(tokenizer("\n        ").input_ids) == 1
    assert tokenizer("").input_ids == []
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 0
    assert tokenizer(END_OF_TEXT).input_ids == [0]
    assert len(tokenizer) <= 400


# --- training --------------------------------------------------------------------------------------------------------

TINY = Recipe(
    tokens=12 * 64,
    more=0,
    batch_tokens=64,
    context=16,
    warmup=2,
    width=32,
    layers=4,
    fall=0.5,
    matrix_rate=1e-2,
    seed=3,
)


@pytest.fixture
def streams():
    rng = np.random.default_rng(0)
    return {domain: rng.integers(100, size=900).astype(np.int16) for domain in sources.DOMAINS}


@pytest.fixture(autouse=True)
def short_context(monkeypatch):
    monkeypatch.setattr("recipes.phi3_nano.train.CONTEXT", 32)


def run(folder, recipe, streams, **options):
    model = make_model(100, recipe.seed, recipe.width, recipe.layers)
    log = train(model, streams, recipe, folder, Console(quiet=True), **options)
    return model, log


class Stop(Exception):
    pass


def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, streams):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, log = run(tmp_path / "whole", TINY, streams, every=4)

    def stop():
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "broken", TINY, streams, every=4, after_saving=stop)
    continued, later = run(tmp_path / "broken", TINY, streams, every=4)
    assert [item["step"] for item in later] == [item["step"] for item in log] == [4, 8, 12]
    assert later[-1]["loss"] == pytest.approx(log[-1]["loss"], abs=1e-4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(continued.state_dict()[name], value, msg=name)


def test_a_longer_training_goes_on_from_a_state_before_the_fall_only(tmp_path, streams):
    def stop():
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path, TINY, streams, every=4, after_saving=stop)
    longer = Recipe(**{**vars(TINY), "tokens": 16 * 64})
    assert longer.same_but_length() == TINY.same_but_length()
    _, log = run(tmp_path, longer, streams, every=4)
    assert log[-1]["step"] == 16
    with pytest.raises(ValueError, match="learning rate was another"):
        run(tmp_path, Recipe(**{**vars(TINY), "tokens": 20 * 64}), streams)


def test_rows_depend_on_seed_and_step_alone_and_grow_in_the_fall(streams):
    assert torch.equal(draw_rows(streams, TINY, 3), draw_rows(streams, TINY, 3))
    assert not torch.equal(draw_rows(streams, TINY, 3), draw_rows(streams, TINY, 4))
    assert draw_rows(streams, TINY, 0).shape == (4, 16)
    assert draw_rows(streams, TINY, TINY.steps - 1).shape == (2, 32)


def test_the_rate_rises_stays_and_falls():
    rates = [TINY.rate(step) for step in range(TINY.steps)]
    assert rates[0] == 0.5 and rates[1 : TINY.first_falling + 1] == [1.0] * TINY.first_falling
    assert all(before > after for before, after in itertools.pairwise(rates[6:])) and rates[-1] > 0
    longer = Recipe(**{**vars(TINY), "more": 4 * 64})
    rates = [longer.rate(step) for step in range(longer.steps)]
    assert rates[:12] == [TINY.rate(step) for step in range(12)]
    assert rates[12:] == pytest.approx([0.6, 0.45, 0.3, 0.15])


def test_every_parameter_is_optimized_once():
    model = make_model(100, 0, 32, 4)
    given = [id(item) for optimizer in make_optimizers(model, TINY) for item in optimizer.param_groups[0]["params"]]
    assert sorted(given) == sorted(id(item) for item in model.parameters())


def test_anchors_are_the_last_computed_position():
    assert anchors(8, 3, 1).tolist() == [0, 1, 1, 1, 4, 4, 4, 7]
    assert anchors(4, 1, 0).tolist() == [0, 1, 2, 3]
    count, index = reused_rows(Recipe(), 5, 16, 256)
    assert count == 6 and (index <= torch.arange(256)).all()


def test_reuse_changes_the_chosen_rows_only():
    model, same = make_model(100, 0, 32, 4).eval(), torch.randint(100, (1, 12)).expand(3, 12)
    reuse = Reuse(model)
    dense = model(input_ids=same).logits
    with reuse.of(1, anchors(12, 4, 0)):
        mixed = model(input_ids=same).logits
    assert_close_in_norm(mixed[:2], dense[:2], FLOAT32)
    assert not torch.allclose(mixed[2, 1:4], dense[2, 1:4])
    assert_close_in_norm(mixed[2, 0], dense[2, 0], FLOAT32)  # computed, and nothing before it
    assert_close_in_norm(model(input_ids=same).logits, dense, FLOAT32)


def test_reused_outputs_are_what_the_bypass_gives():
    from neuroflow_hf import NeuroFlowPhi3Config, NeuroFlowPhi3ForCausalLM
    from neuroflow_hf.language.lossless_config import NeuroFlowLosslessConfig

    stock = make_model(100, 0, 32, 4).eval()
    options = NeuroFlowLosslessConfig.from_options(True, stock.config.lossless).draft_bypass(4)
    assert list(options.cache_layers) == list(drafting_layers(4))
    ours = NeuroFlowPhi3ForCausalLM(NeuroFlowPhi3Config(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    rows = torch.randint(100, (1, 6))
    with torch.inference_mode():
        cache = ours(input_ids=rows[:, :4], use_cache=True, bypass=options).past_key_values
        found = [
            ours(input_ids=rows[:, place : place + 1], past_key_values=cache, bypass=options).logits[0, 0]
            for place in (4, 5)
        ]
        with Reuse(stock).of(1, torch.tensor([0, 1, 2, 3, 3, 3])):
            expected = stock(input_ids=rows).logits[0]
    assert_close_in_norm(torch.stack(found), expected[4:], FLOAT32)


def test_the_loss_is_that_of_transformers():
    model, rows = make_model(100, 0, 32, 4).eval(), torch.randint(100, (2, 9))
    torch.testing.assert_close(NextTokenLoss(model)(rows), model(input_ids=rows, labels=rows).loss)
    assert isinstance(model, Phi3ForCausalLM)


GENERATED = [pytest.mark.slow, pytest.mark.skipif(not can_compile(), reason="compiling takes a C++ compiler")]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=GENERATED)])
def test_the_compiled_loss_is_the_same_whatever_is_reused(backend, monkeypatch):
    """Of traced code, which must not keep what was reused before; slowly, of generated code too."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    def make(compiled):
        model = make_model(100, 0, 32, 4)
        torch.manual_seed(0)
        with torch.no_grad():
            for value in model.parameters():
                value.normal_(std=0.2)
        return Reuse(model), NextTokenLoss(model, compiled)

    (reuse, loss), (of_compiled, compiled_loss) = make(False), make(True)
    rows, found = torch.randint(100, (4, 32)), []
    for period, start in ((3, 0), (5, 1), (7, 3)):
        index = anchors(32, period, start)
        with reuse.of(2, index), of_compiled.of(2, index):
            expected, same = loss(rows), compiled_loss(rows)
        torch.testing.assert_close(same, expected, rtol=1e-5, atol=1e-5)
        found.append(round(expected.item(), 4))
    assert len({*found, round(loss(rows).item(), 4)}) == 4  # each of them, and none, is something else


# --- prompts and judging ---------------------------------------------------------------------------------------------


def test_prefixes_end_where_a_function_begins_to_do_something():
    text = "@x.y\ndef f(a):\n    '''Doc.'''\n    b = a\n    c = b\n    return c\n\ndef short():\n    return 1\n"
    assert list(function_prefixes(text)) == ["@x.y\ndef f(a):\n    '''Doc.'''"]


def test_prompts_are_of_the_length_and_of_all_files_in_turn(tokenizer):
    texts = [" ".join(f"The word {number} of {place} ends." for place in range(60)) for number in range(4)]
    files = [Document("prose", f"book/{number}", text) for number, text in enumerate(texts)]
    found = draw_prompts(files, tokenizer, "prose", 8)
    assert found == draw_prompts(files, tokenizer, "prose", 8)
    assert len({item["prompt"] for item in found}) == len(found)
    assert all(50 <= len(tokenizer(item["prompt"]).input_ids) <= 120 for item in found)
    assert draw_prompts(files, tokenizer, "code", 8) == []


@pytest.mark.parametrize(
    "completion, statements, valid",
    [
        ("\n    return [2 * value for value in values]\n", 1, True),
        ("\n    found = []\n    for value in values:\n        found.append(2 * value)\n    return found\n", 4, True),
        ("\n    found = []\n    for value in val", 1, True),  # broken off in its last line
        ("\n    found = []\n    for value in values:\n", 1, True),  # broken off before a block's body
        ("\n    try:\n        a = 1\n", 0, False),  # nothing is complete
        ("\n    found = [\n        1,\n        2", 0, False),
        ("\n    found = []\n    return return\n    more = 1\n", 1, False),
        ("\n    # only a comment\n", 0, False),
        ("\n    'unclosed\n", 0, False),
        ("\n\n\n\n", 0, False),
        ("", 0, False),
        ("\n  wrong = 1\n", 0, False),
        ("\n    a = 1\n   b = 2\n", 1, False),
        ("\n\nx = 1\n", 1, True),  # a statement after the function
        (".strip()\n    return 1\n", 1, True),
        (".strip()\n", 0, False),
    ],
)
def test_completions_are_judged(completion, statements, valid):
    judged = judge(HEAD, completion)
    assert (judged.statements, judged.is_valid_throughout) == (statements, valid)


def test_the_last_line_counts_only_where_the_model_ended_it():
    assert judge(HEAD, "\n    return values").statements == 0
    assert judge(HEAD, "\n    return values", is_ended=True).statements == 1
    with pytest.raises(ValueError, match="line's end"):
        judge("def f():\n", " pass")


def test_words():
    assert words_of("The cat's -- 12 blorgs, bro") == ["the", "cat's", "blorgs"]
    assert words_of("The end", is_ended=True) == ["the", "end"]
    assert share_of_words(["the", "cat's", "blorgs"], frozenset({"the", "cat"})) == pytest.approx(2 / 3)


def test_the_trigram_control_is_a_distribution():
    rng = np.random.default_rng(0)
    stream = rng.integers(6, size=300)
    for order in (1, 2, 3):
        model = NGrams(stream, 6, order)
        for history in ([1, 2], [5, 5], [0, 3]):
            total = sum(model.probabilities(np.array([*history, token]))[-1] for token in range(6))
            assert total == pytest.approx(1)
    assert np.log(NGrams(np.tile([0, 1, 2], 99), 6).probabilities(np.array([0, 1, 2, 0, 1]))[2:]).min() > -0.1
    assert NGrams(np.tile([0, 1, 2], 99), 6).continue_text([0, 1], 4, rng) == [2, 0, 1, 2]
