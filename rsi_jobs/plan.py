"""What to do next, from what stands in the store: pure functions, no clock, no I/O.

The controller calls `plan` every turn with the markers and the live jobs. Round r trains from the last
accepted checkpoint; the gate then accepts, asks once for half the step, or rolls back. Everything a stage
needs to know of earlier rounds (`history`) is derived from the same markers by the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rsi_jobs.config import Gate, RunConfig
from rsi_jobs.errors import DataError
from rsi_jobs.layout import Phase, Stage, StageRef
from rsi_jobs.marker import Marker, Markers

TRAIN: tuple[Stage, ...] = ("prompts", "sample", "score", "select", "finetune")
JUDGE: tuple[Stage, ...] = ("sample", "score", "select")
SHARDED: frozenset[Stage] = frozenset({"sample", "score"})
GATE_SCORE = "heldout"  # the metric that decides; logged under this name whatever the scorer is called

Verdict = Literal["accept", "half", "rollback"]


@dataclass(frozen=True)
class Job:
    """A stage as its runner sees it now."""

    ref: StageRef
    state: Literal["pending", "running", "backoff", "failed"]
    reason: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Launch:
    ref: StageRef
    shards: tuple[int, ...]  # those without a marker


@dataclass(frozen=True)
class Decide:
    ref: StageRef
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Finish:
    """Nothing is left to do: `best` is the round the gate chose."""

    best: int
    reason: str


@dataclass(frozen=True)
class Fail:
    """A stage cannot be done; its job says why."""

    job: Job


@dataclass(frozen=True)
class Wait:
    """A job for this stage is live."""

    ref: StageRef


Action = Launch | Decide | Finish | Fail | Wait


@dataclass(frozen=True)
class History:
    """What the gate decided before a round."""

    accepted: tuple[tuple[int, int], ...] = ((0, 0),)  # (round, try), oldest first; the base is (0, 0)
    rollbacks: int = 0
    in_a_row: int = 0
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)

    @property
    def last(self) -> tuple[int, int]:
        return self.accepted[-1]

    @property
    def lr_scale(self) -> float:
        """Each roll-back halves the learning rate."""
        return 0.5**self.rollbacks


def gate_ref(round_: int, attempt_no: int) -> StageRef:
    return StageRef(round_, "eval", attempt_no, "gate")


def verdict(markers: Markers, round_: int) -> tuple[Verdict, int] | None:
    """The final word on a round and the try it fell in, or None while it is open."""
    for attempt_no in (0, 1):
        marker = markers.get((gate_ref(round_, attempt_no), 0))
        if marker is None:
            return None
        if marker.decision != "half":
            return ("accept" if marker.decision == "accept" else "rollback"), attempt_no
    return None


def history(markers: Markers, before: int) -> History:
    """The gate's decisions on the rounds 1 to before - 1."""
    accepted: list[tuple[int, int]] = [(0, 0)]
    rollbacks = in_a_row = 0
    verdicts: dict[int, Verdict] = {}
    for round_ in range(1, before):
        found = verdict(markers, round_)
        if found is None:
            continue
        verdicts[round_] = found[0]
        if found[0] == "accept":
            accepted.append((round_, found[1]))
            in_a_row = 0
        else:
            rollbacks += 1
            in_a_row += 1
    return History(tuple(accepted), rollbacks, in_a_row, verdicts)


def best_round(markers: Markers, before: int) -> tuple[int, int]:
    """The accepted (round, try) whose held-out score on the gate prompts is highest; the base included."""

    def score(place: tuple[int, int]) -> float:
        marker = markers.get((StageRef(place[0], "eval", place[1], "select"), 0))
        value = marker.metrics.get(GATE_SCORE) if marker else None
        return -math.inf if value is None else value

    return max(history(markers, before).accepted, key=lambda place: (score(place), -place[0]))


def gate(metrics: Mapping[str, float | None], settings: Gate, attempt_no: int) -> tuple[Verdict, str]:
    """Accept a round unless it is surely worse (METHOD: one-sided 95 % bounds beyond set margins).

    `metrics` are those of the round's eval select: `heldout.vs_ref.high95` is the upper bound of the
    paired difference from the best accepted round, in units of the base's spread; `distance.vs_base.low95`
    the lower bound of how much farther the images lie from the base's good ones (robust z);
    `diversity.ratio.high95` the upper bound of the spread among passing candidates over the base's.
    """

    def value(name: str, default: float) -> float:
        found = metrics.get(name)
        return default if found is None else found

    faults = []
    fall = value("heldout.vs_ref.high95", math.inf)
    if fall < -settings.margin:
        faults.append(f"the held-out score fell (by {-fall:.3f} spreads or more)")
    rise = value("distance.vs_base.low95", -math.inf)
    if rise > settings.hallucination:
        faults.append(f"images lie {rise:.2f} spreads or more farther off the base's good ones")
    spread = value("diversity.ratio.high95", math.inf)
    if spread < settings.diversity:
        faults.append(f"diversity fell to {spread:.0%} of the base's or less")
    if not settings.enabled or not faults:
        return "accept", "the gate is off" if not settings.enabled else "no worse than the best round"
    return ("rollback" if attempt_no else "half"), "; ".join(faults)


