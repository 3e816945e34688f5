"""
Token drift: how far the text of a changed language model is from that of the model unchanged.

    metric = evaluate.load("eval/metrics/token_drift")             # sequences of tokens
    metric = evaluate.load("eval/metrics/token_drift", "logits")   # logits, step by step

The figures are those of `neuroflow drift`, by the same functions; README.md beside this file documents them.
"""

import datasets
import evaluate
import torch

from neuroflow_hf.drift.metrics import PromptRecord, compare_steps, first_divergence, position_drift, summarise
from neuroflow_hf.language.calibration import cut_at_end

DESCRIPTION = """
Token drift compares what a language model generates under a change that should be harmless (layers bypassed, another
precision, a compressed cache) with what it generates without: position by position, where it first differs, under
teacher forcing, and by KL divergence; each with an interval over sequences.
"""
INPUTS = """
Args:
    predictions, references: token ids that the changed and the unchanged model generated, a sequence for each prompt;
        configuration "logits": their logits, [steps, vocabulary] for each prompt, after the same tokens.
    eos_token_id: id, or ids, that end a sequence; what follows is left out.
    samples, seed: of the bootstrap behind the 95 % intervals; 2000 and 0.
Returns:
    A dict, whose entries README.md names.
Example:
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/token_drift")
    >>> metric.compute(predictions=[[5, 6, 7]], references=[[5, 6, 8]])["first_divergence_min"]
    2
"""
CITATION = """
@misc{schmitt2026neuroflow,
  author = {Schmitt, Y.},
  title = {EMA-Gated Temporal Sequence Compression in Vision Transformers},
  year = {2026},
  doi = {10.5281/zenodo.19337577}
}
"""


class TokenDrift(evaluate.Metric):
    """The metric; `evaluate.load` makes one."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "tokens", "logits"):
            raise ValueError(f"The configuration is {self.config_name!r}; expected 'tokens' or 'logits'.")
        row = datasets.Sequence(datasets.Value("int64"))
        if self.config_name == "logits":
            row = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references, samples=2000, seed=0, eos_token_id=None) -> dict:
        pairs = enumerate(zip(predictions, references, strict=True))
        if self.config_name == "logits":
            figures = summarise([step_record(place, *pair) for place, pair in pairs], samples=samples, seed=seed)
            return {
                "other_top1": figures["forced_divergent"],
                "other_top1_interval": figures["forced_interval"],
                "kl_mean": figures["kl"]["mean"],
                "kl_mean_interval": figures["kl"]["interval"],
                "kl_p99": figures["kl"]["p99"],
                "steps": figures["forced_steps"],
                "sequences": figures["prompts"],
            }
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        records = []
        for _, pair in pairs:
            other, dense = (cut_at_end(tokens, ends) for tokens in pair)
            records.append(PromptRecord("", position_drift(dense, other), first_divergence(dense, other)))
        figures = summarise(records, samples=samples, seed=seed)
        return {
            "drift": figures["drift"],
            "drift_interval": figures["drift_interval"],
            "diverged": figures["diverged_prompts"] / figures["prompts"] if figures["prompts"] else None,
            "diverged_bound": figures["diverged_bound"],
            "first_divergence_min": figures["first_divergence"]["min"],
            "first_divergence_median": figures["first_divergence"]["median"],
            "sequences": figures["prompts"],
        }


def step_record(place: int, prediction, reference) -> PromptRecord:
    """What the logits of one prompt say; ValueError, naming the prompt, if they have not equally many steps."""
    if len(prediction) != len(reference):
        raise ValueError(
            f"Prompt {place} has {len(prediction)} `predictions` and {len(reference)} `references`; expected as many."
        )
    if not len(reference):
        return PromptRecord("")
    differs, kl = compare_steps(torch.tensor(reference), torch.tensor(prediction))
    return PromptRecord("", forced_steps=len(reference), forced_divergent=int(differs.sum()), kl=kl.tolist())
