"""Image tokens that repeat earlier frames are left out; for the others, nothing changes."""

import copy
import inspect
import itertools

import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from neuroflow_hf import attach
from neuroflow_hf.attachment.static_tokens import IMAGE_TOKENS, retained_by_gate
from tests.conftest import assert_close_in_norm
from tests.vlms import IMAGE, MODELS, VIDEO, still_and_moving, vlm

pytestmark = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(PaliGemmaForConditionalGeneration.forward).parameters,
    reason="this version of transformers has no `mm_encoder_outputs`",
)
FRAMES = 4
KINDS = {"Gemma 3": "image", "PaliGemma": "image", "LLaVA-OneVision": "video"}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
each_model = pytest.mark.parametrize("name", KINDS)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def prompt(name, clips):
    """A processor's outputs for clips [B, T, C, H, W], one for each prompt; images stand between words."""
    frame = [IMAGE] * MODELS[name].tokens
    if KINDS[name] == "video":
        pixels, row = {"pixel_values_videos": clips}, [VIDEO] * (MODELS[name].tokens * clips.shape[1] + 1)
    else:
        pixels, row = {"pixel_values": clips.flatten(0, 1)}, [3, *frame, 6] * clips.shape[1]
    ids = torch.tensor([[1, 5, *row, 7, 8]] * len(clips))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if name == "Gemma 3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "PaliGemma":
        inputs["token_type_ids"] = (torch.arange(ids.shape[1]) >= ids.shape[1] - 1).long().expand_as(ids)
    return inputs


def attached_model(name, **options):
    model = MODELS[name].build()
    return model, attach(model, rows="frames", **options)


def assert_same_answer(actual, expected):
    new = len(expected.logits)
    assert torch.equal(actual.sequences[:, -new:], expected.sequences[:, -new:])
    assert_close_in_norm(torch.stack(actual.logits), torch.stack(expected.logits))


@each_model
def test_with_everything_active_nothing_is_dropped(name):
    model, attached = attached_model(name, threshold=-1)
    inputs = prompt(name, still_and_moving(FRAMES)[1:])
    assert attached.share_kept is None
    dropped = attached.drop_static_tokens(inputs)
    assert attached.share_kept == 1
    for key in inputs.keys() - {"pixel_values", "pixel_values_videos"}:
        assert torch.equal(dropped[key], inputs[key])
    assert "pixel_values" not in dropped and "pixel_values_videos" not in dropped
    assert_same_answer(model.generate(**dropped, **GREEDY), model.generate(**inputs, **GREEDY))


@each_model
def test_of_a_still_clip_the_first_frame_is_left(name):
    model, attached = attached_model(name)
    inputs, tokens = prompt(name, still_and_moving(FRAMES)[:1]), MODELS[name].tokens
    dropped = attached.drop_static_tokens(inputs)
    mask = attached.session.retention_mask.view(FRAMES, tokens)
    assert attached.share_kept == 1 / FRAMES and mask[0].all() and not mask[1:].any()
    assert dropped["input_ids"].shape[1] == inputs["input_ids"].shape[1] - (FRAMES - 1) * tokens
    full = getattr(model.base_model, f"get_{KINDS[name]}_features")(inputs[PIXELS[KINDS[name]]])
    expected = full.pooler_output.flatten(0, 1)
    expected = torch.cat([expected[:tokens], expected[FRAMES * tokens :]])  # the newline at the end of a video
    assert torch.equal(dropped["mm_encoder_outputs"][KINDS[name]].pooler_output.squeeze(1), expected)


