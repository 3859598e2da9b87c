"""The shapes world's learned scorers, and the exact judge as a reward for the `oracle` recipe alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsi_jobs.rewards import Images, Scorer
from rsi_jobs.shapes import judge, scorers


def load(name: str, device: str) -> Scorer:
    """`dual`, `fused` and `heldout` are learned; `oracle` is 1 where every clause of the prompt is true."""
    if name == "oracle":
        return Scorer(name, _oracle)
    model = scorers.load_scorer(name).to(device)

    def score(images: Images, prompts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.score(np.stack(images), list(prompts)), dtype=np.float32)

    def embed(images: Images) -> np.ndarray:
        return np.asarray(model.embed_image(np.stack(images)), dtype=np.float32)

    return Scorer(name, score, embed if hasattr(model, "embed_image") else None)


def _oracle(images: Images, prompts: Sequence[str]) -> np.ndarray:
    verdicts = judge.judge_batch(np.stack(images), list(prompts))
    return np.array([float(v.right) for v in verdicts], dtype=np.float32)
