"""Stage `report`: the run as it stands after a round, on one page.

Outputs: report.html, also put under the run's own key, where the newest one is always found. It reads
what stands and passes over what is missing, as in a round that was rejected half way.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from rsi_jobs import dataset, layout, plan, report, rounds
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Markers
from rsi_jobs.report import Contents, Shot, Strip
from rsi_jobs.report.charts import Mark
from rsi_jobs.stages.attempt import Attempt, Outcome, main

STRIPS = 8  # prompts that are shown over the rounds
SHOWN = 8  # of the best images, and of the worst
EXAMPLES = 3  # dropped prompts shown for each reason
LARGE = 128  # pixels; a larger image is shown as a smaller JPEG
THUMB = 240  # pixels, the side of that
BUDGET = 64 * 2**20  # bytes of images read for the best and the worst

Rows = dict[str, np.ndarray]
Place = tuple[int, int]  # prompt_id, candidate


def work(attempt: Attempt) -> Outcome:
    with attempt.timed("read"):
        contents = gather(attempt)
    with attempt.timed("render"):
        page = report.render(contents).encode()
    attempt.write(layout.REPORT).write_bytes(page)
    mine = (attempt.ref.round, attempt.ref.attempt_no)
    later = [
        ref for ref, _ in attempt.markers() if ref.phase == "report" and (ref.round, ref.attempt_no) > mine
    ]
    if not later:  # else this is an old round's report, made again
        attempt.store.put(layout.run_key(attempt.run, layout.REPORT), page)
    return Outcome({"bytes": float(len(page)), "rounds": float(len(rounds.rounds(contents.markers)))})


def gather(attempt: Attempt) -> Contents:
    """What the page shows of rounds 0 to this one."""
    final = attempt.ref.attempt_no == 1 or attempt.ref.round == attempt.config.rounds
    markers: Markers = {
        (ref, shard): marker
        for (ref, shard), marker in attempt.markers().items()
        if ref.round <= attempt.ref.round and (ref.phase != "test" or attempt.ref.attempt_no)
    }
    evaluated = {
        r.number: StageRef(r.number, "eval", r.evaluated, "select")
        for r in rounds.rounds(markers)
        if r.evaluated is not None
    }
    scored = {n: rows for n, ref in evaluated.items() if (rows := _rows(attempt, ref, "images.parquet"))}
    heldout = _in_base_spreads(scored)
    shown = max(scored, default=0)
    best, worst = extremes(attempt, evaluated[shown], scored[shown], heldout[shown]) if scored else ([], [])
    numbers = range(1, attempt.ref.round + 1)
    prompts = {n: rows for n in numbers if (rows := _train(attempt, n, "prompts", "prompts.parquet"))}
    picks = {n: rows for n in numbers if (rows := _train(attempt, n, "select", "selection.parquet"))}
    losses = {n: rows for n in numbers if (rows := _train(attempt, n, "finetune", "loss.parquet"))}
    return Contents(
        config=attempt.config,
        markers=markers,
        final=final,
        strips=strips(attempt, evaluated, scored, heldout),
        best=best,
        worst=worst,
        shown_round=shown,
        dropped={n: Counter(rows["reason"].tolist()) for n, rows in prompts.items()},
        examples=examples(prompts),
        picks={n: weights_by_kind(rows) for n, rows in picks.items()},
        losses={
            n: list(zip(rows["step"].tolist(), rows["loss"].tolist(), strict=True))
            for n, rows in losses.items()
        },
        quartiles={n: _quartiles(rows) for n, rows in losses.items() if "q1" in rows},
    )


def _rows(
    attempt: Attempt, ref: StageRef, name: str, columns: list[str] | None = None, shard: int = 0
) -> Rows | None:
    """A table of a stage, or None when it was not made."""
    found = attempt.markers().get((ref, shard))
    if found is None or all(output.name != name for output in found.outputs):
        return None
    return dataset.read(attempt.read(ref, name, shard), columns)


def _train(attempt: Attempt, round_: int, stage: layout.Stage, name: str) -> Rows | None:
    return _rows(attempt, StageRef(round_, "train", 0, stage), name)


def _in_base_spreads(scored: dict[int, Rows]) -> dict[int, np.ndarray]:
    """Held-out scores (n,) of each round less the base's mean, over the base's spread."""
    if not scored:
        return {}
    base = scored[min(scored)][plan.GATE_SCORE]
    mean, spread = float(np.nanmean(base)), float(np.nanstd(base)) or 1.0
    return {n: (rows[plan.GATE_SCORE] - mean) / spread for n, rows in scored.items()}


def strips(
    attempt: Attempt, evaluated: dict[int, StageRef], scored: dict[int, Rows], heldout: dict[int, np.ndarray]
) -> list[Strip]:
    """The same prompts' first candidates in every evaluated round, spread over the first shard's prompts."""
    pictures: dict[int, Rows] = {}
    for number, ref in evaluated.items():
        sample = StageRef(ref.round, "eval", ref.attempt_no, "sample")
        rows = _rows(attempt, sample, "candidates.parquet", ["prompt_id", "candidate", "prompt", "image"])
        if rows is not None and number in scored:
            pictures[number] = rows
    if not pictures:
        return []
    first = pictures[min(pictures)]
    names = {
        int(i): str(p)
        for i, p, k in zip(first["prompt_id"], first["prompt"], first["candidate"], strict=True)
        if k == 0
    }
    ids = list(names)
    chosen = [ids[n * len(ids) // STRIPS] for n in range(STRIPS)] if len(ids) > STRIPS else ids
    shots: dict[int, dict[int, Shot]] = {prompt: {} for prompt in chosen}
    for number, rows in pictures.items():
        row_of = _index(rows)
        score_of = _index(scored[number])
        for prompt in chosen:
            place = (prompt, 0)
            if place in row_of and place in score_of:
                data = rows["image"][row_of[place]]
                shots[prompt][number] = _shot(data, scored[number], score_of[place], heldout[number])
    return [Strip(names[prompt], shots[prompt]) for prompt in chosen]


def _index(rows: Rows) -> dict[Place, int]:
    return {
        (int(p), int(k)): n for n, (p, k) in enumerate(zip(rows["prompt_id"], rows["candidate"], strict=True))
    }


def extremes(
    attempt: Attempt, ref: StageRef, scored: Rows, heldout: np.ndarray
) -> tuple[list[Shot], list[Shot]]:
    """The images of a round with the highest and the lowest held-out score, one a prompt.

    Of a run with large images, only as many shards are looked at as BUDGET allows.
    """
    pictures: dict[Place, bytes] = {}
    for rows in _affordable(attempt, StageRef(ref.round, "eval", ref.attempt_no, "sample")):
        pictures |= {place: rows["image"][n] for place, n in _index(rows).items()}
    order = [n for n in np.argsort(-heldout, kind="stable") if np.isfinite(heldout[n])]
    places = {n: place for place, n in _index(scored).items()}

    def take(candidates: list[int]) -> list[Shot]:
        found: dict[int, Shot] = {}
        for n in candidates:
            if places[n] in pictures and places[n][0] not in found and len(found) < SHOWN:
                found[places[n][0]] = _shot(pictures[places[n]], scored, n, heldout)
        return list(found.values())

    return take([int(n) for n in order]), take([int(n) for n in reversed(order)])


def _affordable(attempt: Attempt, sample: StageRef) -> Iterator[Rows]:
    left = BUDGET
    for shard in attempt.shards(sample):
        found = attempt.markers().get((sample, shard))
        left -= found.output("candidates.parquet").size if found else 0
        if left < 0 and shard:
            return
        rows = _rows(attempt, sample, "candidates.parquet", ["prompt_id", "candidate", "image"], shard)
        if rows is not None:
            yield rows


def _shot(data: bytes, scored: Rows, n: int, heldout: np.ndarray) -> Shot:
    """One image with its held-out score, the judge's word and its prompt."""
    notes = [f"{heldout[n]:+.2f}"]
    for name in ("extra", "malformed"):
        if f"judge.{name}" in scored and scored[f"judge.{name}"][n] > 0:
            notes.append(name)
    right = bool(scored["judge.right"][n]) if "judge.right" in scored else None
    return Shot(
        *shrink(data), ", ".join(notes), right, str(scored["prompt"][n]) if "prompt" in scored else ""
    )


