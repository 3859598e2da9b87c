"""Evaluation prompts: fixed, disjoint sets that no training prompt may repeat.

`shapes:gate` decides, `shapes:dev` is for tuning by hand, `shapes:test` is looked at once, at the end.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from rsi_jobs.config import Evaluation
from rsi_jobs.errors import ConfigError
from rsi_jobs.prompts.sources import RawPrompt, read_file
from rsi_jobs.shapes import scene

_SHAPES = {"gate": 512, "dev": 512, "test": 2000}  # sizes of the built-in sets, in this order


def load(spec: str, n: int) -> list[RawPrompt]:
    """The first `n` prompts of an evaluation set: `shapes:gate|dev|test` or a file.

    Raises:
        ConfigError: an unknown set, or one with fewer prompts.
    """
    if spec.startswith("shapes:"):
        name = spec.removeprefix("shapes:")
        if name not in _SHAPES:
            raise ConfigError(f"evaluation set {spec!r} is unknown: shapes has {', '.join(_SHAPES)}")
        found = _shapes()[name]
    else:
        found = read_file(Path(spec))
    if n > len(found):
        raise ConfigError(f"evaluation set {spec!r} has {len(found)} prompts, {n} were asked for")
    return found[:n]


def all_prompts(settings: Evaluation) -> list[str]:
    """Every prompt of every set a run evaluates on, the whole set even where only a part is used."""
    found: list[str] = []
    for spec in dict.fromkeys((settings.gate, settings.test)):
        if spec.startswith("shapes:"):
            found += [row.prompt for rows in _shapes().values() for row in rows]
        elif Path(spec).exists():
            found += [row.prompt for row in read_file(Path(spec))]
    return list(dict.fromkeys(found))


@lru_cache(maxsize=1)
def _shapes() -> dict[str, list[RawPrompt]]:
    """All sets are drawn in one go without replacement, so that they share no scene."""
    rng = np.random.default_rng(20250209)
    scenes = scene.random_scenes(rng, sum(_SHAPES.values()), exclude=set())
    rows = [RawPrompt(s.caption(), category(s)) for s in scenes]
    found, start = {}, 0
    for name, size in _SHAPES.items():
        found[name] = rows[start : start + size]
        start += size
    return found


def category(scene_: scene.Scene) -> str:
    """A prompt's kind: what the picture has to show."""
    return "one object" if len(scene_.things) == 1 else scene_.relation
