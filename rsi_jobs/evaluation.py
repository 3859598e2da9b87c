"""The metrics of an evaluation phase, with intervals over prompts.

Plain functions on arrays. Images of one prompt are not independent, so every interval comes from
drawing prompts: values are averaged over a prompt's images first. The same prompts and the same
noise are used in every round, so comparisons are paired image by image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rsi_jobs.errors import DataError

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Array: TypeAlias = NDArray[Any]

ONE_SIDED = 0.95  # the gate's bounds, `low95` and `high95`


@dataclass(frozen=True)
class Interval:
    """A mean with a two-sided interval and two one-sided bounds; all NaN without a finite value."""

    mean: float
    low: float
    high: float
    low95: float
    """with 95 % confidence the true mean is not below it"""
    high95: float
    """with 95 % confidence the true mean is not above it"""


@dataclass(frozen=True, eq=False)
class Phase:
    """The images of one evaluation phase, a row each, in any order."""

    prompt: Array
    """(n,) integers"""
    candidate: Array
    """(n,) integers; with `prompt` they name the image: the same noise in every round"""
    scores: Mapping[str, Array]
    """(n,) each: floats, or booleans that become shares; what is not finite does not count"""
    diversity: Floats | None = None
    """(p,) as `diversity` returns it"""

    def __post_init__(self) -> None:
        for name, values in {**self.scores, "candidate": self.candidate}.items():
            if values.shape != self.prompt.shape:
                raise ValueError(f"{name} has shape {values.shape}, prompt {self.prompt.shape}")
        if "diversity" in self.scores:
            raise ValueError("no score may be called diversity: the metric has that name")

    def __len__(self) -> int:
        return len(self.prompt)


def summarise(
    new: Phase,
    *,
    base: Phase | None = None,
    reference: Phase | None = None,
    seed: int = 0,
    n: int = 1000,
    level: float = 0.95,
) -> dict[str, float]:
    """The metrics of a phase, flat, for a marker.

    For each score `<name>` (its mean) with `<name>.low` and `.high` (the two-sided interval);
    against the base `<name>.vs_base` (mean paired difference) with `.low`, `.high`, `.low95` and
    `.high95`, and `<name>.win_base` (win rate, 0 to 1) with `.low` and `.high`; against the
    reference, the best accepted round, the same with `vs_ref` and `win_ref`. `diversity` likewise,
    without win rates, and with `diversity.ratio` (over the base's) and its four bounds. A score
    the other phase lacks is not compared; a metric without a finite value is left out.

    Raises DataError when the phases are not of the same images (prompt and candidate).
    """
    settings: dict[str, Any] = {"seed": seed, "n": n, "level": level}
    metrics: dict[str, float] = {}

    def add(name: str, interval: Interval, *, bounds: bool = False) -> None:
        if np.isfinite(interval.mean):
            metrics[name] = interval.mean
            for bound in ("low", "high", "low95", "high95") if bounds else ("low", "high"):
                metrics[f"{name}.{bound}"] = getattr(interval, bound)

    for name, values in new.scores.items():
        add(name, bootstrap_mean(prompt_means(values, new.prompt), **settings))
    if new.diversity is not None:
        add("diversity", bootstrap_mean(new.diversity, **settings))

    for label, other in (("base", base), ("ref", reference)):
        if other is None:
            continue
        mine, theirs = _matching_rows(new, other, label)
        prompt = new.prompt[mine]
        for name in new.scores:
            if name not in other.scores:
                continue
            a, b = _pair(new.scores[name][mine], other.scores[name][theirs])
            gain = prompt_means(a - b, prompt)
            add(f"{name}.vs_{label}", bootstrap_mean(gain, **settings), bounds=True)
            wins = prompt_means(_wins(a, b), prompt)
            add(f"{name}.win_{label}", bootstrap_mean(wins, **settings))
        if new.diversity is not None and other.diversity is not None:
            difference = paired_difference(new.diversity, other.diversity, **settings)
            add(f"diversity.vs_{label}", difference, bounds=True)
            if label == "base":
                ratio = paired_ratio(new.diversity, other.diversity, **settings)
                add("diversity.ratio", ratio, bounds=True)
    return metrics


def bootstrap_mean(values: Array, *, seed: int = 0, n: int = 1000, level: float = 0.95) -> Interval:
    """Mean over prompts with percentile bootstrap bounds (Efron 1979) from `n` draws.

    values: (p,), one for each prompt; those that are not finite are left out.
    level: of the two-sided interval; `low95` and `high95` are one-sided at 95 % whatever it is.
    """
    finite = _only_finite(values)
    if not finite.size:
        return _NOTHING
    return _interval(float(finite.mean()), _draws(finite.size, seed, n) @ finite / finite.size, level)


def paired_difference(
    new: Array, old: Array, *, seed: int = 0, n: int = 1000, level: float = 0.95
) -> Interval:
    """Mean of new - old over the prompts (p,) where both are finite, with bounds."""
    a, b = _pair(new, old)
    return bootstrap_mean(a - b, seed=seed, n=n, level=level)


def win_rate(new: Array, old: Array, *, seed: int = 0, n: int = 1000, level: float = 0.95) -> Interval:
    """Share of prompts (p,) where new is higher than old, ties counting half, with bounds."""
    return bootstrap_mean(_wins(*_pair(new, old)), seed=seed, n=n, level=level)


def paired_ratio(new: Array, old: Array, *, seed: int = 0, n: int = 1000, level: float = 0.95) -> Interval:
    """Mean of new over mean of old, of the prompts (p,) where both are finite, with bounds.

    For values that are not negative; NaN when the old mean is 0.
    """
    a, b = _pair(new, old)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if not b.sum() > 0:
        return _NOTHING
    drawn = _draws(b.size, seed, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _only_finite((drawn @ a) / (drawn @ b))
    return _interval(float(a.sum() / b.sum()), ratios, level) if ratios.size else _NOTHING


def diversity(features: Array, prompt: Array, passing: Bools) -> Floats:
    """Mean pairwise cosine distance among the passing images of each prompt: (p,), 0 to 2.

    features: (n, d) image embeddings; prompt: (n,) ids; passing: (n,) images good enough to count.
    Prompts are in the order of `np.unique(prompt)`; NaN where fewer than two pass. An embedding
    that is 0 or not finite has no direction: its image does not count.
    """
    names = np.unique(prompt)
    points = np.asarray(features, np.float64)
    norm = np.linalg.norm(points, axis=1)
    rows = passing & np.isfinite(norm) & (norm > 0)
    number = np.searchsorted(names, prompt[rows])
    total = np.zeros((names.size, points.shape[1]))
    np.add.at(total, number, points[rows] / norm[rows, None])
    count = np.bincount(number, minlength=names.size).astype(np.float64)
    # |sum f|^2 holds every pair twice and each image's own 1 once.
    pairs = count * (count - 1)
    cosine = (np.square(total).sum(axis=1) - count) / np.where(pairs > 0, pairs, np.nan)
    apart: Floats = np.clip(1 - cosine, 0, 2)
    return apart


def prompt_means(values: Array, prompt: Array) -> Floats:
    """Mean of the finite values (n,) of each prompt: (p,), in the order of `np.unique(prompt)`.

    NaN for a prompt without one.
    """
    names, number = np.unique(prompt, return_inverse=True)
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    count = np.bincount(number[finite], minlength=names.size)
    total = np.bincount(number[finite], weights=values[finite], minlength=names.size)
    return total / np.where(count > 0, count, np.nan)


_NOTHING = Interval(*(float("nan"),) * 5)


def _matching_rows(new: Phase, other: Phase, label: str) -> tuple[Array, Array]:
    """Row numbers that bring both phases into the same order of images."""
    mine = np.lexsort((new.candidate, new.prompt))
    theirs = np.lexsort((other.candidate, other.prompt))
    if not (
        np.array_equal(new.prompt[mine], other.prompt[theirs])
        and np.array_equal(new.candidate[mine], other.candidate[theirs])
    ):
        raise DataError(
            f"the {len(new)} images of this phase are not those of the {label} ({len(other)}): "
            "rounds are compared on the same prompts and candidate numbers"
        )
    return mine, theirs


def _wins(new: Floats, old: Floats) -> Floats:
    """1 where new is higher, 0.5 where equal, 0 where lower, NaN where either is not finite."""
    wins = (new > old) + 0.5 * (new == old)
    return np.where(np.isfinite(new) & np.isfinite(old), wins, np.nan)


def _pair(new: Array, old: Array) -> tuple[Floats, Floats]:
    if new.shape != old.shape:
        raise ValueError(f"paired values have shapes {new.shape} and {old.shape}")
    return _no_infinity(new), _no_infinity(old)


def _no_infinity(values: Array) -> Floats:
    """As floats, NaN for infinity: the difference of two infinities must not warn."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _only_finite(values: Array) -> Floats:
    values = np.asarray(values, np.float64)
    return values[np.isfinite(values)]


@lru_cache(maxsize=4)
def _draws(size: int, seed: int, n: int) -> Floats:
    """How often each of `size` rows is in each of n bootstrap samples: (n, size), shared by all metrics."""
    rows = np.random.default_rng(seed).integers(0, size, (n, size))
    cells = rows + size * np.arange(n)[:, None]
    return np.bincount(cells.ravel(), minlength=n * size).reshape(n, size).astype(np.float64)


def _interval(mean: float, means: Floats, level: float) -> Interval:
    tail = (1 - level) / 2
    at = np.quantile(means, [tail, 1 - tail, 1 - ONE_SIDED, ONE_SIDED])
    return Interval(mean, *(float(bound) for bound in at))
