"""Stage `score`: give every candidate of a shard its rewards and its embedding.

Outputs: scores.parquet (prompt_id, candidate, a column a reward and, in the shapes world, what the exact
judge says, as judge.*), features.safetensors (`features` (n, d) float32, rows of length 1).
"""

from __future__ import annotations

import sys

import numpy as np
from safetensors.numpy import save_file

from rsi_jobs import dataset, rewards
from rsi_jobs.layout import StageRef
from rsi_jobs.stages.attempt import Attempt, Outcome, main
from rsi_jobs.stages.model import prepare_torch

BATCH = 256  # images scored at once


def work(attempt: Attempt) -> Outcome:
    device = prepare_torch(attempt)
    identity, ref = attempt.identity, attempt.ref
    source = StageRef(ref.round, ref.phase, ref.attempt_no, "sample")
    path = attempt.read(source, "candidates.parquet", attempt.shard)
    rows = dataset.read(path, ["prompt_id", "candidate", "prompt", "image"])
    images = [dataset.pixels(data) for data in rows["image"]]
    prompts = [str(prompt) for prompt in rows["prompt"]]
    names = list(identity.rewards.use)
    if ref.phase != "train":
        names.append(identity.rewards.heldout)
    with attempt.timed("load"):
        scorers = {name: rewards.load(name, device) for name in {*names, identity.rewards.features}}
    features = scorers[identity.rewards.features].embed
    if features is None:
        raise rewards.no_features(identity.rewards.features)
    columns: dict[str, np.ndarray] = {"prompt_id": rows["prompt_id"], "candidate": rows["candidate"]}
    embedded = []
    with attempt.timed("compute"):
        for name in names:
            parts = [
                scorers[name].score(images[i : i + BATCH], prompts[i : i + BATCH])
                for i in range(0, len(images), BATCH)
            ]
            columns[name] = _column(name, parts, len(images))
        for i in range(0, len(images), BATCH):
            embedded.append(features(images[i : i + BATCH]))
            attempt.progress(min(i + BATCH, len(images)), len(images), "images")
        if identity.model.domain == "shapes":
            columns |= judge_columns(images, prompts)
    dataset.write(attempt.write("scores.parquet"), dataset.table(columns))
    save_file(
        {
            "features": np.concatenate(embedded).astype(np.float32)
            if embedded
            else np.zeros((0, 1), np.float32)
        },
        attempt.write("features.safetensors"),
    )
    metrics = {"images": float(len(images))}
    metrics |= {name: float(np.mean(columns[name])) for name in names if len(images)}
    return Outcome(metrics)


def _column(name: str, parts: list[np.ndarray], n: int) -> np.ndarray:
    """One reward's column; a user's own function may return anything, so its shape is checked."""
    empty = np.zeros(0, np.float32)
    column = np.concatenate([np.atleast_1d(np.asarray(part, dtype=np.float32)) for part in parts] or [empty])
    if column.shape != (n,):
        raise rewards.wrong_shape(name, column.shape, n)
    return column.astype(np.float32)


def judge_columns(images: list[np.ndarray], prompts: list[str]) -> dict[str, np.ndarray]:
    """What the exact judge sees. It is recorded beside the scores; selection never reads it."""
    from rsi_jobs.shapes import judge

    if not images:
        return {"judge.right": np.zeros(0, bool), "judge.extra": np.zeros(0, np.int64),
                "judge.malformed": np.zeros(0, np.int64), "judge.off_palette": np.zeros(0, np.float32)}  # fmt: skip
    verdicts = judge.judge_batch(np.stack(images), prompts)
    return {
        "judge.right": np.array([v.right for v in verdicts]),
        "judge.extra": np.array([v.extra for v in verdicts], dtype=np.int64),
        "judge.malformed": np.array([v.malformed for v in verdicts], dtype=np.int64),
        "judge.off_palette": np.array([v.off_palette for v in verdicts], dtype=np.float32),
    }


if __name__ == "__main__":
    sys.exit(main("score", work))
