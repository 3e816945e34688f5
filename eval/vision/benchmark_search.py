"""
How long does a search among a million frames take, all of them compared?

    python -m eval.vision.benchmark_search     # half a minute, and a gigabyte of disk

Random embeddings in half precision, in files of 10,000 as `neuroflow search` keeps them, mapped into memory. Timed is
what it does after loading the checkpoint: the similarity of every frame, and the ten best moments. Processor time does
not depend on what else the machine does. Writes `eval/results/benchmark_search.json`, shown in
`docs/guides/archives.md`.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from eval.docs.speed import search_table
from eval.report import RESULTS, provenance, publish
from eval.vision.benchmark_vision import spread
from neuroflow_hf.archive.index import ENDING, map_rows
from neuroflow_hf.archive.search import find_moments, similarities

ROWS = 10_000  # of a file
FRAMES, DIMS, REPEATS = (100_000, 1_000_000), (384, 768), 5


def mapped_embeddings(folder: Path, frames: int, dim: int) -> list[torch.Tensor]:
    """Random embeddings, float16 [frames, dim] in all, in files of at most `ROWS`."""
    generator = np.random.default_rng(0)
    files = []
    for begin in range(0, frames, ROWS):
        files.append(folder / f"{begin}{ENDING}")
        rows = min(ROWS, frames - begin)
        generator.standard_normal((rows, dim), np.float32).astype(np.float16).tofile(files[-1])
    return [map_rows(file, dim) for file in files]


def time_search(frames: int, dim: int) -> dict:
    """Seconds of processor time of a search: of all similarities, and of the moments."""
    seconds: dict[str, list[float]] = {"similarities": [], "moments": []}
    with tempfile.TemporaryDirectory() as folder:
        parts = mapped_embeddings(Path(folder), frames, dim)
        lengths = [len(part) for part in parts]
        times = [torch.arange(length, dtype=torch.float64) for length in lengths]
        for turn in range(REPEATS + 1):  # the first reads the files
            begun = time.process_time()
            scores = similarities(parts, torch.randn(dim))
            compared = time.process_time()
            find_moments(scores, lengths, times.__getitem__)
            if turn:
                seconds["similarities"].append(compared - begun)
                seconds["moments"].append(time.process_time() - compared)
    return {"frames": frames, "dim": dim, "processor_seconds": {name: spread(seconds[name]) for name in seconds}}


def main(
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "benchmark_search.json",
):
    """Time searches of all sizes, and show the table."""
    torch.manual_seed(0)
    report = {**provenance(), "cases": [time_search(frames, dim) for frames in FRAMES for dim in DIMS]}
    publish(output, report, search_table(report))


if __name__ == "__main__":
    typer.run(main)
