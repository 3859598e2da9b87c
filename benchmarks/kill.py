"""Kill a run at 30 random instants and compare its end with an undisturbed run's, bit for bit.

python -m benchmarks.kill --kills 30
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests import killer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds between two kills, at most")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        killer.finish(Path(folder) / "calm")
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        calm, done, runs = killer.results(Path(folder) / "calm"), 0, 0
        while done < given.kills:
            store = Path(folder) / f"killed-{runs}"
            tally = killer.torture(store, given.kills - done, given.seed + runs, given.longest)
            done += sum(tally.kills.values())
            runs += 1
            same = killer.results(store) == calm
            late = killer.ran_after_commit(store)
            print(f"run {runs}: killed {dict(tally.kills)}; same result: {same}; ran after commit: {len(late)}",
                  flush=True)  # fmt: skip
            assert same
            assert not late
        print(f"{done} kills in {runs} runs: every run ended with the same {len(calm)} markers, bit for bit")


if __name__ == "__main__":
    main()
