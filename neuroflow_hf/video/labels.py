"""
Zero-shot labels: texts through a SigLIP model's text tower, and how well the embeddings of frames fit them.

    model, preprocess, tokenizer = load_text_model("path/to/siglip")
    labels = embed_labels(model, tokenizer, ["a dog", "a cat"])
    output = model.get_image_features(preprocess(image), stream=stream)
    labels.scores(output.pooler_output)  # [B, 2]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipModel

TEMPLATE = "This is a photo of {}."  # what transformers' zero-shot pipeline says


@dataclass(frozen=True, eq=False)
class Labels:
    """
    L labels as a model's text tower sees them, to be compared with embeddings of its vision tower.

    A label's *score* is SigLIP's own probability of it, `sigmoid(logit)`: each label stands for itself, so all are low
    where none fits, and naming another one changes nothing. It is what transformers' zero-shot pipeline gives, and
    what is shown as confidence. A label's *share* is its part among the labels, `softmax(logits)`: always 1 in all,
    whether one fits or not. Both order the labels alike.

    Args:
        names: the labels as they were given.
        template: what the text tower read, with `{}` where the label stands.
        text_embeddings: float32 [L, D], of length 1.
        logit_scale, logit_bias: `logit = logit_scale * cos + logit_bias`; the scale is the factor, not its logarithm.
    """

    names: tuple[str, ...]
    template: str
    text_embeddings: Tensor
    logit_scale: float
    logit_bias: float

    def logits(self, embeddings: Tensor) -> Tensor:
        """Embeddings of frames [..., D] to float32 [..., L]: `SiglipModel`'s `logits_per_image`."""
        texts = self.text_embeddings.to(embeddings.device)
        return functional.normalize(embeddings.float(), dim=-1) @ texts.T * self.logit_scale + self.logit_bias

    def scores(self, embeddings: Tensor) -> Tensor:
        """Embeddings of frames [..., D] to the probability of each label by itself, float32 [..., L]."""
        return self.logits(embeddings).sigmoid()

    def shares(self, embeddings: Tensor) -> Tensor:
        """Embeddings of frames [..., D] to the labels' shares among each other, float32 [..., L]; their sum is 1."""
        return self.logits(embeddings).softmax(dim=-1)

    def best(self, embedding: Tensor) -> tuple[str, float]:
        """The label that fits a frame's embedding [D] best, and its score."""
        logits = self.logits(embedding)
        place = int(logits.argmax())
        return self.names[place], logits[place].sigmoid().item()


def parse_labels(text: str) -> list[str]:
    """`"a dog, a cat"` to `["a dog", "a cat"]`."""
    return [name.strip() for name in text.split(",")]


def check_labels(names: Sequence[str], template: str = TEMPLATE):
    """Raise a ValueError for no labels, empty ones, one that is there twice, and a template without a place for it."""
    if not names:
        raise ValueError("There are no labels; expected at least one, such as `a dog`.")
    for place, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"Label {place + 1} of {len(names)} is empty; expected a text, such as `a dog`.")
        if name in names[:place]:
            raise ValueError(f"The label {name!r} is there twice; name each one once.")
    if template.count("{}") != 1:
        raise ValueError(f"The template is {template!r}; expected a text with one {{}} for the label: {TEMPLATE!r}.")


@torch.no_grad()
def embed_labels(
    model: NeuroFlowSiglipModel, tokenizer: Any, names: Sequence[str], template: str = TEMPLATE
) -> Labels:
    """
    Labels through the model's text tower.

    Args:
        model: with its text tower, in evaluation mode.
        tokenizer: the model's own.
        names: labels, such as `"a dog"`; they go into the template as they are.
        template: the text around a label, with `{}` where it stands; `"{}"` for texts that are whole.

    Raises:
        ValueError: as in `check_labels`, and for labels that are too long for the text tower or the same to it.
    """
    names = tuple(names)
    check_labels(names, template)
    tokens = tokenize(tokenizer, [template.replace("{}", name) for name in names], model.config.text_config)
    require_different(names, tokens["input_ids"])
    features = model.text_model(**{name: values.to(model.device) for name, values in tokens.items()})
    return Labels(
        names=names,
        template=template,
        text_embeddings=functional.normalize(features.pooler_output.float(), dim=-1).cpu(),
        logit_scale=model.logit_scale.float().exp().item(),
        logit_bias=model.logit_bias.float().item(),
    )


def needs_lower_case(tokenizer: Any) -> bool:
    """
    Whether texts have to be lower-cased for this tokenizer. SigLIP 2 was trained on lower-case text, and the Gemma
    tokenizer that its checkpoints come with keeps capitals; SigLIP 1's tokenizer lower-cases by itself.
    """
    return any(
        "gemma" in kind.__name__.lower() or "siglip2" in kind.__name__.lower() for kind in type(tokenizer).mro()
    )


def tokenize(tokenizer: Any, texts: Sequence[str], text_config: Any) -> dict[str, Tensor]:
    """
    `input_ids` int64 [L, P] of the texts, all padded to the P positions of the text tower, as SigLIP was trained. Its
    tokenizers give no attention mask; one that does is taken at its word, as transformers' pipeline takes it.

    Raises:
        ValueError: for a text of more than P tokens, of which the rest would not be seen; for a tokenizer that cannot
            pad, or has tokens that the text tower does not know.
    """
    length = text_config.max_position_embeddings
    if needs_lower_case(tokenizer):
        texts = [text.lower() for text in texts]
    encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=False)
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        if len(ids) > length:
            raise ValueError(f"{text!r} has {len(ids)} tokens, and the text tower reads {length}; shorten the label.")
        if max(ids) >= text_config.vocab_size:
            raise ValueError(
                f"The tokenizer gives token {max(ids)}, and the text tower knows {text_config.vocab_size}: it is "
                "another model's. Save the model's own beside it."
            )
    return {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask") if name in encoded}


def require_different(names: Sequence[str], input_ids: Tensor):
    """Raise a ValueError if two labels have the same tokens [L, P]: by upper case or signs that are not read."""
    seen: dict[tuple[int, ...], str] = {}
    for name, ids in zip(names, input_ids.tolist(), strict=True):
        other = seen.setdefault(tuple(ids), name)
        if other != name:
            raise ValueError(f"{other!r} and {name!r} are the same to this model's tokenizer; keep one of them.")
