"""The captions of the shapes world: a grammar that writes them, and a parser that reads them back.

    caption := ["there is "] what
    what    := thing                                      one object
             | thing " at the " place                     one object and where in the image it is
             | thing relation thing                       two; the relation is of the first to the second
             | thing relation thing " and " relation thing    three; both relations are of the first
             | thing (", " thing)* " and " thing          two or three in no order
             | thing " at the " place (", " ...)* " and " ...    two or three, each in its place
    thing    := ("a" | "an") [size] colour shape
    relation := " left of " | " right of " | " above " | " below "       and, in the rich phrasing, their synonyms
A caption names every object of its scene, in reading order except in one of four relations. The short phrasing has
neither "there is" nor synonyms.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

from latent_verse.data.shapes.drawing import SPECKS, UNKNOWN, Obj, Scene, WorldSettings, place_names

# the direction from the second object to the first
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SYNONYMS = {
    "left of": ("to the left of",),
    "right of": ("to the right of",),
    "above": ("over",),
    "below": ("under", "beneath"),
}
_RELATION_OF = {word: word for word in RELATIONS} | {w: name for name, words in SYNONYMS.items() for w in words}


@dataclass(frozen=True)
class Thing:
    """An object as a caption names it; `size` is None if the caption does not give it."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Statement:
    """What a caption says: exactly these objects; relations (i, name, j) between them; places (i, name)."""

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    places: tuple[tuple[int, str], ...] = ()


def holds(relation: str, a: Obj, b: Obj, margin: float) -> bool:
    """Whether `a` is left of (right of, above, below) `b` by at least `margin` pixels between centres."""
    dx, dy = RELATIONS[relation]
    return (a.x - b.x) * dx + (a.y - b.y) * dy >= margin


def write_caption(world: WorldSettings, scene: Scene, rng: random.Random) -> str:
    """One of the true captions of a scene, chosen by `rng`."""
    objects = list(scene.objects)
    rich = world.phrasing == "rich"
    rng.shuffle(objects)
    if len(objects) == 1:
        forms = ["plain", "placed"]
    else:
        forms = ["plain", *["related"] * 4, "placed"] if rich else ["plain", "related", "related", "placed", "placed"]
    form = rng.choice(forms)
    if form != "related" or rng.random() < 0.75:  # in reading order, as most people would
        objects.sort(key=lambda o: world.cell(o)[::-1])
    related = [[name for name in RELATIONS if holds(name, objects[0], o, world.margin)] for o in objects[1:]]
    if form == "related" and not all(related):  # World.scene gives no such scene, but one may be made by hand
        form = "plain"
    things = [_name(world, o, rng) for o in objects]
    if form == "placed":
        things = [f"{t} at the {world.place(o)}" for t, o in zip(things, objects, strict=True)]
    if form == "related":
        words = [rng.choice(names) for names in related]
        if rich:
            words = [rng.choice((word, *SYNONYMS[word])) for word in words]
        caption = f"{things[0]} " + " and ".join(f"{w} {t}" for w, t in zip(words, things[1:], strict=True))
    else:
        caption = " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
    return f"there is {caption}" if rich and rng.random() < 0.2 else caption


def _name(world: WorldSettings, o: Obj, rng: random.Random) -> str:
    # Where there are two sizes most captions give it, and some do not, as people do.
    with_size = len(world.sizes) > 1 and rng.random() < 0.85
    words = [*([o.size] if with_size else []), o.colour, o.shape]
    return " ".join([_article(words), *words])


def _article(words: list[str]) -> str:
    return "an" if words[0][0] in "aeiou" else "a"


def describe(world: WorldSettings, scene: Scene) -> str:
    """What an image shows: every object in its place, also one whose colour or shape the reader does not know."""

    def name(o: Obj) -> str:
        if o == SPECKS:
            return "scattered pixels"
        known = [word for word in (o.size if len(world.sizes) > 1 else "", o.colour) if word not in ("", UNKNOWN)]
        words = " ".join(["something", *known] if o.shape == UNKNOWN else [_article(known), *known, o.shape])
        return f"{words} at the {world.place(o)}"

    things = [name(o) for o in scene.objects]
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things) or "nothing"


