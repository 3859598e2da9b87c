"""Named runs: each recipe is a function that returns an identity. `RECIPES` is all there are.

shapes             the default: every strategy, on the built-in world
shapes-no-gate     the same, every round accepted
paper              RSIDiff's three strategies (arXiv 2502.09963) and nothing else
no-prompt-filter, no-preference, no-weighting
                   `shapes` less one strategy
sft                one unfiltered candidate a prompt, uniform weights, this round's data only
oracle             selection by the exact judge: the upper bound
smoke              a few minutes' work in seconds, for trying out an installation
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from rsi_jobs.config import Identity
from rsi_jobs.errors import ConfigError
from rsi_jobs.recipes import shapes

RECIPES: dict[str, Callable[[], Identity]] = {
    "shapes": shapes.shapes,
    "shapes-no-gate": shapes.no_gate,
    "paper": shapes.paper,
    "no-prompt-filter": shapes.no_prompt_filter,
    "no-preference": shapes.no_preference,
    "no-weighting": shapes.no_weighting,
    "sft": shapes.sft,
    "oracle": shapes.oracle,
    "smoke": shapes.smoke,
}


def recipe(name: str) -> Identity:
    """The identity of a named recipe.

    Raises:
        ConfigError: an unknown name; the nearest known one is named.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else "there are " + ", ".join(RECIPES)
        raise ConfigError(f"recipe {name!r} is unknown: {hint}")
    return RECIPES[name]().model_copy(update={"recipe": name})
