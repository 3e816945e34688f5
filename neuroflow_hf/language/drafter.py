"""
A trained drafter: one decoder layer that reads the model's final hidden state and the next token, and drafts the token
after that.

It predicts the model's next final state, so that it continues from its own output while it drafts. Embeddings and head
are the model's, the head's rows those of the most frequent tokens. What it drafts, the model verifies.
"""

import os
from collections.abc import Sequence
from typing import cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import (
    Phi3DecoderLayer,
    Phi3PreTrainedModel,
    Phi3RMSNorm,
    Phi3RotaryEmbedding,
)

from .few_tokens import linear_layers, turned

ADDED = 0.03  # what the layer adds at first: a model's last hidden states are much longer than what `fuse` returns
COMPARED = ("hidden_size", "vocab_size", "num_hidden_layers")  # of the model that a drafter was trained for


@strict
class NeuroFlowDrafterConfig(Phi3Config):
    r"""
    Configuration of a [`NeuroFlowDrafter`]: the fields of [`~transformers.Phi3Config`] describe its layer, and

    Args:
        drafts_for (`dict`, *optional*):
            The model that it was trained for: `name`, `weights` (a fingerprint), `hidden_size`, `vocab_size` and
            `num_hidden_layers`.
        head_size (`int`, defaults to 4096): number of tokens that it can draft.
    """

    model_type = "neuroflow_drafter"

    drafts_for: dict | None = None
    head_size: int = 4096


class NeuroFlowDrafter(Phi3PreTrainedModel):
    """
    One decoder layer between a model's final states and its head.

    Example:

    ```python
    drafter = NeuroFlowDrafter.from_pretrained("path/to/drafter")
    model.generate(**inputs, lossless={"drafter": drafter})  # or "path/to/drafter"
    ```
    """

    config: NeuroFlowDrafterConfig
    config_class = NeuroFlowDrafterConfig
    base_model_prefix = ""
    head_tokens: torch.Tensor  # int64 [K], the tokens that it can draft

    def __init__(self, config: NeuroFlowDrafterConfig):
        super().__init__(config)
        self.fuse = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = Phi3DecoderLayer(config, 0)
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Phi3RotaryEmbedding(config)
        self.register_buffer("head_tokens", torch.zeros(config.head_size, dtype=torch.int64))
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as for the model."""
        return False

    @classmethod
    def for_model(
        cls, model: Phi3ForCausalLM, head_tokens: Sequence[int], name: str, weights: str, intermediate_size: int
    ) -> "NeuroFlowDrafter":
        """
        An untrained drafter for a model, begun with the weights of its last layer.

        Args:
            model: the model that verifies.
            head_tokens: the tokens that it can draft.
            name, weights: the model's name and fingerprint, for the configuration.
            intermediate_size: width of its MLP, which begins with the model's first channels; at most the model's.
        """
        intermediate_size = min(intermediate_size, model.config.intermediate_size)
        own = {name: value for name, value in model.config.to_dict().items() if name in Phi3Config().to_dict()}
        own |= {"num_hidden_layers": 1, "intermediate_size": intermediate_size, "sliding_window": None}
        own |= {"model_type": cls.config_class.model_type, "architectures": None, "dtype": None}
        about = {"name": name, "weights": weights} | {field: getattr(model.config, field) for field in COMPARED}
        drafter = cls(NeuroFlowDrafterConfig(**own, head_size=len(head_tokens), drafts_for=about))
        last = {name: value.clone() for name, value in model.model.layers[-1].state_dict().items()}
        gate, up = last["mlp.gate_up_proj.weight"].chunk(2)
        last["mlp.gate_up_proj.weight"] = torch.cat([gate[:intermediate_size], up[:intermediate_size]])
        last["mlp.down_proj.weight"] = last["mlp.down_proj.weight"][:, :intermediate_size]
        drafter.layer.load_state_dict(last)
        with torch.no_grad():
            drafter.norm.weight.copy_(model.model.norm.weight)
            gain = model.model.norm.weight
            undone = torch.where(gain.abs() > 0.1, 1 / gain, 0.0)  # a final state before the norm, but for its length
            embedded = model.model.embed_tokens.weight.square().mean().sqrt()
            eye = torch.eye(model.config.hidden_size)
            drafter.fuse.weight.copy_(torch.cat([torch.diag(undone), 0.5 / embedded * eye], dim=1))
            for added in (drafter.layer.self_attn.o_proj, drafter.layer.mlp.down_proj):
                added.weight.mul_(ADDED)
            drafter.head_tokens.copy_(torch.tensor(head_tokens))
        return drafter.eval()

    def forward(
        self,
        states: torch.Tensor,
        embeddings: torch.Tensor,
        cache: DynamicCache,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Predict the model's final states.

        Args:
            states: [B, n, D], the model's final states, or this drafter's own predictions.
            embeddings: [B, n, D], of the token after each.
            cache: the keys and values before them, to which theirs are added.
            positions: [1, n]; default: those that follow the cache's.
            mask: bool [1, 1, n, cached + n], what each position sees; default: all before it, and itself.

        Returns:
            [B, n, D], the predicted states at these tokens.
        """
        length, before = states.shape[1], cache.get_seq_length()
        if positions is None:
            positions = torch.arange(before, before + length, device=states.device).unsqueeze(0)
        if mask is None and length > 1:
            mask = torch.ones(length, before + length, dtype=torch.bool, device=states.device).tril(before)[None, None]
        hidden = self.fuse(torch.cat([states, embeddings], dim=-1))
        hidden = self.layer(
            hidden,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self.rotary_emb(hidden, positions),
        )
        return self.norm(hidden)

    def require_fit(self, model: Phi3ForCausalLM) -> None:
        """Raise a ValueError if this drafter was trained for a model of another shape."""
        about = self.config.drafts_for or {}
        for field in COMPARED:
            asked, found = about.get(field), getattr(model.config, field)
            if asked != found:
                raise ValueError(
                    f"The drafter was trained for {about.get('name')!r} with a `{field}` of {asked}, and the model "
                    f"has {found}. Train one for this model with `neuroflow tune-drafts`, or draft by lookup."
                )


