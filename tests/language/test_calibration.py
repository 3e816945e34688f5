"""A threshold from a bypass rate: by the checkpoint's own similarities, kept in its configuration."""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuroflow_hf import NeuroFlowBypassConfig, NeuroFlowPhi3Config, NeuroFlowPhi3ForCausalLM
from neuroflow_hf.language.bypass_config import threshold_for_rate
from neuroflow_hf.language.calibration import dense_similarities, gate_similarities, percentiles
from tests.phi3_models import KINDS, make_ours, random_ids, run_steps

PROMPTS = [row.tolist()[: 3 + place] for place, row in enumerate(random_ids(6, 9))]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=300), st.floats(0.01, 1))
def test_a_threshold_is_reached_at_its_rate(similarity, rate):
    threshold = threshold_for_rate(similarity, rate)
    if rate == 1:
        assert threshold == -1
    else:
        place = (1 - rate) * (len(similarity) - 1)  # among the sorted values
        between = sorted(similarity)[int(place) : int(place) + 2]
        assert min(between) - 1e-6 <= threshold <= max(between) + 1e-6


def test_a_threshold_needs_similarities():
    for function, arguments in ((threshold_for_rate, ([], 0.2)), (percentiles, ([],))):
        with pytest.raises(ValueError, match="similarity"):
            function(*arguments)
    assert threshold_for_rate([], 1) == -1


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_sees_what_the_steps_of_a_generation_see(kind):
    model, lengths = make_ours(kind), [13, 9, 11]
    texts = [random_ids(1, length, seed=length) for length in lengths]
    expected = []
    for text in texts:
        _, cache = run_steps(model, text, 5, bypass={"gate_layer": 2, "cache_layers": [3], "threshold": 2})
        expected += model.bypass_statistics(cache).similarity[0, 5:].tolist()
    found = gate_similarities(model, [text[0].tolist() for text in texts], [length - 5 for length in lengths], 2)
    assert found == pytest.approx(expected, abs=1e-5)


def test_texts_count_up_to_their_end_token():
    model = make_ours()
    free = dense_similarities(model, PROMPTS, 1, 8)
    assert len(free) == 7 * len(PROMPTS)
    ids = torch.tensor(PROMPTS[:1])
    third = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, bypass=False)[0, -1]
    model.generation_config.eos_token_id = int(third)
    assert dense_similarities(model, PROMPTS[:1], 1, 8) == pytest.approx(free[:2], abs=1e-5)


def test_a_rate_bypasses_its_share_of_the_steps():
    model = make_ours()
    with pytest.raises(ValueError, match=r"layer 1.*neuroflow calibrate.*calibrate_bypass"):
        model.bypass_options({"rate": 0.3})
    found = model.calibrate_bypass(PROMPTS, max_new_tokens=40)
    assert model.config.bypass is None and model.config.bypass_similarities == {"1": found}
    assert len(found) == 101 and sorted(found) == found
    options = model.bypass_options({"rate": 0.3})
    assert options.rate is None and options.threshold == pytest.approx(found[70])
    ids, similarity = torch.tensor([row[:3] for row in PROMPTS]), dense_similarities(model, PROMPTS, 1, 40)
    assert sum(value >= options.threshold for value in similarity) / len(similarity) == pytest.approx(0.3, abs=0.02)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12}
    assert torch.equal(
        model.generate(ids, bypass={"rate": 0.3}, **how),
        model.generate(ids, bypass={"threshold": options.threshold}, **how),
    )
    with pytest.raises(ValueError, match="gate layer 2"):
        model.bypass_options({"rate": 0.3, "gate_layer": 2})


def test_a_rate_and_a_threshold_replace_one_another():
    def chosen(base, **options):
        found = NeuroFlowBypassConfig.from_options(base, **options)
        return found.threshold, found.rate

    assert chosen({"threshold": 0.8}, rate=0.2) == (0.65, 0.2)
    assert chosen({"rate": 0.2}, threshold=0.8) == (0.8, None)
    assert chosen({"rate": 0.2}, gate_layer=2) == (0.65, 0.2)
    with pytest.raises(ValueError, match="one of them"):
        chosen({}, rate=0.2, threshold=0.8)
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            chosen({}, rate=wrong)


def test_a_calibration_is_saved_with_the_model(tmp_path):
    model = make_ours(bypass={"rate": 0.2, "cache_layers": [3]})
    found = model.calibrate_bypass(PROMPTS)
    model.save_pretrained(tmp_path)
    again = NeuroFlowPhi3ForCausalLM.from_pretrained(tmp_path)
    assert again.config.bypass == {"rate": 0.2, "cache_layers": [3]}
    assert again.bypass_options().threshold == pytest.approx(found[80])
    for wrong in ({"9": [0.5]}, {1: [0.5]}, {"1": []}, {"1": ["high"]}):
        config = json.loads((tmp_path / "config.json").read_text())
        with pytest.raises(ValueError, match="bypass_similarities"):
            NeuroFlowPhi3Config(**config | {"bypass_similarities": wrong})


@pytest.mark.parametrize(("prompts", "layer"), [([], None), ([[]], None), (PROMPTS, 4)])
def test_what_cannot_be_calibrated_is_refused(prompts, layer):
    model = make_ours()
    with pytest.raises(ValueError, match="layer '4'" if layer else "prompts"):
        model.calibrate_bypass(prompts, gate_layer=layer)
    assert model.config.bypass_similarities is None


@pytest.mark.parametrize(("threshold", "warned"), [(-0.999, True), (-1, False), (2, False)])
def test_a_threshold_that_is_nearly_always_reached_warns(threshold, warned):
    model, ids = make_ours(), random_ids(1, 80)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        run_steps(model, ids, 5, bypass={"threshold": threshold})
    assert ["a `rate`, such as 0.2" in str(warning.message) for warning in found] == [True] * warned
