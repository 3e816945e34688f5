"""
Which methods are compared, at which settings: presets, modes, and the baselines that each has to beat.

    specs = [DENSE, *preset_methods(), *mode_methods(few=True), FIRST, *hold_controls(), *smaller_controls(model)]
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from ..vision.gate_config import PRESETS
from .methods import MethodSpec, tower_of

DENSE = MethodSpec("dense", "dense", "dense")
FIRST = MethodSpec("first frame repeated", "first frame", "first", control=True)

EMA = {"reference": "ema", "ema_rate": 0.05}  # as the paper gates
# family, the option that names a setting, and the options of each setting; the first is used alone with `few`
MODE_SETTINGS: tuple[tuple[str, str, tuple[dict, ...]], ...] = (
    ("extrapolate", "sentinels", tuple({"mode": "extrapolate", "sentinels": share} for share in (0.05, 0.02, 0.2))),
    ("context", "threshold", tuple({"mode": "context", "threshold": level} for level in (0.01, 0.001, 0.05))),
    (
        "reconstruct (the paper's C)",
        "threshold",
        tuple({"mode": "reconstruct", "threshold": level, **EMA} for level in (0.01, 0.003, 0.05)),
    ),
    (
        "eliminate (the paper's B, not distilled)",
        "threshold",
        tuple({"mode": "eliminate", "threshold": level, **EMA} for level in (0.01, 0.003, 0.05)),
    ),
    (
        "mlp (the paper's A)",
        "threshold",
        tuple({"mode": "mlp", "threshold": level, **EMA} for level in (0.01, 0.05)),
    ),
)

EVERY = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 48)
FEW_EVERY = (4, 8)
# from near 0 to near 1 of dense's cost on any footage
SURPRISE_LEVELS = tuple(float(f"{level:.3g}") for level in np.geomspace(0.002, 0.4, 14))
FEW_SURPRISE_LEVELS = (0.05, 0.1)
PIXEL_LEVELS = tuple(float(f"{level:.3g}") for level in np.geomspace(0.005, 0.7, 14))
FEW_PIXEL_LEVELS = (0.1, 0.2)
# one level at which any motion asks for a keyframe, and one that ignores small changes
BUDGET_LEVELS = (0.02, 0.1)
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
FEW_BUDGETS = (0.15, 0.25)
SMALLER_SHARES = (0.5, 0.25, 0.375, 0.625, 0.75)  # of the side
MERGED_SHARES = (0.25, 0.08, 0.04, 0.15)  # of the patches, in each layer
MERGED_DECREASING = (0.08, 0.04, 0.15)


def preset_methods() -> list[MethodSpec]:
    """The package's presets, the cheapest first."""
    return [MethodSpec(name, "presets", "stream", dict(options)) for name, options in reversed(PRESETS.items())]


def mode_methods(few: bool = False) -> list[MethodSpec]:
    """
    Every mode at several settings; with `few` at one, and none of `extrapolate`, which is the presets' mode.
    """
    return [
        MethodSpec(f"{family}, {dial} {options[dial]:g}", family, "stream", options)
        for family, dial, settings in MODE_SETTINGS
        for options in (settings[: 0 if family == "extrapolate" else 1] if few else settings)
    ]


def hold_controls(few: bool = False) -> list[MethodSpec]:
    """
    Baselines that hold dense embeddings: every k frames, by surprise, by surprise within a budget, by the
    difference of pixels. They have many settings, which cost little to measure, because a mixture of two distant ones
    is worse than a setting between them. With `few`, two each, so that many frames are dense in none of them.
    """

    def over(kind: str, family: str, levels: Sequence[float]) -> list[MethodSpec]:
        return [MethodSpec(f"{kind} over {level:.3g}", family, kind, {"level": level}, True) for level in levels]

    return [
        *(MethodSpec(f"every {k}", "every k", "every", {"k": k}, True) for k in (FEW_EVERY if few else EVERY)),
        *over("surprise", "surprise", FEW_SURPRISE_LEVELS if few else SURPRISE_LEVELS),
        *(
            MethodSpec(
                f"surprise over {level:g} within a budget of {budget:g}",
                f"surprise over {level:g}, budget",
                "surprise",
                {"level": level, "budget": budget},
                True,
            )
            for level in BUDGET_LEVELS
            for budget in (FEW_BUDGETS if few else BUDGETS)
        ),
        *over("pixels", "pixel difference", FEW_PIXEL_LEVELS if few else PIXEL_LEVELS),
    ]


def smaller_controls(model: nn.Module, few: bool = False) -> list[MethodSpec]:
    """
    Baselines that encode every frame with fewer tokens: fewer pixels, and Token Merging.

    Args:
        model: its resolution sets the numbers of tokens.
        few: one or two settings each.
    """
    tower = tower_of(model)
    side, patch = tower.config.image_size // tower.config.patch_size, tower.config.patch_size

    def some(settings: Sequence, count: int) -> Sequence:
        return settings[:count] if few else settings

    smaller = {round(share * side) for share in some(SMALLER_SHARES, 2)} - {0, side}
    merged = [
        *((max(1, round(share * math.prod((side, side)))), "constant") for share in some(MERGED_SHARES, 1)),
        *((max(1, round(share * math.prod((side, side)))), "decreasing") for share in some(MERGED_DECREASING, 1)),
    ]
    return [
        *(
            MethodSpec(f"{cells * patch} px", "smaller input", "smaller", {"resolution": cells * patch}, True)
            for cells in sorted(smaller)
        ),
        *(
            MethodSpec(f"ToMe {r}, {how}", f"ToMe, {how}", "merged", {"r": r, "schedule": how}, True)
            for r, how in dict.fromkeys(merged)
        ),
    ]
