"""What all plots share: colours, title, grid, legend, and PNG files."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import write_whole

OURS, BASELINE_FIRST, BASELINE_HELD, KEYFRAME = "#d97706", "#9ca3af", "#475569", "#b91c1c"
FAMILY_COLOURS = (OURS, "#0f766e", "#7c3aed", "#be185d", "#65a30d", "#0369a1")
DARK = "#111827"  # lines and marks that everything else is compared with
LEAST_LOSS = 1e-6  # the smallest `1 - cosine` on a logarithmic scale; less is rounding


def titled_figure(title: str, width: float, height: float) -> Figure:
    """A figure of a size in inches, with a bold title in one line. It is outside pyplot and need not be closed."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    return figure


def tidy(panel: Axes, grid: str = "both"):
    """Draw a light grid behind the data along `"x"`, `"y"` or `"both"` axes, and no frame at the top and right."""
    panel.grid(axis=grid, color="#e5e7eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, panel: Axes, columns: int = 3):
    """One legend below all panels, with each label of `panel` once."""
    handles, labels = panel.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def save_plot(figure: Figure, path: Path):
    """Write a PNG file, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160, format="png")
    write_whole(path, picture.getvalue())
