"""Logit bias calibration: known shifts are found, what does not fit is refused, controls do what they must."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.vision.calibration import (
    agreements,
    bias_of,
    compared,
    compared_shuffled,
    figures_of,
    fitted,
    measure_logits,
    rights,
)
from eval.vision.composed_bench import clip_names, measure_clips
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.video.calibration import FILE_NAME, LogitBias, fit_logit_bias
from neuroflow_hf.video.labels import Labels
from neuroflow_hf.vision.gate_config import NeuroFlowGateConfig
from tests.clip_bench import TinyBench

GATE = NeuroFlowGateConfig(mode="reconstruct")


@pytest.fixture
def labels():
    return Labels(("a dog", "a cat", "nothing"), "{}", torch.eye(3, 8), 10.0, -5.0)


@pytest.fixture
def bias(labels):
    dense = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    return LogitBias.fit(labels, dense, dense - torch.tensor([0.5, -1.0, 0.25]), GATE, "abc")


def test_a_constant_shift_is_found_exactly_and_its_mean_where_it_varies():
    dense = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([1.0, -2.0, 0.0, 0.25])
    assert torch.allclose(fit_logit_bias(dense, dense - shift), shift, atol=1e-6)
    assert fit_logit_bias(torch.tensor([[1.0], [4.0]]), torch.zeros(2, 1)).tolist() == [2.5]


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_logits_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="of the same frames, at least one"):
        fit_logit_bias(*(torch.zeros(shape) for shape in shapes))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_logit_bias(torch.tensor([[float("nan"), 0.0]]), torch.zeros(1, 2))


def test_it_is_added_to_streamed_logits_and_the_labels_stay_as_they_were(labels, bias):
    embeddings = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    plain = labels.logits(embeddings)
    calibrated = bias.applied_to(labels, GATE, "abc")
    assert torch.equal(calibrated.logits(embeddings), plain + torch.tensor([0.5, -1.0, 0.25]))
    assert torch.equal(calibrated.scores(embeddings), (plain + bias.values).sigmoid())
    assert labels.label_bias is None and torch.equal(labels.logits(embeddings), plain)


def test_what_is_saved_is_loaded(tmp_path, bias, labels):
    assert bias.save(tmp_path) == tmp_path / FILE_NAME
    found = LogitBias.load(tmp_path)
    assert torch.equal(found.values, bias.values)
    assert (found.labels, found.template, found.gate, found.fingerprint, found.frames) == (
        bias.labels,
        bias.template,
        bias.gate,
        "abc",
        2,
    )
    assert found.applied_to(labels, GATE, "abc").label_bias is not None
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_what_does_not_fit_is_refused_and_says_why(labels, bias):
    with pytest.raises(ValueError, match="label 1 is 'a dog' there, 'a cat' here"):
        bias.applied_to(replace(labels, names=("a cat", "a dog", "nothing")), GATE, "abc")
    with pytest.raises(ValueError, match="labels that the other has not"):
        bias.applied_to(replace(labels, names=("a dog", "a cat")), GATE, "abc")
    with pytest.raises(ValueError, match="template"):
        bias.applied_to(replace(labels, template="a photo of {}"), GATE, "abc")
    with pytest.raises(ValueError, match=r"other gate options: threshold 0.01, now 0.05\."):
        bias.applied_to(labels, NeuroFlowGateConfig(mode="reconstruct", threshold=0.05), "abc")
    with pytest.raises(ValueError, match="checkpoint abc and this one is xyz"):
        bias.applied_to(labels, GATE, "xyz")
    calibrated = bias.applied_to(labels, GATE, "abc")
    with pytest.raises(ValueError, match="calibration already"):
        bias.applied_to(calibrated, GATE, "abc")
    with pytest.raises(ValueError, match="calibration already"):
        LogitBias.fit(calibrated, torch.zeros(1, 3), torch.zeros(1, 3), GATE, "abc")
    with pytest.raises(ValueError, match="logits of 2 labels, and 3 labels"):
        LogitBias.fit(labels, torch.zeros(1, 2), torch.zeros(1, 2), GATE, "abc")


def test_a_missing_file_and_another_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="fit one with"):
        LogitBias.load(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="is no logit bias"):
        LogitBias.load(tmp_path)


def made_up_clips(shift, count=6, frames=9, labels=5, noise=0.01):
    """Clips whose logits are dense's less a shift, and a little noise; the right label is dense's best."""
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(count):
        dense = rng.normal(size=(frames, labels)).astype(np.float32)
        streamed = (dense - shift + noise * rng.normal(size=dense.shape)).astype(np.float32)
        clips.append({"label": dense.argmax(-1), "dense": dense, "reconstruct": streamed})
    return clips


def test_a_shift_that_is_the_same_everywhere_is_undone_on_other_clips():
    clips = made_up_clips(np.array([2.0, -2.0, 0.0, 1.0, -1.0], dtype=np.float32))
    bias = fitted(clips[:3], "reconstruct")
    found = compared(clips[3:], "reconstruct", bias)
    assert found["agreement"]["before"]["value"] < 0.7 and found["agreement"]["after"]["value"] > 0.95
    assert found["top1"]["difference"]["interval"][0] > 0
    shuffled = compared_shuffled(clips[3:], "reconstruct", bias)
    assert shuffled["top1"]["difference"]["value"] < found["top1"]["difference"]["value"] - 0.2


def test_one_value_for_all_labels_changes_no_ranking():
    clips = made_up_clips(np.array([2.0, -2.0, 0.0, 1.0, -1.0], dtype=np.float32))
    for measure in (agreements, rights):
        before, after = (measure(clips, "reconstruct", torch.full((5,), value)) for value in (0.0, 3.5))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_frames_on_which_nothing_is_seen_are_not_judged_right_or_wrong():
    clips = made_up_clips(np.zeros(5, dtype=np.float32), count=1)
    clips[0]["label"][2:5] = -1
    assert len(rights(clips, "reconstruct", torch.zeros(5))[0]) == 8 - 3


def test_clips_are_measured_and_judged(model, tmp_path):
    bench = TinyBench(model)
    names = clip_names(1, 16, 0, ("crossing", "still", "local"))
    found = measure_clips(bench, names, measure_logits, {}, Processes(), cache=tmp_path)
    assert found[0]["dense"].shape == (16, 4) == found[0]["thrifty"].shape
    table = figures_of(found, found)
    assert set(table) == {"reconstruct", "balanced", "thrifty"}
    for row in table.values():
        assert set(row["clips"]) == {"1"}
        control = row["clips"]["1"]["control: one value for all labels"]
        assert control["top1"]["difference"]["value"] == 0 == control["agreement"]["difference"]["value"]
    bias, stream = bias_of(bench, found, "thrifty"), model.new_stream(preset="thrifty")
    assert bias.frames == 3 * 15 and torch.equal(bias.values, fitted(found, "thrifty"))
    bias.save(tmp_path)
    calibrated = LogitBias.load(tmp_path).applied_to(bench.labels, stream.gate, bench.weights)
    assert torch.equal(calibrated.label_bias, bias.values)
    still = found[1]
    assert np.allclose(still["balanced"], still["dense"], atol=1e-4)
