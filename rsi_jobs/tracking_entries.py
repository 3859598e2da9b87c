"""What MLflow should show of a run, from its configuration and markers: pure, no MLflow, no clock.

A run is one entry, with an entry for each of its rounds. Every value comes from a marker and carries that
marker's time, so the same markers always give the same entries, and logging them twice changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rsi_jobs import layout, plan
from rsi_jobs.config import RunConfig
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Marker, Markers, Output, digest
from rsi_jobs.store import Store

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

GRID = "grid.png"  # the output of an evaluation's select: the same prompts and noise in every round
SUMMED = ("images", "flat")  # metrics of a shard that add up; the others are means over its images
NOTE_ROWS = 40  # rounds in the table of a run's description; MLflow cuts a tag at 8000 characters
_NOT_A_METRIC_NAME = re.compile(r"[^A-Za-z0-9_\-. :/]")


@dataclass(frozen=True)
class Point:
    """One value of one metric; `time` in unix milliseconds, `step` is the round."""

    name: str
    value: float
    time: int
    step: int


@dataclass(frozen=True)
class Files:
    """Files in the store that MLflow only points at: a round's dataset, or a checkpoint."""

    uri: str
    digest: str
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundEntry:
    """One round; round 0 is the untouched base."""

    round: int
    started: int  # unix milliseconds
    ended: int | None  # None while the round is open
    points: tuple[Point, ...]  # of its stages, as each one ends
    results: tuple[Point, ...]  # of its checkpoint, once the round is closed
    params: Mapping[str, str]
    tags: Mapping[str, str]
    start_from: int | None  # the round whose checkpoint it trained from
    dataset: Files | None
    checkpoint: Files | None
    grid: Output | None


@dataclass(frozen=True)
class RunEntry:
    run: str
    experiment: str
    started: int
    ended: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    rounds: tuple[RoundEntry, ...]
    best: int  # 0 while no round is better than the base
    status: Status
    reason: str


def run_entry(
    store: Store, config: RunConfig, markers: Markers, status: Status, *, reason: str = "", note: str = ""
) -> RunEntry | None:
    """The whole run; None before its first marker and without a note, as there is nothing to show."""
    if not markers and not note:
        return None
    by_round: dict[int, Markers] = {}
    for place, marker in markers.items():
        if place[0].phase != "report":
            by_round.setdefault(place[0].round, {})[place] = marker
    rounds = tuple(
        _round_entry(store, config, markers, mine, number) for number, mine in sorted(by_round.items())
    )
    closed = [entry.round for entry in rounds if entry.ended is not None]
    best = plan.best_round(markers, max(closed) + 1)[0] if closed else 0
    identity = config.identity.model_dump(mode="json")
    tags = {
        "rsi.uri": f"{store.uri}/{config.run}",
        "rsi.identity": config.identity_digest(),
        "rsi.rounds": str(config.rounds),
        "rsi.best": str(best),
        "rsi.reason": reason,
        "mlflow.note.content": _note(config, rounds, best, reason=reason, note=note),
    }
    return RunEntry(
        run=config.run,
        experiment=experiment_name(config.identity.model.path),
        started=min((entry.started for entry in rounds), default=0),
        ended=max((_time(marker) for marker in markers.values()), default=0),
        params=dict(_flatten(identity)),
        tags=tags,
        rounds=rounds,
        best=best,
        status=status,
        reason=reason,
    )


def experiment_name(model_path: str) -> str:
    """One experiment for each base model: the last part of its path, wherever it is mounted."""
    return model_path.rstrip("/").rpartition("/")[2] or model_path


