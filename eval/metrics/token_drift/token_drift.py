"""
Token drift: how far the text of a changed language model is from that of the model unchanged.

    metric = evaluate.load("eval/metrics/token_drift")             # sequences of tokens
    metric = evaluate.load("eval/metrics/token_drift", "logits")   # logits, step by step

The figures are those of `neuroflow drift`, by the same functions; README.md beside this file documents them.
"""

import datasets
import evaluate
import torch

from neuroflow_hf.drift.metrics import (
    PromptRecord,
    compare_steps,
    first_divergence,
    negative_log_likelihood,
    position_drift,
    summarise,
)
from neuroflow_hf.language.calibration import cut_at_end

DESCRIPTION = """
Token drift compares what a language model generates under a change that should be harmless (layers bypassed, another
precision, a compressed cache) with what it generates without: position by position, where it first differs, under
teacher forcing, by KL divergence and by perplexity; each with an interval over sequences.
"""
INPUTS = """
Args:
    predictions: configuration "tokens": token ids that the changed model generated, a sequence for each prompt.
        Configuration "logits": its logits at each step, [steps, vocabulary] for each prompt, after it had read what
        the unchanged model had read (teacher forcing).
    references: the same of the unchanged model.
    labels (configuration "logits", optional): the tokens that came after each step, for perplexity.
    bypassed (configuration "logits", optional): 1 for each step at which something was bypassed, else 0.
    similarity (configuration "logits", optional): what the gate compared, at each step.
    eos_token_id (configuration "tokens", for `compute`): id, or ids, that end a sequence; what follows is left out.
    samples, seed (for `compute`): of the bootstrap behind the 95 % intervals; 2000 and 0.
Returns:
    A dict; README.md names its entries. Shares are from 0 (nothing differs) to 1, KL divergence and entropy are in
    nats, at least 0. None where there is nothing to tell by.
Examples:
    >>> metric = evaluate.load("eval/metrics/token_drift")
    >>> result = metric.compute(predictions=[[5, 6, 7, 8], [5, 6]], references=[[5, 6, 9, 8], [5, 6]])
    >>> result["drift"], result["diverged"]
    (0.125, 0.5)
"""
CITATION = """
@misc{schmitt2026neuroflow,
  author = {Schmitt, Y.},
  title = {EMA-Gated Temporal Sequence Compression in Vision Transformers},
  year = {2026},
  doi = {10.5281/zenodo.19337577}
}
"""
OPTIONAL = {"logits": ("labels", "bypassed", "similarity")}


