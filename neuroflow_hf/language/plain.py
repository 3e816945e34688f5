# Copied from neuroflow_hf.vision.shortcuts
"""Whether a module is nothing but its weights, so that reading them does what calling it would do."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize


def are_plain(modules: Iterable[nn.Module], weights: Iterable[torch.Tensor | None]) -> bool:
    """
    Whether reading the weights does what calling the modules does: the modules are not hooked, offloaded, parametrised
    or given another `forward`; the weights are all there, floating point, and plain tensors.

    The caller checks the modules' classes: adapters and quantised layers have classes of their own.
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
