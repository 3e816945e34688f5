"""The overlay of several cameras: a picture with a cell for each."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..video.overlay import OverlayWriter, captioned, fitted, marked_picture, tiled
from ..video.records import MOST_CHARACTERS, percent, shortened
from .watch import Seen

ONE_CELL, MANY_CELLS = (540, 960), (270, 480)  # height and width of a camera's picture in pixels


def cell_caption(seen: Seen, labelled: bool) -> list[str]:
    """The lines under a camera's picture."""
    name = seen.source if "://" in seen.source else Path(seen.source).name
    lines = [f"{shortened(name, MOST_CHARACTERS)}   cost {seen.cost:.2f} of dense"]
    if labelled:
        label = seen.label and f"{shortened(seen.label, MOST_CHARACTERS)} {percent(seen.confidence)}"
        lines.append(label or "")
    return lines


class Mosaic:
    """Writes an overlay video with all cameras. Between two of its pictures, a camera's last one stays."""

    def __init__(self, path: Path, names: Sequence[str], covered: float, labelled: bool):
        self.writer, self.covered, self.labelled = OverlayWriter(path), covered, labelled
        self.size = ONE_CELL if len(names) == 1 else MANY_CELLS
        none = np.zeros((6, 6, 3), np.uint8)  # before the first picture
        self.cells = {name: self._cell(Seen(name, none, np.ones((1, 1), bool), 0.0, None, None)) for name in names}

    def add(self, round_seen: Sequence[Seen], seconds: float):
        """Draw what was seen in a round, `seconds` after the beginning."""
        self.cells |= {seen.source: self._cell(seen) for seen in round_seen}
        columns = math.ceil(math.sqrt(len(self.cells)))
        self.writer.write(tiled(list(self.cells.values()), columns), seconds)

    def close(self):
        """Finish the file."""
        self.writer.close()

    def _cell(self, seen: Seen) -> np.ndarray:
        picture = fitted(marked_picture(seen.image, seen.mask, self.covered), *self.size)
        return captioned(picture, cell_caption(seen, self.labelled), size=self.size[1] // 30)
