"""Figures over cost: a line for each family of methods, controls in grey, and what dense reaches."""

import itertools
from collections.abc import Sequence

from neuroflow_hf.evaluation.methods import MethodSpec

COLOURS = ("#d97706", "#2563eb", "#7c3aed", "#0d9488", "#be185d", "#65a30d", "#854d0e")
CONTROL_COLOURS = ("#111827", "#6b7280", "#9ca3af", "#374151", "#4b5563", "#a8a29e", "#78716c", "#1f2937", "#94a3b8")
CONTROL_MARKERS = ("s", "^", "v", "D", "x", "+", "P", "1", "p")
LEAST_COST = 0.01  # of the axis; what costs nothing is drawn here


def draw_over_cost(
    panel, specs: Sequence[MethodSpec], costs: dict[str, float], values: dict[str, float], dense: float
):
    """
    A panel of values over cost.

    Args:
        panel: of matplotlib.
        specs: the methods; those of one family are joined.
        costs, values: of each by name; without a value it is left out.
        dense: what dense reaches, a line across.
    """
    families: dict[str, list[MethodSpec]] = {}
    for spec in specs:
        if spec.kind != "dense":
            families.setdefault(spec.family, []).append(spec)
    colours, control_looks = (
        itertools.cycle(COLOURS),
        itertools.cycle(zip(CONTROL_COLOURS, CONTROL_MARKERS, strict=True)),
    )
    panel.axhline(dense, color="#b91c1c", linewidth=1, linestyle=(0, (4, 3)), label="dense")
    for family, members in families.items():
        control = members[0].control
        colour, marker = next(control_looks) if control else (next(colours), "o")
        if family == "presets":
            marker = "*"
        points = sorted(
            (max(costs[spec.name], LEAST_COST), values[spec.name]) for spec in members if spec.name in values
        )
        if points:
            panel.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=9 if marker == "*" else 4,
                linewidth=1.0 if control else 1.6,
                linestyle="--" if control else "-",
                label=f"control: {family}" if control else family,
                zorder=2 if control else 3,
            )
    panel.set_xscale("log")
    drawn = [costs[spec.name] for spec in specs if spec.name in values]
    panel.set_xlim(LEAST_COST * 0.9, 1.1 * max([1.0, *drawn]))
    panel.grid(color="#e5e7eb", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
