"""One attempt at one shard of one stage: read inputs through markers, do the work, commit.

Every stage is `work(attempt) -> Outcome`; `main` around it is the same on a laptop and in a pod. It reads
the configuration from the run in the store, and commits by writing the marker last. When another attempt
was first, it says so and exits 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from rsi_jobs import config as configs
from rsi_jobs import layout, marker, plan
from rsi_jobs.errors import NO_SPACE, CannotCreate, Damaged, NotFoundError, RsiError, UserError
from rsi_jobs.layout import PHASES, StageRef
from rsi_jobs.marker import Marker, MarkerReader, Markers, Output
from rsi_jobs.stages.logtail import LogTail
from rsi_jobs.store import Store, open_store, sha256_file

RECORDED = ("torch", "diffusers", "transformers", "peft", "numpy", "pyarrow")
PROGRESS_FD = "RSI_PROGRESS_FD"


@dataclass
class Outcome:
    """What a stage's work came to; its files lie where `Attempt.write` said."""

    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""  # not empty: the result is bad, the stage commits `rejected`
    micro_batch: int = 0


class Rejected(Exception):
    """Raised anywhere in a stage's work: the result is bad, which is a result."""

    def __init__(self, reason: str, metrics: dict[str, float] | None = None) -> None:
        super().__init__(reason)
        self.outcome = Outcome(metrics or {}, reason)


