"""Random numbers with names: every draw is a function of what it is for, never of when it was made.

A hash of (seed, round, prompt, candidate) or (seed, round, step, sample) seeds each draw, so that
sharding, batch size, process count and order of arrival change nothing. Generators are always on
the CPU: the same seed gives the same numbers on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def hash63(*parts: int | str) -> int:
    """A seed in [0, 2^63) from the parts, by SHA-256; parts are kept apart by their lengths."""
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def candidate_seed(seed: int, round: int, prompt_key: str, candidate: int) -> int:
    """The seed of one candidate image of one prompt, 63 bits."""
    return hash63("candidate", seed, round, prompt_key, candidate)


def candidate_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, float32 on the CPU, (len(seeds), *shape), a row from each seed."""
    noise = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        torch.randn(*shape, generator=generator.manual_seed(seed), out=row)
    return noise


def keyed_noise(
    seed: int, round: int, step: int, samples: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """Each sample's training noise at one step, float32 on the CPU, (len(samples), *shape)."""
    return candidate_noise([hash63("noise", seed, round, step, s) for s in samples], shape)


def keyed_uniform(purpose: str, seed: int, round: int, step: int, samples: Sequence[int]) -> torch.Tensor:
    """One number in [0, 1) for each sample at one step, float64, (len(samples),), on the CPU."""
    # 53 bits, so that the largest value stays below 1 in float64.
    draws = [(hash63(purpose, seed, round, step, s) >> 10) * 2.0**-53 for s in samples]
    return torch.tensor(draws, dtype=torch.float64)


def keyed_times(
    seed: int, round: int, step: int, samples: Sequence[int], *, stratified: bool = False
) -> torch.Tensor:
    """Where in time each sample is trained at one step, in [0, 1), float64, (len(samples),).

    `stratified` puts one sample into each of the n equal parts of [0, 1): less variance for the
    batch, still uniform for a sample. `samples` must then be the whole global batch; which part a
    sample gets depends on who else is in it, and not on their order.
    """
    uniform = keyed_uniform("time", seed, round, step, samples)
    if not stratified:
        return uniform
    order = keyed_uniform("stratum", seed, round, step, samples).argsort(stable=True)
    stratum = torch.empty_like(order)
    stratum[order] = torch.arange(len(order))
    return (stratum + uniform) / len(order)


def keyed_dropout(
    seed: int, round: int, step: int, samples: Sequence[int], probability: float
) -> torch.Tensor:
    """Which samples lose their prompt at one step, bool, (len(samples),)."""
    return keyed_uniform("dropout", seed, round, step, samples) < probability
