"""MLflow, seen from the controller: told of every turn, never waited for, caught up after an outage.

A thread of its own imports MLflow, talks to it and waits out its outages; the controller's loop only leaves
the newest markers for it. Only the last state matters, as each one holds all that came before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from rsi_jobs.config import RunConfig
from rsi_jobs.errors import ConfigError
from rsi_jobs.marker import Markers
from rsi_jobs.plan import Finish
from rsi_jobs.store import Store
from rsi_jobs.tracking_entries import RunEntry, Status, run_entry
from rsi_jobs.tracking_server import serve

__all__ = ["Tracker", "default_uri", "open_tracker", "serve"]

NONE = "none"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PATIENCE = 60.0  # seconds that the end of a run waits for an MLflow that fails
WORKING = 10  # times as long for one that answers, as there may be much to catch up
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts during an outage


class Tracker(Protocol):
    """Shows runs to people. No method raises because of an outage, and none but the last two waits."""

    def sync(self, config: RunConfig, markers: Markers) -> None:
        """Log what is new; every turn. Cheap when nothing is."""

    def note(self, config: RunConfig, text: str) -> None:
        """Why the run waits, for its description; "" when it no longer does."""

    def finish(self, config: RunConfig, markers: Markers, finish: Finish) -> None:
        """Log all that is left and close the run; `trouble` says so if it could not be done in time."""

    def stop(self, config: RunConfig, markers: Markers, status: Status, reason: str) -> None:
        """The same for a run that did not reach its end: FAILED, or KILLED when it was cancelled."""

    @property
    def trouble(self) -> str:
        """One line for whoever watches, or ""."""


class Silent:
    """`--mlflow none`."""

    trouble = ""

    def sync(self, config: RunConfig, markers: Markers) -> None: ...
    def note(self, config: RunConfig, text: str) -> None: ...
    def finish(self, config: RunConfig, markers: Markers, finish: Finish) -> None: ...
    def stop(self, config: RunConfig, markers: Markers, status: Status, reason: str) -> None: ...


class Writes(Protocol):
    """What the thread hands an entry to; made anew after every failure."""

    def write(self, entry: RunEntry) -> None: ...


def open_tracker(uri: str, store: Store) -> Tracker:
    """The tracker for an MLflow address; nothing is asked of it yet.

    Raises:
        ConfigError: not an address of an MLflow server or database.
    """
    if uri == NONE:
        return Silent()
    scheme = urlsplit(uri).scheme
    if scheme not in ("http", "https") and scheme.partition("+")[0] not in DATABASES:
        raise ConfigError(
            f"--mlflow {uri!r} is not accepted: give http(s)://HOST:PORT, sqlite:///FILE, another database "
            "that MLflow supports, or none"
        )

    def make() -> Writes:
        from rsi_jobs.tracking_mlflow import Writer, connect

        return Writer(connect(uri), uri, store)

    return MlflowTracker(_without_password(uri), store, make)


def default_uri(store_uri: str) -> str:
    """The SQLite database inside a folder store.

    Raises:
        ConfigError: the store is not a folder.
    """
    if "://" in store_uri:
        raise ConfigError(
            f"--mlflow must be given, as the store {store_uri} is not a folder: "
            "http(s)://HOST:PORT of an MLflow server, or none"
        )
    return f"sqlite:///{store_uri}/mlflow.db"


@dataclass(frozen=True)
class _State:
    """The newest that is known of the run."""

    config: RunConfig
    markers: Markers = field(default_factory=dict)
    status: Status = "RUNNING"
    reason: str = ""
    note: str = ""


class MlflowTracker:
    """Hands the newest state to a thread, which writes it until MLflow has it."""

    def __init__(
        self, name: str, store: Store, make: Callable[[], Writes], patience: float = PATIENCE
    ) -> None:
        self.name, self.store, self.patience = name, store, patience
        self._make = make
        self._changed = threading.Condition()
        self._wanted: _State | None = None
        self._written: _State | None = None
        self._note = ""
        self._hurry = False
        self._failed_since = 0.0
        self._error = ""
        self._missing = ""
        self._thread: threading.Thread | None = None

    def sync(self, config: RunConfig, markers: Markers) -> None:
        self._want(_State(config, markers, note=self._note))

    def note(self, config: RunConfig, text: str) -> None:
        self._note = text
        known = self._wanted.markers if self._wanted else {}
        self._want(_State(config, known, note=text))

    def finish(self, config: RunConfig, markers: Markers, finish: Finish) -> None:
        self._close(_State(config, markers, "FINISHED", finish.reason))

    def stop(self, config: RunConfig, markers: Markers, status: Status, reason: str) -> None:
        self._close(_State(config, markers, status, reason))

    @property
    def trouble(self) -> str:
        if self._missing:
            return self._missing
        since = self._failed_since
        if not since:
            return ""
        clock = time.strftime("%H:%M", time.localtime(since))
        return f"MLflow at {self.name} fails since {clock} ({self._error}); nothing is lost"

    def _want(self, state: _State) -> None:
        with self._changed:
            if state == self._wanted:  # unchanged markers are the same objects, so this is quick
                return
            self._wanted = state
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _close(self, state: _State) -> None:
        """Wait until `state` is written, or long enough."""
        self._want(state)
        begun = time.monotonic()
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while not (done := self._written == state):
                waited = time.monotonic() - begun
                if waited > self.patience * (1 if self._failed_since else WORKING):
                    break
                self._changed.wait(min(1.0, self.patience))
            self._hurry = False
        if not done:
            why = f" ({self._error})" if self._error else ""
            self._missing = (
                f"MLflow at {self.name} does not have all of run {state.config.run} yet{why}; "
                "nothing is lost: the same command again logs the rest"
            )

    def _work(self) -> None:
        writer: Writes | None = None
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted != self._written)
                state = self._wanted
            assert state is not None
            try:
                entry = run_entry(
                    self.store,
                    state.config,
                    state.markers,
                    state.status,
                    reason=state.reason,
                    note=state.note,
                )
                if entry is not None:
                    writer = writer or self._make()
                    writer.write(entry)
            # A run must not end because MLflow, the network or a database raises something: it is shown,
            # and tried again.
            except Exception as error:  # noqa: BLE001
                writer = None
                self._failed_since = self._failed_since or time.time()
                self._error = _first_line(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._hurry, pause)
                    if self._hurry:
                        self._changed.wait(FIRST_PAUSE)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            pause, self._failed_since, self._error = FIRST_PAUSE, 0.0, ""
            with self._changed:
                self._written = state
                self._changed.notify_all()


def _first_line(error: BaseException) -> str:
    """What broke, short enough for a line: the innermost cause, as clients wrap it many times over."""
    cause = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__ or cause
    text = str(cause).strip().splitlines()[0] if str(cause).strip() else ""
    return f"{type(cause).__name__}: {text}"[:160] if text else type(cause).__name__


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return parts._replace(netloc=f"{parts.username}@{parts.netloc.rpartition('@')[2]}").geturl()
