"""Which images a sample or score shard owns: the same candidates whatever the number of shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsi_jobs import dataset
from rsi_jobs.diffusion.noise import candidate_seed
from rsi_jobs.layout import StageRef
from rsi_jobs.prompts import evalsets
from rsi_jobs.stages.attempt import Attempt


@dataclass(frozen=True)
class Candidates:
    """One row an image, prompts in order and each one's candidates together."""

    prompt_id: np.ndarray  # (n,) int64
    candidate: np.ndarray  # (n,) int64
    prompt: list[str]
    category: list[str]
    seed: np.ndarray  # (n,) int64

    def batches(self, size: int, shards: int, shard: int) -> list[slice]:
        """This shard's batches: whole ones, counted over all candidates, so re-sharding moves no image."""
        total = -(-len(self.prompt) // size)
        mine = range(total * shard // shards, total * (shard + 1) // shards)
        return [slice(b * size, min((b + 1) * size, len(self.prompt))) for b in mine]


def candidates(attempt: Attempt) -> Candidates:
    """The candidates of a phase. Evaluation has fixed noise: the same in every round and every run."""
    identity, ref = attempt.identity, attempt.ref
    if ref.phase == "train":
        rows = dataset.read(attempt.read(StageRef(ref.round, "train", 0, "prompts"), "prompts.parquet"))
        kept = rows["kept"]
        prompts, categories = list(rows["prompt"][kept]), list(rows["category"][kept])
        n, seed, round_ = identity.sampling.candidates, identity.seed, ref.round
    else:
        settings = identity.evaluation
        spec, size = (
            (settings.gate, settings.gate_prompts)
            if ref.phase == "eval"
            else (settings.test, settings.test_prompts)
        )
        found = evalsets.load(spec, size)
        prompts, categories = [p.prompt for p in found], [p.category for p in found]
        n, seed, round_ = (settings.candidates if ref.phase == "eval" else 1), 0, 0
    ids = np.repeat(np.arange(len(prompts)), n)
    numbers = np.tile(np.arange(n), len(prompts))
    seeds = [candidate_seed(seed, round_, prompts[i], int(k)) for i, k in zip(ids, numbers, strict=True)]
    return Candidates(
        ids.astype(np.int64),
        numbers.astype(np.int64),
        [prompts[i] for i in ids],
        [categories[i] for i in ids],
        np.array(seeds, dtype=np.int64),
    )