def load_drafter(source: object, model: Phi3ForCausalLM) -> NeuroFlowDrafter:
    """
    The drafter that an option names, for a model.

    Args:
        source: a [`NeuroFlowDrafter`], or the folder of one.
        model: the model that verifies.

    Raises:
        ValueError: if there is no such folder, or the drafter was trained for another model.
    """
    if not isinstance(source, str | os.PathLike):
        drafter = cast(NeuroFlowDrafter, source)
    else:
        loaded = vars(model).setdefault("_drafters", {})  # by folder: a generation takes seconds, and so does loading
        drafter = loaded.get(str(source))
        if drafter is None:
            if not os.path.isfile(os.path.join(source, "config.json")):
                raise ValueError(
                    f"Lossless option `drafter` is {str(source)!r}; expected 'lookup', 'bypass', 'none', a "
                    "`NeuroFlowDrafter`, or the folder of one, such as `neuroflow tune-drafts` writes."
                )
            drafter = loaded[str(source)] = NeuroFlowDrafter.from_pretrained(source, dtype=model.dtype)
    drafter.require_fit(model)
    return drafter.eval().to(device=model.device, dtype=model.dtype)


class DrafterState:
    """
    A drafter's side of one generation.

    Args:
        drafter: a [`NeuroFlowDrafter`].
        model: the model that verifies.
    """

    def __init__(self, drafter: NeuroFlowDrafter, model: Phi3ForCausalLM):
        self.drafter = drafter
        self.embed_tokens = model.get_input_embeddings()
        self.vocabulary = model.config.vocab_size
        self.head = cast(torch.Tensor, model.lm_head.weight)[drafter.head_tokens]  # [K, D]
        self.cache = DynamicCache()  # of the pairs of a state and the token after it
        self.unread: list[torch.Tensor] = []  # [n, D], states of the model that are not in the cache yet
        self.predicted: torch.Tensor | None = None  # [1, 1, D], while drafting
        self.linear_layers = linear_layers(drafter)

    def logits_after(self, tokens: list[int]) -> torch.Tensor:
        """
        The logits [1, V] of the token that follows the last of `tokens`, -inf for those that the head lacks: from the
        states that are not read yet, or else from the state that was predicted last.
        """
        if self.predicted is None:
            states = torch.cat(self.unread)[-len(tokens) :].unsqueeze(0)  # virtual tokens of a prompt are no tokens
            self.unread = []
        else:
            states = self.predicted
        count = states.shape[1]
        ids = torch.tensor([tokens[-count:]], device=states.device)
        with turned(self.linear_layers, count):
            self.predicted = self.drafter(states, self.embed_tokens(ids), self.cache)[:, -1:]
        logits = self.predicted.new_full((1, self.vocabulary), -torch.inf)
        logits[:, self.drafter.head_tokens] = self.predicted[0] @ self.head.T
        return logits

    def take_back(self, count: int) -> None:
        """Remove what was fed of a draft of `count` tokens: all pairs but those with a state of the model."""
        if count > 1:
            self.cache.crop(1 - count)
        self.predicted = None
