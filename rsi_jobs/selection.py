"""Preference sampling: which candidate of a prompt is preferred, and which prompts teach something.

Plain functions on arrays. A row is a candidate, in any order; `prompt` and `candidate` identify it,
and a higher reward is a better image. The rewards are turned into ranks within the prompt and the
ranks averaged, so that no reward needs a scale. The paper (arXiv 2502.09963) names
preference sampling; its formulas were not available: these are ours.

What the pick does not depend on: the order of the rows, and a constant added to all candidates of a
prompt. A strictly increasing change of a reward leaves the rank averages as they are; the pick is
then always one of the same candidates, and the same one unless several share the highest average,
which only the size of the rewards can part. What is dropped does depend on the rewards' scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rsi_jobs.errors import ConfigError, DataError

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Array: TypeAlias = NDArray[Any]
Method = Literal["rank", "mean_z", "random", "first"]
Reason = Literal["invalid", "at ceiling", "below floor", "no margin", "quota"]
# A bound on rewards: a quantile of the round's, an absolute value for each reward named, or none.
Bound: TypeAlias = float | Mapping[str, float] | None

MAD_TO_SD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class DegenerateRewardError(DataError, ValueError):
    """A reward that tells no candidate from another: nothing can be preferred by it."""


@dataclass(frozen=True, eq=False)
class Selection:
    """What was picked and kept; arrays are (n,), a row each, in the caller's order."""

    picked: Bools
    """the preferred candidate of its prompt"""
    selected: Bools
    """picked, and its prompt kept for training"""
    score: Floats
    """rank average within the prompt, 0 to 1; NaN where a reward is not finite"""
    margin: Floats
    """lead over the prompt's median, in robust spreads, averaged over rewards; NaN as above"""
    dropped: dict[int, Reason]
    """for each prompt without a selected candidate, why"""


def select(
    rewards: Mapping[str, Array],
    prompt: Array,
    candidate: Array,
    category: Array,
    *,
    keep: int,
    method: Method = "rank",
    margin: float = 0.25,
    floor: Bound = 0.3,
    ceiling: Bound = 1.0,
    quota: bool = True,
    seed: int = 0,
) -> Selection:
    """Pick the preferred candidate of every prompt and keep the `keep` prompts that teach most.

    `rewards` are (n,) each; `prompt` and `candidate` (n,) integers, a pair of them unique;
    `category` (n,) strings, the same for all candidates of a prompt. A row with a reward that is
    not finite is invalid and never picked.

    method: `rank` picks the highest rank average, ties by the mean z (`Selection.margin`), then by
    the lowest candidate number; `mean_z` picks the highest mean z; `first` the lowest candidate
    number, `random` any (by `seed`), both without looking at rewards, so that no prompt is dropped
    but by `keep`. With one candidate a prompt every method is `first`.

    A prompt is dropped, in this order of reasons: `invalid`, no valid candidate; `at ceiling`,
    every candidate reaches `ceiling`; `below floor`, the pick does not reach `floor`; `no margin`,
    the pick leads the prompt's median by less than `margin` robust spreads. A bound that is a
    number is a quantile of the round's scores (rewards ranked over the round, averaged); a mapping
    gives a value for each reward it names, and all must be reached; None is no bound.

    Of the others `keep` are kept by margin, under a quota for each category if `quota`: shares of
    all the round's prompts, by largest remainder, and what a category cannot fill goes to the best
    of the others. The rest is dropped as `quota`.

    Raises DegenerateRewardError when a reward the pick needs is constant or never finite.
    """
    _check(rewards, prompt, candidate, category, keep)
    order = np.lexsort((candidate, prompt))  # so that neither ties nor rounding know the row order
    prompt, candidate, category = prompt[order], candidate[order], category[order]
    rewards = {name: np.asarray(rewards[name], np.float64)[order] for name in sorted(rewards)}
    if np.unique(prompt).size == prompt.size:
        method = "first"
    by_reward = method in ("rank", "mean_z")
    if by_reward and (fault := degenerate_reward(rewards)):
        raise DegenerateRewardError(fault)

    valid = _valid(rewards)
    score, lead = rank_average(rewards, prompt), margins(rewards, prompt)
    draw, worth = np.random.default_rng(seed).random((2, prompt.size))
    if method == "first":
        best, worth = _best_rows((), prompt, valid), -prompt
    elif method == "random":
        best = _best_rows((draw,), prompt, valid)
    else:
        best = _best_rows((score, lead) if method == "rank" else (lead,), prompt, valid)
        worth = lead

    dropped: dict[int, Reason] = {int(p): "invalid" for p in np.setdiff1d(prompt, prompt[best])}
    if by_reward:
        dropped |= _unlearnable(rewards, prompt, best, lead[best] < margin, floor=floor, ceiling=ceiling)
    left = best[[int(p) not in dropped for p in prompt[best]]]
    left = left[np.lexsort((prompt[left], -worth[left]))]
    kept = _keep(left, prompt, category, keep, quota)
    dropped |= {int(p): "quota" for p in np.setdiff1d(prompt[left], prompt[kept])}

    picked, selected = np.zeros((2, prompt.size), dtype=np.bool_)
    picked[best] = selected[kept] = True
    back = np.argsort(order)
    return Selection(picked[back], selected[back], score[back], lead[back], dropped)


