"""Stage `finetune`: train the next checkpoint on the round's weighted samples.

Outputs: checkpoint/... (full weights or an adapter, as `diffusers` reads it), loss.parquet (a row a step),
samples.parquet (a row a training sample: where it came from, its weight, how often it was used). Try 1
trains nothing: it goes half the way from the last accepted checkpoint to the one of try 0.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from rsi_jobs import dataset, layout
from rsi_jobs.diffusion import base_folder, checkpoints
from rsi_jobs.diffusion.batches import ANCHOR, REPLAY, ROUND, TrainingData
from rsi_jobs.diffusion.training import (
    STATE_FILES,
    StepRecord,
    TrainResult,
    TrainSettings,
    sample_uses,
    train,
)
from rsi_jobs.errors import Damaged, NotFoundError
from rsi_jobs.layout import StageRef
from rsi_jobs.stages.attempt import Attempt, Outcome, Rejected, main
from rsi_jobs.stages.model import CHECKPOINT, checkpoint_folder, load_model, prepare_torch
from rsi_jobs.store import sha256_file


@dataclass(frozen=True)
class Samples:
    """The rows of one round that are trained on, in the order of its dataset."""

    round: int
    group: int  # ROUND, REPLAY or ANCHOR
    prompt_id: np.ndarray  # (n,)
    candidate: np.ndarray  # (n,)
    weight: np.ndarray  # (n,)
    latents: torch.Tensor  # (n, C, H, W)
    embeddings: torch.Tensor  # (n, tokens, d)
    uncond: torch.Tensor  # (1, tokens, d)

    def ids(self) -> torch.Tensor:
        """Unique numbers: the group, the round, the prompt and the candidate side by side."""
        key = (
            ((self.group * 1000 + self.round) << 40)
            + (self.prompt_id.astype(np.int64) << 10)
            + self.candidate
        )
        return torch.from_numpy(key)


def work(attempt: Attempt) -> Outcome:
    device = prepare_torch(attempt)
    if attempt.ref.attempt_no:
        return halve(attempt)
    with attempt.timed("read"):
        parts = [samples(attempt, attempt.ref.round, ROUND), *earlier(attempt)]
        data = together(parts)
    with attempt.timed("load"):
        model = load_model(attempt, device, text=False)
    settings = train_settings(attempt, device)
    state = attempt.folder / "state"
    resume_from = newest_state(attempt)
    if resume_from is not None:
        print(f"resuming from {resume_from.name}")

    def on_step(record: StepRecord) -> None:
        attempt.progress(record.step + 1, settings.steps, "steps")

    with attempt.timed("compute"):
        result = train(
            model, data, settings, state_dir=state, resume_from=resume_from, on_step=on_step,
            save_state=lambda step, files: save_state(attempt, step, files),
        )  # fmt: skip
    if result.rejected:
        raise Rejected(result.rejected, {"steps": float(result.steps)})
    checkpoints.save_checkpoint(model.network, attempt.folder / "checkpoint")
    adopt(attempt, attempt.folder / "checkpoint")
    write_records(attempt, result)
    write_samples(attempt, parts, sample_uses(data, settings, result.steps))
    return Outcome(
        metrics(attempt, result, settings, parts), micro_batch=settings.micro_batch or settings.batch_size
    )


def train_settings(attempt: Attempt, device: str) -> TrainSettings:
    settings = attempt.identity.training
    return TrainSettings(
        seed=attempt.identity.seed,
        round=attempt.ref.round,
        steps=settings.steps,
        batch_size=settings.batch,
        micro_batch=attempt.config.operations.micro_batch or None,
        mode=settings.mode,
        rank=settings.rank,
        alpha=settings.alpha,
        learning_rate=settings.lr * attempt.history().lr_scale,
        warmup=math.ceil(settings.warmup * settings.steps),
        clip=settings.clip,
        ema=settings.ema,
        max_passes=settings.max_passes,
        snr_gamma=settings.snr_gamma,
        beta=settings.base_penalty,
        prompt_dropout=settings.dropout,
        stratified=True,
        replay_share=settings.replay,
        anchor_share=settings.anchor,
        bf16=device.startswith("cuda"),
        checkpoint_every=settings.checkpoint_every,
    )


def earlier(attempt: Attempt) -> list[Samples]:
    """Picks of earlier accepted rounds (replay) and the base's own picks, round 1's (anchor)."""
    settings = attempt.identity.training
    found = []
    if settings.replay:
        accepted = [round_ for round_, _ in attempt.history().accepted if round_ > 0]
        found += [samples(attempt, round_, REPLAY) for round_ in accepted]
    if settings.anchor and attempt.ref.round > 1:
        found.append(samples(attempt, 1, ANCHOR))
    return found


def samples(attempt: Attempt, round_: int, group: int) -> Samples:
    """A round's selected candidates: the sampler's own latents and the cached text embeddings."""
    select, sample = StageRef(round_, "train", 0, "select"), StageRef(round_, "train", 0, "sample")
    rows = dataset.read(
        attempt.read(select, "selection.parquet"), ["prompt_id", "candidate", "selected", "weight"]
    )
    latents, embeddings, start = [], [], 0
    for shard in attempt.shards(sample):
        tensors = load_file(attempt.read(sample, "tensors.safetensors", shard))["latents"]
        text = load_file(attempt.read(sample, "text.safetensors", shard))
        here = slice(start, start + len(tensors))
        start += len(tensors)
        chosen = torch.from_numpy(rows["selected"][here])
        latents.append(tensors[chosen])
        wanted = torch.from_numpy(rows["prompt_id"][here])[chosen]
        embeddings.append(text["embeddings"][torch.searchsorted(text["prompt_ids"], wanted)])
    keep = rows["selected"]
    return Samples(
        round_, group, rows["prompt_id"][keep], rows["candidate"][keep], rows["weight"][keep],
        torch.cat(latents), torch.cat(embeddings), text["uncond"],
    )  # fmt: skip


def together(parts: list[Samples]) -> TrainingData:
    n = sum(len(part.weight) for part in parts)
    return TrainingData(
        latents=torch.cat([part.latents for part in parts]),
        embeddings=torch.cat([part.embeddings for part in parts]),
        prompt=torch.arange(n),
        uncond=parts[0].uncond,
        weights=torch.from_numpy(np.concatenate([part.weight for part in parts])),
        ids=torch.cat([part.ids() for part in parts]),
        group=torch.cat([torch.full((len(part.weight),), part.group) for part in parts]),
    )


def halve(attempt: Attempt) -> Outcome:
    """Go half the way from the last accepted checkpoint to this round's."""
    previous = checkpoint_folder(attempt, attempt.history().last)
    new = checkpoint_folder(attempt, (attempt.ref.round, 0))
    assert new is not None
    out = attempt.folder / "checkpoint"
    with attempt.timed("compute"):
        checkpoints.halfway(previous, new, out, base=base_folder(attempt.identity.model.path))
    adopt(attempt, out)
    return Outcome({"share": 0.5})


