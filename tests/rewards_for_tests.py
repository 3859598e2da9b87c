"""Rewards of a user's own, gone wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TRAINING = 24 * 4  # candidates of a training round of `smoke`; an evaluation has fewer images


def nan(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    return np.full(len(images), np.nan)


def nan_in_training(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    return np.full(len(images), np.nan) if len(images) == TRAINING else _brightness(images)


def constant_in_training(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    return np.ones(len(images)) if len(images) == TRAINING else _brightness(images)


def _brightness(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([image.mean() for image in images])
