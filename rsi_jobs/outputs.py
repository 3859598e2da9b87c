"""What markers name, for those who look at a run from outside: verified copies, checkpoints, rounds."""

from __future__ import annotations

from pathlib import Path

from rsi_jobs import plan
from rsi_jobs.errors import Damaged, NotFoundError, UserError
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Marker, Markers, Output
from rsi_jobs.store import Store, sha256_file

CHECKPOINT = "checkpoint/"  # the outputs of finetune that make up the checkpoint
DATASET = "dataset/"  # the outputs of select that make up the round's dataset


def fetch(store: Store, output: Output, path: Path) -> Path:
    """A local copy of one output, compared with its marker.

    Raises:
        Damaged: the object is missing, or its SHA-256 differs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.download(output.key, path)
        actual = sha256_file(path)
    except NotFoundError:
        actual = "missing"
    if actual != output.sha256:
        path.unlink(missing_ok=True)
        raise Damaged(
            f"{store.uri}/{output.key} does not match its marker (SHA-256 {actual[:12]}, expected "
            f"{output.sha256[:12]}): a stage that reads it has it made again"
        )
    return path


def checkpoint_place(markers: Markers, round_: int) -> tuple[int, int]:
    """(round, try) of the checkpoint that stands for a round: the accepted one, else the last that was made.

    Raises:
        NotFoundError: the round has made none.
    """
    if round_ == 0:
        return 0, 0
    final = plan.verdict(markers, round_)
    tries = (final[1],) if final is not None and final[0] == "accept" else (1, 0)
    for attempt_no in tries:
        marker = markers.get((finetune(round_, attempt_no), 0))
        if marker is not None and checkpoint_files(marker):
            return round_, attempt_no
    raise NotFoundError(f"round {round_} has no checkpoint: {_why_none(markers, round_)}")


def finetune(round_: int, attempt_no: int) -> StageRef:
    return StageRef(round_, "train", attempt_no, "finetune")


def checkpoint_files(marker: Marker) -> list[Output]:
    return [output for output in marker.outputs if output.name.startswith(CHECKPOINT)]


def pick_round(text: str, markers: Markers, rounds: int) -> int:
    """The round that `best` or a number means.

    Raises:
        UserError: neither of the two.
        NotFoundError: a round that has not begun.
    """
    if text == "best":
        return plan.best_round(markers, rounds + 1)[0]
    if not text.isdecimal():
        raise UserError(f"--round {text!r} is no round: give best or a number, 0 is the base")
    known = sorted({ref.round for ref, _ in markers})
    if int(text) not in known:
        there = f"it has 0 to {known[-1]}" if known else "it has none yet"
        raise NotFoundError(f"--round {text}: the run has no such round, {there}")
    return int(text)


def _why_none(markers: Markers, round_: int) -> str:
    for (ref, _), marker in sorted(markers.items(), key=lambda item: item[0]):
        if ref.round == round_ and marker.outcome == "rejected":
            return f"its {ref.stage} was rejected: {marker.reason}"
    return "its finetune has not committed"
