"""Which methods are compared, at which settings: presets, modes, and the baselines that each has to beat."""

from collections.abc import Sequence

import numpy as np

from ..vision.gate_config import PRESETS
from .methods import MethodSpec

DENSE = MethodSpec("dense", "dense", "dense")
TUNED = "own settings"  # those of a configuration file
FIRST = MethodSpec("first frame repeated", "first frame", "first", control=True)

EMA = {"reference": "ema", "ema_rate": 0.05}  # the paper's gate
# mode, its name in the paper, the option that is varied, its values, other options
MODE_SETTINGS: tuple[tuple[str, str, str, tuple[float, ...], dict], ...] = (
    ("extrapolate", "", "sentinels", (0.05, 0.02, 0.2), {}),
    ("context", "", "threshold", (0.01, 0.001, 0.05), {}),
    ("reconstruct", " (the paper's C)", "threshold", (0.01, 0.003, 0.05), EMA),
    ("eliminate", " (the paper's B, not distilled)", "threshold", (0.01, 0.003, 0.05), EMA),
    ("mlp", " (the paper's A)", "threshold", (0.01, 0.05), EMA),
)

EVERY = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 48)
# from near 0 to near 1 of dense's cost on any footage
SURPRISES, DIFFERENCES = np.geomspace(0.002, 0.4, 14), np.geomspace(0.005, 0.7, 14)
BUDGET_LEVELS = (0.02, 0.1)  # the first takes a keyframe at any motion, the second ignores small changes
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
SIDES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of smaller inputs, as shares of the frame's


def preset_methods() -> list[MethodSpec]:
    """The package's presets, the cheapest first."""
    return [MethodSpec(name, "presets", "stream", dict(options)) for name, options in reversed(PRESETS.items())]


def mode_methods() -> list[MethodSpec]:
    """Every mode at several settings."""
    return [
        MethodSpec(f"{mode}{note}, {name} {value:g}", mode + note, "stream", {"mode": mode, name: value, **others})
        for mode, note, name, values, others in MODE_SETTINGS
        for value in values
    ]


def hold_baselines(
    every: Sequence[int] = EVERY,
    surprises: Sequence[float] = SURPRISES,
    budgets: Sequence[float] = BUDGETS,
    differences: Sequence[float] = DIFFERENCES,
) -> list[MethodSpec]:
    """
    Baselines that hold dense embeddings: every k frames, by surprise, by surprise within a budget, and by the
    difference of pixels. There are many settings, because a mixture of two distant settings is worse than a setting
    between them, and each costs little to measure.
    """

    def over(kind: str, family: str, levels: Sequence[float]) -> list[MethodSpec]:
        rounded = [float(f"{level:.3g}") for level in levels]
        return [MethodSpec(f"{kind} over {level:g}", family, kind, {"level": level}, True) for level in rounded]

    return [
        *(MethodSpec(f"every {k}", "every k", "every", {"k": k}, True) for k in every),
        *over("surprise", "surprise", surprises),
        *(
            MethodSpec(
                f"surprise over {level:g} within a budget of {budget:g}",
                f"surprise over {level:g}, budget",
                "surprise",
                {"level": level, "budget": budget},
                True,
            )
            for level in BUDGET_LEVELS
            for budget in budgets
        ),
        *over("pixels", "pixel difference", differences),
    ]


def smaller_baselines(patch_size: int, resolution: int, few: bool = False) -> list[MethodSpec]:
    """Baselines that encode every frame of `resolution` pixels a side with fewer pixels; with `few`, at two sides."""
    cells = resolution // patch_size
    sides = {max(1, round(share * cells)) for share in (SIDES[::2][:2] if few else SIDES)} - {cells}
    resolutions = [side * patch_size for side in sorted(sides)]
    return [MethodSpec(f"{side} px", "smaller input", "smaller", {"resolution": side}, True) for side in resolutions]


def chosen_methods(
    patch_size: int, resolution: int, names: Sequence[str] | None = None, quick: bool = False, gate: dict | None = None
) -> list[MethodSpec]:
    """
    Dense, the methods asked for, and the baselines for frames of `resolution` pixels a side. `names` are presets, and
    modes with all their settings; None for the presets. If `quick`, there are two settings of the baseline with a
    smaller input. `gate` has the options of one more method, `TUNED`. ValueError for an unknown name.
    """
    groups = {spec.name: [spec] for spec in preset_methods()}
    for spec in mode_methods():
        groups.setdefault(spec.options["mode"], []).append(spec)
    for name in names or ():
        if name not in groups:
            raise ValueError(f"There is no method {name!r}; expected some of {', '.join(groups)}.")
    chosen = [spec for name, specs in groups.items() if name in (names or PRESETS) for spec in specs]
    tuned = [] if gate is None else [MethodSpec(TUNED, TUNED, "stream", gate)]
    return [DENSE, *tuned, *chosen, FIRST, *hold_baselines(), *smaller_baselines(patch_size, resolution, quick)]
