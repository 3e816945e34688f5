"""
Methods that give an embedding for every frame of B videos: dense, streams and baselines, behind one interface.

    (method,) = make_methods(model, [MethodSpec("every 8", "every k", "every", {"k": 8}, control=True)])
    method.start(2)
    for pixel_values in frames:  # [2, 3, H, W] each
        step = method.step(pixel_values)

Costs are multiply-adds relative to a dense frame of the same resolution.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..vision import cost
from ..vision.gate_config import NeuroFlowGateConfig
from ..vision.patches import project_patches
from ..vision.selection import surprise
from ..vision.tower import VisionTower

GOLDEN = (math.sqrt(5) - 1) / 2
HELD = ("every", "surprise", "pixels", "first")  # kinds that hold dense embeddings


@dataclass(frozen=True, eq=False)
class Step:
    """What a method gave for one frame of B videos."""

    embeddings: Tensor  # float32 [B, D], the pooled output
    cost: Tensor  # float32 [B], relative to dense
    skip_rate: Tensor  # float32 [B], share of patches not encoded; NaN if the method has no such share


@dataclass(frozen=True)
class MethodSpec:
    """Description of a method, as JSON can hold it."""

    name: str  # unique among the methods compared
    family: str  # the curve over cost to which it belongs
    kind: str  # a key of `KINDS`
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the kind's class
    control: bool = False  # whether it is a baseline

    @property
    def shares_dense(self) -> bool:
        """Whether it returns dense embeddings, which can be computed once for all such methods."""
        return self.kind in ("dense", *HELD)


def tower_of(model: nn.Module) -> VisionTower:
    """The vision tower of a model with or without a text tower."""
    return getattr(model, "vision_model", model)


def patches_of(tower: VisionTower, pixel_values: Tensor) -> int:
    """Number of patches of each frame in [B, 3, H, W]."""
    height, width = pixel_values.shape[-2:]
    return (height // tower.config.patch_size) * (width // tower.config.patch_size)


def sizes_of(tower: VisionTower) -> dict[str, int]:
    """The model's sizes as arguments of the functions in `vision/cost.py`."""
    config, parts = tower.config, tower.encoder_layers()[0].parts()
    features = config.num_channels * config.patch_size**2
    return {"dim": parts.dim, "inner": parts.inner, "patch_features": features, "num_heads": parts.num_heads}


def dense_cost(tower: VisionTower, num_patches: int) -> int:
    """Multiply-adds of a dense frame of `num_patches` patches, its pooling included."""
    sizes, tokens = sizes_of(tower), num_patches + tower.num_prefix_tokens
    pooling = tower.pooling(exact=True)
    return (
        cost.patch_projection(num_patches, sizes["dim"], sizes["patch_features"])
        + cost.encoder(tokens, len(tower.encoder_layers()), sizes["dim"], sizes["inner"])
        + (0 if pooling is None else pooling.dense_cost(tokens))
    )


def looking_cost(tower: VisionTower, num_patches: int) -> int:
    """Multiply-adds of projecting a frame's patches and comparing them with one reference."""
    sizes = sizes_of(tower)
    projection = cost.patch_projection(num_patches, sizes["dim"], sizes["patch_features"])
    return projection + cost.gate(num_patches, sizes["dim"], 1)


class DenseFrames:
    """Dense embeddings, computed when first asked for, shared by methods that are given the same `pixel_values`."""

    def __init__(self, model: nn.Module):
        self.tower = tower_of(model)
        self._frame: Tensor | None = None
        self._rows: dict[int, Tensor] = {}

    def of(self, pixel_values: Tensor, rows: Sequence[int]) -> Tensor:
        """Embeddings float32 [len(rows), D] of the frames [B, 3, H, W] at these places."""
        if pixel_values is not self._frame:
            self._frame, self._rows = pixel_values, {}
        missing = [row for row in rows if row not in self._rows]
        if missing:
            part = pixel_values if len(missing) == len(pixel_values) else pixel_values[missing]
            embeddings = self.tower(part, interpolate_pos_encoding=True).pooler_output.float()
            self._rows.update(zip(missing, embeddings, strict=True))
        if not rows:
            return torch.empty(0, self.tower.config.hidden_size, device=pixel_values.device)
        return torch.stack([self._rows[row] for row in rows])