class TokenDrift(evaluate.Metric):
    """The metric; `evaluate.load` makes one."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "tokens", "logits"):
            raise ValueError(f"The configuration is {self.config_name!r}; expected 'tokens' or 'logits'.")
        tokens = datasets.Sequence(datasets.Value("int64"))
        if self.config_name == "logits":
            rows = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
            features = {
                "predictions": rows,
                "references": rows,
                "labels": tokens,
                "bypassed": tokens,
                "similarity": datasets.Sequence(datasets.Value("float32")),
            }
        else:
            features = {"predictions": tokens, "references": tokens}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _with_optional(self, inputs: dict) -> dict:
        """The inputs with an empty sequence, for every prompt, where an optional one is missing."""
        if inputs.get("predictions") is not None:
            for name in OPTIONAL.get(self.config_name, ()):
                if inputs.get(name) is None:
                    inputs[name] = [[]] * len(inputs["predictions"])
        return inputs

    def compute(self, *, predictions=None, references=None, **kwargs):
        """The figures of what was added, and of what is given here; None on all processes but the first."""
        inputs = self._with_optional({"predictions": predictions, "references": references, **kwargs})
        return evaluate.Metric.compute(self, **inputs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add the sequences of some prompts: lists, arrays or tensors."""
        inputs = self._with_optional({"predictions": predictions, "references": references, **kwargs})
        return evaluate.Metric.add_batch(self, **inputs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add the sequence of one prompt."""
        inputs = {"prediction": prediction, "reference": reference, **kwargs}
        for name in OPTIONAL.get(self.config_name, ()):
            inputs.setdefault(name, [])
        return evaluate.Metric.add(self, **inputs)

    def _compute(self, *, predictions, references, samples=2000, seed=0, eos_token_id=None, **optional) -> dict:
        bootstrap = {"samples": samples, "seed": seed}
        if self.config_name == "logits":
            columns = [optional[name] for name in OPTIONAL["logits"]]
            rows = zip(predictions, references, *columns, strict=True)
            return step_figures(summarise([step_record(place, *row) for place, row in enumerate(rows)], **bootstrap))
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        records = [
            text_record(cut_at_end(prediction, ends), cut_at_end(reference, ends))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return text_figures(summarise(records, **bootstrap))


def text_record(prediction: list[int], reference: list[int]) -> PromptRecord:
    """What two sequences of tokens say."""
    return PromptRecord(
        "", drift=position_drift(reference, prediction), first_divergence=first_divergence(reference, prediction)
    )


def text_figures(figures: dict) -> dict:
    """Of the figures, those of sequences of tokens."""
    return {
        "drift": figures["drift"],
        "drift_interval": figures["drift_interval"],
        "diverged": figures["diverged_prompts"] / figures["prompts"] if figures["prompts"] else None,
        "diverged_bound": figures["diverged_bound"],
        "first_divergence_min": figures["first_divergence"]["min"],
        "first_divergence_median": figures["first_divergence"]["median"],
        "sequences": figures["prompts"],
    }


def step_record(place: int, prediction, reference, labels, bypassed, similarity) -> PromptRecord:
    """What the logits of one prompt say; ValueError, naming the prompt, if its parts are not equally long."""
    steps = len(reference)
    lengths = {"predictions": len(prediction)}
    parts = {"labels": labels, "bypassed": bypassed, "similarity": similarity}
    lengths |= {name: len(part) for name, part in parts.items() if len(part)}
    for name, length in lengths.items():
        if length != steps:
            raise ValueError(f"Prompt {place} has {length} `{name}` and {steps} `references`; expected as many.")
    if not steps:
        return PromptRecord("")
    dense, other = torch.tensor(reference), torch.tensor(prediction)
    found = compare_steps(dense, other)
    record = PromptRecord("", forced_steps=steps, forced_divergent=int((~found.same_top1).sum()), kl=found.kl.tolist())
    if len(labels):
        tokens = torch.tensor(labels)
        record.scored_tokens = steps
        record.dense_nll = negative_log_likelihood(dense, tokens).sum().item()
        record.nll = negative_log_likelihood(other, tokens).sum().item()
    if len(bypassed):
        mask = torch.tensor(bypassed).bool()
        record.steps, record.bypassed = steps, int(mask.sum())
        record.entropy_bypassed = found.entropy[mask].tolist()
        record.entropy_computed = found.entropy[~mask].tolist()
    record.similarity = [value for value in similarity if value == value]  # NaN: nothing to compare with
    return record


def step_figures(figures: dict) -> dict:
    """Of the figures, those of steps."""
    perplexity, similarity = figures["perplexity"], figures["similarity"]
    return {
        "other_top1": figures["forced_divergent"],
        "other_top1_interval": figures["forced_interval"],
        "kl_mean": figures["kl"]["mean"],
        "kl_mean_interval": figures["kl"]["interval"],
        "kl_p99": figures["kl"]["p99"],
        "perplexity": perplexity["bypass"],
        "reference_perplexity": perplexity["dense"],
        "delta_perplexity": perplexity["delta"],
        "delta_perplexity_interval": perplexity["interval"],
        "bypass_rate": figures["bypass_rate"],
        **{f"similarity_{name}": value for name, value in similarity.items()},
        "entropy_bypassed": figures["entropy"]["bypassed"],
        "entropy_computed": figures["entropy"]["computed"],
        "steps": figures["forced_steps"],
        "sequences": figures["prompts"],
    }
