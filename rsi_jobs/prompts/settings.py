"""What the prompt filters are asked for, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

from rsi_jobs.errors import ConfigError

Reason = Literal[
    "unreadable", "url", "markup", "text rendering", "instruction", "question", "negation",
    "too short", "too long", "abstract", "contradiction",
    "vague", "overloaded", "off vocabulary",
    "evaluation prompt", "earlier round", "duplicate", "near duplicate", "quota",
]  # fmt: skip
"""Why a prompt was dropped; the order is that of the checks, and the first that fails is named."""

REASONS: Final[tuple[Reason, ...]] = get_args(Reason)


@dataclass(frozen=True)
class FilterSettings:
    """What each filter asks for. Raises ConfigError for a value outside its range."""

    clarity: bool = True
    specificity: bool = True
    diversity: bool = True
    min_words: int = 3
    min_concrete: float = 0.5
    """Least share of content words that are neither abstract nor empty, 0..1."""
    min_details: int = 2
    """Least number of colours, counts, materials, sizes, relations, settings, styles, lights, and
    objects beyond the first."""
    max_objects: int = 8
    """Most things a prompt may name."""
    max_similarity: float = 0.7
    """Estimated Jaccard index of character 4-grams that makes two prompts near duplicates."""
    quota: Literal["source", "equal"] = "source"
    """A category's share of the kept: as among the prompts that pass, or the same for each."""

    def __post_init__(self) -> None:
        for name, low in (("min_words", 1), ("min_details", 0), ("max_objects", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"prompts.{name} is {getattr(self, name)}: at least {low}")
        for name in ("min_concrete", "max_similarity"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"prompts.{name} is {getattr(self, name)}: between 0 and 1")
        if self.quota not in ("source", "equal"):
            raise ConfigError(f"prompts.quota is {self.quota!r}: 'source' or 'equal'")


class Verdict(NamedTuple):
    """What a filter says of one prompt: "" if it passes, else why not and what it saw."""

    reason: Reason | Literal[""] = ""
    detail: str = ""


class Filtered(NamedTuple):
    """One raw prompt after the filters."""

    prompt: str
    """As it is to be used: tidied, a "draw ..." in front of the caption taken off."""
    category: str
    kept: bool
    reason: Reason | Literal[""]
    detail: str
    n_words: int
    n_attributes: int
    nearest: float
    """Highest similarity, 0..1, to an earlier, an evaluation, or another readable raw prompt."""


PASS: Final = Verdict()
