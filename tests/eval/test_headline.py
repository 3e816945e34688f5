"""The headline table: baselines that do what they say, one row for each method, shared keyframes."""

import numpy as np
import pytest
import torch

from eval.docs.distillation import headline_table, stretch_table
from eval.vision import headline
from eval.vision.headline import METHODS, Clip, half_dense, held, measure_clip, pruned, rows_of
from neuroflow_hf.vision.gate_config import NeuroFlowGateConfig
from neuroflow_hf.vision.sparse_adapter import SparseAdapter
from tests.conftest import IMAGE_SIZE, NUM_PATCHES, random_video

pytestmark = pytest.mark.usefixtures("no_grad")


class TinyBench:
    """A tiny tower with adapters that change something, and labels that are embeddings of its own."""

    def __init__(self, vision, monkeypatch):
        self.tower, self.full = vision, None
        monkeypatch.setattr(headline, "THRESHOLD", 0.05)
        self.adapters = {}
        for name, mode in (("reconstruct", "reconstruct"), ("eliminate", "eliminate"), ("extrapolate", "extrapolate")):
            gate = NeuroFlowGateConfig.from_options({"mode": mode}, summary_tokens=4 if name == "reconstruct" else 0)
            self.adapters[name] = SparseAdapter(vision, gate, 2, 2)
            for change in self.adapters[name].parameters():
                change.normal_(std=0.2)
        self.labels = self

    tower_of = headline.Bench.tower_of

    def logits(self, embeddings):
        return embeddings[:, :3]


@pytest.fixture
def bench(stock_vision, monkeypatch):
    from neuroflow_hf import NeuroFlowSiglipVisionModel

    monkeypatch.setattr(headline, "summary", lambda mode: {"mode": mode, "summary_tokens": 4})
    monkeypatch.setattr(
        headline,
        "METHODS",
        {
            name: headline.Method(
                {key: 4 if key == "summary_tokens" else value for key, value in method.options.items()},
                method.variant,
                method.activities,
            )
            for name, method in METHODS.items()
        },
    )
    return TinyBench(NeuroFlowSiglipVisionModel.from_siglip(stock_vision), monkeypatch)


@pytest.fixture
def clip():
    return Clip(random_video(4), np.array([-1, 0, 1, 2]))


def test_methods_share_a_keyframe_and_go_on_as_alone(bench, clip):
    found = measure_clip(bench, clip, IMAGE_SIZE)
    dense = found["dense||embeddings"]
    assert dense.shape == (4, 32) and bench.tower.sparse_adapter is None
    for name, options in (("reconstruct", {"mode": "reconstruct"}), ("context", {"mode": "context"})):
        stream = bench.tower.new_stream(**options, threshold=0.05)
        alone = [bench.tower(pixels, stream=stream).pooler_output.squeeze(0).numpy() for pixels in clip.pixels]
        np.testing.assert_array_equal(found[f"{name}|own activity|embeddings"], np.stack(alone))
    ours, theirs = (found[f"reconstruct with summary{end}|own activity|embeddings"] for end in (", distilled", ""))
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert not np.allclose(ours[1], theirs[1], atol=1e-3)
    assert np.isnan(found["reconstruct with summary, distilled|own activity|ms"][0])  # the keyframe was another's


def test_every_method_has_its_row_and_dense_is_1(bench, clip):
    measured = [measure_clip(bench, clip, IMAGE_SIZE)] * 2
    rows = list(rows_of(bench, IMAGE_SIZE, measured))
    by_name = {(row["method"], row["activity"]): row for row in rows}
    assert by_name["dense", ""]["mean"] == pytest.approx(1) and by_name["dense", ""]["speed_up"] == 1
    assert by_name["keyframe repeated", ""]["cost"] == pytest.approx(1 / 30)
    assert ("balanced", "own activity") in by_name and ("balanced", "97% skipped") not in by_name
    assert ("eliminate with summary, distilled", "own activity") not in by_name  # was not trained
    assert by_name["reconstruct", "97% skipped"]["sparse_cost"] < by_name["reconstruct", "own activity"]["sparse_cost"]
    assert all(row["frames"] == 6 and 0 <= row["top1"] <= 1 for row in rows)
    above = [(row["above_hold"], row["mean"] - row["hold_mean"]) for row in rows[2:] if "hold_mean" in row]
    assert above and all(found == pytest.approx((gap, gap)) for found, gap in above)  # both clips are the same
    assert len(headline_table({"rows": rows}).splitlines()) == len(rows) + 2


def test_hold_repeats_every_nth_dense_frame():
    np.testing.assert_array_equal(held(np.arange(7), 3), [0, 0, 0, 3, 3, 3, 6])


def test_half_dense_and_pruned_give_an_embedding(bench, clip):
    pixels, tower = clip.pixels[0], bench.tower
    dense = tower(pixels).pooler_output
    everything = torch.ones(NUM_PATCHES, dtype=torch.bool)
    torch.testing.assert_close(half_dense(tower, pixels, everything, IMAGE_SIZE), dense)
    some = everything.clone()
    some[:30] = False
    assert not torch.allclose(half_dense(tower, pixels, some, IMAGE_SIZE), dense, atol=1e-3)
    assert pruned(tower, pixels, everything, IMAGE_SIZE).shape == dense.shape


def test_the_error_is_a_share_of_the_repeated_keyframes():
    rows = [
        {"side": side, "method": method, "activity": activity, "mean": mean}
        for side, method, activity, mean in (
            (224, "keyframe repeated", "", 0.8), (448, "keyframe repeated", "", 0.6),
            (224, "context", "97% skipped", 0.9), (448, "context", "97% skipped", 0.5),
        )
    ]  # fmt: skip
    assert "| context | 3% | 0.50 | 1.25 |" in stretch_table({"rows": rows})
