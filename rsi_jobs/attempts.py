"""The attempts at a run's stages: which there were, which won, and what they said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rsi_jobs import layout
from rsi_jobs.errors import NotFoundError
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Markers
from rsi_jobs.store import Store


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt at one shard of a stage."""

    ref: StageRef
    shard: int
    id: str
    state: Literal["won", "lost", "open"]  # open: no attempt at this shard has committed
    modified: float  # unix seconds at which it last wrote an object
    started: float | None  # unix seconds; None where it left no record of its start
    logged: bool  # whether its log is stored


def read(store: Store, run: str, markers: Markers, ref: StageRef | None = None) -> list[AttemptRecord]:
    """All attempts at a run's stages, or at one stage, in the order of the loop and then of time.

    Start records are read for one stage only: for a whole run it would be a request an attempt.
    """
    prefix = f"{run}/r" if ref is None else f"{run}/{ref.folder}/"
    written: dict[tuple[StageRef, int, str], float] = {}
    logged = set()
    for entry in store.list(prefix):
        place = layout.parse_key(run, entry.key)
        if place is not None and place.attempt:
            key = (place.ref, place.shard, place.attempt)
            written[key] = max(written.get(key, 0.0), entry.modified)
            if place.name == layout.LOG:
                logged.add(key)
    found = []
    for (where, shard, name), modified in written.items():
        marker = markers.get((where, shard))
        state: Literal["won", "lost", "open"] = "open"
        if marker is not None:
            state = "won" if marker.attempt == name else "lost"
        began = None if ref is None else _started(store, run, where, shard, name)
        is_logged = (where, shard, name) in logged
        found.append(AttemptRecord(where, shard, name, state, modified, began, is_logged))
    return sorted(found, key=lambda a: (_order(a.ref), a.shard, a.modified, a.id))


def choose(found: Sequence[AttemptRecord], wanted: str) -> list[AttemptRecord]:
    """The attempts that `latest` (of each shard), `all` or an id (or its beginning) means.

    Raises:
        NotFoundError: no attempt has that id.
    """
    if wanted == "all":
        return list(found)
    if wanted == "latest":
        return list({(a.ref, a.shard): a for a in found}.values())
    chosen = [a for a in found if a.id.startswith(wanted)]
    if not chosen:
        raise NotFoundError(f"--attempt {wanted!r}: there are {', '.join(a.id for a in found)}")
    return chosen


def log(store: Store, run: str, attempt: AttemptRecord) -> str:
    """What an attempt said, down to its last words; they are stored every few seconds and at its end."""
    try:
        return store.get(log_key(run, attempt)).decode(errors="replace")
    except NotFoundError:
        return f"attempt {attempt.id} has stored no log: it is at work, or was killed within seconds\n"


def log_key(run: str, attempt: AttemptRecord) -> str:
    return layout.attempt_key(run, attempt.ref, attempt.shard, attempt.id, layout.LOG)


def last_error(store: Store, run: str, tried: Sequence[AttemptRecord]) -> str:
    """The last line of the newest attempt that ended with an error, or ""."""
    for attempt in sorted((a for a in tried if a.state == "open"), key=lambda a: -a.modified):
        said = log(store, run, attempt)
        if "\nTraceback (most recent call last)" in f"\n{said}" or "\nerror: " in f"\n{said}":
            last = said.rstrip().splitlines()[-1]
            return f"{attempt.ref} shard {attempt.shard}, attempt {attempt.id}: {last}"
    return ""


def _started(store: Store, run: str, ref: StageRef, shard: int, attempt: str) -> float | None:
    key = layout.attempt_key(run, ref, shard, attempt, layout.START)
    try:
        return float(json.loads(store.get(key))["started"])
    except (NotFoundError, ValueError, KeyError, TypeError):
        return None


def _order(ref: StageRef) -> tuple[int, int, int, int]:
    return ref.round, layout.PHASES.index(ref.phase), ref.attempt_no, layout.STAGES.index(ref.stage)