def degenerate_reward(rewards: Mapping[str, Array]) -> str | None:
    """A sentence that names the first reward no pick can rest on, or None when all are fit.

    Unfit is a reward (n,) that is finite nowhere, or the same everywhere (n > 1) it is finite.
    """
    for name, values in rewards.items():
        finite = np.asarray(values, np.float64)
        finite = finite[np.isfinite(finite)]
        if not finite.size:
            return f"reward {name} is not finite for any of {len(values)} candidates"
        if len(values) > 1 and finite.min() == finite.max():
            return f"reward {name} is {finite[0]:g} for all of {finite.size} candidates"
    return None


def rank_average(rewards: Mapping[str, Array], prompt: Array) -> Floats:
    """Mean over rewards of the rank within the prompt, 0 (worst) to 1 (best): (n,).

    Ties share their average rank; a prompt's only candidate gets 0.5. Rows with a reward that is
    not finite get NaN and do not count. One prompt number for all rows ranks over the round.
    """
    valid = _valid(rewards)
    _, group = np.unique(prompt[valid], return_inverse=True)
    # Ranks are whole or half numbers: their sum is exact, so equal averages compare as equal.
    total = np.zeros(group.size)
    for values in rewards.values():
        total += _ranks(np.asarray(values, np.float64)[valid], group)
    last = np.bincount(group)[group] - 1
    score = np.full(valid.size, np.nan)
    score[valid] = np.where(last > 0, total / (len(rewards) * np.maximum(last, 1)), 0.5)
    return score


def margins(rewards: Mapping[str, Array], prompt: Array) -> Floats:
    """How far each candidate leads its prompt's median, in spreads, averaged over rewards: (n,).

    A reward's spread is 1.4826 times the median absolute distance from the prompt's median, over
    the round (the standard deviation where that is 0). NaN for rows with a reward not finite.
    """
    valid = _valid(rewards)
    _, group = np.unique(prompt[valid], return_inverse=True)
    total = np.zeros(group.size)
    for values in rewards.values():
        finite = np.asarray(values, np.float64)[valid]
        lead = finite - _medians(finite, group)[group]
        spread = (MAD_TO_SD * np.median(np.abs(lead)) or lead.std()) if lead.size else 0.0
        total += lead / spread if spread > 0 else 0.0
    result = np.full(valid.size, np.nan)
    result[valid] = total / len(rewards)
    return result


