"""Every key of a run in the store, and every name derived from one. Nothing else builds a path.

    <run>/config.json                                    identity, target, operations
    <run>/cancel.json                                    present: every controller stops
    <run>/controller.json                                the lease of the live controller
    <run>/mlflow.json                                    the identity under which MLflow knows the run
    <run>/report.html                                    the newest report (a copy of the last report stage's)
    <run>/r003/train-t0/sample/s0007/_SUCCESS.json       the marker: written last, names the winning attempt
    <run>/r003/train-t0/sample/s0007/_DAMAGED-<attempt>.json   a marker taken back: its data did not match
    <run>/r003/train-t0/sample/s0007/a-<attempt>/...      what one attempt made, its start record and log
    <run>/r003/train-t0/finetune/s0000/state/...          training state, shared by the attempts of one stage

A round is trained once (`train-t0`); when the gate asks for half the step, `train-t1` holds the
halved checkpoint and `eval-t1` its evaluation. Round 0 is the untouched base: `eval-t0` only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["train", "eval", "test", "report"]
Stage = Literal["prompts", "sample", "score", "select", "finetune", "gate", "report"]

PHASES: tuple[Phase, ...] = get_args(Phase)
STAGES: tuple[Stage, ...] = get_args(Stage)

CONFIG = "config.json"
CANCEL = "cancel.json"
LEASE = "controller.json"
REPORT = "report.html"
MLFLOW = "mlflow.json"
SUCCESS = "_SUCCESS.json"
START = "_START.json"
LOG = "log.txt"
DAMAGED = "_DAMAGED-"
STATE = "state"

# A Job's name is `<run>-r003-train-t0-finetune-g00`; Kubernetes allows 63 characters, and an Indexed
# Job's pods append up to 12 more to it as a host name.
RUN_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
RUN_NAME_MAX = 28


@dataclass(frozen=True, order=True)
class StageRef:
    """One stage of one round: what a Job runs, in one shard or several."""

    round: int
    phase: Phase
    attempt_no: int  # the gate's try: 0, or 1 for half the step
    stage: Stage

    @property
    def folder(self) -> str:
        return f"r{self.round:03d}/{self.phase}-t{self.attempt_no}/{self.stage}"

    def job_name(self, run: str, generation: int = 0) -> str:
        """The name of its Job; a generation above 0 makes a Failed Job anew."""
        name = f"{run}-r{self.round:03d}-{self.phase}-t{self.attempt_no}-{self.stage}"
        return f"{name}-g{generation}" if generation else name

    def __str__(self) -> str:
        half = " at half step" if self.attempt_no and self.phase != "report" else ""
        return f"round {self.round} {self.phase} {self.stage}{half}"


_KEY = re.compile(
    r"r(?P<round>\d{3,})/(?P<phase>[a-z]+)-t(?P<try>\d+)/(?P<stage>[a-z]+)/s(?P<shard>\d{4,})/(?P<rest>.+)"
)
_ATTEMPT = "a-"


def shard_folder(run: str, ref: StageRef, shard: int) -> str:
    return f"{run}/{ref.folder}/s{shard:04d}"


def marker_key(run: str, ref: StageRef, shard: int) -> str:
    return f"{shard_folder(run, ref, shard)}/{SUCCESS}"


def damaged_key(run: str, ref: StageRef, shard: int, attempt: str) -> str:
    return f"{shard_folder(run, ref, shard)}/{DAMAGED}{attempt}.json"


def attempt_key(run: str, ref: StageRef, shard: int, attempt: str, name: str) -> str:
    return f"{shard_folder(run, ref, shard)}/{_ATTEMPT}{attempt}/{name}"


def state_prefix(run: str, ref: StageRef) -> str:
    return f"{shard_folder(run, ref, 0)}/{STATE}"


def run_key(run: str, name: str) -> str:
    return f"{run}/{name}"


def parse_marker_key(run: str, key: str) -> tuple[StageRef, int] | None:
    """The stage and shard whose marker a key is, or None for any other key."""
    found = parse_key(run, key)
    if found is None or found.attempt or found.name != SUCCESS:
        return None
    return found.ref, found.shard


@dataclass(frozen=True)
class Place:
    """What a key of a stage's folder is: an attempt's object, or (attempt "") one of the shard's own."""

    ref: StageRef
    shard: int
    attempt: str
    name: str


def parse_key(run: str, key: str) -> Place | None:
    """Where a key below a stage's folder belongs, or None for any other key."""
    if not key.startswith(f"{run}/"):
        return None
    match = _KEY.fullmatch(key[len(run) + 1 :])
    if match is None or match["phase"] not in PHASES or match["stage"] not in STAGES:
        return None
    ref = StageRef(int(match["round"]), match["phase"], int(match["try"]), match["stage"])  # type: ignore[arg-type]
    folder, _, name = match["rest"].partition("/")
    if name and folder.startswith(_ATTEMPT):
        return Place(ref, int(match["shard"]), folder.removeprefix(_ATTEMPT), name)
    return Place(ref, int(match["shard"]), "", match["rest"])


def check_run_name(name: str) -> str | None:
    """What is wrong with a run's name, or None."""
    if not RUN_NAME.fullmatch(name):
        return "must start with a lower-case letter and hold only lower-case letters, digits and '-'"
    if len(name) > RUN_NAME_MAX:
        return f"has {len(name)} characters, at most {RUN_NAME_MAX} fit a Kubernetes Job name"
    return None
