"""Exported streams against the engine: who gets which frame, and the figures of a comparison."""

import pytest
import torch

from eval.docs.speed import export_table
from eval.vision.export_fidelity import compare, follow


def test_every_nth_frame_is_a_keyframe_and_the_state_is_handed_on():
    calls = []

    def run(name, inputs):
        calls.append((name, inputs.get("state", {}).get("output")))
        return {"pooler_output": inputs["pixel_values"], "new_state": {"output": inputs["pixel_values"] * 10}}

    outputs = follow(run, [torch.tensor(float(number)) for number in range(5)], interval=3)
    assert calls == [("keyframe", None), ("sparse", 0), ("sparse", 10), ("keyframe", None), ("sparse", 30)]
    assert [output["pooler_output"].item() for output in outputs] == [0, 1, 2, 3, 4]
    assert [output["sparse"].item() for output in outputs] == [False, True, True, False, True]


def test_figures():
    def outputs(angles, masks):
        vectors = [torch.stack([torch.tensor(a).cos(), torch.tensor(a).sin()]).unsqueeze(0) for a in angles]
        return [
            {
                "pooler_output": vector,
                "last_hidden_state": torch.stack([vector, torch.tensor([[1.0, 0.0]])], dim=1),
                "active_mask": torch.tensor(mask),
                "sparse": torch.tensor(number > 0),
            }
            for number, (vector, mask) in enumerate(zip(vectors, masks, strict=True))
        ]

    engine = outputs([0.0, 0.0, 0.0], [[True, True]] + [[True, False]] * 2)
    other = outputs([0.0, 0.6, 0.0], [[False, True], [True, False], [False, True]])
    row = compare(other, engine, other)
    least = torch.tensor(0.6).cos().item()
    assert row["to_engine_least"] == row["patches_to_engine_least"] == pytest.approx(least)
    assert row["to_engine"] == pytest.approx((2 + least) / 3) and row["to_dense"] == pytest.approx(1)
    assert row["difference"] == pytest.approx(torch.tensor(0.6).sin().item())
    assert row["same_patches"] == 0.5  # of the sparse frames
    settings = {"model": "model", "frames": 3, "token_budget": 1, "interval": 3, "every": 2}
    assert "50%" in export_table(
        {"command": "python", "settings": settings, "rows": [{"way": "engine", "dtype": "float32", **row}]}
    )
