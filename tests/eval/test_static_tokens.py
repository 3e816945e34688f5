"""Image tokens left out: the masks, what stands for the tokens that are gone, and the count of multiply-adds."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from eval.vision import static_tokens
from eval.vision.static_tokens import cosines, even_frames, least_change, mixed, most_changed, multiply_adds_7b
from eval.vision.tower_share import multiply_adds

TOKENS = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))


def test_masks_keep_the_first_frame_and_the_number_asked_for():
    still = TOKENS.clone()
    still[3] = still[2]
    for rule in (most_changed, least_change):
        mask = rule(still, 11)
        assert mask.sum() == 11 and mask[0].all() and not mask[3].any()
    assert even_frames(6, 3).tolist() == [True, False] * 3
    assert even_frames(5, 1).tolist() == [True] + [False] * 4


def test_the_last_kept_token_stands_for_those_left_out():
    mask = even_frames(5, 2)[:, None].expand(5, 4).clone()
    mask[4, 0] = True
    found = cosines(TOKENS, mask, TOKENS)
    for time in range(1, 5):
        for place in range(4):
            last = max(number for number in range(time + 1) if mask[number, place])
            expected = torch.cosine_similarity(TOKENS[last, place], TOKENS[time, place], dim=0)
            assert found[time - 1, place] == pytest.approx(expected.item(), abs=1e-5)


def test_a_mixture_keeps_the_share():
    assert mixed({"kept": 0.2, "mean": 1.0}, {"kept": 0.6, "mean": 0.0}, 0.3) == pytest.approx(
        {"kept": 0.3, "mean": 0.75}
    )


def test_multiply_adds_are_those_that_torch_counts(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    names = {"WIDTH_7B": 32, "INNER_7B": 48, "LAYERS_7B": 3, "KEY_VALUE_7B": 16}
    for name, size in names.items():
        monkeypatch.setattr(static_tokens, name, size)
    model = Qwen2Model(Qwen2Config(**sizes, num_hidden_layers=3, vocab_size=8)).eval()
    model.set_attn_implementation("eager")
    counted = multiply_adds(lambda: model(inputs_embeds=torch.randn(1, 10, 32), use_cache=False))
    assert counted == pytest.approx(multiply_adds_7b(10), rel=1e-2)
