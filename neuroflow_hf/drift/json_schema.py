"""Generate JSON of a schema, and find the tokens that the schema forces. Needs `llguidance`."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as `json.dumps` writes


def grammar_tokens(tokenizer: Any, vocabulary: int) -> Any:
    """
    A fast tokenizer with an end token in the form that [`JsonGrammar`] needs, for a model with logits for `vocabulary`
    tokens. Takes seconds. ImportError without `llguidance`.
    """
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ImportError('JSON schemas need llguidance: pip install "neuroflow-hf[json]"') from error
    return from_tokenizer(tokenizer, n_vocab=vocabulary)


class JsonGrammar:
    """
    The texts that are JSON of a schema, token by token; `tokens` are of `grammar_tokens`.

    Raises:
        ValueError: for a schema that is no object, or uses what `llguidance` does not support.
    """

    def __init__(self, schema: dict, tokens: Any):
        from llguidance import LLMatcher

        shown = json.dumps(schema)[:200]
        if not isinstance(schema, dict):
            raise ValueError(f'The schema is {shown}; expected an object such as {{"type": "object"}}.')
        self.tokens = tokens
        self.matcher = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(schema, overrides=SPACING))
        if self.matcher.is_error():
            raise ValueError(f"The schema {shown} cannot be used: {self.matcher.get_error().splitlines()[0]}.")

    def advance(self, token: int):
        """Add a token; ValueError for one that is not allowed. Tokens after the end are padding."""
        if not self.matcher.is_stopped() and not self.matcher.consume_token(token):
            raise ValueError(f"Token {token} does not continue JSON of the schema.")

    def forced(self, tokens: Sequence[int]) -> list[bool]:
        """For each token of a text, whether the schema allows no other text at its place."""
        self.matcher.reset()
        found = []
        for token in tokens:
            text = self.tokens.decode_bytes([token])
            found.append(bool(text) and self.matcher.compute_ff_bytes().startswith(text))
            self.advance(token)
        return found


class JsonSchemaProcessor(LogitsProcessor):
    """
    Leaves only tokens that continue JSON of a schema.

        tokens = grammar_tokens(tokenizer, model.config.vocab_size)
        grammar = JsonGrammar({"type": "object", "properties": {"age": {"type": "integer"}}}, tokens)
        model.generate(**inputs, logits_processor=[JsonSchemaProcessor([grammar])], lossless=True)

    Make one for each generation. It keeps the state of its grammars and expects a call for every new token in order,
    as greedy and lossless generation do; beams are not supported. `grammars` has one for each row of the batch.
    """

    def __init__(self, grammars: Sequence[JsonGrammar]):
        self.grammars = grammars
        self.has_begun = False
        for grammar in grammars:
            grammar.matcher.reset()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [B, V] with minus infinity for tokens that may not come after `input_ids` [B, T]."""
        if len(input_ids) != len(self.grammars):
            raise ValueError(f"There are {len(self.grammars)} grammars for {len(input_ids)} rows; give one for each.")
        if self.has_begun:
            for grammar, token in zip(self.grammars, input_ids[:, -1].tolist(), strict=True):
                grammar.advance(token)
        self.has_begun = True
        biases = [bytearray(grammar.matcher.compute_logit_bias()) for grammar in self.grammars]  # 0: not allowed
        refused = torch.stack([torch.frombuffer(bias, dtype=torch.uint8) == 0 for bias in biases])
        return scores.masked_fill(refused.to(scores.device), -torch.inf)
