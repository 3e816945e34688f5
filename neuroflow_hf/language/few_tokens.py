"""
Matrix products for a few tokens on the CPU.

`linear` of 2 to 16 tokens takes about twice the time of one token where the matrix library copies the weights into
another order first. Weights times tokens, instead of tokens times weights, spares it that. The result is the same but
for rounding.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from .plain import are_plain

MAX_TOKENS = 16
SAMPLE = (2048, 576, 4)  # outputs, inputs and tokens of the products that are timed
REPEATS = 5


def turned_linear(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` of tokens [..., n, K] and a weight [O, K], as the transpose of weight times tokens: [..., n, O]."""
    product = weight @ tokens.reshape(-1, tokens.shape[-1]).t()
    return product.t().contiguous().view(*tokens.shape[:-1], -1)


@functools.cache
def is_turned_faster(threads: int) -> bool:
    """Whether `turned_linear` is faster for a few tokens, timed once here for this number of threads."""
    outputs, inputs, count = SAMPLE
    weight, tokens = torch.ones(outputs, inputs), torch.ones(count, inputs)

    def seconds(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        begun = time.perf_counter()
        product(tokens, weight)
        return time.perf_counter() - begun

    times = [(seconds(turned_linear), seconds(functional.linear)) for _ in range(REPEATS)]
    return min(turned for turned, _ in times) < min(usual for _, usual in times)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model that [`turned`] changes; none if that saves no time."""
    found = [
        cast(nn.Linear, module)
        for module in model.modules()
        if type(module) is nn.Linear
        and module.bias is None
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and are_plain([module], [module.weight])
    ]
    return found if found and is_turned_faster(torch.get_num_threads()) else []


@contextmanager
def turned(layers: list[nn.Linear], count: int) -> Iterator[None]:
    """Within the context, these layers multiply weights by tokens, if `count` tokens are few, but more than one."""
    if not 1 < count <= MAX_TOKENS:
        layers = []
    for layer in layers:
        layer.forward = functools.partial(turned_linear, weight=layer.weight)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # another thread may have been first
