"""
What do the linear layers of an encoder layer take on few rows, and what would make them faster?

    python -m eval.vision.linear_costs    # a minute; best on an idle machine

The six products of a layer of the small SigLIP, with biases, one thread. A sparse frame has as many rows as active
patches. Twelve layers' weights take turns, as in a tower, so that they do not stay in the processor's caches. Ways: as
transformers computes them; query, key and value as one product; weights times tokens; weights that oneDNN or MKL has
packed beforehand; int8 weights with bfloat16 tokens; and all threads. The ways take turns, and the figure is the
median. Writes `eval/results/linear_costs.json`, shown in `docs/results/speed.md`.
"""

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import linear

from eval.docs.speed import linear_costs_table
from eval.report import RESULTS, provenance, publish
from neuroflow_hf.utils.jobs import timed

WIDTH, INNER, LAYERS = 384, 1536, 12
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH), (WIDTH, INNER)]  # out, in: query, key, value, output, and the MLP
FUSED = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), *SHAPES[4:]]
ROWS, REPEATS = (8, 16, 32, 64, 128, 256), 60
CPU = torch.device("cpu")
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def turned(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Weights times tokens."""
    return torch.addmm(bias[:, None], weight, rows.T).T


def by_onednn(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """By oneDNN, from weights that it has packed."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def by_mkl(rows: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
    """By MKL, from weights that it has packed."""
    return torch.ops.mkl._mkl_linear(rows, *packed, bias, len(rows))


def by_int8(rows: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
    """Weights of int8 with a scale for each output; torch has a fast kernel for tokens of bfloat16 only."""
    return torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), *packed).float() + bias


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] as int8, and the scales bfloat16 [out]."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()


def on_threads(compute: Callable[[], object], threads: int) -> Callable[[], object]:
    """`compute` with this number of threads, and with one afterwards."""

    def run() -> object:
        torch.set_num_threads(threads)
        try:
            return compute()
        finally:
            torch.set_num_threads(1)

    return run


def ways(count: int, threads: int) -> dict[str, Callable[[], object]]:
    """For each way a function that computes the products of the next layer on `count` rows."""

    def layers(shapes: list[tuple[int, int]], pack: Callable = lambda weight: weight) -> list[list]:
        return [[(pack(torch.randn(shape) / WIDTH), torch.randn(shape[0])) for shape in shapes] for _ in range(LAYERS)]

    def computed(product: Product, weights: list[list]) -> Callable[[], object]:
        inputs = {width: torch.randn(count, width) for width in (WIDTH, INNER)}
        order = itertools.cycle(weights)
        widths = [WIDTH] * (len(weights[0]) - 1) + [INNER]
        return lambda: [product(inputs[width], *one) for width, one in zip(widths, next(order), strict=True)]

    found = {
        "as transformers": computed(linear, layers(SHAPES)),
        "query, key, value as one": computed(linear, layers(FUSED)),
        "weights times tokens": computed(turned, layers(SHAPES)),
    }
    if torch.backends.mkldnn.is_available():
        pack = torch.ops.mkldnn._reorder_linear_weight
        found["packed by oneDNN"] = computed(by_onednn, layers(SHAPES, lambda weight: pack(weight, count)))
    if torch.backends.mkl.is_available():
        reorder = torch.ops.mkl._mkl_reorder_linear_weight
        found["packed by MKL"] = computed(by_mkl, layers(SHAPES, lambda weight: (reorder(weight, count), weight)))
    found["int8 weights"] = computed(by_int8, layers(SHAPES, to_int8))
    found[f"{threads} threads"] = on_threads(computed(linear, layers(SHAPES)), threads)
    return found


@torch.inference_mode()
def main(
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "linear_costs.json",
):
    """Time all ways on all numbers of rows, and show the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for count in ROWS:
        products = ways(count, threads)
        times: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(REPEATS):
            for name, compute in products.items():
                times[name].append(timed(compute, CPU)[1])
        rows.append({"rows": count, "ms": {name: statistics.median(values) for name, values in times.items()}})
    report = {**provenance(), "width": WIDTH, "inner": INNER, "rows": rows}
    publish(output, report, linear_costs_table(report))


if __name__ == "__main__":
    typer.run(main)
