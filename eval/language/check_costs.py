"""
What a verification of several tokens costs in dense steps, by the products of `language/few_tokens.py` or others.

    python -m eval.language.check_costs

The least of seven, in processor time. A verification of a draft of n tokens feeds n + 1.
"""

import torch

from eval.report import RESULTS, provenance, write_json
from neuroflow_hf.cli.language_model import language_model
from neuroflow_hf.drift.draft_costs import check_seconds
from neuroflow_hf.drift.prompts import encode_prompt, read_prompts
from neuroflow_hf.loading import EMBEDDED_PROMPTS, load_language_model

TOKENS = (1, 2, 3, 4, 8, 16)


def main() -> None:
    torch.set_num_threads(1)
    source = language_model(None)
    model, tokenizer = load_language_model(source, device="cpu")
    ids = torch.tensor([encode_prompt(tokenizer, read_prompts(EMBEDDED_PROMPTS)[0])])
    seconds = {name: check_seconds(model, ids, TOKENS, turns) for name, turns in (("turned", True), ("usual", False))}
    costs = {
        name: {str(count): value / seconds["usual"][1] for count, value in times.items()}
        for name, times in seconds.items()
    }
    found = {"model": source.name, "step_seconds": seconds["usual"][1], "costs": costs}
    write_json(RESULTS / "check_costs.json", {**provenance(), **found})


if __name__ == "__main__":
    main()
