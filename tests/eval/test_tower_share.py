"""The tower's share: torch's count is the one that costs are relative to, and the rest grows with the text."""

from eval.vision.tower_share import of_gemma3, of_pi0
from neuroflow_hf.vision.cost import dense_frame
from tests.conftest import NUM_PATCHES, PATCH_SIZE, TINY_VISION
from tests.vlms import GEMMA3, PI0

LAYERS, DIM, INNER, HEADS = (
    TINY_VISION[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
)


def test_shares():
    frame = dense_frame(NUM_PATCHES, LAYERS, DIM, INNER, 3 * PATCH_SIZE**2, HEADS, pooled=False)
    for count, options in ((of_gemma3, GEMMA3), (of_pi0, PI0)):
        (one, short), (same, longer), (two, _) = (count(options, *given) for given in ((1, 4), (1, 8), (2, 4)))
        assert one == same == frame and two == 2 * frame
        assert frame < short < longer