class Method(ABC):
    """Gives an embedding for every frame."""

    follows = True  # whether an embedding depends on earlier frames, so that the method has to see all frames
    nbytes = 0  # size of what the method remembers of the videos

    def start(self, count: int):  # noqa: B027  # optional
        """Start `count` new videos, B."""

    @abstractmethod
    def step(self, pixel_values: Tensor, wanted: Tensor | None = None) -> Step:
        """
        Take the next frame of each video, [B, 3, H, W] as the checkpoint's preprocessing makes them, in the model's
        dtype. `wanted`, bool [B], says which embeddings are needed; None for all. A method that does not follow
        computes only these; the other rows are NaN.
        """


def true_rows(mask: Tensor) -> list[int]:
    """The indices at which a mask, bool [B], is true."""
    return mask.nonzero()[:, 0].tolist()


class EachFrame(Method):
    """Encodes each frame independently, at the same cost."""

    follows = False
    skip_rate = math.nan

    def step(self, pixel_values: Tensor, wanted: Tensor | None = None) -> Step:
        count = len(pixel_values)
        rows = list(range(count)) if wanted is None else true_rows(wanted)
        found, spent = self.encode(pixel_values, rows)
        embeddings = found.new_full((count, found.shape[-1]), math.nan, dtype=torch.float32)
        embeddings[rows] = found.float()
        return Step(embeddings, torch.full((count,), spent), torch.full((count,), self.skip_rate))

    @abstractmethod
    def encode(self, pixel_values: Tensor, rows: Sequence[int]) -> tuple[Tensor, float]:
        """Embeddings [len(rows), D] of the frames [B, 3, H, W] at these places, and the cost of a frame."""


class Dense(EachFrame):
    """Every frame in full."""

    skip_rate = 0.0

    def __init__(self, model: nn.Module, frames: DenseFrames | None = None):
        self.frames = frames or DenseFrames(model)

    def encode(self, pixel_values: Tensor, rows: Sequence[int]) -> tuple[Tensor, float]:
        return self.frames.of(pixel_values, rows), 1.0


class Smaller(EachFrame):
    """Every frame dense at `resolution` pixels a side. Resizing is not counted: preprocessing resizes in any case."""

    def __init__(self, model: nn.Module, resolution: int):
        self.tower, self.resolution = tower_of(model), resolution

    def encode(self, pixel_values: Tensor, rows: Sequence[int]) -> tuple[Tensor, float]:
        side = (self.resolution, self.resolution)
        pixels = functional.interpolate(pixel_values[rows].float(), size=side, mode="bilinear", antialias=True)
        spent, whole = (dense_cost(self.tower, patches_of(self.tower, some)) for some in (pixels, pixel_values))
        found = self.tower(pixels.to(pixel_values.dtype), interpolate_pos_encoding=True)
        return found.pooler_output, spent / whole


class Streamed(Method):
    """A NeuroFlow stream with the package's default gate options, or those given; the checkpoint's are not used."""

    def __init__(self, model: nn.Module, **gate: Any):
        self.tower = tower_of(model)
        self.gate = NeuroFlowGateConfig.from_options({}, **gate)

    def start(self, count: int):
        self.stream = self.tower.new_stream(batch_size=count, **self.gate.to_dict())

    def step(self, pixel_values: Tensor, wanted: Tensor | None = None) -> Step:
        output = self.tower(pixel_values, stream=self.stream, interpolate_pos_encoding=True)
        return Step(output.pooler_output.float(), output.cost.float(), output.skip_rate.float())

    @property
    def nbytes(self) -> int:
        return self.stream.nbytes


