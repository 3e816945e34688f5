"""A bench as of `composed_bench.py`, with a tiny random model and rectangles for things; clips in milliseconds."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from eval.vision.composed_bench import Bench
from neuroflow_hf.video.labels import Labels
from neuroflow_hf.video.preprocess import Preprocessor
from tests.conftest import IMAGE_SIZE

THINGS = {"apple": (250, 10, 10), "boat": (10, 250, 10), "cat": (10, 10, 250), "dog": (250, 250, 10)}


class TinyBench(Bench):
    """Things are plain rectangles before grey noise; labels are random directions."""

    side = 4 * IMAGE_SIZE

    def __init__(self, model):
        self.model = model
        self.preprocess = Preprocessor(IMAGE_SIZE)
        self.things = sorted(THINGS)
        embeddings = torch.randn(len(THINGS), 32, generator=torch.Generator().manual_seed(0))
        self.labels = Labels(tuple(self.things), "{}", torch.nn.functional.normalize(embeddings, dim=-1), 10.0, -5.0)
        self.weights, self.device = "tiny", torch.device("cpu")

    @property
    def material(self):
        """Drawings and grounds."""
        drawings = {
            name: [SimpleNamespace(picture=Image.new("RGBA", (60, 48), (*colour, 255)))]
            for name, colour in THINGS.items()
        }
        grey = np.random.default_rng(0).integers(90, 160, (240, 240, 1), dtype=np.uint8).repeat(3, axis=2)
        return SimpleNamespace(drawings=drawings, grounds=[SimpleNamespace(picture=Image.fromarray(grey))])