@each_model
@pytest.mark.parametrize("beams", [1, 2])
def test_removed_is_masked_out(name, beams):
    """In prefill and in decoding: every token that stays has its own features, and the position that it had."""
    model, attached = attached_model(name)
    clips = still_and_moving(FRAMES)[1:]
    inputs = prompt(name, clips)
    dropped = attached.drop_static_tokens(inputs)
    assert 0.3 < attached.share_kept < 0.9
    pixels = inputs.pop(PIXELS[KINDS[name]])
    with torch.no_grad():
        full = getattr(model.base_model, f"get_{KINDS[name]}_features")(pixels)
    active = full.active_mask.clone()
    active[0] = True
    seen = retained_by_gate(model.base_model, IMAGE_TOKENS[model.config.model_type], active).flatten()
    assert torch.equal(attached.session.retention_mask, seen)
    mask, ids = inputs["attention_mask"].clone(), inputs["input_ids"]
    places = (ids[0] == (VIDEO if KINDS[name] == "video" else IMAGE)).nonzero().flatten()[: len(seen)]
    mask[0, places[~seen]] = 0
    assert torch.equal(dropped["position_ids"][0], mask[0].nonzero().flatten())
    masked = inputs | {
        "attention_mask": mask,
        "position_ids": torch.arange(ids.shape[1])[None],
        "mm_encoder_outputs": {KINDS[name]: full},
    }
    with torch.no_grad():
        logits, expected = model(**dropped).logits, model(**masked).logits
    assert_close_in_norm(logits, expected[mask.bool()][None])
    answers = [model.generate(**copy.deepcopy(given), **GREEDY, num_beams=beams) for given in (dropped, masked)]
    assert_same_answer(*answers)
    # the reference tells positions: without them, the same tokens give another answer
    moved = copy.deepcopy(dropped) | {"position_ids": torch.arange(dropped["input_ids"].shape[1])[None]}
    assert not torch.allclose(torch.stack(model.generate(**moved, **GREEDY).logits), torch.stack(answers[0].logits))


@pytest.mark.parametrize("beams", [1, 2])
def test_clips_that_keep_different_numbers_are_padded(beams):
    """Each answers as alone, also where text was padded on the right."""
    model, attached = attached_model("LLaVA-OneVision")
    options = GREEDY | {"num_beams": beams, "num_return_sequences": beams}
    inputs = prompt("LLaVA-OneVision", still_and_moving(FRAMES))
    alone = [
        model.generate(
            **attached.drop_static_tokens({key: value[row : row + 1] for key, value in inputs.items()}), **options
        )
        for row in range(2)
    ]
    for name, value in (("input_ids", 0), ("attention_mask", 0)):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 3), value=value)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]  # of all rows
    dropped = attached.drop_static_tokens(inputs | {"position_ids": positions})
    lengths = dropped["attention_mask"].sum(1).tolist()
    assert lengths[0] < lengths[1] == dropped["input_ids"].shape[1]
    together = model.generate(**dropped, **options)
    for row, answer in enumerate(alone):
        ours = slice(row * beams, row * beams + beams)
        assert torch.equal(together.sequences[ours, -4:], answer.sequences[:, -4:])
        if beams == 1:
            assert_close_in_norm(torch.stack(together.logits)[:, ours], torch.stack(answer.logits))


def test_the_first_frame_of_each_clip_is_kept():
    """Also if cameras saw it before, since it is not in the prompt."""
    attached = attached_model("LLaVA-OneVision")[1]
    attached.rows = "cameras"
    inputs = prompt("LLaVA-OneVision", still_and_moving(FRAMES)[:1].repeat(2, 1, 1, 1, 1))
    for _ in range(2):
        attached.drop_static_tokens(inputs)
        assert attached.session.retention_mask.view(2, FRAMES, -1).float().mean(2).tolist() == [[1, 0, 0, 0]] * 2


def test_the_first_image_of_each_prompt_is_kept():
    """Of images, which are one stream, and of features that were computed before."""
    model, attached = attached_model("Gemma 3")
    clip = still_and_moving(FRAMES)[0]
    inputs = prompt("Gemma 3", clip.view(2, 2, *clip.shape[1:]))
    attached.drop_static_tokens(inputs)
    assert attached.session.retention_mask.view(FRAMES, -1).float().mean(1).tolist() == [1, 0, 1, 0]
    attached.rows = "cameras"
    with pytest.raises(ValueError, match="images of a prompt are of different cameras"):
        attached.drop_static_tokens(inputs)
    attached.rows = "frames"
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"))
    attached.rows, features.active_mask = "cameras", torch.zeros_like(features.active_mask)
    attached.drop_static_tokens(inputs | {"mm_encoder_outputs": {"image": features}})
    assert attached.session.retention_mask.view(FRAMES, -1).float().mean(1).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("name, grid", [("Gemma 3", 6), ("LLaVA-OneVision", 6), ("LLaVA-OneVision", 7)])