def shrink(data: bytes) -> tuple[bytes, str]:
    """An image as the page shows it, and its kind: small ones as they are, large ones as a small JPEG."""
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= LARGE:
            return data, (image.format or "png").lower()
        image.draft("RGB", (THUMB, THUMB))
        small = image.convert("RGB")
        small.thumbnail((THUMB, THUMB))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
        return buffer.getvalue(), "jpeg"


def examples(prompts: dict[int, Rows]) -> dict[str, list[tuple[str, str]]]:
    """The first dropped prompts of each reason, from the newest round back."""
    found: dict[str, dict[str, str]] = {}
    for number in sorted(prompts, reverse=True):
        rows = prompts[number]
        for prompt, reason, detail in zip(rows["prompt"], rows["reason"], rows["detail"], strict=True):
            if reason and len(found.setdefault(str(reason), {})) < EXAMPLES:
                found[str(reason)].setdefault(str(prompt), str(detail))
    return {reason: list(found[reason].items()) for reason in sorted(found)}


def weights_by_kind(rows: Rows) -> list[Mark]:
    """The weight of each selected candidate, under what the exact judge says of it, or under `all`."""
    picked = np.flatnonzero(rows["selected"])
    if "judge.right" not in rows:
        return [Mark("all", float(rows["weight"][n])) for n in picked]
    kinds = np.where(rows["judge.right"].astype(bool), "right", "wrong")
    kinds = np.where(rows["judge.extra"] > 0, "extra", kinds)
    kinds = np.where(rows["judge.malformed"] > 0, "malformed", kinds)
    return [Mark(str(kinds[n]), float(rows["weight"][n])) for n in picked]


def _quartiles(rows: Rows) -> list[float]:
    """Mean squared error in each quarter of the noise schedule, over the steps that had a sample there."""
    columns = [rows[f"q{q}"] for q in (1, 2, 3, 4)]
    return [float(np.nanmean(c)) if np.isfinite(c).any() else float("nan") for c in columns]


if __name__ == "__main__":
    sys.exit(main("report", work))
