"""
Zero-shot labels: embedded by a SigLIP model's text tower, and compared with embeddings of frames.

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

TEMPLATE = "This is a photo of {}."  # as in transformers' zero-shot pipeline


@dataclass(frozen=True, eq=False)
class Labels:
    """
    L labels, embedded by a model's text tower.

    A label's *score* is SigLIP's probability, `sigmoid(logit)`, as in transformers' zero-shot pipeline; runs show it
    as confidence. It does not depend on the other labels; if no label fits, all scores are low. A label's *share* is
    its part of `softmax(logits)`; shares add up to 1 even if no label fits. Both rank the labels alike.
    """

    names: tuple[str, ...]  # the labels as given
    template: str  # the text around a label, with `{}` for the label
    text_embeddings: Tensor  # float32 [L, D], of length 1
    # logit_scale, logit_bias: `logit = logit_scale * cos + logit_bias`; the scale is a factor, not its logarithm
    logit_scale: float
    logit_bias: float

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits, float32 [..., L], of embeddings [..., D], equal to `logits_per_image` of `SiglipModel`."""
        texts = self.text_embeddings.to(embeddings.device)
        return functional.normalize(embeddings.float(), dim=-1) @ texts.T * self.logit_scale + self.logit_bias

    def scores(self, embeddings: Tensor) -> Tensor:
        """Scores, float32 [..., L], of embeddings [..., D]."""
        return self.logits(embeddings).sigmoid()

    def best(self, embedding: Tensor) -> tuple[str, float]:
        """The best label for an embedding [D], and its score."""
        logits = self.logits(embedding)
        place = int(logits.argmax())
        return self.names[place], logits[place].sigmoid().item()


def parse_labels(text: str) -> list[str]:
    """`"a dog, a cat"` to `["a dog", "a cat"]`."""
    return [name.strip() for name in text.split(",")]


def check_labels(names: Sequence[str], template: str = TEMPLATE):
    """Raise a ValueError for missing, empty or repeated labels, and for a template without one `{}`."""
    if not names:
        raise ValueError("There are no labels; expected at least one, such as `a dog`.")
    for place, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"Label {place + 1} of {len(names)} is empty; expected a text, such as `a dog`.")
        if name in names[:place]:
            raise ValueError(f"The label {name!r} is given twice; give each label once.")
    if template.count("{}") != 1:
        raise ValueError(f"The template is {template!r}; expected a text with one {{}} for the label: {TEMPLATE!r}.")


@torch.no_grad()
def embed_labels(
    model: NeuroFlowSiglipModel, tokenizer: Any, names: Sequence[str], template: str = TEMPLATE
) -> Labels:
    """
    Embed labels with the model's text tower.

    Args:
        model: with its text tower, in evaluation mode.
        tokenizer: the model's own.
        names: labels, such as `"a dog"`.
        template: the text around a label, with `{}` for the label; `"{}"` if the labels are whole texts.

    Raises:
        ValueError: as in `check_labels`, and for labels that are too long or have the same tokens.
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
    Whether texts must be lower-cased before this tokenizer. SigLIP 2 was trained on lower-case text, but its
    tokenizer, Gemma's, keeps capitals; SigLIP 1's tokenizer lower-cases.
    """
    names = [kind.__name__.lower() for kind in type(tokenizer).mro()]
    return any("gemma" in name or "siglip2" in name for name in names)


def tokenize(tokenizer: Any, texts: Sequence[str], text_config: Any) -> dict[str, Tensor]:
    """
    Tokenize texts as in SigLIP's training.

    Returns:
        `input_ids` int64 [L, P], padded to the P positions of the text tower, and `attention_mask`, if the tokenizer
        gives one (SigLIP's do not).

    Raises:
        ValueError: for a text of more than P tokens, a tokenizer that cannot pad, and tokens beyond the text tower's
            vocabulary.
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
                f"The tokenizer gives token {max(ids)}, and the text tower has {text_config.vocab_size} tokens: the "
                "tokenizer belongs to another model. Save the model's own tokenizer in its folder."
            )
    return {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask") if name in encoded}


def require_different(names: Sequence[str], input_ids: Tensor):
    """Raise a ValueError if two labels have the same tokens [L, P], such as labels that differ in case only."""
    seen: dict[tuple[int, ...], str] = {}
    for name, ids in zip(names, input_ids.tolist(), strict=True):
        other = seen.setdefault(tuple(ids), name)
        if other != name:
            raise ValueError(f"{other!r} and {name!r} are the same to this model's tokenizer; keep one of them.")