def _round_entry(store: Store, config: RunConfig, markers: Markers, mine: Markers, number: int) -> RoundEntry:
    """One round, as far as it has come; `mine` are its own markers."""
    points = tuple(_stage_points(config, mine, number))
    dataset, select = None, mine.get((StageRef(number, "train", 0, "select"), 0))
    if select is not None:
        dataset = _files(store, select, "dataset", {"samples": _text(select.metrics.get("selected"))})
    last = _verdict(mine, number)
    if last is None:
        stages = [ref for (ref, _), _ in sorted(mine.items(), key=lambda item: _time(item[1]))]
        tags = {"rsi.stage": str(stages[-1])}
        return RoundEntry(number, _started(mine), None, points, (), {}, tags, None, dataset, None, None)

    decision, attempt_no, closing = last
    past = plan.history(markers, number)
    finetune = mine.get((StageRef(number, "train", attempt_no, "finetune"), 0))
    judged = mine.get((StageRef(number, "eval", attempt_no, "select"), 0))
    params = {"round": str(number)}
    if number:
        scale = past.lr_scale * 0.5**attempt_no
        params |= {"try": str(attempt_no), "start_from": str(past.last[0]), "lr_scale": f"{scale:g}"}
    tags = {"rsi.stage": "done", "rsi.decision": decision, "rsi.reason": closing.reason}
    checkpoint = _checkpoint(store, config, finetune, params) if judged is not None else None
    grid = next((o for o in judged.outputs if o.name == GRID), None) if judged is not None else None
    return RoundEntry(
        round=number,
        started=_started(mine),
        ended=_time(closing),
        points=points,
        results=tuple(_results(markers, mine, number, attempt_no, closing)),
        params=params,
        tags=tags,
        start_from=past.last[0] if number else None,
        dataset=dataset,
        checkpoint=checkpoint,
        grid=grid,
    )


def _verdict(mine: Markers, number: int) -> tuple[str, int, Marker] | None:
    """(decision, try, the marker that closed the round); None while it is open. The base has no gate."""
    if number == 0:
        marker = mine.get((StageRef(0, "eval", 0, "select"), 0))
        return None if marker is None else ("base", 0, marker)
    found = plan.verdict(mine, number)
    return None if found is None else (*found, mine[plan.gate_ref(number, found[1]), 0])


def _stage_points(config: RunConfig, mine: Markers, number: int) -> Iterator[Point]:
    """What each finished stage took, and what the training stages measured."""
    for ref in sorted({ref for ref, _ in mine}):
        shards = [marker for (other, _), marker in sorted(mine.items()) if other == ref]
        if ref.stage == "gate" or len(shards) < plan.shard_count(config, ref, mine):
            continue
        at = max(_time(marker) for marker in shards)
        half = ".half" if ref.attempt_no else ""
        yield Point(f"seconds/{ref.phase}.{ref.stage}{half}", sum(m.seconds for m in shards), at, number)
        if ref.phase == "train" and ref.stage != "finetune":
            yield from _points(_merge(shards), f"{ref.stage}/", at, number)


def _results(
    markers: Markers, mine: Markers, number: int, attempt_no: int, closing: Marker
) -> Iterator[Point]:
    """What only holds once the round is closed: the metrics of the try that the gate looked at last."""
    finetune = mine.get((StageRef(number, "train", attempt_no, "finetune"), 0))
    if finetune is not None:
        yield from _points(finetune.metrics, "train/", _time(finetune), number)
    judged = mine.get((StageRef(number, "eval", attempt_no, "select"), 0))
    if judged is not None:
        yield from _points(judged.metrics, "", _time(judged), number)
    test = mine.get((StageRef(number, "test", attempt_no, "select"), 0))
    if test is not None:
        yield from _points(test.metrics, "test/", _time(test), number)
    # The final test belongs to no round's cost.
    spent = [m for (ref, _), m in mine.items() if ref.phase != "test" and "gpu" in m.hardware]
    hours = math.fsum(m.seconds * int(m.hardware.get("gpus", 1)) for m in spent) / 3600
    best = plan.best_round(markers, number + 1)
    select = markers.get((StageRef(best[0], "eval", best[1], "select"), 0))
    run_level = {
        "accepted": float(number == 0 or closing.decision == "accept"),
        "gpu_hours": hours,
        "best/round": float(best[0]),
        "best/heldout": select.metrics.get(plan.GATE_SCORE) if select else None,
    }
    yield from _points(run_level, "", _time(closing), number)


