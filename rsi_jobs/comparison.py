"""Runs side by side: their metrics round by round, and the paired difference of their best rounds."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsi_jobs import plan, rounds
from rsi_jobs.config import RunConfig
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Markers
from rsi_jobs.outputs import fetch
from rsi_jobs.rounds import Round
from rsi_jobs.store import Store

if TYPE_CHECKING:
    import numpy as np

SHOWN: dict[str, str] = {
    f"{plan.GATE_SCORE}.vs_base": "held-out vs base, in spreads of the base",
    "judge.right": "right images",
    "distance": "distance from the base's good images, robust z",
    "diversity": "diversity among passing images",
}
"""The metrics that are compared, and what they are called."""


Rows = dict[int, list[tuple[float, float, float] | None]]
"""For each round an entry a run: a value with its interval, or None."""


@dataclass(frozen=True)
class Side:
    """One of the runs that are compared."""

    config: RunConfig
    markers: Markers

    @property
    def name(self) -> str:
        return self.config.run

    def rounds(self) -> list[Round]:
        return rounds.rounds(self.markers)

    def best(self) -> tuple[int, int]:
        """(round, try) that the gate's score prefers."""
        return plan.best_round(self.markers, self.config.rounds + 1)


@dataclass(frozen=True)
class Difference:
    """How one run's best round differs from another's: the mean of b - a with its two-sided interval."""

    metric: str
    mean: float
    low: float
    high: float
    unit: str


def by_round(sides: list[Side], metric: str) -> Rows:
    """A metric of every round, one entry a run: (value, low, high), or None where there is none."""
    found = [{r.number: rounds.interval(r.metrics, metric) for r in side.rounds()} for side in sides]
    numbers = sorted({number for each in found for number in each})
    return {n: [each.get(n) for each in found] for n in numbers if any(each.get(n) for each in found)}


def differences(store: Store, a: Side, b: Side) -> tuple[list[Difference], str]:
    """b's best round less a's, image by image: both were drawn from the same prompts and noise.

    Returns no differences and the reason where the two cannot be paired.
    """
    import numpy as np

    from rsi_jobs import evaluation

    with tempfile.TemporaryDirectory(prefix="rsi-compare-") as folder:
        base = _images(store, a, (0, 0), Path(folder))
        mine, theirs = _images(store, a, a.best(), Path(folder)), _images(store, b, b.best(), Path(folder))
    if base is None or mine is None or theirs is None:
        return [], "one of them has no evaluation yet"
    if not all(np.array_equal(mine[c], theirs[c]) for c in ("prompt", "candidate")):
        return [], "they were evaluated on different prompts"
    if a.config.identity.rewards.heldout != b.config.identity.rewards.heldout:
        return [], "they have different held-out judges"
    spread = float(np.nanstd(base["heldout"])) or 1.0
    found = []
    for column in [c for c in mine if c in theirs and (c == "heldout" or c.startswith("judge."))]:
        scale, unit = (spread, "spreads of the base") if column == "heldout" else (1.0, "")
        old, new = (
            evaluation.prompt_means(rows[column].astype(np.float64) / scale, rows["prompt_id"])
            for rows in (mine, theirs)
        )
        paired = evaluation.paired_difference(new, old)
        found.append(Difference(column, paired.mean, paired.low, paired.high, unit))
    return found, ""


def _images(store: Store, side: Side, place: tuple[int, int], folder: Path) -> dict[str, np.ndarray] | None:
    """The rows of an evaluation, in the order of prompts and candidates."""
    import numpy as np

    from rsi_jobs import dataset

    marker = side.markers.get((StageRef(place[0], "eval", place[1], "select"), 0))
    if marker is None or marker.outcome != "ok":
        return None
    path = folder / f"{side.name}-{place[0]}-{place[1]}.parquet"
    rows: dict[str, Any] = dataset.read(fetch(store, marker.output("images.parquet"), path))
    order = np.lexsort((rows["candidate"], rows["prompt_id"]))
    return {name: values[order] for name, values in rows.items()}