def shard_count(config: RunConfig, ref: StageRef, markers: Markers) -> int:
    """How many shards a stage has: as many as its sample stage began with, though the setting may change.

    Evaluation phases never have more shards than batches.
    """
    if ref.stage not in SHARDED:
        return 1
    begun = _shards_begun(StageRef(ref.round, ref.phase, ref.attempt_no, "sample"), markers)
    if begun:
        return begun
    identity = config.identity
    if ref.phase == "train":
        images = identity.prompts.keep * identity.sampling.candidates
    elif ref.phase == "test":
        images = identity.evaluation.test_prompts
    else:
        images = identity.evaluation.gate_prompts * identity.evaluation.candidates
    return max(1, min(config.operations.shards, -(-images // identity.sampling.batch)))


def _shards_begun(sample: StageRef, markers: Markers) -> int:
    first = markers.get((sample, 0))
    if first is None:  # its other shards may have been quicker
        first = next((m for (ref, _), m in markers.items() if ref == sample), None)
    return first.shards if first else 0


def plan(config: RunConfig, markers: Markers, jobs: Mapping[StageRef, Job]) -> list[Action]:
    """The actions of one turn. Stages run one after another; a report never holds up the next round."""
    actions: list[Action] = []
    for step in _steps(config, markers):
        if isinstance(step, Finish):
            return actions or [step]
        if isinstance(step, (Decide, Fail)):
            return [*actions, step]
        shards = range(shard_count(config, step, markers))
        missing = tuple(shard for shard in shards if (step, shard) not in markers)
        if not missing:
            continue
        job = jobs.get(step)
        optional = step.phase == "report"
        if job is None:
            actions.append(Launch(step, missing))
        elif job.state != "failed":
            actions.append(Wait(step))
        elif not optional:
            return [*actions, Fail(job)]
        if not optional:
            return actions
    return actions


def _steps(config: RunConfig, markers: Markers) -> Iterator[StageRef | Decide | Finish | Fail]:
    """Every step in order. The reader stops at the first that is not done, so later ones may look at it."""
    for ref in _stages(0, "eval", 0, JUDGE):
        yield ref
        bad = _rejected(config, markers, ref)
        if bad is not None:  # without the base's figures no later round can be judged
            yield Fail(Job(ref, "failed", bad.reason, DataError.exit_code))
    last = 0
    reason = f"all {config.rounds} rounds are done"
    for round_ in range(1, config.rounds + 1):
        past = history(markers, round_)
        if past.in_a_row >= config.identity.gate.patience:
            reason = f"stopped early: rounds {last - past.in_a_row + 1} to {last} were rolled back"
            break
        yield from _round(config, markers, round_)
        last = round_
        yield StageRef(round_, "report", 0, "report")
    best, attempt_no = best_round(markers, last + 1)
    if config.identity.evaluation.test_prompts:
        yield from _stages(0, "test", 0, JUDGE)
        if best:
            yield from _stages(best, "test", attempt_no, JUDGE)
        yield StageRef(last, "report", 1, "report")
    yield Finish(best, reason)


def _stages(round_: int, phase: Phase, attempt_no: int, stages: tuple[Stage, ...]) -> Iterator[StageRef]:
    for stage in stages:
        yield StageRef(round_, phase, attempt_no, stage)


def _round(config: RunConfig, markers: Markers, round_: int) -> Iterator[StageRef | Decide]:
    """One round's stages and decisions; a stage that commits `rejected` ends its try."""
    for attempt_no in (0, 1):
        train: tuple[Stage, ...] = TRAIN if attempt_no == 0 else ("finetune",)
        refs = [*_stages(round_, "train", attempt_no, train), *_stages(round_, "eval", attempt_no, JUDGE)]
        bad: Marker | None = None
        for ref in refs:
            yield ref
            bad = _rejected(config, markers, ref)
            if bad is not None:
                break
        ref = gate_ref(round_, attempt_no)
        marker = markers.get((ref, 0))
        if marker is None:
            if bad is not None:
                yield Decide(ref, "rollback", f"{bad.stage} was rejected: {bad.reason}")
            else:
                select = markers[StageRef(round_, "eval", attempt_no, "select"), 0]
                yield Decide(ref, *gate(select.metrics, config.identity.gate, attempt_no))
            return
        if marker.decision != "half":
            return


def _rejected(config: RunConfig, markers: Markers, ref: StageRef) -> Marker | None:
    for shard in range(shard_count(config, ref, markers)):
        marker = markers.get((ref, shard))
        if marker is not None and marker.outcome == "rejected":
            return marker
    return None
