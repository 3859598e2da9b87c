"""Where an image came from, and which rounds were trained on it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_jobs import plan, rounds
from rsi_jobs.config import RunConfig
from rsi_jobs.errors import NotFoundError, UserError
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Markers, Output
from rsi_jobs.outputs import checkpoint_files, fetch, finetune
from rsi_jobs.store import Store

SAMPLES = "samples.parquet"  # the output of finetune that records what it drew
_ID = re.compile(r"r?(\d{3,})-(\d{5,})-(\d{2,})(\.png)?")
# Columns of selection.parquet that are no score.
_FACTS = (
    "prompt_id", "candidate", "prompt", "category", "seed", "flat", "picked", "selected", "weight", "reason",
)  # fmt: skip


@dataclass(frozen=True, order=True)
class ImageId:
    """A candidate of a training round, by its round, prompt and number."""

    round: int
    prompt: int
    candidate: int

    def __str__(self) -> str:
        return f"r{self.round:03d}-{self.prompt:05d}-{self.candidate:02d}"


@dataclass(frozen=True)
class Use:
    """A round whose training drew the image: how often, and what became of the round.

    A training without a record of its samples is named if it may have drawn the image; `uses` is None then.
    """

    round: int
    part: str  # "round", "replay" or "anchor": which part of the batches it was in
    uses: int | None
    weight: float
    standing: str


@dataclass(frozen=True)
class Lineage:
    """All that is recorded of one image."""

    id: ImageId
    prompt: str
    category: str
    source: str  # of the prompt
    seed: int
    made_by: tuple[int, int]  # (round, try) of the checkpoint that drew it; (0, 0) is the base
    base: str
    checkpoint: tuple[Output, ...]  # empty for the base
    scores: dict[str, float]
    selected: bool
    weight: float
    reason: str  # why not selected
    uses: tuple[Use, ...]


def parse_id(text: str) -> ImageId:
    """`r003-00012-05` or `003-00012-05.png`, as datasets name their images: round, prompt, candidate.

    Raises:
        UserError: anything else.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise UserError(f"--image {text!r} is no image: give round-prompt-candidate, e.g. r003-00012-05")
    return ImageId(int(match[1]), int(match[2]), int(match[3]))


def trace(store: Store, config: RunConfig, markers: Markers, image: ImageId) -> Lineage:
    """The lineage of a training round's candidate.

    Raises:
        NotFoundError: no such round, or no such image in it.
    """
    marker = markers.get((StageRef(image.round, "train", 0, "select"), 0))
    if marker is None or marker.outcome != "ok":
        known = sorted(r.round for (r, _), m in markers.items() if m.outcome == "ok" and _chooses(r))
        raise NotFoundError(
            f"--image {image}: round {image.round} of run {config.run} has selected no images, "
            f"those that have are: {', '.join(map(str, known)) or 'none yet'}"
        )
    with tempfile.TemporaryDirectory(prefix="rsi-lineage-") as folder:
        row = _row(store, marker.output("selection.parquet"), Path(folder), image)
        if row is None:
            raise NotFoundError(
                f"--image {image}: round {image.round} of run {config.run} has no such image; its prompts "
                f"count from 0, as do the {config.identity.sampling.candidates} candidates of each"
            )
        uses = _uses(store, config, markers, Path(folder), image) if row["selected"] else ()
    place = plan.history(markers, image.round).last
    made = markers.get((finetune(*place), 0))
    selected = bool(row["selected"])
    return Lineage(
        id=image,
        prompt=row["prompt"],
        category=row["category"],
        source=config.identity.prompts.source,
        seed=int(row["seed"]),
        made_by=place,
        base=config.identity.model.path,
        checkpoint=tuple(checkpoint_files(made)) if made is not None else (),
        scores={name: float(value) for name, value in row.items() if name not in _FACTS},
        selected=selected,
        weight=float(row["weight"]),
        reason="" if selected else _why_not(row),
        uses=uses,
    )


def _chooses(ref: StageRef) -> bool:
    return ref.phase == "train" and ref.stage == "select"


def _why_not(row: dict[str, Any]) -> str:
    if row["flat"]:
        return "it is black or constant"
    return f"its prompt was dropped: {row['reason']}" if row["reason"] else "another candidate was preferred"


def _row(store: Store, output: Output, folder: Path, image: ImageId) -> dict[str, Any] | None:
    from rsi_jobs import dataset

    columns = dataset.read(fetch(store, output, folder / "selection.parquet"))
    here = (columns["prompt_id"] == image.prompt) & (columns["candidate"] == image.candidate)
    if not here.any():
        return None
    return {name: values[here][0] for name, values in columns.items()}


def _uses(store: Store, config: RunConfig, markers: Markers, folder: Path, image: ImageId) -> tuple[Use, ...]:
    """Every training since whose record of samples holds the selected image."""
    from rsi_jobs import dataset

    found: list[Use] = []
    for round_ in rounds.rounds(markers):
        marker = markers.get((finetune(round_.number, 0), 0))
        if round_.number < image.round or marker is None or marker.outcome != "ok":
            continue
        if all(output.name != SAMPLES for output in marker.outputs):
            parts = _may_draw(config, markers, image.round, round_.number)
            found += [Use(round_.number, part, None, 0.0, round_.standing) for part in parts]
            continue
        rows = dataset.read(fetch(store, marker.output(SAMPLES), folder / f"{round_.number}-{SAMPLES}"))
        here = (
            (rows["source_round"] == image.round)
            & (rows["prompt_id"] == image.prompt)
            & (rows["candidate"] == image.candidate)
        )
        found += [
            Use(round_.number, str(part), int(uses), float(weight), round_.standing)
            for part, uses, weight in zip(
                rows["group"][here], rows["uses"][here], rows["weight"][here], strict=True
            )
        ]
    return tuple(found)


def _may_draw(config: RunConfig, markers: Markers, source: int, round_: int) -> list[str]:
    """The parts of a round's batches that an earlier round's picks may be in."""
    training = config.identity.training
    accepted = [number for number, _ in plan.history(markers, round_).accepted]
    parts = {
        "round": source == round_,
        "replay": bool(training.replay) and source in accepted,
        "anchor": bool(training.anchor) and source == 1 and round_ > 1,
    }
    return [part for part, may in parts.items() if may]
