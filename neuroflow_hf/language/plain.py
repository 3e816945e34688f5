# Copied from neuroflow_hf.vision.shortcuts
"""Whether a module is nothing but its weights, so that reading them does what calling it would do."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize


def are_plain(modules: Iterable[nn.Module], weights: Iterable[torch.Tensor | None]) -> bool:
    """
    Whether the modules are called for nothing but their weights: neither hooked, offloaded, parametrised nor given
    another `forward`, and the weights all there, floating point, not quantised and not of a class of their own.

    The caller makes sure of the modules' classes: adapters and quantised layers are modules of other ones.
    """
    return all(
        weight is not None
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        for weight in weights
    ) and not any(
        hasattr(module, "_hf_hook")
        or "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or parametrize.is_parametrized(module)
        for module in modules
    )
