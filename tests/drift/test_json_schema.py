"""JSON under a schema: what may come, what is forced, and lossless generation with a grammar that keeps state."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from neuroflow_hf.drift.json_schema import JsonGrammar, JsonSchemaProcessor, grammar_tokens, leaves, value_drift
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
    """A token for each byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([END, *alphabet])}, []))
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
    free = "".join(letter for letter, is_forced in zip(text, forced, strict=True) if not is_forced)
    assert free == "12a"  # after two digits comes the comma, and both kinds begin with "c"
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
        processor(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 257))


@pytest.mark.parametrize(
    ("schema", "words"), [({"type": "objekt"}, "objekt"), ([1], r"is \[1\]"), ({"$ref": "#/gone"}, "gone")]
)
def test_a_schema_that_is_none(tokens, schema, words):
    with pytest.raises(ValueError, match=words):
        JsonGrammar(schema, tokens)


def test_drift_of_values():
    dense = {"name": "cup", "parts": [1, {"size": None}], "none": []}
    assert leaves(dense) == {("name",): "cup", ("parts", 0): 1, ("parts", 1, "size"): None, ("none",): []}
    assert value_drift(dense, dense) == 0
    assert value_drift(dense, dense | {"name": "mug"}) == 0.25
    assert value_drift(dense, {"name": "cup", "parts": [1], "none": []}) == 0.25  # a null is not a missing value
    assert value_drift({}, {"name": 1}) == 1
