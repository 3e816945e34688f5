"""
How fast lossless generation is: the loop with each drafter and without drafts, and transformers' own loops.

    python -m eval.language.benchmark_lossless --limit 10 --new-tokens 48 --turns 1    # SmolLM2, fetched on first use

Greedy text until the end token or `--new-tokens`, prompt included in the time. All variants take turns on every
prompt, in a new random order each time, so that a slow phase of the machine affects all alike. A prompt's time is the
median of its turns. Comparisons are paired: a variant's speed on a prompt over that of the loop without drafts. The
stock model's own `generate`, with and without its prompt lookup, tells the gain of a lean loop from the gain of
drafts.

Processor time counts, since other programs delay the clock on a shared machine; the clock is written down, too. The
rule that decides whether drafting pays reads processor time here, and the clock elsewhere.

Every text is compared with the stock model's. A text may differ from a token at which the stock model's two highest
logits are closer than rounding (1e-5 in float32). Such differences are counted; others end the program with 1.

Every finished prompt is written to the file at once; the same command continues, unless `--fresh` is given.
"""

import functools
import json
import random
import statistics
import time
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoTokenizer

from eval.docs.language import lossless_table
from eval.report import RESULTS, provenance, show, write_json
from neuroflow_hf import NeuroFlowLosslessConfig, NeuroFlowPhi3ForCausalLM
from neuroflow_hf.conversion.smollm2 import smollm2_folder
from neuroflow_hf.drift.metrics import first_divergence
from neuroflow_hf.drift.prompts import Prompt, encode_prompt, read_prompts
from neuroflow_hf.evaluation.statistics import middle, resamples
from neuroflow_hf.language.draft_policy import Drafts
from neuroflow_hf.language.speculative_decoding import decode_losslessly
from neuroflow_hf.loading import EMBEDDED_PROMPTS
from neuroflow_hf.utils.provenance import checkout_commit, fingerprint, key_of, model_version

STOCK = {"stock": {}, "stock lookup": {"prompt_lookup_num_tokens": 10}}  # 10: the value of transformers' guide
DRAFTERS = {"dense": "none", "lookup": "lookup"}
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}
ROUNDING = 1e-5
RESAMPLES = 2000
LEAST_TOKENS = 16  # texts with fewer are ignored
WHOLE = "all"  # tasks


def prompts_in_turn(path: Path, limit: int | None) -> list[tuple[int, Prompt]]:
    """Prompts with their numbers in the file, from 1, by task in turn: `limit` of each task at most."""
    by_task: dict[str, list[tuple[int, Prompt]]] = {}
    for number, prompt in enumerate(read_prompts(path), start=1):
        rows = by_task.setdefault(prompt.task, [])
        if limit is None or len(rows) < limit:
            rows.append((number, prompt))
    return [row for turn in zip_longest(*by_task.values()) for row in turn if row]


def generate(model, ids: torch.Tensor, variant: str, new_tokens: int) -> dict:
    """One text: its tokens after the prompt `ids` [1, T], seconds by each clock, and counts."""
    kwargs = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
    if variant in STOCK:
        kwargs |= STOCK[variant]
    else:
        kwargs["custom_generate"] = functools.partial(
            decode_losslessly,
            options=NeuroFlowLosslessConfig(drafter=DRAFTERS[variant]),
            make_drafts=functools.partial(Drafts, clock=time.process_time),
        )
    begun = {name: clock() for name, clock in CLOCKS.items()}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    seconds = {name: clock() - begun[name] for name, clock in CLOCKS.items()}
    counts = getattr(output, "lossless", None)
    return {"tokens": output.sequences[0, ids.shape[1] :].tolist(), **seconds, "counts": counts and vars(counts)}


def divergence(model, ids: torch.Tensor, expected: list[int], tokens: list[int]) -> dict | None:
    """Where `tokens` first differ from `expected`, after the prompt `ids` [1, T], and the margin there."""
    at = first_divergence(expected, tokens)
    if at is None:
        return None
    before = torch.cat([ids, torch.tensor([expected[:at]], dtype=ids.dtype)], dim=1)
    top = model(before, logits_to_keep=1, bypass=False).logits[0, -1].float().topk(2).values
    margin = (top[0] - top[1]).item()
    return {"at": at, "margin": margin, "within_rounding": margin <= ROUNDING}


def measure(model, ids: torch.Tensor, order: random.Random, settings: dict) -> dict:
    """All variants on one prompt: by variant, the times of its turns, its counts and how its text differs."""
    names, texts = settings["variants"], []
    found: dict[str, dict] = {name: {"processor": [], "wall": [], "divergences": []} for name in names}
    for _ in range(settings["turns"]):
        for variant in order.sample(names, len(names)):
            run = generate(model, ids, variant, settings["new_tokens"])
            texts.append((variant, run["tokens"]))
            for name in CLOCKS:
                found[variant][name].append(run[name])
            found[variant]["counts"] = run["counts"]
    expected = dict(texts)["stock"]
    for variant, tokens in texts:
        found[variant]["divergences"] += filter(None, [divergence(model, ids, expected, tokens)])
    return {"tokens": len(expected), "variants": found}


