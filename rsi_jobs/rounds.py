"""What a person asks of a run's rounds, read off its markers: pure functions, no clock, no I/O.

The live view, the summary and the report all show these, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rsi_jobs import plan
from rsi_jobs.config import RunConfig
from rsi_jobs.layout import PHASES, STAGES, StageRef
from rsi_jobs.marker import Marker, Markers

Standing = Literal["base", "accepted", "half step", "rolled back", "rejected", "open"]
"""`half step`: accepted with half the change; `rejected`: a stage's own result was bad."""

ARITHMETIC = "compute"  # the kind of work in a marker's breakdown that is the models' own


@dataclass(frozen=True)
class Decision:
    """One word of the gate: the try it fell on, what it said, why."""

    attempt_no: int
    verdict: str
    reason: str


@dataclass(frozen=True)
class Round:
    """A round as it stands."""

    number: int
    standing: Standing
    evaluated: int | None  # the last try with an evaluation
    metrics: Mapping[str, float]  # of that evaluation; without those that are not numbers
    decisions: tuple[Decision, ...]
    seconds: float  # its training and evaluation, every shard; not the report, not the test

    @property
    def accepted(self) -> bool:
        return self.standing in ("base", "accepted", "half step")

    @property
    def reason(self) -> str:
        return self.decisions[-1].reason if self.decisions else ""


def rounds(markers: Markers) -> list[Round]:
    """Every round that has begun, oldest first; round 0 is the base."""
    return [_round(markers, number) for number in sorted({ref.round for ref, _ in markers})]


def _round(markers: Markers, number: int) -> Round:
    mine = {place: marker for place, marker in markers.items() if place[0].round == number}
    decisions, evaluated, found = [], None, {}
    for attempt_no in (0, 1):
        gate = mine.get((plan.gate_ref(number, attempt_no), 0))
        if gate is not None:
            decisions.append(Decision(attempt_no, gate.decision, gate.reason))
        select = mine.get((StageRef(number, "eval", attempt_no, "select"), 0))
        if select is not None and select.outcome == "ok":
            evaluated, found = attempt_no, numbers(select)
    standing: Standing = "open"
    final = plan.verdict(markers, number)
    if number == 0:
        standing = "base"
    elif final is not None and final[0] == "accept":
        standing = "half step" if final[1] else "accepted"
    elif final is not None:
        bad = any(m.outcome == "rejected" for m in mine.values())
        standing = "rejected" if bad else "rolled back"
    seconds = sum(m.seconds for (ref, _), m in mine.items() if ref.phase in ("train", "eval"))
    return Round(number, standing, evaluated, found, tuple(decisions), seconds)


def numbers(marker: Marker) -> dict[str, float]:
    """A marker's metrics, less those that were not finite."""
    return {name: value for name, value in marker.metrics.items() if value is not None}


def finished(config: RunConfig, markers: Markers) -> dict[StageRef, list[Marker]]:
    """The stages of which every shard has committed, in the order in which they ended."""
    shards: dict[StageRef, list[Marker]] = {}
    for (ref, _), marker in sorted(markers.items(), key=lambda item: item[0]):
        shards.setdefault(ref, []).append(marker)
    whole = {r: found for r, found in shards.items() if len(found) >= plan.shard_count(config, r, markers)}
    return dict(sorted(whole.items(), key=lambda item: (max(map(ended, item[1])), item[0])))


def ended(marker: Marker) -> float:
    """Unix seconds."""
    return marker.started + marker.seconds


def busy(markers: Iterable[Marker]) -> float:
    """Seconds in which at least one of these was at work: work side by side counts once."""
    total, until = 0.0, float("-inf")
    for marker in sorted(markers, key=lambda m: m.started):
        total += max(0.0, ended(marker) - max(marker.started, until))
        until = max(until, ended(marker))
    return total


@dataclass
class StageTime:
    """Seconds of one kind of stage, summed over rounds, tries and shards."""

    seconds: float = 0.0
    arithmetic: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)

    @property
    def other(self) -> float:
        return self.seconds - self.arithmetic


def stage_name(ref: StageRef) -> str:
    """`sample`, or `eval sample` outside training, where the same stage does another thing."""
    return ref.stage if ref.phase in ("train", "report") else f"{ref.phase} {ref.stage}"


def stage_times(markers: Markers) -> dict[str, StageTime]:
    """Seconds by stage, in the order of the loop. The gate takes none and is left out."""
    times: dict[str, StageTime] = {}
    order = {(p, s): (i, j) for i, p in enumerate(PHASES) for j, s in enumerate(STAGES)}
    for (ref, _), marker in sorted(
        markers.items(), key=lambda item: order[item[0][0].phase, item[0][0].stage]
    ):
        if ref.stage == "gate":
            continue
        time = times.setdefault(stage_name(ref), StageTime())
        time.seconds += marker.seconds
        time.arithmetic += marker.breakdown.get(ARITHMETIC, 0.0)
        for kind, seconds in marker.breakdown.items():
            time.kinds[kind] = time.kinds.get(kind, 0.0) + seconds
    return times


def gain_on_test(
    markers: Markers, best: int, name: str = plan.GATE_SCORE
) -> tuple[float, float, float] | None:
    """The best round's gain over the base on the test prompts, with its interval, once measured."""
    for attempt_no in (1, 0):
        marker = markers.get((StageRef(best, "test", attempt_no, "select"), 0))
        if marker is not None and best:
            return interval(numbers(marker), f"{name}.vs_base")
    return None


def interval(metrics: Mapping[str, float], name: str) -> tuple[float, float, float] | None:
    """A metric with its two-sided interval, or None; without an interval, three times the value."""
    if name not in metrics:
        return None
    value = metrics[name]
    return value, metrics.get(f"{name}.low", value), metrics.get(f"{name}.high", value)


def scores(metrics: Mapping[str, float]) -> str:
    """The held-out score against the base with its interval; right images where one knows."""
    parts = []
    gain = interval(metrics, f"{plan.GATE_SCORE}.vs_base")
    if gain is not None:
        parts.append(f"held-out {signed(gain)} vs base")
    elif plan.GATE_SCORE in metrics:
        parts.append(f"held-out {metrics[plan.GATE_SCORE]:.3f}")
    if "judge.right" in metrics:
        parts.append(f"right {metrics['judge.right']:.1%}")
    return ", ".join(parts)


def signed(gain: tuple[float, float, float]) -> str:
    return f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"


def duration(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
