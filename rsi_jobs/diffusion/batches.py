"""What is trained on, and which of it each step sees: a function of (seed, round, step) alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rsi_jobs.diffusion.noise import hash63, keyed_dropout, keyed_noise, keyed_times
from rsi_jobs.errors import DataError

GROUPS = ("round", "replay", "anchor")
ROUND, REPLAY, ANCHOR = range(3)


@dataclass(frozen=True)
class TrainingData:
    """n samples of p prompts, on the CPU.

    `latents` (n, C, H, W) as the sampler left them (already scaled); `embeddings` (p, t, d), one a
    prompt; `prompt` (n,) int64, the row of `embeddings` of each sample; `uncond` (1, t, d), the
    sampler's own; `weights` (n,) with mean 1 over this round's picks; `ids` (n,) int64, unique;
    `group` (n,) int64: ROUND for this round's picks, REPLAY for earlier accepted rounds', ANCHOR
    for the base model's own selected samples (or real ones).
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    prompt: torch.Tensor
    uncond: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    group: torch.Tensor

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(set(self.ids.tolist())) != n:
            raise DataError(f"the {n} training samples have ids that are not unique")
        for name in ("latents", "prompt", "weights", "group"):
            if len(getattr(self, name)) != n:
                raise DataError(f"training {name} has {len(getattr(self, name))} rows, ids {n}")
        if not (self.group == ROUND).any():
            raise DataError("no training sample is of this round: there is nothing to learn from")
        for name in ("latents", "embeddings", "uncond", "weights"):
            if not torch.isfinite(getattr(self, name)).all():
                raise DataError(f"training {name} has values that are not finite")
        mean = float(self.weights[self.group == ROUND].mean())
        if abs(mean - 1) > 0.01 or float(self.weights.min()) < 0:
            raise DataError(f"the round's sample weights have mean {mean:.4g}, or one is negative")

    def digest(self) -> str:
        """Of the samples and their weights, whatever their order."""
        columns = (self.ids.tolist(), self.weights.tolist(), self.group.tolist())
        rows = sorted(zip(*columns, strict=True))
        return hashlib.sha256(repr(rows).encode()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """What one pass of a family's `loss` sees, on the model's device: n samples and their draws."""

    latents: torch.Tensor  # (n, C, H, W), scaled
    embeddings: torch.Tensor  # (n, t, d), dropped prompts already replaced by the unconditional
    noise: torch.Tensor  # (n, C, H, W)
    times: torch.Tensor  # (n,) in [0, 1), float64
    weights: torch.Tensor  # (n,)


class Composer:
    """Picks each global batch: fixed shares from each group, each group in shuffled passes.

    The k-th sample taken from a group is the k-th of its passes laid end to end, and how many were
    taken before a step follows from its number: nothing is carried from step to step, so a resumed
    run and any number of processes see the same batches. Rows are ordered by sample id first. The
    share of a group that is empty goes to this round's picks.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        seed: int,
        round: int,
        size: int,
        replay_share: float,
        anchor_share: float,
    ) -> None:
        self.seed, self.round, self.size = seed, round, size
        rows = data.ids.argsort()
        self.rows = [rows[data.group[rows] == group] for group in range(len(GROUPS))]
        wanted = (0.0, replay_share, anchor_share)
        self.share = [s if len(r) else 0.0 for s, r in zip(wanted, self.rows, strict=True)]

    def taken(self, step: int) -> list[int]:
        """How many samples of each group the steps before `step` used."""
        # Rounded down over the run and not in each step: small shares of small batches count.
        counts = [math.floor(round(step * self.size * share, 6)) for share in self.share]
        counts[ROUND] = step * self.size - sum(counts[1:])
        return counts

    def rows_of(self, step: int) -> torch.Tensor:
        """The rows of the global batch of `step`, (size,) int64."""
        ranges = zip(self.taken(step), self.taken(step + 1), strict=True)
        return torch.cat([self._slice(g, a, b) for g, (a, b) in enumerate(ranges) if b > a])

    def _slice(self, group: int, start: int, stop: int) -> torch.Tensor:
        rows = self.rows[group]
        n = len(rows)
        passes = range(start // n, -(-stop // n))
        laid = torch.cat([rows[self._shuffle(group, p, n)] for p in passes])
        return laid[start - passes[0] * n : stop - passes[0] * n]

    def _shuffle(self, group: int, number: int, n: int) -> torch.Tensor:
        seed = hash63("order", self.seed, self.round, GROUPS[group], number)
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def times_of(
    data: TrainingData, rows: torch.Tensor, *, seed: int, round: int, step: int, stratified: bool
) -> torch.Tensor:
    """Where in time each sample of a whole global batch is trained, (len(rows),) float64."""
    return keyed_times(seed, round, step, data.ids[rows].tolist(), stratified=stratified)


def make_batch(
    data: TrainingData,
    rows: torch.Tensor,
    times: torch.Tensor,
    *,
    seed: int,
    round: int,
    step: int,
    dropout: float,
    device: torch.device,
) -> Batch:
    """The samples of `rows`, any part of a global batch, with the draws that are theirs."""
    ids: Sequence[int] = data.ids[rows].tolist()
    dropped = keyed_dropout(seed, round, step, ids, dropout)[:, None, None]
    text = torch.where(dropped, data.uncond, data.embeddings[data.prompt[rows]])
    return Batch(
        latents=data.latents[rows].float().to(device),
        embeddings=text.to(device),
        noise=keyed_noise(seed, round, step, ids, data.latents.shape[1:]).to(device),
        times=times.to(device),
        weights=data.weights[rows].float().to(device),
    )