def adopt(attempt: Attempt, folder: Path) -> None:
    """Make a folder's files outputs of this attempt."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.rename(attempt.write(CHECKPOINT + path.relative_to(folder).as_posix()))


def save_state(attempt: Attempt, step: int, files: dict[str, Path]) -> None:
    """Upload a training state; its list of digests comes last and makes it whole."""
    prefix = f"{layout.state_prefix(attempt.run, attempt.ref)}/step-{step:06d}-{attempt.id}"
    with attempt.timed("store"):
        for name, path in files.items():
            attempt.store.upload(f"{prefix}/{name}", path)
        digests = {name: sha256_file(path) for name, path in files.items()}
        attempt.store.put(f"{prefix}/whole.json", json.dumps(digests).encode())


def newest_state(attempt: Attempt) -> Path | None:
    """The last whole training state of an earlier attempt; a damaged one is passed over."""
    prefix = layout.state_prefix(attempt.run, attempt.ref)
    whole = [e.key for e in attempt.store.list(f"{prefix}/") if e.key.endswith("/whole.json")]
    for key in sorted(whole, reverse=True):
        folder = attempt.folder / Path(key).parent.name
        folder.mkdir(exist_ok=True)
        try:
            digests = json.loads(attempt.store.get(key))
            for name in STATE_FILES:
                attempt.store.download(f"{key.removesuffix('/whole.json')}/{name}", folder / name)
                if sha256_file(folder / name) != digests[name]:
                    raise Damaged(f"{key}: {name} does not match its digest")
        except (Damaged, NotFoundError, ValueError, KeyError) as error:
            print(f"passing over a training state: {error}")
            continue
        return folder
    return None


def metrics(
    attempt: Attempt, result: TrainResult, settings: TrainSettings, parts: list[Samples]
) -> dict[str, float]:
    tail = result.records[-max(1, len(result.records) // 4) :]
    found = {
        "steps": float(result.steps),
        "passes": result.passes,
        "lr": settings.learning_rate,
        "loss": float(np.mean([r.loss for r in tail])),
        "mse": float(np.mean([r.mse for r in tail])),
        "grad_norm": float(np.mean([r.grad_norm for r in tail])),
    }
    for group, name in ((ROUND, "samples"), (REPLAY, "replayed"), (ANCHOR, "anchored")):
        found[name] = float(sum(len(part.weight) for part in parts if part.group == group))
    return found


def write_records(attempt: Attempt, result: TrainResult) -> None:
    columns: dict[str, object] = {
        "step": [r.step for r in result.records],
        "loss": [r.loss for r in result.records],
        "mse": [r.mse for r in result.records],
        "grad_norm": [r.grad_norm for r in result.records],
        "lr": [r.learning_rate for r in result.records],
    }
    for q in range(4):
        values = [r.quartiles[q] for r in result.records]
        columns[f"q{q + 1}"] = np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    dataset.write(attempt.write("loss.parquet"), dataset.table(columns))


def write_samples(attempt: Attempt, parts: list[Samples], uses: torch.Tensor) -> None:
    dataset.write(
        attempt.write("samples.parquet"),
        dataset.table(
            {
                "source_round": np.concatenate([np.full(len(p.weight), p.round) for p in parts]),
                "group": dataset.text(
                    ("round", "replay", "anchor")[p.group] for p in parts for _ in p.weight
                ),
                "prompt_id": np.concatenate([p.prompt_id for p in parts]),
                "candidate": np.concatenate([p.candidate for p in parts]),
                "weight": np.concatenate([p.weight for p in parts]),
                "uses": uses.numpy(),
            }
        ),
    )


if __name__ == "__main__":
    sys.exit(main("finetune", work))
