"""Reads an English prompt with word lists: its attributes, objects, and what contradicts itself.

There is no tagger and no model here, so that the prompts stage runs anywhere in milliseconds. A
prompt is cut into pieces (the longest phrase of any list wins); the words between two stop words,
relations or punctuation marks are a noun phrase, and one that names something is an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final, NamedTuple

ATTRIBUTES: Final = (
    "relations", "styles", "lights", "settings", "counts", "sizes", "materials", "colours",
)  # fmt: skip
"""The lists whose words make a prompt specific."""

LISTS: Final = (*ATTRIBUTES, "vague", "abstract", "stop", "actions_not")
"""Every list, the one that wins a phrase named twice first."""

OPPOSITE: Final = {
    "above": "below", "below": "above", "left": "right", "right": "left",
    "front": "behind", "behind": "front", "inside": "outside", "outside": "inside",
}  # fmt: skip

_TOKEN = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*|[^\w\s]")
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_REFLEXIVE: Final = frozenset({"itself", "himself", "herself", "themselves"})
_EXCLUSIVE: Final = frozenset({"colours", "sizes"})
_COPULAS: Final = frozenset({"is", "are"})
_LONGEST = 5


class Piece(NamedTuple):
    """One phrase of a prompt: its words, the list it is in ("word", "end" if none), its group."""

    text: str
    kind: str
    group: str


@dataclass(frozen=True)
class Reading:
    """What the word lists find in a prompt."""

    n_words: int
    attributes: tuple[str, ...]
    objects: tuple[str, ...]
    vague_objects: tuple[str, ...]
    concrete: float
    """Share of the content words that name something one can see; 1.0 if there are none."""
    conflict: str
    """What contradicts itself, or ""."""


@cache
def lexicon() -> dict[str, tuple[str, str]]:
    """Every listed phrase (words joined by single spaces) with its list and group."""
    found: dict[str, tuple[str, str]] = {}
    folder = resources.files("rsi_jobs.prompts") / "words"
    for name in LISTS:
        for line in (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            group, _, words = line.partition("#")[0].rpartition(":")
            for word in words.split(","):
                if word.strip():
                    found.setdefault(word.strip(), (name, group.strip()))
    return found


def read(prompt: str) -> Reading:
    """Cut a prompt into pieces and count what is in it."""
    tokens = [_POSSESSIVE.sub("", token) for token in _TOKEN.findall(prompt.lower())]
    pieces = list(_pieces(tokens))
    content = [piece for piece in pieces if piece.kind not in ("stop", "end")]
    empty = [piece for piece in content if piece.kind in ("abstract", "vague")]
    phrases = list(_noun_phrases(pieces))
    named = [phrase for phrase in phrases if any(p.kind in _NAMING for p in phrase)]
    vague = [
        phrase
        for phrase in phrases
        if any(p.kind == "vague" for p in phrase) and not any(p.kind in _SHOWN for p in phrase)
    ]
    return Reading(
        n_words=sum(token[0].isalnum() for token in tokens if token),
        attributes=tuple(p.text for p in pieces if p.kind in ATTRIBUTES),
        objects=tuple(_text(phrase) for phrase in named),
        vague_objects=tuple(_text(phrase) for phrase in vague),
        concrete=1.0 - len(empty) / len(content) if content else 1.0,
        conflict=_two_of_a_kind(phrases) or _told_twice(pieces) or _to_itself(pieces),
    )


_NAMING: Final = frozenset({"word", "actions_not"})
# A noun phrase with one of these is no vague one: "a beautiful beach", "a nice watercolor".
_SHOWN: Final = _NAMING | {"settings", "styles", "lights", "abstract"}
_INSIDE: Final = _NAMING | {"vague", "abstract", "settings", "styles", "lights",
                            "sizes", "materials", "colours"}  # fmt: skip


def _pieces(tokens: list[str]) -> Iterator[Piece]:
    words, i = lexicon(), 0
    while i < len(tokens):
        for length in range(min(_LONGEST, len(tokens) - i), 0, -1):
            text = " ".join(tokens[i : i + length]).replace("-", " ")
            known = words.get(text) or (_singular(text) if length == 1 else None)
            if known:
                yield Piece(text, *known)
                break
        else:
            length, text = 1, tokens[i]
            yield _unlisted(text)
        i += length


def _singular(word: str) -> tuple[str, str] | None:
    known = lexicon().get(word[:-1]) if word.endswith("s") and len(word) > 3 else None
    return known if known and known[0] in ("abstract", "vague", "settings", "styles") else None


def _unlisted(token: str) -> Piece:
    if not token or not token[0].isalnum():
        return Piece(token, "end", "")
    if token.isdecimal():
        return Piece(token, "counts" if 1 <= int(token[:4]) <= 100 else "word", "")
    if token.endswith("ing") and len(token) > 4:
        return Piece(token, "relations", "")
    # "black-tipped", "blue-eyed": an attribute, but none that excludes another.
    for part in token.split("-") if "-" in token else ():
        known = lexicon().get(part)
        if known and known[0] in ("colours", "sizes", "materials", "counts"):
            return Piece(token, known[0], "")
    return Piece(token, "word", "")


def _noun_phrases(pieces: list[Piece]) -> Iterator[list[Piece]]:
    phrase: list[Piece] = []
    for piece in (*pieces, Piece("", "end", "")):
        if piece.kind in _INSIDE:
            phrase.append(piece)
        elif phrase:
            yield phrase
            phrase = []


def _text(phrase: list[Piece]) -> str:
    return " ".join(piece.text for piece in phrase)


def _two_of_a_kind(phrases: list[list[Piece]]) -> str:
    """Two groups of one list right before a noun: "a red blue circle", "a tiny huge dog"."""
    for phrase in phrases:
        run: list[Piece] = []
        for piece in phrase:
            if piece.kind in ("colours", "sizes", "materials"):
                run.append(piece)
                continue
            for kind in _EXCLUSIVE if piece.kind in _NAMING else ():
                groups = {p.group: p.text for p in run if p.kind == kind and p.group}
                # Height, length and bulk go together ("a long tall wall"); only opposites clash.
                if kind == "sizes" and not _opposed(set(groups)):
                    continue
                if len(groups) > 1:
                    return f"{' and '.join(groups.values())} {piece.text}"
            run = []
    return ""


def _opposed(groups: set[str]) -> bool:
    return any(pair <= groups for pair in ({"large", "small"}, {"tall", "short"}, {"long", "short"}))


def _told_twice(pieces: list[Piece]) -> str:
    """A coloured object said to be of another colour: "a red circle that is blue"."""
    colour: Piece | None = None
    copula = False
    for i, piece in enumerate(pieces):
        if piece.kind == "end" or (piece.kind == "stop" and piece.text in ("and", "or", "with")):
            colour, copula = None, False
        elif piece.kind == "colours" and piece.group:
            following = pieces[i + 1].kind if i + 1 < len(pieces) else "end"
            if colour and copula and colour.group != piece.group and following not in _INSIDE:
                return f"{colour.text} that is {piece.text}"
            colour, copula = piece, False
        elif piece.text in _COPULAS:
            copula = True
        elif piece.kind in ("relations", "colours"):
            colour, copula = None, False
    return ""


def _to_itself(pieces: list[Piece]) -> str:
    """A place relative to itself, or two opposite places at once."""
    for i, piece in enumerate(pieces):
        if piece.kind != "relations" or piece.group not in (*OPPOSITE, "near"):
            continue
        after = pieces[i + 1 :]
        # "wrapped around itself", "leaning against itself" can be drawn; "above itself" cannot.
        if after and after[0].text in _REFLEXIVE and piece.group in OPPOSITE:
            return f"{piece.text} {after[0].text}"
        opposite = OPPOSITE.get(piece.group, "none")
        if [p.text for p in after[:1]] == ["and"] and opposite in {p.group for p in after[1:2]}:
            return f"{piece.text} and {after[1].text}"
        mine, before = _phrase_at(pieces[:i][::-1]), _phrase_at(after)
        if mine[1] and mine[1] == before[1][::-1] and before[0] & {"the", "same", "that"}:
            return f"{_text(before[1])} {piece.text} {_text(before[1])}"
    return ""


def _phrase_at(pieces: list[Piece]) -> tuple[set[str], list[Piece]]:
    """The stop words that `pieces` begins with, and the noun phrase after them."""
    stops: set[str] = set()
    phrase: list[Piece] = []
    for piece in pieces:
        if piece.kind in _INSIDE:
            phrase.append(piece)
        elif phrase or piece.kind != "stop":
            break
        else:
            stops.add(piece.text)
    return stops, phrase