def _merge(shards: list[Marker]) -> dict[str, float | None]:
    """Metrics over all shards: counts add up, the rest is averaged over images."""
    merged: dict[str, float | None] = {}
    for name in {name for marker in shards for name in marker.metrics}:
        pairs = [(m.metrics.get(name), m.metrics.get("images") or 1.0) for m in shards]
        known = [(value, weight) for value, weight in pairs if value is not None]
        if name in SUMMED:
            merged[name] = math.fsum(value for value, _ in known)
        elif known:
            total = math.fsum(weight for _, weight in known)
            merged[name] = math.fsum(value * weight for value, weight in known) / total
    return merged


def _points(metrics: Mapping[str, float | None], prefix: str, at: int, step: int) -> Iterator[Point]:
    for name, value in sorted(metrics.items()):
        if value is not None and math.isfinite(value):
            yield Point(_NOT_A_METRIC_NAME.sub("_", prefix + name), float(value), at, step)


def _checkpoint(
    store: Store, config: RunConfig, finetune: Marker | None, params: Mapping[str, str]
) -> Files | None:
    model = config.identity.model
    about = {"base": model.path, "family": model.family, "mode": config.identity.training.mode, **params}
    if params["round"] == "0":
        return Files(model.path, digest(model.path), about)
    return _files(store, finetune, "checkpoint", about) if finetune is not None else None


def _files(store: Store, marker: Marker, folder: str, params: Mapping[str, str]) -> Files | None:
    """The outputs `<folder>/...` of a marker as one thing: their common address and a digest of all."""
    outputs = [output for output in marker.outputs if output.name.startswith(f"{folder}/")]
    if not outputs:
        return None
    root = outputs[0].key.removesuffix(outputs[0].name) + folder
    return Files(f"{store.uri}/{root}", digest(sorted((o.name, o.sha256) for o in outputs)), params)


def _note(config: RunConfig, rounds: tuple[RoundEntry, ...], best: int, *, reason: str, note: str) -> str:
    """The run's description, in Markdown: what it waits for, which round is best, a table of rounds."""
    lines = [f"**Waiting:** {note}", ""] if note else []
    lines += [f"**Ended:** {reason}", ""] if reason else []
    closed = [entry for entry in rounds if entry.ended is not None]
    if not closed:
        return "\n".join([*lines, f"Run `{config.run}`, {config.rounds} rounds, none done yet."])
    name = f"round {best}" if best else "the base (round 0)"
    lines += [f"Best so far: **{name}**, of {closed[-1].round} done and {config.rounds} wanted.", ""]
    lines += ["| round | held-out score | 95 % interval | decision |", "|---|---|---|---|"]
    for entry in closed[-NOTE_ROWS:]:
        values = {point.name: point.value for point in entry.results}
        score, low, high = (_short(values.get(plan.GATE_SCORE + end)) for end in ("", ".low", ".high"))
        mark = " (best)" if entry.round == best else ""
        lines.append(f"| {entry.round}{mark} | {score} | {low} to {high} | {entry.tags['rsi.decision']} |")
    return "\n".join(lines)


def _flatten(value: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            text = ",".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            yield f"{prefix}{name}", text


def _started(mine: Markers) -> int:
    return min(int(marker.started * 1000) for marker in mine.values())


def _time(marker: Marker) -> int:
    """When the stage was done, in unix milliseconds."""
    return int((marker.started + marker.seconds) * 1000)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def key_of(run_key: str, number: int) -> str:
    """The `rsi.key` of a round's run and of its checkpoint."""
    return f"{run_key}/r{number:03d}"


def identity_key(run: str) -> str:
    """The object in the store that holds the id this run goes by in MLflow."""
    return layout.run_key(run, layout.MLFLOW)