@dataclass
class Attempt:
    """The surroundings of a stage's work. `folder` is scratch space that goes away with the attempt."""

    store: Store
    run: str
    config: configs.RunConfig
    ref: StageRef
    shard: int
    id: str
    folder: Path
    breakdown: dict[str, float] = field(default_factory=dict)
    _inputs: dict[str, str] = field(default_factory=dict)
    _written: list[str] = field(default_factory=list)
    _markers: Markers | None = None

    @property
    def identity(self) -> configs.Identity:
        return self.config.identity

    def markers(self) -> Markers:
        """All of the run's markers as they stood when the work began."""
        if self._markers is None:
            self._markers = MarkerReader(self.store, self.run).read()
        return self._markers

    def history(self) -> plan.History:
        """The gate's decisions before this round."""
        return plan.history(self.markers(), self.ref.round)

    def marker(self, ref: StageRef, shard: int = 0) -> Marker:
        """An input's marker; its content becomes part of this attempt's inputs digest."""
        found = self.markers().get((ref, shard))
        if found is None:
            raise NotFoundError(f"{ref} shard {shard} of run {self.run} has no marker: it must run first")
        self._inputs[f"{ref.folder}/s{shard:04d}"] = found.content()
        return found

    def shards(self, ref: StageRef) -> range:
        return range(plan.shard_count(self.config, ref, self.markers()))

    def read(self, ref: StageRef, name: str, shard: int = 0) -> Path:
        """A local, verified copy of an input. A damaged one is taken back, to be made again.

        Raises:
            Damaged: size or SHA-256 differ from the marker's (exit 75; the controller makes it anew).
        """
        found = self.marker(ref, shard).output(name)
        path = self.folder / "in" / ref.folder / f"s{shard:04d}" / name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.timed("store"):
            try:
                self.store.download(found.key, path)
                actual = sha256_file(path)
            except NotFoundError:
                actual = "missing"
        if actual != found.sha256:
            path.unlink(missing_ok=True)
            marker.take_back(self.store, self.run, ref, shard)
            raise Damaged(
                f"{found.key} does not match its marker (SHA-256 {actual[:12]}, expected "
                f"{found.sha256[:12]}): it will be made again"
            )
        return path

    def write(self, name: str) -> Path:
        """Where to write an output; it is uploaded when the work is done."""
        if name not in self._written:
            self._written.append(name)
        path = self.folder / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add the block's wall seconds to the marker's breakdown under `kind`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.breakdown[kind] = self.breakdown.get(kind, 0.0) + time.perf_counter() - start

    def progress(self, done: int, total: int, unit: str) -> None:
        """Tell whoever watches how far this shard is."""
        descriptor = os.environ.get(PROGRESS_FD)
        if descriptor:
            line = json.dumps({"stage": self.ref.folder, "shard": self.shard, "done": done,
                               "total": total, "unit": unit})  # fmt: skip
            with contextlib.suppress(OSError):
                os.write(int(descriptor), line.encode() + b"\n")

    def inputs_digest(self) -> str:
        return marker.digest([self.config.identity_digest(), self.ref.folder, sorted(self._inputs.items())])

    def key(self, name: str) -> str:
        return layout.attempt_key(self.run, self.ref, self.shard, self.id, name)

    def commit(self, outcome: Outcome, started: float) -> bool:
        """Upload the outputs, then write the marker. False when another attempt's marker stands."""
        outputs = []
        with self.timed("store"):
            for name in self._written:
                path = self.folder / "out" / name
                if not path.exists():
                    continue
                self.store.upload(self.key(name), path)
                outputs.append(Output(name=name, key=self.key(name), size=path.stat().st_size,
                                      sha256=sha256_file(path)))  # fmt: skip
        body = Marker(
            stage=self.ref.folder,
            shard=self.shard,
            shards=len(self.shards(self.ref)),
            attempt=self.id,
            inputs=self.inputs_digest(),
            outputs=tuple(outputs),
            metrics={k: float(v) for k, v in outcome.metrics.items()},
            outcome="rejected" if outcome.reason else "ok",
            reason=outcome.reason,
            started=started,
            seconds=time.time() - started,
            breakdown={k: round(v, 4) for k, v in self.breakdown.items()},
            micro_batch=outcome.micro_batch,
            versions=versions(),
            hardware=hardware(self.config.operations.threads),
        )
        return self.store.put_new(layout.marker_key(self.run, self.ref, self.shard), body.dumps())


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What is installed; read once a process, in the warm parent before it forks."""
    found = {"python": platform.python_version()}
    for name in ("rsi-jobs", *RECORDED):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware(threads: int) -> dict[str, str | int]:
    """What equal bits depend on."""
    found: dict[str, str | int] = {"machine": platform.machine(), "threads": threads, "cpu": _cpu()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def split_run(uri: str) -> tuple[str, str]:
    """`s3://bucket/prefix/run` or `folder/run` -> (store, run)."""
    store, _, run = uri.rstrip("/").rpartition("/")
    if not store or layout.check_run_name(run):
        raise UserError(f"--run {uri!r} is not STORE/RUN, e.g. runs/shapes or s3://bucket/prefix/shapes")
    return store, run


def _arguments(stage: layout.Stage, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m rsi_jobs.stages.{stage}", exit_on_error=False)
    parser.add_argument("--run", required=True, help="STORE/RUN, a folder or an s3:// address")
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--phase", choices=PHASES, default="train")
    parser.add_argument("--try", type=int, default=0, dest="attempt_no", help="1: at half the step")
    parser.add_argument("--shard", type=int, default=0)
    try:
        return parser.parse_args(argv)
    except (argparse.ArgumentError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == 0:
            raise
        raise UserError(
            f"usage: {error}" if not isinstance(error, SystemExit) else "usage: see above"
        ) from None


def main(stage: layout.Stage, work: Callable[[Attempt], Outcome], argv: list[str] | None = None) -> int:
    """Run one attempt; the exit code is errors.py's."""
    try:
        given = _arguments(stage, argv)
        uri, run = split_run(given.run)
        store = open_store(uri, create=False)
        ref = StageRef(given.round, given.phase, given.attempt_no, stage)
        attempt_id = os.environ.get("RSI_ATTEMPT") or uuid.uuid4().hex[:12]
        with LogTail(store, layout.attempt_key(run, ref, given.shard, attempt_id, layout.LOG)) as tail:
            code = _guarded(store, run, ref, given.shard, attempt_id, work)
            if code == 0:
                tail.finished = True
            return code
    except RsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _guarded(
    store: Store, run: str, ref: StageRef, shard: int, attempt_id: str, work: Callable[[Attempt], Outcome]
) -> int:
    try:
        return _execute(store, run, ref, shard, attempt_id, work)
    except RsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno in NO_SPACE:
            print(f"error: no space left in {tempfile.gettempdir()} or the store {store.uri}: free some, "
                  "or set TMPDIR to a larger disk", file=sys.stderr)  # fmt: skip
            return CannotCreate.exit_code
        traceback.print_exc()
        return 1
    except Exception:  # noqa: BLE001  any defect: its traceback, and exit 1
        traceback.print_exc()
        return 1


def _execute(
    store: Store, run: str, ref: StageRef, shard: int, attempt_id: str, work: Callable[[Attempt], Outcome]
) -> int:
    started = time.time()
    key = layout.run_key(run, layout.CONFIG)
    config = configs.loads(store.get(key), f"{store.uri}/{key}")
    if store.exists(layout.marker_key(run, ref, shard)):
        print(f"{ref} shard {shard} is done already")
        return 0
    with tempfile.TemporaryDirectory(prefix=f"rsi-{ref.stage}-") as folder:
        attempt = Attempt(store, run, config, ref, shard, attempt_id, Path(folder))
        start = {"started": started, "host": platform.node(), "pid": os.getpid()}
        store.put(attempt.key(layout.START), json.dumps(start).encode())
        try:
            outcome = work(attempt)
        except Rejected as rejected:
            outcome = rejected.outcome
        won = attempt.commit(outcome, started)
    seconds = time.time() - started
    if not won:
        print(f"{ref} shard {shard}: another attempt committed first; this one's result is not used")
    elif outcome.reason:
        print(f"{ref} shard {shard}: rejected after {seconds:.1f} s: {outcome.reason}")
    else:
        print(f"{ref} shard {shard}: done in {seconds:.1f} s")
    return 0
