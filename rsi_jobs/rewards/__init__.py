"""Rewards: one module each; a scorer takes images and their prompts and returns a number an image.

A module offers `load(name, device) -> Scorer`. `package.module:function` names a user's own plain
function `(images, prompts) -> scores`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rsi_jobs.errors import ConfigError, DataError
from rsi_jobs.names import REWARDS
from rsi_jobs.plugins import load_function

Images = Sequence[np.ndarray]  # each (H, W, 3) uint8
Score = Callable[[Images, Sequence[str]], np.ndarray]  # -> (n,) float
Embed = Callable[[Images], np.ndarray]  # -> (n, d) float32, rows of length 1


@dataclass(frozen=True)
class Scorer:
    """A loaded reward; `embed` is None for one without an image embedding."""

    name: str
    score: Score
    embed: Embed | None = None


def load(name: str, device: str) -> Scorer:
    """Load a reward by name.

    Raises:
        ConfigError: an unknown name.
    """
    if ":" in name:
        return Scorer(name, load_function(name))
    check(name)
    module = importlib.import_module(f"rsi_jobs.rewards.{REWARDS[name]}")
    scorer: Scorer = module.load(name, device)
    return scorer


def check(name: str) -> None:
    """Refuse an unknown reward without loading anything."""
    if ":" not in name and name not in REWARDS:
        raise ConfigError(f"reward {name!r} is unknown: choose from {', '.join(REWARDS)}, "
                          "or name your own as package.module:function")  # fmt: skip


def no_features(name: str) -> ConfigError:
    return ConfigError(f"rewards.features={name} has no image embedding: name a scorer that has one")


def wrong_shape(name: str, shape: tuple[int, ...], n: int) -> DataError:
    return DataError(
        f"reward {name} returned an array of shape {shape} for {n} images: one number an image is expected"
    )
