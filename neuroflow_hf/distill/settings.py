"""What a distillation is asked to do."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.provenance import key_of
from ..video.preprocess import Preprocessor
from ..vision.gate_config import GateOption, NeuroFlowGateConfig
from ..vision.sparse_adapter import TARGETS, require_distillable

METHODS = ("lora", "full")


@dataclass(frozen=True)
class DistillSettings:
    """
    Settings of [`distill`]. The defaults train an adapter; `published()` gives the paper's recipe.

    Args:
        mode (`str`, defaults to `"reconstruct"`): `eliminate`, `reconstruct`, `context` or `extrapolate`.
        summary_tokens (`int`, *optional*): of the gate; default: 64 in `eliminate` and `reconstruct` as far as the
            grid allows, else 0.
        method (`str`, defaults to `"lora"`): `"lora"` trains a sparse adapter and leaves the model as it is; `"full"`
            trains all weights of a copy, which forgets.
        rank (`int`, defaults to 16): of the adapter. 8 is smaller, 32 seldom better.
        targets: the linear maps that the adapter changes, of every encoder layer.
        clip_frames (`int`, defaults to 24): T, the frames of a clip.
        frame_stride (`int`, defaults to 3): a clip takes every Nth frame of a video.
        thresholds: the range from which each clip's gate threshold is drawn, on a logarithmic scale; uniformly in the
            paper's recipe.
        ema_rates: the same of the rate of the running mean that frames are compared with; `None` compares with each
            patch's last update, as streams do by default.
        keyframe_ages: the range from which each clip's `keyframe_interval` is drawn, in frames of the clip.
        active_shares: the range from which the `token_budget` of every second clip or so is drawn, as a share of the
            patches, on a logarithmic scale; in the others the threshold decides. Where less is encoded than in
            training, or more, an adapter does harm. With `None` there are no budgets.
        resolutions: sides in pixels, one of which is drawn for each clip; default: the image processor's.
        batch (`int`, defaults to 4): B, the clips that are encoded together. They share what is drawn.
        accumulate (`int`, defaults to 1): the batches of one optimizer step; a multiple of the number of processes.
        steps (`int`, defaults to 600): optimizer steps.
        learning_rate (`float`, defaults to 2e-4): its largest value; it rises over the first twentieth of the steps
            and falls to 0 as a cosine. Constant in the paper's recipe.
        weight_decay (`float`, defaults to 0.0): of AdamW.
        angle, mse, cosine: weights of the losses, see `losses.py`.
        evaluate_every (`int`, defaults to 50): steps between measurements on held-out clips.
        checkpoint_seconds (`float`, defaults to 120): time between checkpoints.
        seed (`int`, defaults to 0): of everything that is drawn.

    Raises:
        ValueError: for a value outside its range.
    """

    mode: str = "reconstruct"
    summary_tokens: int | None = None
    method: str = "lora"
    rank: int = 16
    targets: tuple[str, ...] = tuple(TARGETS)
    clip_frames: int = 24
    frame_stride: int = 3
    thresholds: tuple[float, float] = (0.003, 0.3)
    ema_rates: tuple[float, float] | None = None
    keyframe_ages: tuple[int, int] = (6, 24)
    active_shares: tuple[float, float] | None = (0.02, 0.5)
    resolutions: tuple[int, ...] = ()
    batch: int = 4
    accumulate: int = 1
    steps: int = 600
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    angle: float = 1.0
    mse: float = 0.0
    cosine: float = 0.0
    evaluate_every: int = 50
    checkpoint_seconds: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_distillable(self.mode)
        if self.method not in METHODS:
            raise ValueError(f"The method is {self.method!r}; expected one of {', '.join(METHODS)}.")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"The targets are {', '.join(self.targets)}; expected some of {', '.join(TARGETS)}.")
        least = {"clip_frames": 2, "frame_stride": 1, "rank": 1, "batch": 1, "accumulate": 1, "steps": 1}
        for name, smallest in {**least, "evaluate_every": 1}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected at least {smallest}.")
        for name in ("thresholds", "ema_rates", "keyframe_ages", "active_shares"):
            ends = getattr(self, name)
            if ends is not None and not 0 < ends[0] <= ends[1]:
                raise ValueError(f"`{name}` is {ends}; expected a range above 0, the smaller end first.")
        if self.active_shares is not None and self.active_shares[1] > 1:
            raise ValueError(f"`active_shares` is {self.active_shares}; expected shares of at most 1.")

    @classmethod
    def published(cls, **changes: Any) -> "DistillSettings":
        """The paper's recipe: all weights, AdamW at 3e-5, thresholds 0.0001 to 0.35, a running mean as reference."""
        recipe: dict[str, Any] = {
            "mode": "eliminate",
            "summary_tokens": 0,
            "method": "full",
            "thresholds": (0.0001, 0.35),
            "ema_rates": (0.001, 0.1),
            "keyframe_ages": (10_000, 10_000),
            "active_shares": None,
            "batch": 1,
            "angle": 0.0,
            "mse": 1.0,
            "cosine": 0.5,
            "learning_rate": 3e-5,
            "weight_decay": 0.01,
        }
        return cls(**{**recipe, **changes})

    def resolved(self, patch_size: int, preprocess: Preprocessor) -> "DistillSettings":
        """With `resolutions` and `summary_tokens` for a model, if they were left to it."""
        sides = self.resolutions or (preprocess.resolution,)
        grid = min(dataclasses.replace(preprocess, resolution=side).patches_per_side(patch_size) for side in sides)
        tokens = self.summary_tokens
        if tokens is None:
            tokens = min(8, grid) ** 2 if self.mode in ("eliminate", "reconstruct") else 0
        return dataclasses.replace(self, resolutions=sides, summary_tokens=tokens)

    def gate(self, **options: GateOption) -> NeuroFlowGateConfig:
        """The options of a stream, of resolved settings."""
        return NeuroFlowGateConfig.from_options(
            {"mode": self.mode, "summary_tokens": self.summary_tokens, "on_change": "keyframe"}, **options
        )

    def draw_gate(self, rng: np.random.Generator, num_patches: int) -> NeuroFlowGateConfig:
        """The gate of one batch of clips."""
        uniform = self.method == "full"
        threshold = rng.uniform(*self.thresholds) if uniform else log_uniform(rng, self.thresholds)
        options: dict[str, Any] = {
            "threshold": threshold,
            "keyframe_interval": int(rng.integers(self.keyframe_ages[0], self.keyframe_ages[1] + 1)),
        }
        if self.ema_rates is not None:
            options |= {"reference": "ema", "ema_rate": rng.uniform(*self.ema_rates)}
        if self.active_shares is not None and rng.random() < 0.5:
            options["token_budget"] = max(1, round(log_uniform(rng, self.active_shares) * num_patches))
        return self.gate(**options)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.method == "full":
            return self.learning_rate
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2

    def key(self, **depends: Any) -> str:
        """Changes with whatever the result depends on; not with how often it is saved."""
        values = dataclasses.asdict(self)
        del values["checkpoint_seconds"]
        return key_of(settings=values, **depends)


def log_uniform(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    """A number between two positive ends, its logarithm uniformly distributed."""
    low, high = map(math.log, ends)
    return math.exp(rng.uniform(low, high))
