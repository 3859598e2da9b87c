"""The model a stage works with: the base, and the checkpoint that its round and phase call for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rsi_jobs import diffusion
from rsi_jobs.errors import ConfigError
from rsi_jobs.layout import StageRef
from rsi_jobs.stages.attempt import Attempt

CHECKPOINT = "checkpoint/"  # the outputs of finetune that make up the checkpoint


def prepare_torch(attempt: Attempt) -> str:
    """Set threads and determinism from the configuration; returns the device to use."""
    operations = attempt.config.operations
    torch.set_num_threads(operations.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(True)  # a third faster on a CPU: tiny activations are common
    device = operations.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"operations.device={device}, but this machine has no CUDA device: use cpu or auto")
    return device


def checkpoint_place(attempt: Attempt) -> tuple[int, int]:
    """(round, try) of the checkpoint this phase samples from; (0, 0) is the base."""
    if attempt.ref.phase == "train":
        return attempt.history().last
    return attempt.ref.round, attempt.ref.attempt_no


def checkpoint_folder(attempt: Attempt, place: tuple[int, int]) -> Path | None:
    """A local copy of the checkpoint that a round's finetune made, or None for the base."""
    round_, attempt_no = place
    if round_ == 0:
        return None
    ref = StageRef(round_, "train", attempt_no, "finetune")
    names = [o.name for o in attempt.marker(ref).outputs if o.name.startswith(CHECKPOINT)]
    for name in names:
        path = attempt.read(ref, name)
    return path.parents[len(Path(name).parts) - 1] / CHECKPOINT


def family(attempt: Attempt) -> Any:
    return diffusion.family(attempt.identity.model.family)


def load_model(attempt: Attempt, device: str, *, text: bool = True, vae: bool = False) -> Any:
    """The model of this phase: base plus checkpoint, in float32 on a CPU."""
    return family(attempt).load(
        diffusion.base_folder(attempt.identity.model.path),
        device=device,
        dtype=torch.float32,
        checkpoint=checkpoint_folder(attempt, checkpoint_place(attempt)),
        text=text,
        vae=vae,
    )
