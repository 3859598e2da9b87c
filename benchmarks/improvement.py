"""Does it improve? Recipes and seeds side by side, on test prompts that nothing decided by.

    python -m benchmarks.improvement --recipes shapes oracle sft --seeds 0 1 2 --prompts 1000

Each run is an ordinary run in --store and is continued, not repeated, when this is started again. The figure is
the paired difference of right images, the gate's choice less the base, on the same prompts and noise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from rsi_jobs import plan, runs
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import MarkerReader
from rsi_jobs.store import open_store


def row(store: str, run: str) -> str:
    """One run's line: the gate's choice, right images at base and there, and the difference."""
    opened = open_store(store)
    config = runs.load(opened, run)
    markers = MarkerReader(opened, run).read()
    best, attempt_no = plan.best_round(markers, config.rounds + 1)
    base = markers[StageRef(0, "test", 0, "select"), 0].metrics
    seconds = sum(marker.seconds for marker in markers.values())
    curve = []
    for round_ in range(config.rounds + 1):
        for t in (1, 0):
            found = markers.get((StageRef(round_, "eval", t, "select"), 0))
            if found is not None and found.metrics.get("judge.right") is not None:
                curve.append(f"{100 * (found.metrics['judge.right'] or 0):.0f}")
                break
    if not best:
        return f"{run:14} best 0 (the base): no gain; gate prompts right by round {' '.join(curve)}"
    new = markers[StageRef(best, "test", attempt_no, "select"), 0].metrics
    low, high = new["judge.right.vs_base.low"], new["judge.right.vs_base.high"]
    assert low is not None
    assert high is not None
    return (
        f"{run:14} best {best}: {base['judge.right']:.1%} -> {new['judge.right']:.1%} right, "
        f"{new['judge.right.vs_base']:+.1%} [{low:+.1%}, {high:+.1%}]; extra objects {base['judge.extra']:.2f} -> "
        f"{new['judge.extra']:.2f}; gate prompts right by round {' '.join(curve)}; {seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipes", nargs="+", default=["shapes", "oracle", "sft"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--store", default="runs/improvement")
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    began = time.monotonic()
    for recipe in given.recipes:
        for seed in given.seeds:
            name = f"{recipe}-s{seed}"
            command = [sys.executable, "-m", "rsi_jobs.controller", "--recipe", recipe, "--run", name,
                       "--rounds", str(given.rounds), "--seed", str(seed), "--store", given.store]  # fmt: skip
            for change in [f"evaluation.test_prompts={given.prompts}", *given.set]:
                command += ["--set", change]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(
                row(given.store, name) if done.returncode == 0 else f"{name}: {done.stderr.strip()}",
                flush=True,
            )
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
