"""
What does a bypass change in the text of SmolLM2, and which published findings hold on it?

    python -m eval.language.token_drift --max-prompts 50 --batch-size 100
    python -m eval.language.token_drift --max-prompts 50 --batch-size 100 --cascade    # afterwards

The first command measures ten bypasses on the prompts of `eval/prompts/prompts.jsonl`, some hours on two cores; the
second one raises the threshold step by step, on prose alone. Every finished bypass is written to the JSON file; the
same command continues an interrupted run. `python -m eval.docs.tables` writes `docs/results/drift.md` from it.
`neuroflow drift` measures your own checkpoint and prompts.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from eval.language.findings import drift_findings
from eval.report import RESULTS, provenance, write_whole
from neuroflow_hf.cli.drift import print_drift, run_drift
from neuroflow_hf.cli.errors import one_line_errors
from neuroflow_hf.drift.report import plot_drift
from neuroflow_hf.utils.files import report_text
from neuroflow_hf.utils.plots import save_plot

PICTURE = Path(__file__).parents[2] / "docs" / "drift.png"
CASCADE = (0.80, 0.82, 0.84, 0.86, 0.88, 0.90)


def cascade_of(report: dict) -> list[dict]:
    """The first published pair of a report at each threshold of the cascade."""
    options = report["configurations"][0]["options"]
    return [options | {"threshold": threshold} for threshold in CASCADE]


def main(
    max_prompts: Annotated[
        int | None, typer.Option(help="Maximum number of prompts of each task.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 64,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Measure thresholds from 0.80 to 0.90 on prose instead.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore what is in the file.")] = False,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "token_drift.json",
    debug: Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")] = False,
):
    """Measure, print and write the drift of each bypass."""
    path = output.with_name("drift_cascade.json") if cascade else output
    with one_line_errors(debug, f"what was measured is in {path}; the same command continues."):
        report = run_drift(
            model=None,
            prompts=None,
            path=path,
            settings={"batch_size": batch_size},
            own=cascade_of(json.loads(output.read_text(encoding="utf-8"))) if cascade else None,
            max_prompts=max_prompts,
            tasks=["prose"] if cascade else None,
            fresh=fresh,
            command=provenance()["command"],
        )
        if not cascade:
            report["findings"] = drift_findings(report)
            write_whole(path, report_text(report))
            save_plot(plot_drift(report), PICTURE if path.parent == RESULTS else path.with_suffix(".png"))
    print_drift(report)
    for found in report.get("findings", ()):
        print(f"{found['claim']}: {found['verdict']} ({found['measured']})")


if __name__ == "__main__":
    typer.run(main)
