"""The marker a stage commits with: written last, once, by a conditional put. No marker, nothing happened."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsi_jobs import layout
from rsi_jobs.errors import Damaged, DataError, NotFoundError
from rsi_jobs.layout import StageRef
from rsi_jobs.store import Store

FORMAT = 1


class Output(BaseModel):
    """One object a stage made: its name within the stage, its key, its size in bytes, its SHA-256."""

    model_config = ConfigDict(frozen=True)
    name: str
    key: str
    size: int
    sha256: str


class Marker(BaseModel):
    """What one shard of one stage did. `metrics` is flat: name -> number, NaN written as null."""

    model_config = ConfigDict(frozen=True)
    format: int = FORMAT
    stage: str  # StageRef.folder
    shard: int
    shards: int = 1  # of the stage, when this attempt began
    attempt: str
    inputs: str  # digest of the identity and of every input's SHA-256: equal inputs, equal digest
    outputs: tuple[Output, ...] = ()
    metrics: dict[str, float | None] = Field(default_factory=dict)
    outcome: Literal["ok", "rejected"] = "ok"
    reason: str = ""
    decision: Literal["", "accept", "half", "rollback"] = ""  # of a gate
    started: float  # unix seconds
    seconds: float
    breakdown: dict[str, float] = Field(default_factory=dict)  # seconds by kind of work
    micro_batch: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, str | int] = Field(default_factory=dict)

    def output(self, name: str) -> Output:
        for output in self.outputs:
            if output.name == name:
                return output
        raise NotFoundError(f"{self.stage} shard {self.shard} has no output {name!r}; it has "
                            + ", ".join(o.name for o in self.outputs))  # fmt: skip

    def content(self) -> str:
        """Digest of what was made, whoever made it: equal for two attempts that agree."""
        parts = [(o.name, o.sha256) for o in self.outputs]
        return digest([parts, self.outcome, self.decision])

    def dumps(self) -> bytes:
        clean = {k: (None if v is None or not math.isfinite(v) else v) for k, v in self.metrics.items()}
        body = self.model_copy(update={"metrics": clean}).model_dump(mode="json")
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode()


Markers = dict[tuple[StageRef, int], Marker]


def digest(value: object) -> str:
    """SHA-256 of a value's canonical JSON, as 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def loads(data: bytes, key: str) -> Marker:
    """Parse a marker.

    Raises:
        DataError: written by a newer version of this package.
        Damaged: not a marker at all.
    """
    try:
        body = json.loads(data)
        if int(body["format"]) > FORMAT:
            raise DataError(
                f"{key} has marker format {body['format']}, this version reads up to {FORMAT}: "
                "upgrade rsi-jobs to continue this run"
            )
        return Marker.model_validate(body)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise Damaged(f"{key} is not a marker: {str(error).splitlines()[0]}") from None


class MarkerReader:
    """Reads a run's markers; unchanged ones come from memory, keyed by ETag, so a turn costs one listing."""

    def __init__(self, store: Store, run: str, *, repair: bool = True) -> None:
        """repair: move damaged markers aside; without it they are passed over and nothing is written."""
        self.store, self.run, self.repair = store, run, repair
        self._cache: dict[str, tuple[str, Marker]] = {}

    def read(self) -> Markers:
        """All markers that stand. A damaged one is moved aside, so that its stage is made again."""
        markers: Markers = {}
        for entry in self.store.list(f"{self.run}/r"):
            place = layout.parse_marker_key(self.run, entry.key)
            if place is None:
                continue
            cached = self._cache.get(entry.key)
            if cached is None or cached[0] != entry.etag:
                try:
                    cached = (entry.etag, loads(self.store.get(entry.key), entry.key))
                except NotFoundError:  # taken back between the listing and now
                    continue
                except Damaged:
                    if self.repair:
                        take_back(self.store, self.run, *place)
                    continue
                self._cache[entry.key] = cached
            markers[place] = cached[1]
        return markers


def read_one(store: Store, run: str, ref: StageRef, shard: int) -> Marker:
    """One shard's marker; NotFoundError when the stage has not committed."""
    key = layout.marker_key(run, ref, shard)
    return loads(store.get(key), key)


def take_back(store: Store, run: str, ref: StageRef, shard: int) -> None:
    """Withdraw a marker whose data is damaged, keeping a copy; plan() then sees the stage as not done."""
    key = layout.marker_key(run, ref, shard)
    try:
        data = store.get(key)
    except NotFoundError:
        return
    name = hashlib.sha256(data).hexdigest()[:12]
    store.put(layout.damaged_key(run, ref, shard, name), data)
    store.delete([key])