class Held(Method):
    """
    Dense embeddings of keyframes, held in between. Keyframes are the first frame of each video, and frames whose
    `distance` to the last keyframe is more than `level`, if `budget` (`cost_budget` of the gate; None for no limit)
    allows one. `frames` are dense embeddings that are shared with other methods.
    """

    def __init__(
        self, model: nn.Module, level: float = 0.0, frames: DenseFrames | None = None, budget: float | None = None
    ):
        self.frames = frames or DenseFrames(model)
        self.tower, self.level = self.frames.tower, level
        self.gate = NeuroFlowGateConfig(mode="hold", cost_budget=budget)
        self.number = 0
        self.credit: list[float] = []
        self.held = self.reference = torch.empty(0)  # of the last keyframe: [B, D], and what was observed, [B, ...]

    def start(self, count: int):
        self.number, self.credit = 0, [self.gate.cost_reserve] * count

    def step(self, pixel_values: Tensor, wanted: Tensor | None = None) -> Step:
        now, count = self.observe(pixel_values), len(pixel_values)
        if self.number == 0:
            keyframes = torch.ones(count, dtype=torch.bool)
            self.held, self.reference = self.frames.of(pixel_values, range(count)).clone(), now.clone()
        else:
            keyframes = (self.distance(now, self.reference) > self.level).cpu()
            if self.gate.cost_budget is not None:
                keyframes = keyframes & (torch.tensor(self.credit) > 0)
            rows = true_rows(keyframes)
            self.held[rows], self.reference[rows] = self.frames.of(pixel_values, rows), now[rows]
        whole = dense_cost(self.tower, patches_of(self.tower, pixel_values))
        costs = torch.where(keyframes, *(torch.tensor(part / whole) for part in self.costs(pixel_values, whole)))
        self.credit = [
            self.gate.budget.credit_after(credit, self.number, cost)
            for credit, cost in zip(self.credit, costs.tolist(), strict=True)
        ]
        self.number += 1
        return Step(self.held.clone(), costs, 1 - keyframes.float())

    @property
    def nbytes(self) -> int:
        return self.held.nbytes + self.reference.nbytes

    @abstractmethod
    def observe(self, pixel_values: Tensor) -> Tensor:
        """What to compare of frames [B, 3, H, W]: [B, ...]."""

    @abstractmethod
    def distance(self, now: Tensor, reference: Tensor) -> Tensor:
        """The distance between two observations [B, ...]: [B]."""

    @abstractmethod
    def costs(self, pixel_values: Tensor, whole: int) -> tuple[float, float]:
        """Multiply-adds of a keyframe and of any other frame, if a dense frame takes `whole`."""


class EveryFrames(Held):
    """
    A keyframe every k frames; for None, only the first frame. The keyframes of several videos fall on different
    frames, so that frames sampled at regular intervals favour no k.
    """

    def __init__(self, model: nn.Module, k: int | None = None, frames: DenseFrames | None = None):
        super().__init__(model, frames=frames)
        self.k = k

    def observe(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.new_empty(len(pixel_values), 0)

    def distance(self, now: Tensor, reference: Tensor) -> Tensor:
        if self.k is None:
            return torch.zeros(len(now))
        phases = torch.tensor([int((video * GOLDEN % 1) * self.k) for video in range(len(now))])
        return ((phases + self.number) % self.k == 0).float()

    def costs(self, pixel_values: Tensor, whole: int) -> tuple[float, float]:
        return whole, 0.0


class PatchSurprise(Held):
    """By the mean surprise of the patches, as in mode `hold` with `keyframe_surprise`."""

    def observe(self, pixel_values: Tensor) -> Tensor:
        return project_patches(self.tower, pixel_values, as_product=True)

    def distance(self, now: Tensor, reference: Tensor) -> Tensor:
        return surprise(now, reference).mean(-1)

    def costs(self, pixel_values: Tensor, whole: int) -> tuple[float, float]:
        patches, pooling = patches_of(self.tower, pixel_values), self.tower.pooling(exact=False)
        keyframe = whole + cost.gate(patches, sizes_of(self.tower)["dim"], 1)  # reuses the projection of the patches
        if pooling is not None:
            tokens = patches + self.tower.num_prefix_tokens
            keyframe += pooling.cost(tokens, with_summary=False) - pooling.dense_cost(tokens)
        return keyframe, looking_cost(self.tower, patches)


class PixelDifference(Held):
    """By the mean absolute difference of the preprocessed pixel values."""

    def observe(self, pixel_values: Tensor) -> Tensor:
        return pixel_values

    def distance(self, now: Tensor, reference: Tensor) -> Tensor:
        return (now.float() - reference.float()).abs().flatten(1).mean(-1)

    def costs(self, pixel_values: Tensor, whole: int) -> tuple[float, float]:
        looking = pixel_values[0].numel()  # a subtraction for each pixel and channel
        return whole + looking, looking


KINDS: dict[str, type[Method]] = {
    "dense": Dense,
    "stream": Streamed,
    "first": EveryFrames,
    "every": EveryFrames,
    "surprise": PatchSurprise,
    "pixels": PixelDifference,
    "smaller": Smaller,
}


def make_methods(model: nn.Module, specs: Sequence[MethodSpec]) -> list[Method]:
    """Make methods from their descriptions. Methods that return dense embeddings share them."""
    shared = {"frames": DenseFrames(model)}
    return [KINDS[spec.kind](model, **(shared if spec.shares_dense else {}), **spec.options) for spec in specs]
