"""Runners start stages: as processes on this machine, or as Jobs on Kubernetes. Both send the same argv."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rsi_jobs.layout import StageRef
from rsi_jobs.plan import Job


@dataclass(frozen=True)
class Progress:
    """How far a shard is, by its own word."""

    done: int
    total: int
    unit: str


class Runner(Protocol):
    """What the controller needs of a runner."""

    def jobs(self) -> Mapping[StageRef, Job]:
        """Live and failed stages, as they are now."""

    def launch(self, ref: StageRef, shards: tuple[int, ...]) -> None:
        """Start a stage's shards. A stage that is live already is left alone."""

    def progress(self) -> Mapping[tuple[StageRef, int], Progress]:
        """What live shards last said of themselves."""

    def wait(self, seconds: float) -> None:
        """Return after `seconds`, or as soon as something changed."""

    def stop(self) -> None:
        """End every live stage."""


def command(uri: str, ref: StageRef, shard: int | str) -> list[str]:
    """The one command a stage is, less the interpreter's path."""
    return [
        "-m", f"rsi_jobs.stages.{ref.stage}", "--run", uri, "--round", str(ref.round), "--phase", ref.phase,
        "--try", str(ref.attempt_no), "--shard", str(shard),
    ]  # fmt: skip


def interpreter() -> str:
    return sys.executable
