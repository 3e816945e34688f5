"""The student: the model with a sparse adapter that is trained, or a copy of it that is trained whole."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from ..vision.sparse_adapter import SparseAdapter
from .settings import DistillSettings


class Student:
    """
    A student of a dense model, whose own weights are not changed: `model` encodes clips, and `trained` is the module
    that holds what is trained. `base` is the checkpoint's name.
    """

    def __init__(self, teacher: NeuroFlowSiglipVisionModel, settings: DistillSettings, base: str | None):
        self.settings = settings
        if settings.method == "full":
            self.model = copy.deepcopy(teacher).requires_grad_(True)
            self.trained: nn.Module = self.model
            return
        torch.manual_seed(settings.seed)
        adapter = SparseAdapter(teacher, settings.gate(), settings.rank, settings.rank, settings.targets, base)
        self.model = copy.copy(teacher)  # shares the weights, and leaves the teacher without the adapter
        self.model._modules = dict(teacher._modules)
        self.model.sparse_adapter = adapter.to(teacher.device).requires_grad_(True)
        self.trained = adapter

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order."""
        return [parameter for _, parameter in sorted(self.trained.named_parameters())]

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is trained, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.trained.named_parameters()}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Continue from `weights()`."""
        with torch.no_grad():
            for name, value in self.trained.named_parameters():
                value.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the adapter in half precision, or the whole model."""
        if self.settings.method == "full":
            self.model.save_pretrained(folder)
            return
        adapter = self.model.sparse_adapter
        assert adapter is not None
        self.model.sparse_adapter = copy.deepcopy(adapter).half()
        try:
            self.model.save_sparse_adapter(folder)
        finally:
            self.model.sparse_adapter = adapter
