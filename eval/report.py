"""What the scripts of this folder share: percentiles, where a figure comes from."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
import transformers

import neuroflow_hf
from neuroflow_hf.utils.provenance import fill_block, write_whole

__all__ = ["RESULTS", "fill_block", "percentile", "provenance", "write_json", "write_whole"]

RESULTS = Path(__file__).parent / "results"


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def provenance() -> dict:
    """The command, the machine and the versions behind a result."""
    return {
        "command": shlex.join(["python", f"eval/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "neuroflow_hf": neuroflow_hf.__version__,
        },
    }


def write_json(path: Path, report: dict):
    """Write a report, whole or not at all."""
    write_whole(path, json.dumps(report, indent=2) + "\n")
