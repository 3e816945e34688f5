"""
How long does it take until the package is imported, and until the command line answers?

    python -m eval.start_up     # two minutes on an idle machine

Each command runs in a process of its own, in turns; the first turn, which fills the disk's cache, does not count.
Writes `eval/results/start_up.json`, shown in `docs/results/speed.md`.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from eval.docs.speed import start_up_table
from eval.report import RESULTS, provenance, publish

COMMANDS = {
    "`import transformers`": ["-c", "import transformers"],
    "`import torch`": ["-c", "import torch"],
    "`from transformers import AutoModel`": ["-c", "from transformers import AutoModel"],
    "`from transformers import SiglipModel`": ["-c", "from transformers import SiglipModel"],
    "`import neuroflow_hf`": ["-c", "import neuroflow_hf"],
    "`neuroflow --help`": ["-m", "neuroflow_hf.cli", "--help"],
}
REPEATS = 5


def seconds_of(arguments: list[str]) -> float:
    """Wall clock of a Python process with these arguments; CalledProcessError if it fails."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - begun


def main(
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "start_up.json",
):
    """Time all commands, and show the table."""
    turns = [{name: seconds_of(arguments) for name, arguments in COMMANDS.items()} for _ in range(REPEATS + 1)][1:]
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in COMMANDS}
    report = {**provenance(), "repeats": REPEATS, "seconds": seconds, "turns": turns}
    publish(output, report, start_up_table(report))


if __name__ == "__main__":
    typer.run(main)
