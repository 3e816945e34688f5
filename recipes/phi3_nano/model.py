"""The model: a small Phi-3, and what is done to it so that drafts with bypassed layers are good."""

import functools
from contextlib import contextmanager

import torch
from transformers import Phi3Config, Phi3ForCausalLM

CONTEXT = 512


def model_config(vocabulary: int, width: int = 128, layers: int = 12) -> Phi3Config:
    """A Phi-3 with one key and value per head of 32 features and embeddings that are the head's too."""
    return Phi3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        sliding_window=None,
        lossless={"bypass": {"cache_layers": list(drafting_layers(layers))}},
    )


def make_model(vocabulary: int, seed: int, width: int = 128, layers: int = 12) -> Phi3ForCausalLM:
    """The untrained model, the same for the same seed; the last matrix of every part begins small."""
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(model_config(vocabulary, width, layers))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * layers) ** -0.5)
    return model


def drafting_layers(layers: int) -> range:
    """The layers that a draft bypasses: all after the first quarter but the last; the configuration says so."""
    return range(layers // 4, layers - 1)


def anchors(length: int, period: int, start: int) -> torch.Tensor:
    """
    For every position, the one whose outputs are reused there, int64 [length]: the last one that was computed, if one
    in `period` is, beginning with `start`; the positions before that are all computed.
    """
    positions = torch.arange(length)
    return torch.where(positions < start, positions, positions - (positions - start) % period)


class Reuse:
    """
    Makes a model's drafting layers reuse older outputs in some rows of a batch, as they do when they are bypassed:
    attention and MLP outputs [B, T, D] become those of an earlier position; keys and values stay each position's own.

    Args:
        model: the model; the forward of each part of its drafting layers is replaced. (Not by hooks: compiled layers
            pass over those of their parts.)
    """

    def __init__(self, model: Phi3ForCausalLM):
        self.rows, self.index = 0, None
        for layer in drafting_layers(len(model.model.layers)):
            for part in (model.model.layers[layer].self_attn, model.model.layers[layer].mlp):
                part.forward = functools.partial(self.forward, part.forward)

    @contextmanager
    def of(self, rows: int, index: torch.Tensor):
        """Within, the last `rows` rows of a batch take what position `index[t]` gave at every position t."""
        self.rows, self.index = rows, index
        try:
            yield
        finally:
            self.rows, self.index = 0, None

    def forward(self, compute, *args, **kwargs):
        """A part's output, replaced where it is to be."""
        output = compute(*args, **kwargs)
        if not self.rows:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        kept = len(hidden) - self.rows
        mixed = torch.cat([hidden[:kept], hidden[kept:, self.index]])
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed
