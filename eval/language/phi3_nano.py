"""
Evaluate the embedded Phi-3: perplexity on held-out files, completions of functions, words in its prose.

    python -m eval.language.phi3_nano      # some minutes on two cores; the first time, packages are read for the texts

Each question has trivial baselines, and all files are held out from training:

- Perplexity per token and bits per byte of each domain, against a unigram and a trigram model of the same tokens,
  counted on the same training texts. Windows of 512 tokens, each predicted from its own beginning; intervals are 95 %,
  from a bootstrap over files.
- Of 100 held-out beginnings of functions (decorators, signature, docstring or first statement), how many does
  decoding complete so that `ast.parse` accepts the text when it is cut at the last complete statement, one that the
  completion itself began? Decoding is greedy; greedy, but with no NO_REPEAT tokens in a row twice; or drawn at a low
  temperature. That is kind: one good statement suffices, whatever follows. So also: of how many is all that was
  generated the valid beginning of a Python file? The control draws completions from the trigram model.
- Which share of the words in its prose, sampled at a low temperature, is in a word list? The baselines are the
  held-out texts themselves and the trigram model.
- What is the perplexity with layers skipped, and the acceptance rate of drafts in lossless generation?

Runs in float32. Writes `eval/results/phi3_nano.json` and, out of it and `recipes/phi3_nano/card.md`, the model card.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer, Phi3ForCausalLM

from eval.language.ngrams import NGrams
from eval.report import RESULTS, provenance, write_json, write_whole
from neuroflow_hf import NeuroFlowPhi3ForCausalLM
from neuroflow_hf.evaluation.statistics import middle, resamples, wilson
from neuroflow_hf.utils.provenance import checkout_commit
from recipes.phi3_nano.card import make_card
from recipes.phi3_nano.corpus import load_corpus, read_texts
from recipes.phi3_nano.judge import judge, share_of_words, words_of
from recipes.phi3_nano.model import Reuse, anchors, drafting_layers
from recipes.phi3_nano.prompts import draw_prompts
from recipes.phi3_nano.sources import DOMAINS, Document, word_list

ROOT = Path(__file__).parents[2]

CHECKPOINT = ROOT / "models" / "neuroflow-phi3-nano"
WINDOW, WINDOWS = 512, 4  # tokens; of a file, from its beginning, at most
SEED = 1
FUNCTIONS, NEW_TOKENS = 100, 160
NO_REPEAT = 12  # no n-gram of this length may repeat: so small a model loops
TEMPERATURE, COOL = 0.7, 0.4  # of prose, of code
BATCH = 20


def windows_of(held_out: list[Document], tokenizer) -> dict[str, list[list[torch.Tensor]]]:
    """By domain, for every file, its windows, int64 [T] each, and T up to WINDOW."""
    found: dict[str, list[list[torch.Tensor]]] = {domain: [] for domain in DOMAINS}
    for document in held_out:
        tokens = [tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(document.text).ids]
        parts = [tokens[first : first + WINDOW] for first in range(0, len(tokens), WINDOW)][:WINDOWS]
        found[document.domain].append([torch.tensor(part) for part in parts if len(part) > 16])
    return found


Losses = Callable[[torch.Tensor], np.ndarray]


def perplexity(
    files: list[list[torch.Tensor]], losses: Losses, byte_lengths: np.ndarray, limit: int = WINDOWS
) -> dict:
    """Perplexity per token and bits per byte, with an interval from a bootstrap over files."""
    totals, counts, sizes = [], [], []
    for windows in files:
        found = [losses(window) for window in windows[:limit]]
        totals.append(sum(float(part.sum()) for part in found))
        counts.append(sum(len(part) for part in found))
        sizes.append(sum(int(byte_lengths[window[1:].numpy()].sum()) for window in windows[:limit]))
    total, count, size = np.array(totals), np.array(counts), np.array(sizes)
    draws = resamples(len(files), seed=SEED)
    return {
        "perplexity": math.exp(total.sum() / count.sum()),
        "interval": list(middle(np.exp(total[draws].sum(1) / count[draws].sum(1)))),
        "bits_per_byte": total.sum() / math.log(2) / size.sum(),
        "files": len(files),
        "tokens": int(count.sum()),
    }


def losses_of(model: Phi3ForCausalLM) -> Losses:
    """Cross entropy in nats of every token of a window but the first, by a model."""

    @torch.inference_mode()
    def losses(window: torch.Tensor) -> np.ndarray:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none").numpy()

    return losses


def ngram_losses(ngrams: NGrams) -> Losses:
    """The same by an n-gram model."""
    return lambda window: -np.log(ngrams.probabilities(window.numpy())[1:])


@torch.inference_mode()
def generate(model: Phi3ForCausalLM, tokenizer, prompts: list[str], **options) -> list[tuple[str, bool]]:
    """For every prompt, the generated text, and whether the model ended it."""
    found = []
    for first in track(range(0, len(prompts), BATCH), "generating", console=Console(stderr=True)):
        inputs = tokenizer(prompts[first : first + BATCH], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)[:, inputs.input_ids.shape[1] :]
        for row in output.tolist():
            is_ended = tokenizer.eos_token_id in row
            kept = row[: row.index(tokenizer.eos_token_id)] if is_ended else row
            found.append((tokenizer.decode(kept), is_ended))
    return found


def ngram_texts(ngrams: NGrams, tokenizer, prompts: list[str]) -> list[tuple[str, bool]]:
    """The same, sampled from an n-gram model."""
    rng = np.random.default_rng(SEED)
    rows = [ngrams.continue_text(tokenizer(prompt).input_ids, NEW_TOKENS, rng) for prompt in prompts]
    ended = [tokenizer.eos_token_id in row for row in rows]
    kept = [row[: row.index(tokenizer.eos_token_id)] if end else row for row, end in zip(rows, ended, strict=True)]
    return list(zip(map(tokenizer.decode, kept), ended, strict=True))


def judge_functions(prompts: list[str], texts: list[tuple[str, bool]]) -> dict:
    """How many completions are Python, leniently and strictly; how much they add, and how much of it repeats."""
    judged = [judge(prompt, *text) for prompt, text in zip(prompts, texts, strict=True)]
    good, valid = sum(item.statements > 0 for item in judged), sum(item.is_valid_throughout for item in judged)
    lines = [[line for line in item.kept.split("\n") if line.strip()] for item in judged if item.statements]
    return {
        "prefixes": len(judged),
        "parse_when_cut": good / len(judged),
        "parse_when_cut_interval": list(wilson(good, len(judged))),
        "valid_throughout": valid / len(judged),
        "valid_throughout_interval": list(wilson(valid, len(judged))),
        "statements_added_mean": sum(item.statements for item in judged) / len(judged),
        "distinct_lines": sum(len(set(kept)) for kept in lines) / max(1, sum(map(len, lines))),
    }


def judge_words(texts: list[tuple[str, bool]]) -> dict:
    """The share of words that are in the word list."""
    words = [word for text in texts for word in words_of(*text)]
    return {"share": share_of_words(words, word_list()), "words": len(words), "distinct": len(set(words))}


def layers_skipped(checkpoint: Path, files: dict, byte_lengths: np.ndarray) -> dict:
    """By variant and domain, the perplexity with layers left out or with their outputs reused, two windows a file."""

    def without(layers) -> Phi3ForCausalLM:
        model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        kept = [layer for place, layer in enumerate(model.model.layers) if place not in layers]
        model.model.layers = torch.nn.ModuleList(kept)
        return model

    whole = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    count = whole.config.num_hidden_layers
    middle, half = drafting_layers(count), range(count // 2, count)
    reusing = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    reuse = Reuse(reusing)

    def reused(period: int) -> Losses:
        plain = losses_of(reusing)

        def losses(window: torch.Tensor) -> np.ndarray:
            with reuse.of(1, anchors(len(window), period, 0)):
                return plain(window)

        return losses

    variants = {
        "all layers": losses_of(whole),
        f"layers {middle[0]} to {middle[-1]} reuse their outputs at every second token": reused(2),
        f"layers {middle[0]} to {middle[-1]} reuse their outputs at three of four tokens": reused(4),
        f"layers {middle[0]} to {middle[-1]} left out": losses_of(without(middle)),
        f"layers {half[0]} to {half[-1]} left out": losses_of(without(half)),
    }
    return {
        name: {domain: perplexity(files[domain], losses, byte_lengths, limit=2) for domain in DOMAINS}
        for name, losses in track(variants.items(), "layers skipped", console=Console(stderr=True))
    }


def drafts(checkpoint: Path, tokenizer, prompts: dict[str, list[str]], count: int = 8) -> dict:
    """By domain and drafter, the acceptance rate of drafts over some prompts with 64 new tokens."""
    model = NeuroFlowPhi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found: dict[str, dict] = {}
    for domain, texts in prompts.items():
        found[domain] = {}
        for drafter in ("bypass", "lookup"):
            options = {"drafter": drafter, "draft_length": 4, "min_confidence": 0}
            tokens = checks = drafted = accepted = 0
            for text in texts[:count]:
                inputs = tokenizer(text, return_tensors="pt")
                output = model.generate(
                    **inputs, max_new_tokens=64, do_sample=False, lossless=options, return_dict_in_generate=True
                ).lossless
                tokens, checks = tokens + output.tokens, checks + output.checks
                drafted += output.drafted
                accepted += output.accepted
            found[domain][drafter] = {
                "drafted": drafted,
                "accepted": accepted,
                "share": accepted / max(1, drafted),
                "tokens_per_dense_forward": tokens / max(1, checks + len(texts[:count])),
            }
    return found


def write_card(checkpoint: Path, report: dict):
    """Write the model card."""
    recipe = json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
    write_whole(checkpoint / "README.md", make_card(report, recipe))


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "phi3_nano.json",
    card: Annotated[bool, typer.Option(help="Write the model card.")] = True,
    card_only: Annotated[
        bool, typer.Option("--card-only", help="Write the card from the JSON file, without measuring.")
    ] = False,
):
    """Measure, print and write."""
    if card_only:
        write_card(checkpoint, json.loads(output.read_text(encoding="utf-8")))
        return
    console = Console()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    corpus = load_corpus(console)
    held_out = list(read_texts("held_out"))
    byte_lengths = np.array(
        [len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    )  # a character of a token is a byte
    byte_lengths[tokenizer.eos_token_id] = 0
    files = windows_of(held_out, tokenizer)
    ngrams = {
        name: NGrams(np.concatenate([corpus.streams[domain] for domain in DOMAINS]), len(tokenizer), order)
        for name, order in (("trigram", 3), ("unigram", 1))
    }
    models = {"model": losses_of(model), **{name: ngram_losses(found) for name, found in ngrams.items()}}
    report = {
        **provenance(),
        "commit": checkout_commit(),
        "seed": SEED,
        "dtype": "float32",
        "perplexity": {
            domain: {name: perplexity(files[domain], losses, byte_lengths) for name, losses in models.items()}
            for domain in track(DOMAINS, "perplexity", console=Console(stderr=True))
        },
    }
    functions = [item["prompt"] for item in draw_prompts(held_out, tokenizer, "code", FUNCTIONS, SEED)]
    torch.manual_seed(SEED)
    cool = {"do_sample": True, "temperature": COOL, "top_k": 0}
    report["functions"] = {
        "model, greedy": judge_functions(functions, generate(model, tokenizer, functions, do_sample=False)),
        f"model, greedy, no {NO_REPEAT} tokens twice": judge_functions(
            functions, generate(model, tokenizer, functions, do_sample=False, no_repeat_ngram_size=NO_REPEAT)
        ),
        f"model, temperature {COOL}": judge_functions(functions, generate(model, tokenizer, functions, **cool)),
        "*control:* trigram, drawn": judge_functions(functions, ngram_texts(ngrams["trigram"], tokenizer, functions)),
    }
    prose = [item["prompt"] for item in draw_prompts(held_out, tokenizer, "prose", FUNCTIONS, SEED)]
    torch.manual_seed(SEED)
    drawn = generate(model, tokenizer, prose, do_sample=True, temperature=TEMPERATURE, top_k=0)
    report["words"] = {
        f"model, temperature {TEMPERATURE}": judge_words(drawn),
        "*control:* trigram, drawn": judge_words(ngram_texts(ngrams["trigram"], tokenizer, prose)),
        "*control:* the held-out prose": judge_words([(d.text, True) for d in held_out if d.domain == "prose"]),
    }
    report["layers"] = layers_skipped(checkpoint, files, byte_lengths)
    prompts = {
        domain: [item["prompt"] for item in draw_prompts(held_out, tokenizer, domain, 60)] for domain in DOMAINS
    }
    report["drafts"] = drafts(checkpoint, tokenizer, prompts)
    greedy = {domain: generate(model, tokenizer, prompts[domain][:2], do_sample=False) for domain in DOMAINS}
    report["samples"] = {
        domain: [{"prompt": prompt, "text": text} for prompt, (text, _) in zip(prompts[domain], found, strict=False)]
        for domain, found in greedy.items()
    }
    write_json(output, report)
    if card:
        write_card(checkpoint, report)
    console.print_json(json.dumps({name: report[name] for name in ("perplexity", "functions", "words", "drafts")}))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    typer.run(main)
