"""Captions with the facts that they assert, and the prompts of zero-shot classification."""

from dataclasses import dataclass

import numpy as np

from recipes.siglip_small.facts import KINDS, NOTHING, PLACES
from recipes.siglip_small.sources import Thing, things

# {} is the thing with its article ("a dog", "an apple", "grapes"), {name} the bare name.
TRAINING_PHRASINGS = (
    "{}",
    "{name}",
    "a photo of {}",
    "This is a photo of {name}.",
    "this is {}",
    "a picture of {}",
    "a drawing of {}",
    "an image of {}",
    "there is {} here",
    "you can see {}",
    "{} in a picture",
    "a photo of the {name}",
    "a small {name}",
    "a frame of a video that shows {}",
    "{} before a background",
    "it shows {}",
    "one {name}",
    "look, {}!",
)
HELD_OUT_PHRASINGS = (
    "a close-up photo of {}",
    "an illustration with {}",
    "we see {} in this image",
    "a camera picture of {}",
    "the object is {}",
)
PLACE_WORDS = {
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "middle": ("in the middle", "in the centre"),
}
NUMBERS = {2: "two", 3: "three"}
EMPTY_PHRASES = (
    "nothing",
    "an empty scene",
    "an empty picture",
    "nothing to see",
    "no object at all",
    "just a background",
    "an empty place with nothing in it",
)
# Names of scenes in photographs and footage.
SCENES = {
    "person": ("a person", "people", "somebody", "a human", "persons"),
    "street": ("a street", "a road in a town", "a street scene"),
    "traffic": ("traffic", "cars on a road"),
    "city": ("a city", "a city by night", "tall buildings"),
    "city from above": ("a town from above", "an aerial photo of a town"),
    "park": ("a park", "people in a park"),
    "room": ("a room", "the inside of a room", "an indoor scene"),
    "face": ("a face", "a human face", "somebody talking", "a talking head"),
    "meadow": ("grass", "a meadow", "a field"),
    "landscape": ("a landscape", "countryside"),
    "forest": ("a forest", "a wood with a stream"),
    "sky": ("the sky", "a dark sky"),
    "wall": ("a wall", "a brick wall"),
    "plant": ("a plant", "a plant in a pot"),
    "circuit board": ("a circuit board", "electronics"),
    "painting": ("a painting",),
    "graffiti": ("graffiti", "a painted wall"),
    "text": ("text", "a sign with letters"),
    "flower": ("a flower", "flowers"),
    "mountain": ("a mountain", "mountains"),
    "bridge": ("a bridge",),
    "piano": ("a piano", "somebody playing the piano"),
}
KIND_WORDS = {
    "animal": ("an animal", "animals"),
    "bird": ("a bird", "birds"),
    "insect or bug": ("an insect", "a bug"),
    "sea animal": ("a sea animal",),
    "fruit": ("fruit", "a fruit"),
    "food": ("food", "something to eat"),
    "vegetable": ("a vegetable", "vegetables"),
    "something sweet": ("something sweet", "a dessert"),
    "drink": ("a drink", "something to drink"),
    "vehicle": ("a vehicle", "something to travel with"),
    "building": ("a building",),
    "tool": ("a tool",),
    "musical instrument": ("a musical instrument", "an instrument"),
    "something to wear": ("clothes", "something to wear"),
    "person": ("a person", "people", "somebody"),
}
BY_NAME = {thing.name: thing for thing in things()}
GENERAL = frozenset(kind for kinds in KINDS.values() for kind in kinds)


@dataclass(frozen=True)
class Caption:
    """A text, and the facts that it asserts: it is true of a picture that has all of them."""

    text: str
    facts: frozenset[str]


def with_article(name: str, thing: Thing | None = None) -> str:
    """A name with its article, such as `a dog` or `an apple`; plurals get none."""
    if thing is not None and name == thing.plural:
        return name
    if name.split()[0].endswith("s") and name.split()[0] not in ("bus", "glass", "octopus", "cactus", "christmas"):
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'ewe', 'eu', 'one')) else 'a'} {name}"


