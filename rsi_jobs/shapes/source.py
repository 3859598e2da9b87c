"""A prompt source as untidy as a language model: mostly good captions, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from rsi_jobs.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    random_caption,
    random_scene,
)

Rng = np.random.Generator

VAGUE: Final = (
    "a thing",
    "something nice",
    "a shape",
    "some shapes",
    "a picture",
    "two things",
    "an object on a background",
    "something colourful",
    "a nice picture of something",
    "a few objects",
    "anything",
    "art",
)
"""Five in a hundred of the base's own training captions are these, so they mean something."""

SOURCE_WORDS: Final = VAGUE
"""Phrases outside the caption grammar whose words the tokenizer knows whole."""

_UNKNOWN: Final = (
    "a majestic dragon over a misty castle",
    "a {size} turquoise hexagon on white",
    "a {colour} bicycle above a {size} {shape} on {background}",
    "an astronaut riding a {shape}",
    "a {size} {colour} dodecahedron in the centre, magenta background",
    "bond",
    "a watercolour of three foxes at dawn",
)
_UNFIT: Final = (
    "a {shape} that is not {colour} on {background}",
    "no {colour} {shape}, {background} background",
    "what does a {size} {colour} {shape} look like?",
    "can you draw a {colour} {shape}?",
    "draw a {size} {colour} {shape} please",
    "a {colour} {shape}, see https://example.com/{shape}.png",
    "a {colour} {shape} with the text 'hello' written on it",
    "<b>a {size} {colour} {shape}</b>",
    "{size} {colour} {shape} without a background",
)
_CONTRADICTORY: Final = (
    "a {colour} {colour2} {shape} on {background}",
    "a {size} {shape} above itself on {background}",
    "a large small {colour} {shape} in the centre on {background}",
    "a {colour} {shape} above and below a {colour2} {shape2} on {background}",
    "a round {colour} square on {background}",
)


def _two(words: tuple[str, ...], rng: Rng) -> tuple[str, str]:
    first, second = rng.choice(len(words), 2, replace=False)
    return words[first], words[second]


def _fill(frames: tuple[str, ...], rng: Rng) -> str:
    colour, colour2 = _two(COLOURS, rng)
    shape, shape2 = _two(SHAPES, rng)
    return frames[rng.integers(len(frames))].format(
        size=SIZES[rng.integers(len(SIZES))],
        colour=colour,
        colour2=colour2,
        shape=shape,
        shape2=shape2,
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
    )


def _good(rng: Rng, earlier: list[str]) -> str:
    return random_caption(random_scene(rng), rng)


def _vague(rng: Rng, earlier: list[str]) -> str:
    return VAGUE[rng.integers(len(VAGUE))]


def _contradictory(rng: Rng, earlier: list[str]) -> str:
    return _fill(_CONTRADICTORY, rng)


def _overloaded(rng: Rng, earlier: list[str]) -> str:
    things = " and ".join(_fill(("a {size} {colour} {shape}",), rng) for _ in range(rng.integers(4, 7)))
    return f"{things} on {BACKGROUNDS[rng.integers(len(BACKGROUNDS))]}"


def _unknown(rng: Rng, earlier: list[str]) -> str:
    return _fill(_UNKNOWN, rng)


def _unfit(rng: Rng, earlier: list[str]) -> str:
    return _fill(_UNFIT, rng)


def _truncated(rng: Rng, earlier: list[str]) -> str:
    caption = _good(rng, earlier)
    praise = " very beautiful highly detailed masterpiece of great quality"
    return caption + praise * int(rng.integers(2, 6))


def _duplicate(rng: Rng, earlier: list[str]) -> str:
    """An earlier prompt again, as it was or (two in three) reworded."""
    # Imported scenes only: a vague or broken prompt is repeated word for word.
    from rsi_jobs.shapes.scene import parse

    if not earlier:
        return _good(rng, earlier)
    prompt = earlier[rng.integers(len(earlier))]
    scene = parse(prompt)
    if scene is None or rng.random() < 1 / 3:
        return prompt
    return random_caption(scene, rng)


_KINDS: Final[tuple[tuple[float, Callable[[Rng, list[str]], str]], ...]] = (
    (0.66, _good),
    (0.06, _vague),
    (0.04, _contradictory),
    (0.04, _overloaded),
    (0.04, _unknown),
    (0.05, _unfit),
    (0.03, _truncated),
    (0.08, _duplicate),
)


def untidy_prompts(rng: Rng, n: int) -> list[str]:
    """`n` prompts, two in three of them good; the rest is what filters are for."""
    shares = np.array([share for share, _ in _KINDS])
    kinds = rng.choice(len(_KINDS), size=n, p=shares / shares.sum())
    prompts: list[str] = []
    for kind in kinds:
        prompts.append(_KINDS[kind][1](rng, prompts))
    return prompts
