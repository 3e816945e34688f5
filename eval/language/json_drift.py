"""
Does a bypass change JSON whose syntax a grammar enforces?

    python -m eval.language.json_drift    # after eval.language.token_drift, whose bypasses it takes

Each line of the prompts is `{"prompt": text, "schema": JSON schema}`. Dense and bypass generate apart, each under the
grammar of the schema. Texts are compared in the tokenizer's own tokens, so that another tokenisation of the same text
is no drift. A token is forced if the schema leaves no other text at its place; the others are free. Finished bypasses
are kept in the file, and the same command continues.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LogitsProcessorList

from eval.report import RESULTS, provenance, show
from neuroflow_hf.cli.errors import one_line_errors
from neuroflow_hf.cli.language_model import language_model
from neuroflow_hf.drift.decode import Batch, make_batches
from neuroflow_hf.drift.json_schema import JsonGrammar, JsonSchemaProcessor, grammar_tokens, value_drift
from neuroflow_hf.drift.metrics import position_drift
from neuroflow_hf.drift.prompts import CHAT, encode_prompt, make_prompt, read_json_lines
from neuroflow_hf.evaluation.statistics import mean, paired_interval
from neuroflow_hf.language.calibration import cut_at_end, end_tokens
from neuroflow_hf.loading import load_language_model
from neuroflow_hf.utils.files import report_text, write_whole
from neuroflow_hf.utils.tables import Table, markdown_table, number, with_interval

PROMPTS = Path(__file__).parents[1] / "prompts" / "json.jsonl"
NAMES = (
    *("1->22, attention, for 20%", "1->29, attention, for 20%", "1->22, attention, threshold 0.65"),
    *("1->22, attention, entropy 1, for 20%", "1->22, block, for 20%"),
)
LINE = '{"prompt": "Describe a cat in JSON.", "schema": {"type": "object", ...}}'


def read_cases(path: Path, tokenizer: Any, tokens: Any) -> list[tuple[list[int], JsonGrammar]]:
    """Each prompt's token ids, in the chat template, and its grammar; ValueError for a bad line, which it names."""
    cases = []
    for line, found in read_json_lines(path, ("prompt", "schema"), LINE):
        where = f"{path}, line {line}"
        prompt = make_prompt({"prompt": found["prompt"], "task": CHAT}, where)
        try:
            cases.append((encode_prompt(tokenizer, prompt), JsonGrammar(found["schema"], tokens)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return cases


def generate(model, tokenizer, batch: Batch, grammars: list[JsonGrammar], new_tokens: int, bypass) -> list[dict]:
    """Text, length in tokens and bypassed steps of each prompt of a batch."""
    output = model.generate(
        batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        bypass=bypass,
        logits_processor=LogitsProcessorList([JsonSchemaProcessor(grammars)]),
        return_dict_in_generate=True,
    )
    new = output.sequences[:, batch.ids.shape[1] :]
    steps = torch.zeros(new.shape[0], new.shape[1] - 1, dtype=torch.bool)
    if bypass is not False:
        steps = model.bypass_statistics(output.past_key_values).bypassed_mask[:, 1 - new.shape[1] :]
    texts = []
    for row, of_row in zip(new.tolist(), steps, strict=True):
        tokens = cut_at_end(row, end_tokens(model))
        # a text that is cut off may end in part of a character
        text = tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
        bypassed = int(of_row[: len(tokens) - 1].sum())
        texts.append({"text": text, "tokens": tokens, "steps": len(tokens) - 1, "bypassed": bypassed})
    return texts


def parsed(text: str) -> Any:
    """The JSON in a text; None if it is not complete."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def compare(dense: dict, other: dict, grammar: JsonGrammar, tokenizer: Any) -> dict:
    """Drift of a text from the dense one: of tokens as generated, of the tokenizer's own tokens, and of values."""
    own = [tokenizer(one["text"], add_special_tokens=False)["input_ids"] for one in (dense, other)]
    forced = [grammar.forced(tokens) for tokens in own]
    free = [
        [token for token, is_forced in zip(*pair, strict=True) if not is_forced]
        for pair in zip(own, forced, strict=True)
    ]
    values = [parsed(one["text"]) for one in (dense, other)]
    return {
        "generated_drift": position_drift(dense["tokens"], other["tokens"]),
        "drift": position_drift(*own),
        "free_drift": position_drift(*free),
        "value_drift": None if None in values else value_drift(*values),
        "valid": values[1] is not None,
        "forced": sum(forced[1]) / max(1, len(forced[1])),
        "same_text": dense["text"] == other["text"],
    }


def summarise(rows: list[dict]) -> dict:
    """Figures over all prompts, with 95 % intervals over prompts."""
    found: dict[str, Any] = {"bypass_rate": sum(row["bypassed"] for row in rows) / sum(row["steps"] for row in rows)}
    for name in ("generated_drift", "drift", "free_drift", "value_drift", "valid", "forced", "same_text"):
        values = [float(row[name]) for row in rows if row[name] is not None]
        found[name] = {
            "mean": mean(values),
            "interval": paired_interval(values, [0.0] * len(values)),
            "n": len(values),
        }
    return found


def json_table(report: dict) -> Table:
    """A row for each bypass."""
    headers = ["configuration", "steps bypassed", "valid JSON", "same text", "drift: all tokens", "drift: free tokens"]
    headers += ["drift: values", "forced tokens"]
    rows = []
    for name, entry in report["configurations"].items():
        figures = entry["summary"]
        drifts = [figures[key] for key in ("drift", "free_drift", "value_drift")]
        counts = [round(figures[key]["mean"] * figures[key]["n"]) for key in ("valid", "same_text")]
        rows.append(
            [
                name,
                number(figures["bypass_rate"], ".1%"),
                *(f"{count} of {len(entry['prompts'])}" for count in counts),
                *(with_interval(one["mean"], one["interval"], ".1%") for one in drifts),
                number(figures["forced"]["mean"], ".0%"),
            ]
        )
    return headers, rows


def describe(report: dict) -> str:
    """Describe the measurement in a paragraph."""
    count = len(report["prompts"])
    return (
        f"{report['model']}, {count} prompts with {count} schemas, at most {report['new_tokens']} new tokens, greedy. "
        "Valid: the text ends within these tokens and parses. Drift: share of positions that differ from dense, with "
        "its 95 % interval from a bootstrap over prompts; of values: share of the numbers, strings and other leaves, "
        "where both texts parse. Free tokens: where the schema leaves a choice of text."
    )


def main(
    model: Annotated[str | None, typer.Option(help="Checkpoint.", show_default="SmolLM2")] = None,
    prompts: Annotated[Path, typer.Option(help="File of prompts with schemas.")] = PROMPTS,
    bypasses: Annotated[Path, typer.Option(help="Drift report to take bypasses from.")] = RESULTS / "token_drift.json",
    new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 128,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "json_drift.json",
    debug: Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")] = False,
):
    """Measure each bypass, and write the report after each."""
    with one_line_errors(debug, f"what was measured is in {output}; the same command continues."):
        found = json.loads(bypasses.read_text(encoding="utf-8"))["configurations"]
        options = {entry["name"]: entry["options"] for entry in found if entry["name"] in NAMES}
        source = language_model(model)
        loaded, tokenizer = load_language_model(source)
        cases = read_cases(prompts, tokenizer, grammar_tokens(tokenizer, loaded.config.vocab_size))
        rows = [row for row, _ in cases]
        conditions = {"model": Path(source).name, "new_tokens": new_tokens, "prompts": rows, "bypasses": options}
        report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        if any(report.get(name) != value for name, value in conditions.items()):
            report = {**conditions, **provenance(), "configurations": {}}
        runs = {"dense": (len(rows), False), "dense, another batch shape": (7, False)}
        runs |= {name: (len(rows), bypass) for name, bypass in options.items()}
        for name, (batch_size, bypass) in runs.items():
            if name in report["configurations"]:
                continue
            texts: list[dict] = [{}] * len(rows)
            for batch in make_batches(rows, batch_size):
                grammars = [cases[index][1] for index in batch.indices]
                for index, text in zip(
                    batch.indices, generate(loaded, tokenizer, batch, grammars, new_tokens, bypass), strict=True
                ):
                    texts[index] = text
            dense = report["configurations"]["dense"]["prompts"] if report["configurations"] else texts
            for text, base, (_, grammar) in zip(texts, dense, cases, strict=True):
                text |= compare(base, text, grammar, tokenizer)
            report["configurations"][name] = {"summary": summarise(texts), "prompts": texts}
            write_whole(output, report_text(report))
    show(markdown_table(json_table(report)))


if __name__ == "__main__":
    typer.run(main)