def phrase(thing: Thing, phrasing: str, name: str | None = None) -> str:
    """A phrasing filled with a thing's name, or another name for it."""
    name = name or thing.name
    return phrasing.format(with_article(name, thing), name=name)


def any_name(thing: Thing, rng: np.random.Generator) -> str:
    """The thing's name, or sometimes a synonym."""
    if thing.synonyms and rng.random() < 0.3:
        return thing.synonyms[rng.integers(len(thing.synonyms))]
    return thing.name


def pick(options, rng: np.random.Generator):
    """A random option."""
    return options[int(rng.integers(len(options)))]


def caption(facts: frozenset[str], rng: np.random.Generator) -> Caption:
    """A caption that is true of a picture with these facts (at least one)."""
    names = sorted(fact for fact in facts if fact in BY_NAME)
    scenes = sorted(fact for fact in facts if fact in SCENES or fact == NOTHING)
    kinds = sorted(fact for fact in facts if fact in GENERAL)
    detailed = sorted(fact for fact in facts if fact not in BY_NAME and fact.split(" ", 1)[-1] in BY_NAME)
    draw = rng.random()
    if detailed and draw < 0.3:
        fact = pick(detailed, rng)
        head, name = fact.split(" ", 1)
        thing = BY_NAME[name]
        if head in PLACES:
            return Caption(
                f"{with_article(any_name(thing, rng), thing)} {pick(PLACE_WORDS[head], rng)}", frozenset({fact})
            )
        if int(head) in NUMBERS:
            ending = pick(("", " in a picture", " together"), rng)
            return Caption(f"{NUMBERS[int(head)]} {thing.plural}{ending}", frozenset({fact}))
    if len(names) > 1 and draw < 0.5:
        two = [names[place] for place in rng.choice(len(names), size=2, replace=False)]
        said = [with_article(any_name(BY_NAME[name], rng), BY_NAME[name]) for name in two]
        return Caption(pick(("{} and {}", "a picture of {} and {}", "{} with {}"), rng).format(*said), frozenset(two))
    if kinds and draw < 0.57:
        kind = pick(kinds, rng)
        return Caption(
            pick(("{}", "a picture of {}", "there is {}"), rng).format(pick(KIND_WORDS[kind], rng)), frozenset({kind})
        )
    if scenes and (not names or rng.random() < 0.4):
        scene = pick(scenes, rng)
        words = pick(EMPTY_PHRASES if scene == NOTHING else SCENES[scene], rng)
        return Caption(pick(("{}", "{}", "a photo of {}", "this is {}"), rng).format(words), frozenset({scene}))
    return name_caption(pick(names or sorted(BY_NAME), rng), rng)


def name_caption(name: str, rng: np.random.Generator) -> Caption:
    """A caption that names a thing, in one of TRAINING_PHRASINGS."""
    thing = BY_NAME[name]
    return Caption(phrase(thing, pick(TRAINING_PHRASINGS, rng), any_name(thing, rng)), frozenset({name}))


def prompts(phrasing: str) -> list[str]:
    """One prompt for every thing, in the table's order."""
    return [phrase(thing, phrasing) for thing in things()]


def all_words() -> list[str]:
    """Texts with every word of the captions, to train the tokenizer on."""
    rng = np.random.default_rng(0)
    texts = [phrase(thing, phrasing) for thing in things() for phrasing in TRAINING_PHRASINGS]
    texts += [name for thing in things() for name in (thing.name, thing.plural, *thing.synonyms)]
    texts += [word for words in (*SCENES.values(), *KIND_WORDS.values()) for word in words] + list(EMPTY_PHRASES)
    texts += [word for words in PLACE_WORDS.values() for word in words]
    texts += [f"{NUMBERS[2 + int(rng.integers(2))]} {thing.plural} together" for thing in things()]
    return texts