def seconds(case: dict, variant: str, clock: str) -> float:
    """Seconds of a variant on one prompt."""
    return statistics.median(case["variants"][variant][clock])


def interval(values: list[float]) -> list[float]:
    """95 % interval of the median of `values`, by bootstrap."""
    return list(middle(np.median(np.array(values)[resamples(len(values), RESAMPLES, 0)], axis=1)))


def speed(cases: list[dict], variant: str, clock: str) -> dict:
    """Tokens per second and the ratio to the loop without drafts, by one clock."""
    ratios = [seconds(case, "dense", clock) / seconds(case, variant, clock) for case in cases]
    total = {name: sum(seconds(case, name, clock) for case in cases) for name in ("dense", variant)}
    return {
        "tokens_per_second": statistics.median(case["tokens"] / seconds(case, variant, clock) for case in cases),
        "times_dense": {
            "median": statistics.median(ratios),
            "interval": interval(ratios),
            "total": total["dense"] / total[variant],
            "least": min(ratios),
        },
    }


def summarise(cases: list[dict]) -> dict:
    """By variant, over some prompts: speed by each clock, and counts."""
    summary = {}
    for variant in cases[0]["variants"]:
        entries = [case["variants"][variant] for case in cases]
        row: dict = {clock: speed(cases, variant, clock) for clock in CLOCKS}
        counts = [entry["counts"] for entry in entries if entry["counts"]]
        if counts and variant != "dense":
            drafted, accepted = (sum(c[name] for c in counts) for name in ("drafted", "accepted"))
            drafts = sum(c["drafts"] for c in counts)
            row |= {
                "acceptance": accepted / drafted if drafted else None,
                "draft_length": drafted / drafts if drafts else None,
                "tokens_per_check": sum(c["tokens"] for c in counts) / max(1, sum(c["checks"] for c in counts)),
            }
        places = [place for entry in entries for place in entry["divergences"]]
        row["divergences"] = {
            "within_rounding": sum(place["within_rounding"] for place in places),
            "others": sum(not place["within_rounding"] for place in places),
            "greatest_margin": max((place["margin"] for place in places), default=None),
        }
        summary[variant] = row
    return summary


def summaries(report: dict) -> dict:
    """Summaries by task and of all; texts of fewer tokens than `least_tokens` are left out."""
    cases = [case for case in report["cases"] if case["tokens"] >= report["settings"]["least_tokens"]]
    tasks = {task: [case for case in cases if case["task"] == task] for task in sorted({c["task"] for c in cases})}
    return {task: summarise(chosen) for task, chosen in {**tasks, WHOLE: cases}.items() if chosen}


@torch.inference_mode()
def main(
    model: Annotated[
        Path | None, typer.Option(help="Folder with a Phi-3 checkpoint and its tokenizer.", show_default="SmolLM2")
    ] = None,
    prompts: Annotated[Path, typer.Option(help="JSON lines with `task` and `prompt`.")] = EMBEDDED_PROMPTS,
    limit: Annotated[int | None, typer.Option(help="Maximum number of prompts of each task.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 128,
    turns: Annotated[int, typer.Option(help="Runs of every variant on each prompt.")] = 3,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore what is in the file.")] = False,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "benchmark_lossless.json",
):
    """Time all variants on all prompts, compare their texts, and print the table."""
    model = model or smollm2_folder()
    torch.set_num_threads(1)
    variants = [*STOCK, *DRAFTERS]
    tokenizer = AutoTokenizer.from_pretrained(model)
    language_model = NeuroFlowPhi3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    settings = {
        "model": model.name,
        "weights": fingerprint(language_model),
        "prompts": key_of(text=prompts.read_text(encoding="utf-8")),
        **{"new_tokens": new_tokens, "least_tokens": LEAST_TOKENS, "turns": turns, "dtype": "float32"},
        "variants": variants,
        **{name: provenance()[name] for name in ("machine", "versions")},
        "code": model_version(),
    }
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() and not fresh else {}
    report = {"settings": settings, "cases": before["cases"] if before.get("settings") == settings else []}
    done = {case["number"] for case in report["cases"]}

    rows = prompts_in_turn(prompts, limit)
    encoded = {number: torch.tensor([encode_prompt(tokenizer, prompt)]) for number, prompt in rows}
    for variant in variants:  # warm-up
        generate(language_model, encoded[rows[0][0]], variant, 8)
    for number, prompt in rows:
        if number in done:
            continue
        case = measure(language_model, encoded[number], random.Random(number), settings)
        report["cases"].append({"number": number, "task": prompt.task, **case})
        write_json(output, {**provenance(), "commit": checkout_commit(), **report, "summary": summaries(report)})
    found = summaries(report)
    if not found:
        print("Nothing was measured.")
        raise typer.Exit(1)
    show(lossless_table({**provenance(), **report, "summary": found}))
    if any(row["divergences"]["others"] for row in found[WHOLE].values()):
        print("Some texts differ from the stock model's by more than rounding: see `divergences`.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
