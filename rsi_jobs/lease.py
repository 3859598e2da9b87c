"""A lease that keeps a second controller out, as a courtesy: safety rests on conditional writes."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from pathlib import Path

from rsi_jobs import layout
from rsi_jobs.errors import NotFoundError, PassingFault
from rsi_jobs.store import Store

TTL = 45.0  # seconds after its last renewal at which a lease is free
RENEW = 10.0


class Lease:
    """Held while a controller lives; a holder of this machine that is gone loses it at once."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run
        self.key = layout.run_key(run, layout.LEASE)
        self.id = uuid.uuid4().hex
        self._etag: str | None = None
        self._renewed = 0.0

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            PassingFault: another controller holds it (exit 75).
        """
        etag, held = self._read()
        if held is not None and _alive(held):
            raise PassingFault(
                f"run {self.run} in {self.store.uri} is being controlled by process {held['pid']} on "
                f"{held['host']}: watch it with `rsi status {self.run}`, or wait until it ends"
            )
        self._etag = self.store.replace(self.key, self._body(), etag)
        if self._etag is None:
            raise PassingFault(f"another controller of run {self.run} started at the same instant")
        self._renewed = time.monotonic()

    def renew(self) -> None:
        """Say that the holder lives; cheap to call every turn.

        Raises:
            PassingFault: another controller has taken over.
        """
        if time.monotonic() - self._renewed < RENEW:
            return
        self._etag = self.store.replace(self.key, self._body(), self._etag)
        if self._etag is None:
            etag, held = self._read()
            if held is None or held.get("id") != self.id:
                raise PassingFault(f"another controller has taken over run {self.run}; this one stops")
            self._etag = etag  # our own renewal whose answer was lost
        self._renewed = time.monotonic()

    def release(self) -> None:
        if self._etag is not None:
            self.store.delete_if(self.key, self._etag)

    def _body(self) -> bytes:
        holder = {"id": self.id, "host": platform.node(), "pid": os.getpid(), "boot": _boot(),
                  "began": _began(os.getpid()), "renewed": time.time()}  # fmt: skip
        return json.dumps(holder).encode()

    def _read(self) -> tuple[str | None, dict[str, object] | None]:
        entry = next((e for e in self.store.list(self.key) if e.key == self.key), None)
        if entry is None:
            return None, None
        try:
            return entry.etag, json.loads(self.store.get(self.key))
        except (NotFoundError, ValueError):
            return entry.etag, None


def holder(store: Store, run: str) -> dict[str, object] | None:
    """Who controls a run now (host, pid, renewed), or None."""
    _, held = Lease(store, run)._read()
    return held if held is not None and _alive(held) else None


def _alive(held: dict[str, object]) -> bool:
    if held.get("host") == platform.node() and held.get("boot") == _boot() and _boot():
        began = _began(int(str(held.get("pid", 0))))
        return bool(began) and began == held.get("began")
    return time.time() - float(str(held.get("renewed", 0))) < TTL


def _boot() -> str:
    """Tells this boot of this kernel from others; empty where the system does not say."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return name + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began, in clock ticks since boot; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
