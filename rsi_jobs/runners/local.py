"""Stages as processes on this machine, forked from a warm parent. They die with the controller."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsi_jobs.config import RunConfig
from rsi_jobs.errors import RsiError, is_retryable
from rsi_jobs.layout import StageRef
from rsi_jobs.plan import Job
from rsi_jobs.runners import Progress, command, interpreter

FIRST_BACKOFF = 1.0  # seconds before the first retry; doubles

# A stage frees and asks for the same large blocks at every step: given back to the system each time, they cost
# a third of a CPU's time in page faults (benchmarks/sampling.py).
STAGE_ENV = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000",
             "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
# Two busy OpenMP pools that spin while they wait slow each other many times over; one alone is slower without.
SHARED_ENV = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


@dataclass
class _Shard:
    ref: StageRef
    shard: int
    state: str = "queued"  # queued, running, backoff, done, failed
    failures: int = 0
    until: float = 0.0  # monotonic time at which a backoff ends
    code: int = 0


class LocalRunner:
    """Runs at most `operations.workers` shards at once; several GPUs take one shard each."""

    def __init__(self, uri: str, config: RunConfig, gpus: int = 0) -> None:
        self.uri, self.config, self.gpus = uri, config, gpus
        self._shards: dict[str, _Shard] = {}
        self._devices: dict[str, int] = {}
        self._progress: dict[tuple[StageRef, int], Progress] = {}
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._parent: subprocess.Popen[bytes] | None = None
        self._ready = False

    def jobs(self) -> Mapping[StageRef, Job]:
        self._take_events()
        self._start_queued()
        found: dict[StageRef, Job] = {}
        for ref in {shard.ref for shard in self._shards.values()}:
            shards = [s for s in self._shards.values() if s.ref == ref]
            failed = [s for s in shards if s.state == "failed"]
            if failed:
                found[ref] = Job(ref, "failed", self._why(failed[0]), failed[0].code)
            elif any(s.state == "running" for s in shards):
                found[ref] = Job(ref, "running")
            elif any(s.state in ("queued", "backoff") for s in shards):
                state = "backoff" if all(s.state == "backoff" for s in shards) else "pending"
                found[ref] = Job(ref, "backoff" if state == "backoff" else "pending")
        return found

    def launch(self, ref: StageRef, shards: tuple[int, ...]) -> None:
        for number in shards:
            name = f"{ref.folder}/{number}"
            known = self._shards.get(name)
            if known is None:
                self._shards[name] = _Shard(ref, number)
            elif known.state == "done":  # it ended well, yet its marker does not stand
                known.failures += 1
                known.state = "queued" if known.failures <= self.config.operations.retries else "failed"
        self._start_queued()

    def progress(self) -> Mapping[tuple[StageRef, int], Progress]:
        return self._progress

    def wait(self, seconds: float) -> None:
        waits = [s.until - time.monotonic() for s in self._shards.values() if s.state == "backoff"]
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=max(0.01, min([seconds, *waits])))
            self._events.put(event)
            if "progress" in event:  # not a change: do not turn the loop for every batch
                time.sleep(min(seconds, 0.2))

    def stop(self) -> None:
        if self._parent is None:
            return
        for name, shard in self._shards.items():
            if shard.state == "running":
                self._send({"kill": name})
        deadline = time.monotonic() + 5
        while any(s.state == "running" for s in self._shards.values()) and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._handle(self._events.get(timeout=0.1))
        assert self._parent.stdin is not None
        self._parent.stdin.close()  # the parent kills what is left and ends
        try:
            self._parent.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it is still importing; its children would die with it
            self._parent.kill()
            self._parent.wait()
        self._parent = None

    def _why(self, shard: _Shard) -> str:
        if shard.code == 0:
            return "it ended without an error but left no marker"
        if shard.code < 0:
            return f"killed by signal {-shard.code}, {shard.failures} times"
        times = f"exit code {shard.code}, {shard.failures} time{'s' if shard.failures > 1 else ''}"
        # The store has its log too, unless the store is what failed: a full disk takes no log.
        said = [line for line in self._said() if line.startswith("error: ")]
        return f"{said[-1].removeprefix('error: ')} ({times})" if said else times

    def _said(self) -> list[str]:
        """The lines that the stages and their parent wrote to standard error, as far as it is kept."""
        file = self._stderr.fileno()  # its offset is the writers' too: it must not move
        start = max(0, os.fstat(file).st_size - 64_000)
        return os.pread(file, 64_000, start).decode(errors="replace").strip().splitlines()

    def _start_queued(self) -> None:
        now = time.monotonic()
        room = max(self.config.operations.workers, self.gpus)
        room -= sum(s.state == "running" for s in self._shards.values())
        for name, shard in self._shards.items():
            if shard.state == "backoff" and shard.until <= now:
                shard.state = "queued"
            if shard.state == "queued" and room > 0:
                room -= 1
                shard.state = "running"
                env = {}
                if self.gpus > 1:
                    free = set(range(self.gpus)) - set(self._devices.values())
                    self._devices[name] = min(free)
                    env["CUDA_VISIBLE_DEVICES"] = str(self._devices[name])
                self._send({"id": name, "argv": command(self.uri, shard.ref, shard.shard), "env": env})

    def _send(self, message: dict[str, Any]) -> None:
        if self._parent is None or self._parent.poll() is not None:
            self._parent = self._start_parent()
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(message).encode() + b"\n")
        self._parent.stdin.flush()

    def _start_parent(self) -> subprocess.Popen[bytes]:
        env = dict(os.environ, **STAGE_ENV, OMP_NUM_THREADS=str(self.config.operations.threads))
        if self.config.operations.workers > 1:
            env |= SHARED_ENV
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the parent
        self._ready = False
        parent = subprocess.Popen(
            [interpreter(), "-m", "rsi_jobs.runners.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
        )
        threading.Thread(target=self._listen, args=(parent,), daemon=True).start()
        return parent

    def _listen(self, parent: subprocess.Popen[bytes]) -> None:
        assert parent.stdout is not None
        for line in parent.stdout:
            self._events.put(json.loads(line))
        self._events.put({"gone": parent.wait()})

    def _take_events(self) -> None:
        while True:
            try:
                self._handle(self._events.get_nowait())
            except queue.Empty:
                return

    def _handle(self, event: dict[str, Any]) -> None:
        if "ready" in event:
            self._ready = True
        if "gone" in event and not self._ready:
            tail = self._said()[-1:]
            raise RsiError(f"the parent of the stages could not start: {' '.join(tail) or event['gone']}")
        if "gone" in event:
            for name, shard in self._shards.items():
                if shard.state == "running":
                    self._ended(name, shard, event["gone"] or 1)
            return
        known = self._shards.get(event.get("id", ""))
        if known is None:
            return
        if "progress" in event:
            said = event["progress"]
            self._progress[known.ref, known.shard] = Progress(said["done"], said["total"], said["unit"])
        elif "code" in event and known.state == "running":
            self._ended(event["id"], known, event["code"])

    def _ended(self, name: str, shard: _Shard, code: int) -> None:
        self._devices.pop(name, None)
        self._progress.pop((shard.ref, shard.shard), None)
        shard.code = code
        if code == 0:
            shard.state = "done"
            return
        shard.failures += 1
        if is_retryable(code) and shard.failures <= self.config.operations.retries:
            shard.state = "backoff"
            shard.until = time.monotonic() + FIRST_BACKOFF * 2 ** (shard.failures - 1)
        else:
            shard.state = "failed"
