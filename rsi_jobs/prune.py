"""What a run no longer needs: losing attempts, damaged copies, the training state of finished stages.

A standing marker names what stays; so do the logs and start records of the attempts that won. The stage
of a missing or damaged marker is left alone, as an attempt at it may be at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rsi_jobs import layout
from rsi_jobs.marker import MarkerReader, Markers
from rsi_jobs.store import Store

Why = Literal["losing attempt", "damaged marker", "training state", "unnamed object"]


@dataclass(frozen=True)
class Waste:
    """An object that can go: its size in bytes, and why."""

    key: str
    size: int
    why: Why


def find(store: Store, run: str) -> list[Waste]:
    """Everything that can go. Reads only.

    Raises:
        DataError: a marker of a newer version stands, which may name what this one does not know.
    """
    entries = list(store.list(f"{run}/r"))  # before the markers: what appears later is not judged
    markers = MarkerReader(store, run, repair=False).read()
    named = _named(markers)
    found = []
    for entry in entries:
        place = layout.parse_key(run, entry.key)
        if place is None or entry.key in named:
            continue
        why = _why(place, markers)
        if why is not None:
            found.append(Waste(entry.key, entry.size, why))
    return found


def remove(store: Store, run: str, waste: Sequence[Waste]) -> int:
    """Delete what `find` found, less what a marker has named since; how many objects went."""
    named = _named(MarkerReader(store, run, repair=False).read())
    keys = [each.key for each in waste if each.key not in named]
    store.delete(keys)
    return len(keys)


def _named(markers: Markers) -> set[str]:
    return {output.key for marker in markers.values() for output in marker.outputs}


def _why(place: layout.Place, markers: Markers) -> Why | None:
    marker = markers.get((place.ref, place.shard))
    if marker is None:
        return None
    if not place.attempt:
        if place.name.startswith(layout.DAMAGED):
            return "damaged marker"
        return "training state" if place.name.startswith(f"{layout.STATE}/") else None
    if place.attempt != marker.attempt:
        return "losing attempt"
    return None if place.name in (layout.LOG, layout.START) else "unnamed object"