def read_caption(world: WorldSettings, text: str) -> Statement | None:
    """What a caption states, or None if it does not follow the grammar with this world's words.

    Case, spaces, a space before a comma (as CLIP decodes) and a full stop at the end make no difference.
    """
    text = re.sub(r"\s*,\s*", ", ", " ".join(text.lower().split())).removesuffix(".").strip()
    text = text.removeprefix("there is ")
    sizes, colours, shapes = ("|".join(words) for words in (world.sizes, world.colours, world.shapes))
    thing = rf"an? (?:({sizes}) )?({colours}) ({shapes})\b"
    places = "|".join(sorted(place_names(world.grid), key=len, reverse=True))
    relations = "|".join(sorted(_RELATION_OF, key=len, reverse=True))
    placed = rf"{thing}(?: at the ({places}))?"

    parts = [re.fullmatch(placed, part) for part in re.split(r", | and ", text)]
    if all(parts):
        joints = re.findall(r", | and ", text)  # commas between all but the last two things, "and" before the last
        expected = [", "] * (len(parts) - 2) + [" and "] * (len(parts) > 1)
        if len(parts) > world.max_objects or joints != expected:
            return None
        stated = [(i, m[4]) for i, m in enumerate(parts) if m[4]]
        if stated and len(stated) != len(parts):
            return None
        return Statement(tuple(map(_thing, parts)), places=tuple(stated))

    subject = re.match(thing, text)
    if subject is None or world.max_objects < 2:
        return None
    clauses = text[subject.end() :].split(" and")
    matches = [re.fullmatch(rf" ({relations}) {thing}", clause) for clause in clauses]
    if not all(matches) or len(matches) > world.max_objects - 1:
        return None
    things = (_thing(subject), *(_thing(m, first=2) for m in matches))
    return Statement(things, relations=tuple((0, _RELATION_OF[m[1]], i + 1) for i, m in enumerate(matches)))


def _thing(match: re.Match, first: int = 1) -> Thing:
    return Thing(size=match[first], colour=match[first + 1], shape=match[first + 2])


def compare(world: WorldSettings, scene: Scene, statement: Statement | None) -> dict[str, bool]:
    """Which parts of a caption are true of a scene. An ill-formed caption (None) is false in everything.

    Returns:
        count: the number of objects is right.
        colour, shape: the same ones occur equally often, whichever object has them.
        size, layout: every size, and every relation and place, is true of the best assignment of objects to words.
        all: some assignment makes every word true.
    """
    report = dict.fromkeys(("count", "colour", "shape", "size", "layout", "all"), False)
    if statement is None:
        return report
    things, objects = statement.things, scene.objects
    report["count"] = len(things) == len(objects)
    for attribute in ("colour", "shape"):
        said, seen = ([getattr(o, attribute) for o in side] for side in (things, objects))
        report[attribute] = sorted(said) == sorted(seen)
    if not report["count"]:
        return report
    best = (-1, False, False)
    for order in itertools.permutations(objects):
        pairs = list(zip(things, order, strict=True))
        sizes = [t.size in (None, o.size) for t, o in pairs]
        right = sum((t.shape == o.shape) + (t.colour == o.colour) for t, o in pairs) + sum(sizes)
        best = max(best, (right, all(sizes), _layout_holds(world, order, statement)))
    _, report["size"], report["layout"] = best
    report["all"] = best == (3 * len(things), True, True)
    return report


def _layout_holds(world: WorldSettings, objects: tuple[Obj, ...], statement: Statement) -> bool:
    return all(holds(name, objects[i], objects[j], world.margin) for i, name, j in statement.relations) and all(
        world.place(objects[i]) == place for i, place in statement.places
    )
