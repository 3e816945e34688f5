"""
Prompts to train a drafter of SmolLM2 on: of the tasks of `eval/prompts/prompts.jsonl`, without the measured ones.

    python -m recipes.smollm2_drafter.prompts prompts.jsonl
    neuroflow tune-drafts --prompts prompts.jsonl --out path/to/drafter

Code and prose come from the same packages, structured text is random records, and the model itself asks the questions.
Of the measured file, the prompts after the first `MEASURED` of each task are trained on, too. None has `SHARED` words
in a row in common with a measured one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from neuroflow_hf.cli.language_model import language_model
from neuroflow_hf.drift.decode import decode, make_batches
from neuroflow_hf.drift.prompts import CHAT, first_of_each, read_prompts
from neuroflow_hf.loading import EMBEDDED_PROMPTS, load_language_model
from neuroflow_hf.utils.files import write_whole
from recipes.prompts.build import code_files, draw, fitting, function_heads, prose_files, sentences

MEASURED = 10  # prompts of each task, which `eval.language.benchmark_lossless` reads
SHARED = 8
EACH = 250
SEED = 2
VALUES = {
    "id": lambda rng: int(rng.integers(1, 9999)),
    "name": lambda rng: str(rng.choice(["Ada", "Bo", "Carmen", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines"])),
    "city": lambda rng: str(rng.choice(["Oslo", "Lyon", "Porto", "Leeds", "Turin", "Gdansk", "Quito", "Osaka"])),
    "item": lambda rng: str(rng.choice(["lamp", "chair", "cable", "notebook", "bottle", "drill", "tent", "kettle"])),
    "status": lambda rng: str(rng.choice(["open", "done", "failed", "running", "late", "ok"])),
    "price": lambda rng: round(float(rng.uniform(1, 200)), 2),
    "count": lambda rng: int(rng.integers(0, 60)),
    "date": lambda rng: f"20{rng.integers(10, 26)}-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}",
    "active": lambda rng: bool(rng.integers(2)),
}


def structured(rng: np.random.Generator) -> str:
    """The beginning of a few random records as JSON, CSV, YAML, TOML or a log."""
    names = [str(name) for name in rng.permutation(list(VALUES))[: rng.integers(2, 6)]]
    rows = [{name: VALUES[name](rng) for name in names} for _ in range(rng.integers(3, 6))]
    plural = str(rng.choice(["items", "orders", "users", "events", "tasks", "rooms"]))
    kind = rng.choice(["json", "json", "csv", "yaml", "toml", "log"])
    if kind == "json":
        text = json.dumps({plural: rows}, indent=2) if rng.integers(2) else json.dumps(rows, indent=2)
    elif kind == "csv":
        text = "\n".join([",".join(names), *(",".join(map(str, row.values())) for row in rows)])
    elif kind == "yaml":
        lines = ("\n    ".join(f"{name}: {value}" for name, value in row.items()) for row in rows)
        text = f"{plural}:\n" + "\n".join(f"  - {line}" for line in lines)
    elif kind == "toml":
        lines = ("\n".join(f"{name} = {json.dumps(value)}" for name, value in row.items()) for row in rows)
        text = "\n\n".join(f"[[{plural}]]\n{line}" for line in lines)
    else:
        times = (f"2024-05-{rng.integers(1, 29):02d} 09:{minute:02d}:{rng.integers(60):02d}" for minute in range(9))
        text = "\n".join(
            f"{time} INFO [{plural}] " + " ".join(f"{name}={value}" for name, value in row.items())
            for time, row in zip(times, rows, strict=False)
        )
    return text[: int(len(text) * rng.uniform(0.4, 0.8))][:350].rstrip()


def questions(model, tokenizer, count: int, batch_size: int = 64, length: int = 40) -> list[str]:
    """Questions of a user, no two alike, that the model draws after the beginning of its chat template."""
    opening = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False).rsplit("?", 1)
    row, end = tokenizer.encode(opening[0]), opening[1].strip()
    batch = make_batches([row] * batch_size, batch_size)[0]
    torch.manual_seed(SEED)
    found: dict[str, None] = {}
    how = {"ends": [tokenizer.eos_token_id], "do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
    while len(found) < count:
        for tokens in decode(model, batch, length, **how).tokens:
            text, ended, _ = tokenizer.decode(tokens).partition(end)
            text = text.strip()
            if ended and len(text) > 20 and text.isascii() and text[-1] in "?.":
                found.setdefault(text)
    return list(found)[:count]


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `SHARED` words of a text; of a shorter one, the text."""
    words = text.split()
    return {tuple(words[first : first + SHARED]) for first in range(max(1, len(words) - SHARED + 1))}


def build(model, tokenizer) -> list[dict[str, str]]:
    """All prompts, the same on every machine but for rounding in the model's questions."""
    rng, read = np.random.default_rng(SEED), read_prompts(EMBEDDED_PROMPTS)
    first = set(first_of_each([prompt.task for prompt in read], MEASURED))
    measured = set().union(*(runs(read[index].text) for index in first))
    chosen = [(prompt.task, prompt.text) for prompt in read]
    for task, texts, cut in (("code", code_files(), function_heads), ("prose", prose_files(), sentences)):
        more = (rng,) if task == "prose" else ()
        files = [(source, fitting(cut(text, *more))) for source, text in texts]
        count = min(EACH, len({text for _, found in files for text in found}))
        chosen += [(task, item["prompt"]) for item in draw(task, files, rng, count)]
    chosen += [("structured", structured(rng)) for _ in range(EACH)]
    chosen += [(CHAT, text) for text in questions(model, tokenizer, EACH)]
    unique = dict.fromkeys(item for item in chosen if not runs(item[1]) & measured)
    return [{"task": task, "prompt": text} for task, text in unique]


def main() -> None:
    """Write the prompts to the file that is named."""
    model, tokenizer = load_language_model(language_model(None))
    built = build(model, tokenizer)
    write_whole(Path(sys.argv[1]), "".join(json.dumps(item) + "\n" for item in built))
    print(f"{len(built)} prompts: {sys.argv[1]}")


if __name__ == "__main__":
    main()