def test_a_pooled_token_is_kept_if_any_of_its_patches_was_encoded(name, grid):
    """The reference looks up the patches that a token reads, along each side."""
    options = {"vision_config": {**vlm("gemma")["vision_config"], "image_size": 4 * grid}}
    model = MODELS[name].build(**options).model.float()
    side = 3 if name == "Gemma 3" else -(-grid // 2)
    if name == "Gemma 3":
        reads = [range(grid // side * place, grid // side * (place + 1)) for place in range(side)]
    else:  # bilinear: the two nearest patches of the token's centre
        lowest = [int((place + 0.5) * grid / side - 0.5) for place in range(side)]
        reads = [range(low, low + 2) for low in lowest]
    active = torch.rand(50, grid, grid, generator=torch.Generator().manual_seed(0)) < 0.1
    expected = [
        any(frame[row, column] for row in reads[place // side] for column in reads[place % side])
        for frame in active
        for place in range(side * side)
    ]
    retained = retained_by_gate(model, IMAGE_TOKENS[model.config.model_type], active)
    assert retained.flatten().tolist() == expected and 0 < sum(expected) < len(expected)


@each_model
def test_tokens_that_moved_away_from_the_last_one_kept(name):
    """Against plain loops; of two clips, where each prompt has one. Dense frames, too."""
    model, attached = attached_model(name, mode="dense")
    clips = torch.stack([still_and_moving(FRAMES)[1], still_and_moving(FRAMES)[1].flip(0)])
    inputs, tokens = prompt(name, clips), MODELS[name].tokens
    with torch.no_grad():
        full = getattr(model.base_model, f"get_{KINDS[name]}_features")(inputs[PIXELS[KINDS[name]]]).pooler_output
    frames = full[:, : FRAMES * tokens].reshape(2, FRAMES, tokens, -1)
    shares = []
    for level in (-1, 0.05, 3):
        expected = torch.ones(2, FRAMES, tokens, dtype=torch.bool)
        for number, place in itertools.product(range(2), range(tokens)):
            last = 0
            for time in range(1, FRAMES):
                similar = torch.cosine_similarity(*frames[number, [last, time], place], dim=0)
                expected[number, time, place] = bool(1 - similar > level)
                last = time if expected[number, time, place] else last
        attached.drop_static_tokens(inputs, min_change=level)
        assert torch.equal(attached.session.retention_mask, expected.flatten())
        shares.append(attached.share_kept)
    assert shares[0] == 1 and 0.26 < shares[1] < 0.95 and shares[2] == 1 / FRAMES


def test_a_mask_from_elsewhere():
    model, attached = attached_model("LLaVA-OneVision", mode="dense")
    inputs = prompt("LLaVA-OneVision", still_and_moving(FRAMES))
    mask = torch.rand(2 * FRAMES * 9, generator=torch.Generator().manual_seed(0)) < 0.5
    dropped = attached.drop_static_tokens(inputs, retention_mask=mask)
    kept = model.get_video_features(inputs["pixel_values_videos"]).pooler_output[:, :-1].flatten(0, 1)[mask]
    features = dropped["mm_encoder_outputs"]["video"].pooler_output.squeeze(1)
    first = mask[: FRAMES * 9].sum()
    assert torch.equal(torch.cat([features[:first], features[first + 1 : -1]]), kept)
    assert attached.share_kept == mask.float().mean()
    with pytest.raises(ValueError, match=r"torch.bool of shape \(71,\); expected bool of shape \(72,\)"):
        attached.drop_static_tokens(inputs, retention_mask=mask[1:])


def test_what_cannot_be_dropped_is_refused():
    model, attached = attached_model("LLaVA-OneVision")
    inputs = prompt("LLaVA-OneVision", still_and_moving(FRAMES)[:1])

    def refused(words, **changes):
        given = {key: value for key, value in (inputs | changes).items() if value is not None}
        with pytest.raises(ValueError, match=words):
            attached.drop_static_tokens(given)

    refused("needs `input_ids`", input_ids=None)
    refused("no `pixel_values_videos`", pixel_values_videos=None)
    refused("The text has 37 video tokens for 28 features", pixel_values_videos=inputs["pixel_values_videos"][:, 1:])
    model.train()
    refused("encoded densely")
    model.eval()
    attached.detach()
    refused("encoded densely")
    assert attached.session.retention_mask is None
    with pytest.raises(ValueError, match="cannot be dropped for a AyaVisionForConditionalGeneration"):
        attached_model("Aya Vision")[1].drop_static_tokens(inputs)
