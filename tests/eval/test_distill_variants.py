"""The comparison of losses: gains and differences are paired by clip."""

import pytest

from eval.docs.distillation import distill_variants_table
from eval.vision.distill_variants import REFERENCE, gains


def figures(*by_clip):
    mean = sum(by_clip) / len(by_clip)
    return {"5%": {"mean": mean, "p5": 0.1, "cost": 0.1, "repeated_mean": 0.5, "by_clip": list(by_clip)}}


def test_gains_are_paired_by_clip():
    before = figures(0.1, 0.5, 0.9)
    found = {
        REFERENCE: {"changes": {}, "before": before, "after": figures(0.2, 0.6, 1.0), "seconds": 1},
        "other": {"changes": {}, "before": before, "after": figures(0.4, 0.8, 1.2), "seconds": 1},
        "larger": {"changes": {"resolutions": (448,)}, "before": before, "after": before, "seconds": 1},
    }
    usual, other, larger = gains(found)
    assert larger["gain"] == 0 and "to_reference" not in larger
    assert usual["gain_interval"] == pytest.approx((0.1, 0.1)) and "to_reference" not in usual
    assert other["gain_interval"] == pytest.approx((0.3, 0.3)) and other["gain"] == pytest.approx(0.3)
    assert other["to_reference_interval"] == pytest.approx((0.2, 0.2))
    assert "| +0.3000 (+0.3000 to +0.3000) | +0.2000 (+0.2000 to +0.2000) |" in distill_variants_table(
        {"rows": [usual, other]}
    )
