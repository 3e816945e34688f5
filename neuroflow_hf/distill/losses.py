"""What a student's output costs it. All are means, and 0 where it equals the teacher's."""

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL_ANGLE = 0.02  # radians, a cosine of 0.9998: what is nearer than this counts as right


def embedding_loss(student: Tensor, teacher: Tensor, mse: float, cosine: float) -> Tensor:
    """
    `mse` times the mean squared error, and `cosine` times 1 - cosine, of embeddings [B, D]: a scalar. With 1 and 0.5,
    the loss of the paper's distillation.
    """
    distance = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return mse * F.mse_loss(student, teacher) + cosine * distance.mean()


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """
    log(1 + angle / SMALL_ANGLE) of the angle between embeddings [B, D], in radians, averaged: a scalar. A smaller
    *share* of the angle counts the same for near and far embeddings, so that frames in which much changes do not
    outweigh frames that are nearly right.
    """
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
    return torch.log1p(angle / SMALL_ANGLE).mean()


def cosines(student: Tensor, teacher: Tensor) -> Tensor:
    """The cosine of each embedding to the teacher's, [B, D] to float64 [B]."""
    return F.cosine_similarity(student.detach().double(), teacher.double(), dim=-1)
