"""Products for a few tokens are those of `linear`, and leave no trace in the model."""

import pytest
import torch

from neuroflow_hf.language import few_tokens
from neuroflow_hf.language.few_tokens import linear_layers, turned, turned_linear
from tests.conftest import assert_close_in_norm
from tests.phi3_models import adopt, make_stock, random_ids


@pytest.fixture
def faster(monkeypatch):
    """Turned products are found to be faster, or not."""

    def choose(found):
        monkeypatch.setattr(few_tokens, "is_turned_faster", lambda threads: found)

    choose(True)
    return choose


@pytest.mark.parametrize("shape", [(1, 2, 8), (3, 8), (2, 5, 8)])
def test_a_turned_product_is_the_usual_one(shape):
    tokens, weight = torch.randn(shape), torch.randn(6, 8)
    found, expected = turned_linear(tokens, weight), torch.nn.functional.linear(tokens, weight)
    assert found.shape == expected.shape and found.is_contiguous()
    assert_close_in_norm(found, expected)


def test_it_is_timed_once_for_each_number_of_threads():
    few_tokens.is_turned_faster.cache_clear()
    assert few_tokens.is_turned_faster(1) in (True, False)
    few_tokens.is_turned_faster(1)
    assert few_tokens.is_turned_faster.cache_info().hits == 1


@pytest.mark.parametrize(("count", "changed"), [(1, False), (2, True), (16, True), (17, False)])
def test_layers_are_changed_for_a_few_tokens_and_within_the_context(faster, count, changed):
    model = adopt(make_stock("plain"))
    layers = linear_layers(model)
    assert len(layers) == 4 * model.config.num_hidden_layers + 1
    with pytest.raises(KeyError), turned(layers, count):
        assert all(("forward" in vars(layer)) == changed for layer in layers)
        raise KeyError
    assert not any("forward" in vars(layer) for layer in layers)


def test_what_is_not_a_plain_float32_layer_stays(faster):
    model = adopt(make_stock("plain"))
    hooked = model.model.layers[0].mlp.down_proj
    hooked.register_forward_hook(lambda *_: None)
    assert hooked not in linear_layers(model)
    assert linear_layers(model.to(torch.bfloat16)) == []
    faster(False)
    assert linear_layers(adopt(make_stock("plain"))) == []


def test_the_text_is_the_dense_one(faster, monkeypatch):
    calls, product = [], few_tokens.turned_linear
    monkeypatch.setattr(few_tokens, "turned_linear", lambda *args, **more: calls.append(1) or product(*args, **more))
    stock = make_stock("plain")
    ids = random_ids(1, 6).repeat(1, 3)
    found = adopt(stock).generate(ids, max_new_tokens=40, lossless={"draft_length": 3})
    assert torch.equal(found, stock.generate(ids, max_new_tokens=40)) and calls
