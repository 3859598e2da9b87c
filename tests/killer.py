"""Kills a run again and again, and tells whether what it ends with is what an undisturbed run ends with."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rsi_jobs import layout
from rsi_jobs.marker import MarkerReader
from rsi_jobs.store import open_store

COMMAND = ["--recipe", "smoke", "--rounds", "3", "--mlflow", "none"]


def start(store: Path | str, *extra: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "rsi_jobs.controller", *COMMAND, "--store", str(store), *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(store: Path | str, *extra: str, timeout: float = 600) -> None:
    """Run to the end, undisturbed; fails with what it printed."""
    run = start(store, *extra)
    output, _ = run.communicate(timeout=timeout)
    if run.returncode:
        raise AssertionError(f"the run ended with {run.returncode}:\n{output.decode()}")


def results(store: Path | str, run: str = "smoke") -> dict[str, str]:
    """What every marker says was made: equal dictionaries mean equal bits. Reports hold times: left out."""
    markers = MarkerReader(open_store(str(store)), run).read()
    return {
        f"{ref.folder}/{shard}": f"{marker.inputs} {marker.content()}"
        for (ref, shard), marker in sorted(markers.items())
        if ref.stage != "report"
    }


def ran_after_commit(store: Path | str, run: str = "smoke") -> list[str]:
    """Attempts that started after the marker of their shard stood: there must be none."""
    opened = open_store(str(store))
    late = []
    for (ref, shard), marker in MarkerReader(opened, run).read().items():
        prefix = f"{layout.shard_folder(run, ref, shard)}/a-"
        for entry in opened.list(prefix):
            if entry.key.endswith(layout.START):
                started = json.loads(opened.get(entry.key))["started"]
                if started > marker.started + marker.seconds + 0.5:
                    late.append(entry.key)
    return late


@dataclass
class Tally:
    """What was killed, and what the run was doing."""

    kills: Counter[str] = field(default_factory=Counter)
    finished_early: int = 0


def torture(store: Path, kills: int, seed: int, longest: float) -> Tally:
    """Kill the controller or a stage `kills` times, each after a random while, then let the run end."""
    rng, tally = random.Random(seed), Tally()
    run = start(store)
    while sum(tally.kills.values()) < kills:
        time.sleep(rng.uniform(0.0, longest))
        if run.poll() is not None:
            tally.finished_early += 1
            break
        victims = [("controller", psutil.Process(run.pid))]
        for parent in victims[0][1].children():
            victims += [("parent", parent), *(("stage", child) for child in parent.children())]
        name, victim = rng.choice(victims)
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
        tally.kills[name] += 1
        if name == "controller":
            run.communicate()
            run = start(store)
    output, _ = run.communicate(timeout=900)
    if run.returncode:
        raise AssertionError(f"the run ended with {run.returncode}:\n{output.decode()}")
    return tally
