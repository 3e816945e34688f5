"""
Does a bypass change JSON whose syntax a grammar enforces?

    python -m eval.language.json_drift    # after eval.language.token_drift, whose thresholds it takes

Each line of the prompts is `{"prompt": text, "schema": JSON schema}`. Dense and bypass generate separately, each under
the grammar of the schema. Texts are tokenized again before they are compared, so that another tokenization of the same
text is no drift. A token is forced if the schema leaves no other text at its place; all others are free. Finished
bypasses are kept in the file, and the same command continues.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from eval.report import RESULTS, provenance, show
from neuroflow_hf.cli.errors import one_line_errors
from neuroflow_hf.cli.language_model import language_model
from neuroflow_hf.drift.decode import Batch, decode, make_batches
from neuroflow_hf.drift.grid import full_grid
from neuroflow_hf.drift.json_schema import JsonGrammar, JsonSchemaProcessor, grammar_tokens
from neuroflow_hf.drift.metrics import position_drift
from neuroflow_hf.drift.prompts import CHAT, encode_prompt, make_prompt, read_json_lines
from neuroflow_hf.evaluation.statistics import mean, mean_interval
from neuroflow_hf.language.calibration import cut_at_end, end_tokens
from neuroflow_hf.loading import load_language_model
from neuroflow_hf.utils.files import report_text, write_whole
from neuroflow_hf.utils.tables import Table, markdown_table, number, with_interval

PROMPTS = Path(__file__).parents[1] / "prompts" / "json.jsonl"
BYPASSES = 4  # the first ones of the grid: both pairs, the published threshold, the guard
NEW_TOKENS = 128  # at most
OTHER_SHAPE, SMALL_BATCH = "dense, another batch shape", 7
LINE = '{"prompt": "Describe a cat in JSON.", "schema": {"type": "object", ...}}'
Cases = list[tuple[list[int], JsonGrammar]]  # a prompt's token ids, and its grammar


def read_cases(path: Path, tokenizer: Any, tokens: Any) -> Cases:
    """Each prompt's token ids, in the chat template, and its grammar; ValueError for a bad line, which it names."""
    cases = []
    for where, found in read_json_lines(path, ("prompt", "schema"), LINE):
        prompt = make_prompt({"prompt": found["prompt"], "task": CHAT}, where)
        try:
            cases.append((encode_prompt(tokenizer, prompt), JsonGrammar(found["schema"], tokens)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return cases


def generate(model, tokenizer, batch: Batch, grammars: list[JsonGrammar], new_tokens: int, bypass) -> list[dict]:
    """Text, length in tokens and bypassed steps of each prompt of a batch."""
    output = decode(model, batch, new_tokens, bypass, JsonSchemaProcessor(grammars), end_tokens(model))
    texts = []
    for row, of_row in zip(output.tokens.tolist(), output.bypassed, strict=True):
        tokens = cut_at_end(row, end_tokens(model))
        # a text that is cut off may end in part of a character
        text = tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
        bypassed = int(of_row[: len(tokens) - 1].sum())
        texts.append({"text": text, "tokens": tokens, "steps": len(tokens) - 1, "bypassed": bypassed})
    return texts


def generate_all(model, tokenizer, cases: Cases, batch_size: int, new_tokens: int, bypass: dict | bool) -> list[dict]:
    """What `generate` gives for each prompt, in batches."""
    texts: list[dict] = [{}] * len(cases)
    for batch in make_batches([row for row, _ in cases], batch_size):
        grammars = [cases[index][1] for index in batch.indices]
        found = generate(model, tokenizer, batch, grammars, new_tokens, bypass)
        for index, text in zip(batch.indices, found, strict=True):
            texts[index] = text
    return texts


def parsed(text: str) -> Any:
    """The JSON in a text; None if it is not complete."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def leaves(value: Any, path: tuple = ()) -> dict[tuple, Any]:
    """The values of parsed JSON that are no objects or lists, by path, such as `{("items", 0, "name"): "cup"}`."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, part in parts for place, leaf in leaves(part, (*path, key)).items()}


def value_drift(dense: Any, other: Any) -> float:
    """The share of `leaves` of two parsed texts that differ, or that only one of them has."""
    expected, found = leaves(dense), leaves(other)
    paths = expected.keys() | found.keys()
    return sum(expected.get(path, ...) != found.get(path, ...) for path in paths) / len(paths)


def compare(dense: dict, other: dict, grammar: JsonGrammar, tokenizer: Any) -> dict:
    """Drift of a text from the dense one, in the tokenizer's own tokens and in values."""
    own = [tokenizer(one["text"], add_special_tokens=False)["input_ids"] for one in (dense, other)]
    forced = [grammar.forced(tokens) for tokens in own]
    free = [
        [token for token, is_forced in zip(*pair, strict=True) if not is_forced]
        for pair in zip(own, forced, strict=True)
    ]
    values = [parsed(one["text"]) for one in (dense, other)]
    return {
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
    for name in ("drift", "free_drift", "value_drift", "valid", "forced", "same_text"):
        values = [float(row[name]) for row in rows if row[name] is not None]
        found[name] = {
            "mean": mean(values),
            "interval": mean_interval(values),
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
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "json_drift.json",
    debug: Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")] = False,
):
    """Measure each bypass, and write the report after each."""
    with one_line_errors(debug, f"what was measured is in {output}; the same command continues."):
        gates = json.loads((RESULTS / "token_drift.json").read_text(encoding="utf-8"))["gates"]
        source = language_model(None)
        loaded, tokenizer = load_language_model(source)
        thresholds = {int(layer): gate["thresholds"] for layer, gate in gates.items()}
        grid = full_grid(loaded.config.num_hidden_layers, thresholds)
        options = {bypass.name: bypass.options for bypass in grid[:BYPASSES]}
        cases = read_cases(PROMPTS, tokenizer, grammar_tokens(tokenizer, loaded.config.vocab_size))
        conditions = {"model": Path(source).name, "new_tokens": NEW_TOKENS, "bypasses": options}
        conditions["prompts"] = [row for row, _ in cases]
        report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        if any(report.get(name) != value for name, value in conditions.items()):
            report = {**conditions, **provenance(), "configurations": {}}
        found = report["configurations"]
        for name, bypass in {"dense": False, OTHER_SHAPE: False, **options}.items():
            if name not in found:
                batch_size = SMALL_BATCH if name == OTHER_SHAPE else len(cases)
                texts = generate_all(loaded, tokenizer, cases, batch_size, NEW_TOKENS, bypass)
                for text, dense, (_, grammar) in zip(
                    texts, found["dense"]["prompts"] if found else texts, cases, strict=True
                ):
                    text |= compare(dense, text, grammar, tokenizer)
                found[name] = {"summary": summarise(texts), "prompts": texts}
                write_whole(output, report_text(report))
    show(markdown_table(json_table(report)))


if __name__ == "__main__":
    typer.run(main)
