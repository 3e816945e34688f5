"""
Facts: a picture has a set of facts, a caption asserts some, and it is true of every picture that has all of these. So
every caption of a batch can be compared with every picture, and another picture of a dog is no negative for "a dog".

Facts are strings: `dog` (there is one), `2 dog` (there are exactly two), `left dog`, `animal` (a thing of that kind),
`street` (a scene), `nothing` (no thing at all).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from recipes.siglip_small.sources import things

NOTHING = "nothing"
# Names in captions of the groups in `things.csv`; groups without an entry are never named.
KINDS = {
    "animal": ("animal",),
    "bird": ("bird", "animal"),
    "bug": ("insect or bug", "animal"),
    "sea": ("sea animal", "animal"),
    "fruit": ("fruit", "food"),
    "vegetable": ("vegetable", "food"),
    "food": ("food",),
    "sweet": ("something sweet", "food"),
    "drink": ("drink",),
    "vehicle": ("vehicle",),
    "building": ("building",),
    "tool": ("tool",),
    "music": ("musical instrument",),
    "clothes": ("something to wear",),
}
HUMANS = frozenset(("construction worker", "santa claus", "walking person"))
PLACES = ("left", "right", "top", "bottom", "middle")


@dataclass(frozen=True)
class Placed:
    """A drawing in a picture."""

    thing: str
    style: str
    x: float  # x, y: its centre, shares of the picture's width and height
    y: float
    share: float  # of the picture's pixels that it covers


def general_facts(name: str) -> tuple[str, ...]:
    """The kinds that a thing belongs to."""
    if name in HUMANS:
        return ("person",)
    return KINDS.get(CATEGORIES.get(name, ""), ())


CATEGORIES = {thing.name: thing.category for thing in things()}


def place_of(placed: Placed) -> str | None:
    """The place in the picture, one of PLACES; None if it is between places."""
    sideways, upright = placed.x - 0.5, placed.y - 0.5
    if max(abs(sideways), abs(upright)) < 0.1:
        return "middle"
    if abs(sideways) > 0.2 and abs(sideways) > 1.5 * abs(upright):
        return "left" if sideways < 0 else "right"
    if abs(upright) > 0.2 and abs(upright) > 1.5 * abs(sideways):
        return "top" if upright < 0 else "bottom"
    return None


def facts_of(placed: Iterable[Placed], shows: Iterable[str], empty: bool) -> frozenset[str]:
    """
    The facts of a picture with drawings before a photograph that shows things or scenes, or, if `empty`, nothing that
    has a name.
    """
    placed, shows = list(placed), list(shows)
    facts = set(shows)
    counts = Counter(item.thing for item in placed)
    for name, count in counts.items():
        facts.add(name)
        if name not in shows:
            facts.add(f"{count} {name}")
    for item in placed:
        place = place_of(item)
        if place is not None:
            facts.add(f"{place} {item.thing}")
    for name in [*counts, *shows]:
        facts.update(general_facts(name))
    if not placed and empty:
        facts.add(NOTHING)
    return frozenset(facts)
