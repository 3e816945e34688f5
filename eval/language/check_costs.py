"""
What a verification of several tokens costs in dense steps, by the products of `language/few_tokens.py` or others.

    python -m eval.language.check_costs

The least of seven, in processor time. A verification of a draft of n tokens feeds n + 1.
"""

import time

import torch
from transformers import DynamicCache

from eval.report import RESULTS, provenance, write_json
from neuroflow_hf import NeuroFlowPhi3ForCausalLM
from neuroflow_hf.cli.language_model import language_model
from neuroflow_hf.drift.prompts import encode_prompt, read_prompts
from neuroflow_hf.language.few_tokens import linear_layers, turned
from neuroflow_hf.loading import EMBEDDED_PROMPTS, load_language_model

TOKENS = (1, 2, 3, 4, 8, 16)
REPEATS = 7


@torch.inference_mode()
def check_seconds(model: NeuroFlowPhi3ForCausalLM, ids: torch.Tensor, turns: bool) -> dict[int, float]:
    """
    Seconds of a dense forward by its number of tokens, the last ones of the text `ids` [1, T], which are fed again
    after it. `turns`: whether products may be turned, as in a verification.
    """
    cache, layers, found = DynamicCache(config=model.config), linear_layers(model) if turns else [], {}
    model(ids, past_key_values=cache, use_cache=True, bypass=False, logits_to_keep=1)
    for count in TOKENS:
        times = []
        for _ in range(REPEATS):
            begun = time.process_time()
            with turned(layers, count):
                model(ids[:, -count:], past_key_values=cache, use_cache=True, bypass=False)
            times.append(time.process_time() - begun)
            cache.crop(-count)
        found[count] = min(times)
    return found


def main() -> None:
    torch.set_num_threads(1)
    source = language_model(None)
    model, tokenizer = load_language_model(source, device="cpu")
    ids = torch.tensor([encode_prompt(tokenizer, read_prompts(EMBEDDED_PROMPTS)[0])])
    seconds = {name: check_seconds(model, ids, turns) for name, turns in (("turned", True), ("usual", False))}
    costs = {
        name: {str(count): value / seconds["usual"][1] for count, value in times.items()}
        for name, times in seconds.items()
    }
    found = {"model": source.name, "step_seconds": seconds["usual"][1], "costs": costs}
    write_json(RESULTS / "check_costs.json", {**provenance(), **found})


if __name__ == "__main__":
    main()
