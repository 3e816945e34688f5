"""JSON under a schema: what may come, what is forced, and lossless generation with a grammar that keeps state."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from eval.language.json_drift import compare, leaves, read_cases, value_drift
from neuroflow_hf.drift.json_schema import JsonGrammar, JsonSchemaProcessor, grammar_tokens
from tests.phi3_models import make_ours, random_ids

END = "<end>"
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 99}, "kind": {"enum": ["cat", "cow"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte, one for "ca", and an end token."""
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ca"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("c", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    pytest.importorskip("llguidance")
    return grammar_tokens(tokenizer, len(tokenizer))


def test_what_the_schema_forces(tokenizer, tokens):
    text = '{"age": 12, "kind": "cat"}'
    forced = JsonGrammar(SCHEMA, tokens).forced(tokenizer(text)["input_ids"])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    free = [piece for piece, is_forced in zip(pieces, forced, strict=True) if not is_forced]
    assert free == ["1", "2", "ca"]  # after two digits comes the comma, and after "ca" the "t"
    with pytest.raises(ValueError, match="does not continue"):
        JsonGrammar(SCHEMA, tokens).forced(tokenizer('{"age": 0}')["input_ids"])


@pytest.mark.parametrize("lossless", [None, {"drafter": "lookup"}, {"drafter": "bypass"}])
def test_generated_text_is_json_of_the_schema(tokenizer, tokens, lossless):
    """In a batch, and losslessly, where drafts are taken back but the grammar sees kept tokens only."""
    model = make_ours(vocab_size=len(tokenizer))
    ids = random_ids(1 if lossless else 3, 5)
    grammars = [JsonGrammar(SCHEMA, tokens) for _ in ids]
    how = {"max_new_tokens": 60, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    dense, output = (
        model.generate(ids, logits_processor=LogitsProcessorList([JsonSchemaProcessor(grammars)]), **how, **more)
        for more in ({}, {} if lossless is None else {"lossless": lossless})
    )
    assert torch.equal(output, dense)
    for row in output[:, ids.shape[1] :]:
        found = json.loads(tokenizer.decode(row, skip_special_tokens=True))
        assert 1 <= found["age"] <= 99 and found["kind"] in ("cat", "cow")


def test_one_grammar_for_each_row(tokens):
    processor = JsonSchemaProcessor([JsonGrammar(SCHEMA, tokens)])
    with pytest.raises(ValueError, match="1 grammars for 2 rows"):
        processor(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 258))


@pytest.mark.parametrize(
    ("schema", "words"), [({"type": "objekt"}, "objekt"), ([1], r"is \[1\]"), ({"$ref": "#/gone"}, "gone")]
)
def test_a_schema_that_is_none(tokens, schema, words):
    with pytest.raises(ValueError, match=words):
        JsonGrammar(schema, tokens)


def test_another_tokenisation_of_the_same_text_is_no_drift(tokenizer, tokens):
    text = '{"age": 1, "kind": "cat"}'
    apart = [tokenizer.convert_tokens_to_ids(letter) for letter in text.replace(" ", "\u0120")]
    dense, other = {"text": text, "tokens": apart}, {"text": text, "tokens": tokenizer(text)["input_ids"]}
    found = compare(dense, other, JsonGrammar(SCHEMA, tokens), tokenizer)
    assert found["drift"] == found["free_drift"] == found["value_drift"] == 0
    changed = text.replace("cat", "cow")
    found = compare(dense, {"text": changed, "tokens": []}, JsonGrammar(SCHEMA, tokens), tokenizer)
    # free: "1", ",", "ca" densely; "1", ",", "o" in the other
    assert found["free_drift"] == pytest.approx(1 / 3) and found["value_drift"] == 0.5 and found["valid"]
    found = compare(dense, {"text": text[:-3], "tokens": []}, JsonGrammar(SCHEMA, tokens), tokenizer)
    assert found["value_drift"] is None and not found["valid"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "a"}, "line 2: `schema` is missing"),
        ({"prompt": "", "schema": SCHEMA}, "line 2: `prompt` is ''"),
        ({"prompt": "a", "schema": {"type": 3}}, "line 2: The schema"),
    ],
)
def test_bad_lines_are_named(tokenizer, tokens, tmp_path, line, words):
    path = tmp_path / "json.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "a cat", "schema": SCHEMA}, line])))
    with pytest.raises(ValueError, match=words):
        read_cases(path, tokenizer, tokens)


def test_drift_of_values():
    dense = {"name": "cup", "parts": [1, {"size": None}], "none": []}
    assert leaves(dense) == {("name",): "cup", ("parts", 0): 1, ("parts", 1, "size"): None, ("none",): []}
    assert value_drift(dense, dense) == 0
    assert value_drift(dense, dense | {"name": "mug"}) == 0.25
    assert value_drift(dense, {"name": "cup", "parts": [1], "none": []}) == 0.25  # a null is not a missing value
    assert value_drift({}, {"name": 1}) == 1
