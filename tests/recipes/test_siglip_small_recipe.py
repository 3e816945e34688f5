"""The embedded SigLIP's recipe: facts, captions, composing, the loss; nothing is downloaded."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import SiglipModel

from recipes import packages
from recipes.siglip_small import sources
from recipes.siglip_small.captions import HELD_OUT_PHRASINGS, TRAINING_PHRASINGS, Caption, caption, phrase, prompts
from recipes.siglip_small.compose import SIDE, Material, compose, tinted
from recipes.siglip_small.facts import NOTHING, Placed, facts_of, place_of
from recipes.siglip_small.features import SHARD, FeatureStore, patch_shares
from recipes.siglip_small.model import TEXT_LENGTH, make_tokenizer
from recipes.siglip_small.sources import RENDERINGS, Drawing, Photo, held_out_rendering, things
from recipes.siglip_small.train import Trained, looking_loss, sigmoid_loss, truth
from tests.conftest import assert_close_in_norm


@pytest.fixture(scope="module")
def material():
    """A red disc that is called a dog, blue and white bars that are called cat and apple, and two photographs."""
    drawings = {}
    shapes = {
        "dog": ("red", (0, 0, 223, 223)),
        "cat": ("blue", (0, 90, 223, 130)),
        "apple": ("white", (90, 0, 130, 223)),
    }
    for name, (colour, box) in shapes.items():
        picture = Image.new("RGBA", (224, 224))
        ImageDraw.Draw(picture).ellipse(box, fill=colour)
        drawings[name] = [Drawing(name, "noto", 0, picture.crop(picture.getbbox()))]
    ground = Photo(Image.new("RGB", (300, 200), "green"), False, True, ())
    street = Photo(Image.new("RGB", (200, 300), "grey"), False, False, ("street",))
    return Material(drawings, [ground, street], [ground, street])


def placed(thing, x=0.5, y=0.5, share=0.1):
    return Placed(thing, "noto", x, y, share)


def test_there_are_many_things_and_no_name_stands_for_two_of_them():
    assert len(things()) >= 150
    taken = {}
    for thing in things():
        for name in {thing.name, thing.plural, *thing.synonyms}:
            assert taken.setdefault(name, thing.name) == thing.name, name


def test_facts_say_what_is_there_where_and_how_often():
    facts = facts_of([placed("dog", x=0.1), placed("dog", x=0.9), placed("apple")], ["street"], empty=False)
    assert {"dog", "2 dog", "left dog", "right dog", "apple", "1 apple", "middle apple", "street"} <= facts
    assert {"animal", "fruit", "food"} <= facts
    assert not {"1 dog", "cat", NOTHING} & facts
    assert facts_of([], [], empty=True) == {NOTHING}
    assert facts_of([], ["street"], empty=False) == {"street"}
    assert "person" in facts_of([placed("walking person")], [], empty=False)


def test_how_many_of_a_thing_is_not_known_where_the_photograph_shows_some_too():
    assert "1 dog" not in facts_of([placed("dog")], ["dog"], empty=False)


@pytest.mark.parametrize(
    "x, y, place", [(0.5, 0.5, "middle"), (0.1, 0.5, "left"), (0.9, 0.4, "right"), (0.5, 0.1, "top"), (0.3, 0.3, None)]
)
def test_places_are_said_only_where_they_are_clear(x, y, place):
    assert place_of(placed("dog", x, y)) == place


def test_every_caption_is_true_of_the_picture_it_was_drawn_for(material):
    rng = np.random.default_rng(0)
    for number in range(300):
        picture = compose(material, np.random.default_rng(number))
        said = caption(picture.facts, rng)
        if picture.facts:
            assert said.facts <= picture.facts, (said, picture.facts)
        assert said.text and "{" not in said.text


def test_captions_of_all_kinds_are_drawn(material):
    rng = np.random.default_rng(0)
    facts = facts_of([placed("dog", x=0.1), placed("cat", x=0.9)], ["street"], empty=False)
    drawn = [caption(facts, rng) for _ in range(400)]
    asserted = {text.facts for text in drawn}
    for expected in ({"dog"}, {"dog", "cat"}, {"left dog"}, {"animal"}, {"street"}):
        assert frozenset(expected) in asserted


def test_a_picture_depends_on_its_number_alone(material):
    first, again = (compose(material, np.random.default_rng((3, 7))) for _ in range(2))
    other = compose(material, np.random.default_rng((3, 8)))
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert first.facts == again.facts
    assert first.image.size == (SIDE, SIDE)


def test_shares_are_of_the_pixels_that_a_drawing_covers(material):
    for number in range(120):
        picture = compose(material, np.random.default_rng(number))
        shares = [item.share for item in picture.placed]
        assert shares == sorted(shares, reverse=True)
        assert all(0 < share < 1 for share in shares)


def test_a_drawing_is_seen_where_it_is_said_to_be(material, monkeypatch):
    monkeypatch.setattr("recipes.siglip_small.compose.spoiled", lambda picture, rng: picture)
    monkeypatch.setattr("recipes.siglip_small.compose.turned", lambda drawing, rng, side: drawing.resize((side, side)))
    found = 0
    for number in range(60):
        picture = compose(material, np.random.default_rng(number))
        if [item.thing for item in picture.placed] == ["dog"]:
            red = (np.asarray(picture.image) == (255, 0, 0)).all(-1)
            assert (red != picture.covered).mean() < 0.02
            assert red.mean() == pytest.approx(picture.placed[0].share, abs=0.02)
            found += 1
    assert found > 5


def test_truth_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    names = [thing.name for thing in things()[:12]]
    pictures = [frozenset(rng.choice(names, size=rng.integers(0, 5), replace=False)) for _ in range(20)]
    captions = [Caption("", frozenset(rng.choice(names, size=rng.integers(1, 3), replace=False))) for _ in range(15)]
    expected = [[text.facts <= facts for text in captions] for facts in pictures]
    assert truth(pictures, captions).tolist() == expected


def test_the_loss_is_siglips_where_each_picture_has_its_own_caption(stock_model):
    torch.manual_seed(0)
    pixels, ids = torch.randn(4, 3, 24, 24), torch.randint(3, 99, (4, 16))
    with torch.no_grad():
        output = stock_model(input_ids=ids, pixel_values=pixels, return_loss=True)
    ours = sigmoid_loss(output.logits_per_image, torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(ours, output.loss)


def test_looking_at_drawings_costs_nothing_and_looking_away_does():
    covered = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    at = torch.tensor([0.7, 0.3, 0.0, 0.0]).view(1, 4, 1).repeat(2, 1, 2)
    away = torch.tensor([0.25, 0.25, 0.5, 0.0]).view(1, 4, 1).repeat(2, 1, 2)
    assert looking_loss(at, covered).item() == pytest.approx(0, abs=1e-5)
    assert looking_loss(away, covered).item() == pytest.approx(-np.log(0.5), abs=1e-5)
    assert looking_loss(away, torch.zeros(2, 4)).item() == 0  # pictures without drawings ask for nothing


def test_what_is_trained_gives_the_models_logits(stock_model):
    torch.manual_seed(0)
    stock_model = copy.deepcopy(stock_model).double()
    pixels, ids = torch.randn(3, 3, 24, 24), torch.randint(3, 99, (5, 16))
    with torch.no_grad():
        expected = stock_model(input_ids=ids, pixel_values=pixels).logits_per_image
        patches = stock_model.vision_model(pixel_values=pixels).last_hidden_state
        assert_close_in_norm(Trained(stock_model)(patches, ids), expected)


def test_the_optimizer_is_given_every_parameter_once(stock_model):
    trained = Trained(stock_model)
    given = [id(item) for group in trained.groups(1e-3) for item in group["params"]]
    assert sorted(given) == sorted(id(item) for item in trained.parameters())
    tower = {id(item) for item in SiglipModel.get_submodule(stock_model, "vision_model.encoder").parameters()}
    assert not tower & set(given)


def test_the_tokenizer_takes_any_text_in_siglips_length():
    tokenizer = make_tokenizer()
    ids = tokenizer(["a dog", "Zürich 東京 ☃ " * 40, ""], padding="max_length", truncation=True)["input_ids"]
    assert {len(row) for row in ids} == {TEXT_LENGTH}
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer("A DOG")["input_ids"] == tokenizer("a dog")["input_ids"]
    assert tokenizer.model_input_names == ["input_ids"]


def test_phrasings_read_well():
    dog, grapes, apple = (next(t for t in things() if t.name == name) for name in ("dog", "grapes", "apple"))
    assert phrase(dog, "a photo of {}") == "a photo of a dog"
    assert phrase(apple, "{}") == "an apple"
    assert phrase(grapes, "a photo of {}") == "a photo of grapes"
    assert phrase(dog, "This is a photo of {name}.") == "This is a photo of dog."
    assert not set(HELD_OUT_PHRASINGS) & set(TRAINING_PHRASINGS)
    assert len(set(prompts("{}"))) == len(things())


def test_what_is_held_out_has_another_rendering_in_training():
    assert held_out_rendering("dog", {"noto", "fluent-emoji", "twemoji"}) is None
    assert held_out_rendering("dog", {"noto", "noto-v1", "fluent-emoji", "twemoji"}) in ("noto", "noto-v1")
    # among many things, every one of them is held out somewhere
    every = {style for pair in RENDERINGS for style in pair}
    assert {held_out_rendering(str(number), every | {"twemoji"}) for number in range(100)} == every


def test_one_colour_becomes_another_one_and_the_shape_stays(material):
    drawing = Image.new("RGBA", (20, 10), (0, 0, 0, 255))
    drawing.putpixel((0, 0), (0, 0, 0, 0))
    found = tinted(drawing, np.random.default_rng(3))
    colours = {colour for _, colour in found.convert("RGB").getcolors()}
    assert len(colours) == 1 and colours != {(0, 0, 0)}
    assert found.getchannel("A").tobytes() == drawing.getchannel("A").tobytes()


def test_what_is_covered_is_what_the_drawings_cover(material):
    for number in range(40):
        picture = compose(material, np.random.default_rng(number))
        assert picture.covered.shape == (SIDE, SIDE)
        assert picture.covered.mean() == pytest.approx(sum(item.share for item in picture.placed), abs=0.15)
        assert picture.covered.any() == bool(picture.placed)
    where = np.zeros((4, 4), dtype=bool)
    where[0, 3] = where[2:, :2] = True
    assert patch_shares(where, 4).tolist() == [0, 0.25, 1, 0]


def test_features_continue_where_they_stopped(tmp_path, material):
    def pictures(first, stop):
        return [compose(material, np.random.default_rng(number)) for number in range(first, stop)]

    store = FeatureStore(tmp_path, SHARD + 5, (4, 3))
    store.add(torch.ones(SHARD, 4, 3), pictures(0, SHARD))
    again = FeatureStore(tmp_path, SHARD + 5, (4, 3))
    assert again.done == SHARD
    again.add(torch.full((5, 4, 3), 2.0), pictures(SHARD, SHARD + 5))
    whole = FeatureStore(tmp_path, SHARD + 5, (4, 3))
    assert whole.done == SHARD + 5
    assert whole.features[-1].min() == 2
    assert whole.facts()[-1] == pictures(SHARD + 4, SHARD + 5)[0].facts
    with pytest.raises(ValueError, match="array of shape"):
        FeatureStore(tmp_path, SHARD, (4, 3))


def test_a_file_with_another_hash_is_refused(tmp_path):
    (tmp_path / "x.tgz").write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-256"):
        packages.fetch(packages.Package(("npm",), "x.tgz", "0" * 64), tmp_path)


def test_a_registrys_client_that_is_missing_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-client"):
        packages.fetch(packages.Package(("no-such-client", "pack"), "x.tgz", "0" * 64), tmp_path)


def test_every_package_is_one_of_a_registry_that_is_known():
    assert len(sources.EMOJI) + len(sources.DEBIAN) == len(sources.ROWS)
    assert sources.EMOJI["noto"].filename == f"iconify-json-noto-{sources.ROWS[0]['version']}.tgz"
