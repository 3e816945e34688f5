"""Distillation: train what a mode computes on sparse frames towards the dense model's embeddings."""

from .settings import DistillSettings
from .train import DistillResult, distill

__all__ = ["DistillResult", "DistillSettings", "distill"]
