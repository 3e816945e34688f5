"""
What does a bypass change in the text of SmolLM2, and which published findings hold on it?

    python -m eval.language.token_drift    # some 15 minutes on two cores
    torchrun --nproc_per_node 2 -m eval.language.token_drift

Prompts are those of `eval/prompts/prompts.jsonl`. Dense and bypass have caches of their own. Every finished
configuration is written to `eval/results/token_drift.json` at once. The same command continues an interrupted run,
unless `--fresh` is given. Also writes `token_drift.md` beside it, and draws
`docs/drift.png` and `docs/drift_reachable.png`; shown in `docs/results/drift.md`. `neuroflow drift` measures your own
checkpoint and prompts.
"""

from pathlib import Path
from typing import Annotated

import typer

from eval.language.findings import PUBLISHED_DRIFT, drift_findings, findings_table
from eval.report import RESULTS, provenance, write_whole
from neuroflow_hf.cli.drift import print_drift, run_drift, write_drift
from neuroflow_hf.cli.errors import one_line_errors
from neuroflow_hf.drift.tables import drift_markdown
from neuroflow_hf.utils.files import report_text
from neuroflow_hf.utils.tables import markdown_table

PICTURES = Path(__file__).parents[2] / "docs"


def main(
    model: Annotated[str | None, typer.Option(help="Checkpoint.", show_default="SmolLM2")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts.", show_default="those in the checkout")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Number of tokens to generate after each prompt.")] = 64,
    max_prompts: Annotated[
        int | None, typer.Option(help="Maximum number of prompts of each task.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 64,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore what is in the file.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed of the intervals' bootstrap.")] = 0,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "token_drift.json",
    pictures: Annotated[Path, typer.Option(help="Folder to draw to.")] = PICTURES,
    debug: Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")] = False,
):
    """Measure the grid, print it, and write it."""
    with one_line_errors(debug, f"what was measured is in {output}; the same command continues."):
        report = run_drift(
            model=model,
            prompts=prompts,
            path=output,
            settings={"new_tokens": new_tokens, "batch_size": batch_size, "seed": seed},
            max_prompts=max_prompts,
            fresh=fresh,
            command=provenance()["command"],
        )
        if report is None:
            return
        report["findings"] = drift_findings(report, seed=seed)
        write_whole(output, report_text(report))
        table = output.with_suffix(".md")
        names = {"plot": pictures / "drift.png", "reachable": pictures / "drift_reachable.png"}
        write_drift(report, {"table": table, **names}, list(PUBLISHED_DRIFT.values()))
        findings = markdown_table(findings_table(report))
        write_whole(table, f"{drift_markdown(report)}\n## Published findings\n\n{findings}\n")
    print_drift(report)
    for found in report["findings"]:
        print(f"{found['claim']}: {found['verdict']} ({found['measured']})")


if __name__ == "__main__":
    typer.run(main)
