"""
Which methods are compared, at which settings: presets, modes, and the baselines that each has to beat.

    specs = [DENSE, *preset_methods(), *mode_methods(few=True), FIRST, *hold_baselines(), *smaller_baselines(model)]
"""

from collections.abc import Sequence

import numpy as np
from torch import nn

from ..vision.gate_config import PRESETS
from .methods import MethodSpec, tower_of

DENSE = MethodSpec("dense", "dense", "dense")
TUNED = "own settings"  # those of a configuration file
FIRST = MethodSpec("first frame repeated", "first frame", "first", control=True)

EMA = {"reference": "ema", "ema_rate": 0.05}  # the paper's gate
# mode, its name in the paper, the option that is varied, its values (only the first with `few`), other options
MODE_SETTINGS: tuple[tuple[str, str, str, tuple[float, ...], dict], ...] = (
    ("extrapolate", "", "sentinels", (0.05, 0.02, 0.2), {}),
    ("context", "", "threshold", (0.01, 0.001, 0.05), {}),
    ("reconstruct", " (the paper's C)", "threshold", (0.01, 0.003, 0.05), EMA),
    ("eliminate", " (the paper's B, not distilled)", "threshold", (0.01, 0.003, 0.05), EMA),
    ("mlp", " (the paper's A)", "threshold", (0.01, 0.05), EMA),
)

EVERY, FEW_EVERY = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 48), (4, 8)
# from near 0 to near 1 of dense's cost on any footage
SURPRISE_LEVELS, FEW_SURPRISE_LEVELS = np.geomspace(0.002, 0.4, 14), (0.05, 0.1)
PIXEL_LEVELS, FEW_PIXEL_LEVELS = np.geomspace(0.005, 0.7, 14), (0.1, 0.2)
BUDGET_LEVELS = (0.02, 0.1)  # the first takes a keyframe at any motion, the second ignores small changes
BUDGETS, FEW_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5), (0.15, 0.25)
SMALLER_SHARES = (0.5, 0.25, 0.375, 0.625, 0.75)  # of the side
# of the patches, in each layer; by schedule
MERGED_SHARES = {"constant": (0.25, 0.08, 0.04, 0.15), "decreasing": (0.08, 0.04, 0.15)}


def preset_methods() -> list[MethodSpec]:
    """The package's presets, the cheapest first."""
    return [MethodSpec(name, "presets", "stream", dict(options)) for name, options in reversed(PRESETS.items())]


def mode_methods(few: bool = False) -> list[MethodSpec]:
    """Every mode at several settings; with `few`, at one, and without `extrapolate`, which is the presets' mode."""
    return [
        MethodSpec(f"{mode}{note}, {name} {value:g}", mode + note, "stream", {"mode": mode, name: value, **others})
        for mode, note, name, values, others in MODE_SETTINGS
        if not (few and mode == "extrapolate")
        for value in (values[:1] if few else values)
    ]


def hold_baselines(few: bool = False) -> list[MethodSpec]:
    """
    Baselines that hold dense embeddings: every k frames, by surprise, by surprise within a budget, and by the
    difference of pixels. There are many settings, because a mixture of two distant settings is worse than a setting
    between them, and each costs little to measure; with `few`, two of each.
    """

    def over(kind: str, family: str, levels: Sequence[float]) -> list[MethodSpec]:
        rounded = [float(f"{level:.3g}") for level in levels]
        return [MethodSpec(f"{kind} over {level:g}", family, kind, {"level": level}, True) for level in rounded]

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


def smaller_baselines(model: nn.Module, few: bool = False, resolution: int | None = None) -> list[MethodSpec]:
    """
    Baselines that encode every frame with fewer tokens: fewer pixels, and Token Merging; with `few`, one or two
    settings each. The numbers of tokens are those of the model's resolution, scaled to frames of `resolution` pixels a
    side.
    """
    config = tower_of(model).config
    patch, own = config.patch_size, config.image_size // config.patch_size
    cells = own if resolution is None else resolution // patch
    sides = {round(share * own) for share in (SMALLER_SHARES[:2] if few else SMALLER_SHARES)} - {0, own}
    smaller = dict.fromkeys(max(1, min(cells - 1, round(side / own * cells))) * patch for side in sorted(sides))
    merged = dict.fromkeys(
        (max(1, round(max(1, round(share * own**2)) * cells**2 / own**2)), schedule)
        for schedule, shares in MERGED_SHARES.items()
        for share in (shares[:1] if few else shares)
    )
    return [
        *(MethodSpec(f"{side} px", "smaller input", "smaller", {"resolution": side}, True) for side in smaller),
        *(
            MethodSpec(f"ToMe {r}, {schedule}", f"ToMe, {schedule}", "merged", {"r": r, "schedule": schedule}, True)
            for r, schedule in merged
        ),
    ]


def chosen_methods(
    model: nn.Module,
    resolution: int,
    names: Sequence[str] | None = None,
    quick: bool = False,
    gate: dict | None = None,
) -> list[MethodSpec]:
    """
    Dense, the methods asked for, and the baselines.

    Args:
        model: the vision tower.
        resolution: side of the frames in pixels.
        names: presets, and modes with all their settings; None for the presets.
        quick: fewer settings of the baselines that encode every frame.
        gate: gate options of one more method, `TUNED`.

    Raises:
        ValueError: for an unknown name.
    """
    groups = {spec.name: [spec] for spec in preset_methods()}
    for spec in mode_methods():
        groups.setdefault(spec.options["mode"], []).append(spec)
    for name in names or ():
        if name not in groups:
            raise ValueError(f"There is no method {name!r}; expected some of {', '.join(groups)}.")
    chosen = [spec for name, specs in groups.items() if name in (names or PRESETS) for spec in specs]
    tuned = [] if gate is None else [MethodSpec(TUNED, TUNED, "stream", gate)]
    smaller = [
        spec
        for spec in smaller_baselines(model, quick, resolution)
        if spec.options.get("schedule") != "decreasing"  # constant is the main schedule of the paper
    ]
    return [DENSE, *tuned, *chosen, FIRST, *hold_baselines(), *smaller]
