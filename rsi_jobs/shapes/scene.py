"""The vocabulary of the shapes world: scenes, their captions, and the way back.

A scene is one object at a place, or two objects in a relation, on a plain background.
"A above B" and "B below A" are one scene: `Scene.key` is the same string for both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES: Final = ("small", "large")
BACKGROUNDS: Final = ("white", "black", "gray", "pink", "cyan")
RELATIONS: Final = ("above", "below", "left", "right")
PLACES: Final = ("centre", "top left", "top right", "bottom left", "bottom right")

OPPOSITE: Final = {"above": "below", "below": "above", "left": "right", "right": "left"}
RELATION_PHRASES: Final = {
    "above": ("above",),
    "below": ("below",),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
}
PLACE_PHRASES: Final = {
    "centre": "in the centre",
    "top left": "in the top left",
    "top right": "in the top right",
    "bottom left": "in the bottom left",
    "bottom right": "in the bottom right",
}
BACKGROUND_TEMPLATES: Final = (
    "{body} on {background}",
    "{body} on a {background} background",
    "{body}, {background} background",
    "{background} background, {body}",
)
PREFIXES: Final = ("", "a picture of ")
N_TEMPLATES: Final = 2 * len(BACKGROUND_TEMPLATES)

CHANGES: Final = ("colour", "shape", "size", "background", "relation", "swap")
"""What `change_one` can alter; "relation" means the place of a lone object."""

FACTS: Final = (
    len(SIZES),
    len(COLOURS),
    len(SHAPES),
    len(SIZES) + 1,
    len(COLOURS) + 1,
    len(SHAPES) + 1,
    len(RELATIONS) + len(PLACES),
    len(BACKGROUNDS),
)
"""Classes of each fact of a scene: two things (the second may be absent), how, where."""

_SINGLE_SHARE: Final = 0.1


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing with a place, or two things with a relation of the first to the second."""

    things: tuple[Thing, ...]
    relation: str
    background: str

    def __post_init__(self) -> None:
        known = {1: PLACES, 2: RELATIONS}.get(len(self.things))
        if known is None:
            raise ValueError(f"a scene has one or two things, not {len(self.things)}")
        if self.relation not in known:
            raise ValueError(f"relation {self.relation!r} is none of {known}")

    def canonical(self) -> Scene:
        """The same scene with the upper or left thing first."""
        if len(self.things) == 2 and self.relation in ("below", "right"):
            return Scene(self.things[::-1], OPPOSITE[self.relation], self.background)
        return self

    def key(self) -> str:
        """One string for one scene, whatever the caption's word order was."""
        scene = self.canonical()
        things = " & ".join(str(thing) for thing in scene.things)
        return f"{things} | {scene.relation} | {scene.background}"

    def caption(self, template: int = 0, phrase: int = 0) -> str:
        """A caption; `template` in 0..N_TEMPLATES-1 and `phrase` choose the wording."""
        first = f"a {self.things[0]}"
        if len(self.things) == 2:
            phrases = RELATION_PHRASES[self.relation]
            body = f"{first} {phrases[phrase % len(phrases)]} a {self.things[1]}"
        else:
            body = f"{first} {PLACE_PHRASES[self.relation]}"
        prefix = PREFIXES[template // len(BACKGROUND_TEMPLATES) % len(PREFIXES)]
        frame = BACKGROUND_TEMPLATES[template % len(BACKGROUND_TEMPLATES)]
        return frame.format(body=prefix + body, background=self.background)


def _alternatives(words: tuple[str, ...]) -> str:
    return "|".join(words)


_THING = rf"a ({_alternatives(SIZES)}) ({_alternatives(COLOURS)}) ({_alternatives(SHAPES)})"
_RELATION = rf"(above|below|(?:to the )?(?:left|right) of) {_THING}"
_BODY = rf"(?:a picture of )?{_THING} (?:{_RELATION}|in the ({_alternatives(PLACES)}))"
_GROUND = rf"({_alternatives(BACKGROUNDS)})"
_CAPTION = re.compile(
    rf"(?:{_GROUND} background, )?{_BODY}"
    rf"(?:, {_GROUND} background| on {_GROUND}| on a {_GROUND} background)?"
)


def parse(caption: str) -> Scene | None:
    """The scene a caption describes, or None if it is not exactly one of our captions."""
    text = " ".join(caption.lower().split()).rstrip(".")
    match = _CAPTION.fullmatch(text)
    if match is None:
        return None
    g = match.groups()
    grounds = [word for word in (g[0], *g[9:12]) if word]
    if len(grounds) != 1:
        return None
    first = Thing(*g[1:4])
    if g[8] is not None:
        return Scene((first,), g[8], grounds[0])
    relation = next(word for word in RELATIONS if word in g[4].split())
    return Scene((first, Thing(*g[5:8])), relation, grounds[0])


def _pick(words: tuple[str, ...], u: float) -> str:
    return words[int(u * len(words))]


def random_scene(rng: np.random.Generator) -> Scene:
    """One scene: a lone thing in one of ten, else two things."""
    u = rng.random(9)
    first = Thing(_pick(SIZES, u[1]), _pick(COLOURS, u[2]), _pick(SHAPES, u[3]))
    background = _pick(BACKGROUNDS, u[4])
    if u[0] < _SINGLE_SHARE:
        return Scene((first,), _pick(PLACES, u[5]), background)
    second = Thing(_pick(SIZES, u[6]), _pick(COLOURS, u[7]), _pick(SHAPES, u[8]))
    return Scene((first, second), _pick(RELATIONS, u[5]), background)


def random_scenes(rng: np.random.Generator, n: int, exclude: set[str] | None = None) -> list[Scene]:
    """`n` scenes with distinct keys, none of them in `exclude` (a set of `Scene.key`)."""
    seen = set(exclude or ())
    if n + len(seen) > count_scenes() // 2:
        raise ValueError(f"{n} new scenes beside {len(seen)}: there are {count_scenes()}")
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = random_scene(rng)
        if scene.key() not in seen:
            seen.add(scene.key())
            scenes.append(scene)
    return scenes


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene: any template, wording, and order of the two things."""
    u = rng.random(3)
    if len(scene.things) == 2 and u[0] < 0.5:
        scene = Scene(scene.things[::-1], OPPOSITE[scene.relation], scene.background)
    return scene.caption(int(u[1] * N_TEMPLATES), int(u[2] * 2))


def count_scenes() -> int:
    """How many distinct scenes (keys) there are."""
    things = len(SIZES) * len(COLOURS) * len(SHAPES)
    return (things * len(PLACES) + things * things * 2) * len(BACKGROUNDS)


def _other(words: tuple[str, ...], word: str, u: float) -> str:
    return _pick(tuple(w for w in words if w != word), u)


def _changed(scene: Scene, kind: str, u: np.ndarray) -> Scene:
    which = int(u[0] * len(scene.things))
    thing = scene.things[which]
    if kind == "background":
        return replace(scene, background=_other(BACKGROUNDS, scene.background, u[1]))
    if kind == "relation":
        words = RELATIONS if len(scene.things) == 2 else PLACES
        return replace(scene, relation=_other(words, scene.relation, u[1]))
    if kind == "swap" and len(scene.things) == 2:
        a, b = scene.things
        swapped = (replace(a, colour=b.colour), replace(b, colour=a.colour))
        return replace(scene, things=swapped)
    if kind == "shape":
        thing = replace(thing, shape=_other(SHAPES, thing.shape, u[1]))
    elif kind == "size":
        thing = replace(thing, size=_other(SIZES, thing.size, u[1]))
    else:
        thing = replace(thing, colour=_other(COLOURS, thing.colour, u[1]))
    things = tuple(thing if i == which else t for i, t in enumerate(scene.things))
    return replace(scene, things=things)


def change_one(scene: Scene, rng: np.random.Generator, kinds: tuple[str, ...] = CHANGES) -> Scene:
    """The scene with one thing changed (of the given kinds); its key always differs."""
    while True:
        u = rng.random(3)
        changed = _changed(scene, _pick(kinds, u[2]), u)
        if changed.key() != scene.key():
            return changed
        # Swapping the colours of two things of one colour changes nothing: draw again.
        if kinds == ("swap",):
            kinds = ("colour",)


def facts(scene: Scene) -> list[int]:
    """The class of each of FACTS, for training: the same for every wording of a scene."""
    scene = scene.canonical()
    found: list[int] = []
    for thing in scene.things:
        found += [SIZES.index(thing.size), COLOURS.index(thing.colour), SHAPES.index(thing.shape)]
    if len(scene.things) == 1:
        found += [classes - 1 for classes in FACTS[3:6]]
    how = (RELATIONS + PLACES).index(scene.relation)
    return [*found, how, BACKGROUNDS.index(scene.background)]