def quotas(prompts: Mapping[str, int], keep: int) -> dict[str, int]:
    """Places for each category: `keep` shared in proportion to its prompts, by largest remainder.

    Equal remainders go to the first name. The places add up to `keep`.
    """
    total = sum(prompts.values())
    places = {name: keep * count // total for name, count in sorted(prompts.items())}
    by_remainder = sorted(places, key=lambda name: -(keep * prompts[name] % total))
    for name in by_remainder[: keep - sum(places.values())]:
        places[name] += 1
    return places


def _check(rewards: Mapping[str, Array], prompt: Array, candidate: Array, category: Array, keep: int) -> None:
    """Raises ValueError for arrays that do not describe a round: the caller's defect."""
    columns = {**rewards, "candidate": candidate, "category": category}
    for name, values in columns.items():
        if values.shape != prompt.shape:
            raise ValueError(f"{name} has shape {values.shape}, prompt has {prompt.shape}")
    if not rewards or keep < 1:
        raise ValueError(f"select needs a reward and keep >= 1; got {list(rewards)}, {keep}")
    pairs = np.stack([prompt, candidate])
    if np.unique(pairs, axis=1).shape[1] != prompt.size:
        raise ValueError("two rows have the same prompt and candidate")
    names = {(int(p), str(c)) for p, c in zip(prompt, category, strict=True)}
    if len(names) != np.unique(prompt).size:
        raise ValueError("a prompt has candidates of two categories")


def _valid(rewards: Mapping[str, Array]) -> Bools:
    finite = [np.isfinite(np.asarray(values, np.float64)) for values in rewards.values()]
    valid: Bools = np.logical_and.reduce(finite)
    return valid


def _ranks(values: Floats, group: Array) -> Floats:
    """Average rank from 0 within the group, all groups in one sort; `group` is 0 ... g - 1."""
    order = np.lexsort((values, group))
    ordered, group = values[order], group[order]
    new_group = np.diff(group, prepend=-1) > 0
    new_run = new_group.copy()
    new_run[1:] |= ordered[1:] != ordered[:-1]
    start = np.flatnonzero(new_run)
    stop = np.append(start[1:], len(values))
    middle = ((start + stop - 1) / 2)[np.cumsum(new_run) - 1]
    ranks = np.empty(len(values))
    ranks[order] = middle - np.flatnonzero(new_group)[group]
    return ranks


def _medians(values: Floats, group: Array) -> Floats:
    """The median of each group (g,); `group` is 0 ... g - 1, none of them empty."""
    ordered = values[np.lexsort((values, group))]
    count = np.bincount(group)
    start = np.cumsum(count) - count
    medians: Floats = (ordered[start + (count - 1) // 2] + ordered[start + count // 2]) / 2
    return medians


def _best_rows(keys: tuple[Floats, ...], prompt: Array, valid: Bools) -> Array:
    """The valid row of each prompt with the highest keys, compared in order."""
    rows = np.flatnonzero(valid)
    rows = rows[np.lexsort((rows, *(-key[rows] for key in reversed(keys)), prompt[rows]))]
    _, start = np.unique(prompt[rows], return_index=True)
    return rows[start]


def _unlearnable(
    rewards: Mapping[str, Floats],
    prompt: Array,
    best: Array,
    close: Bools,
    *,
    floor: Bound,
    ceiling: Bound,
) -> dict[int, Reason]:
    """Prompts that teach nothing, and why; `close` says which rows of `best` lack the margin."""
    dropped: dict[int, Reason] = {}
    valid = _valid(rewards)
    at_ceiling = np.zeros_like(valid) if ceiling is None else _reaches(rewards, valid, ceiling)
    above_floor = np.ones_like(valid) if floor is None else _reaches(rewards, valid, floor)
    open_prompts = set(prompt[valid & ~at_ceiling].tolist())
    for row, no_margin in zip(best, close, strict=True):
        number = int(prompt[row])
        if number not in open_prompts:
            dropped[number] = "at ceiling"
        elif not above_floor[row]:
            dropped[number] = "below floor"
        elif no_margin:
            dropped[number] = "no margin"
    return dropped


def _reaches(rewards: Mapping[str, Floats], valid: Bools, bound: float | Mapping[str, float]) -> Bools:
    """Rows (n,) at or above the bound. Raises ConfigError for one that cannot be used."""
    if isinstance(bound, Mapping):
        if unknown := sorted(set(bound) - set(rewards)):
            raise ConfigError(
                f"floor or ceiling names {', '.join(unknown)}: not a reward of this run, "
                f"which are {', '.join(rewards)}"
            )
        reached = valid.copy()
        for name, least in bound.items():
            reached &= rewards[name] >= least
        return reached
    if not 0 <= bound <= 1:
        raise ConfigError(f"floor or ceiling is {bound:g}: a number there is a quantile, from 0 to 1")
    if not valid.any():
        return valid.copy()
    # One ranking over the round: the same strictness whatever the number of rewards.
    score = rank_average(rewards, np.zeros(valid.size, np.int64))
    return score >= np.quantile(score[valid], bound)


def _keep(ranked: Array, prompt: Array, category: Array, keep: int, quota: bool) -> Array:
    """The rows of `ranked` (picks, most worth first) that find a place."""
    if not quota:
        return ranked[:keep]
    _, start = np.unique(prompt, return_index=True)
    names, counts = np.unique(category[start], return_counts=True)
    places = quotas(dict(zip(names.tolist(), counts.tolist(), strict=True)), keep)
    within = np.zeros(ranked.size, dtype=np.bool_)
    for name, count in places.items():
        within[np.flatnonzero(category[ranked] == name)[:count]] = True
    spare = keep - int(within.sum())
    within[np.flatnonzero(~within)[:spare]] = True
    return ranked[within]
