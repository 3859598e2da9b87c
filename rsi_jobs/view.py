"""What a person sees of a run: live on a terminal, plain lines elsewhere, a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rsi_jobs import plan, rounds
from rsi_jobs.config import RunConfig
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Marker, Markers
from rsi_jobs.plan import Job
from rsi_jobs.rounds import Round
from rsi_jobs.runners import Progress
from rsi_jobs.summary import STYLE, summary

__all__ = ["Lines", "LiveView", "View", "open_view", "summary"]

RECENT = 3  # completed rounds whose mean duration predicts the next one's


class View(Protocol):
    """Who watches the controller's turns."""

    def update(
        self,
        config: RunConfig,
        markers: Markers,
        jobs: Mapping[StageRef, Job],
        progress: Mapping[tuple[StageRef, int], Progress],
    ) -> None:
        """Show the state of this turn."""

    def message(self, text: str) -> None:
        """Say something once."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_view(console: Console | None = None) -> View:
    """A live view when standard output is a terminal, plain lines otherwise."""
    console = console or Console(highlight=False)
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


class Lines:
    """One plain line for each finished stage and decision; none twice, no control characters."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._seen: set[StageRef] | None = None  # None: nothing was shown yet
        self._said = ""

    def update(
        self,
        config: RunConfig,
        markers: Markers,
        jobs: Mapping[StageRef, Job],
        progress: Mapping[tuple[StageRef, int], Progress],
    ) -> None:
        done = rounds.finished(config, markers)
        if self._seen is None:
            self._seen = set(done)
            self._print(opening(config, markers))
        for ref in [ref for ref in done if ref not in self._seen]:
            self._seen.add(ref)
            self._print(stage_line(config, ref, done[ref]))

    def message(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._print(text)

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self.console.print(_printable(text), markup=False, highlight=False, soft_wrap=True, style=None)


class LiveView:
    """A block of lines that is redrawn every turn; finished rounds scroll up above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self.console, self.clock = console, clock
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._seen: set[int] | None = None
        self._said = ""
        self._rate = Rate()

    def update(
        self,
        config: RunConfig,
        markers: Markers,
        jobs: Mapping[StageRef, Job],
        progress: Mapping[tuple[StageRef, int], Progress],
    ) -> None:
        closed = {r.number: r for r in rounds.rounds(markers) if _is_closed(r)}
        if self._seen is None:
            self._seen = set(closed)
            self.console.print(Text(opening(config, markers)))
            self._live.start()
        for number in sorted(set(closed) - self._seen):
            self._seen.add(number)
            self.console.print(round_text(closed[number]))
        now = self.clock()
        self._rate.see(progress, now)
        turn = Turn(config, markers, jobs, progress, self._rate.per_second())
        self._live.update(block(turn, now), refresh=True)

    def message(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.console.print(Text(_printable(text)))

    def close(self) -> None:
        self._live.stop()


class Rate:
    """Units a second of the stage that runs, from what its shards said since it was first seen."""

    def __init__(self) -> None:
        self._stage: StageRef | None = None
        self._first = (0.0, 0)
        self._last = (0.0, 0)

    def see(self, progress: Mapping[tuple[StageRef, int], Progress], now: float) -> None:
        stage = next((ref for ref, _ in progress), None)
        done = sum(p.done for (ref, _), p in progress.items() if ref == stage)
        if stage != self._stage or done < self._last[1]:
            self._stage, self._first, self._last = stage, (now, done), (now, done)
        elif done > self._last[1]:
            self._last = (now, done)

    def per_second(self) -> float | None:
        seconds = self._last[0] - self._first[0]
        return (self._last[1] - self._first[1]) / seconds if seconds > 0 else None


def opening(config: RunConfig, markers: Markers) -> str:
    """The first line: a new run, or where an old one goes on."""
    name = f"run {config.run} (recipe {config.identity.recipe}, seed {config.identity.seed})"
    closed = [r for r in rounds.rounds(markers) if r.number and _is_closed(r)]
    if not markers:
        return f"{name}: {config.rounds} rounds to do"
    if not closed:
        return f"{name}: continuing in round {_newest(markers)}"
    word = "round" if len(closed) == 1 else "rounds"
    return f"{name}: continuing, {len(closed)} of {config.rounds} {word} done"


def _newest(markers: Markers) -> int:
    return max((ref.round for ref, _ in markers), default=0)


def stage_line(config: RunConfig, ref: StageRef, done: list[Marker]) -> str:
    """A finished stage or decision in one line: round, stage, seconds, the figure that matters."""
    head = f"round {ref.round}/{config.rounds}"
    if ref.stage == "gate":
        marker = done[0]
        word = {"accept": "accepted", "half": "once more at half the step"}
        verdict = word.get(marker.decision, "rolled back")
        if marker.decision == "accept" and ref.attempt_no:
            verdict = "accepted at half the step"
        return f"{head}  verdict: {verdict} ({marker.reason})"
    name = rounds.stage_name(ref) + (" (half step)" if ref.attempt_no else "")
    bad = next((m for m in done if m.outcome == "rejected"), None)
    figure = f"rejected: {bad.reason}" if bad else headline(ref, done)
    return f"{head}  {name:<12} {rounds.busy(done):6.1f} s  {figure}".rstrip()


def headline(ref: StageRef, done: list[Marker]) -> str:
    """The figure of a finished stage that matters most; empty if it has none."""
    metrics = rounds.numbers(done[0])
    if ref.stage == "prompts":
        return f"{metrics.get('kept', 0):.0f} of {metrics.get('raw', 0):.0f} prompts kept"
    if ref.stage in ("sample", "score"):
        images, seconds = sum(rounds.numbers(m).get("images", 0) for m in done), rounds.busy(done)
        return f"{images:.0f} images" + (f", {images / seconds:.1f}/s" if seconds > 0 else "")
    if ref.stage == "finetune":
        if ref.attempt_no:
            return "halved this round's change"
        parts = [f"{metrics['steps']:.0f} steps"] if "steps" in metrics else []
        return ", ".join(parts + ([f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []))
    if ref.stage == "select" and ref.phase == "train":
        return f"{metrics['selected']:.0f} selected" if "selected" in metrics else ""
    return rounds.scores(metrics) if ref.stage == "select" else ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _is_closed(round_: Round) -> bool:
    """Nothing more will be said of it: decided, or the base with its evaluation."""
    return bool(round_.metrics) if round_.standing == "base" else round_.standing != "open"


def round_text(round_: Round) -> Text:
    """One decided round in one line, coloured."""
    line = Text(f"round {round_.number:<3}")
    line.append(f"{round_.standing:<12}", style=STYLE.get(round_.standing, ""))
    line.append(rounds.scores(round_.metrics) or round_.reason)
    if round_.standing in ("rolled back", "rejected") and round_.metrics:
        line.append(f" ({round_.reason})", style="dim")
    line.append(f"  {rounds.duration(round_.seconds)}", style="dim")
    return line


@dataclass(frozen=True)
class Turn:
    """What one turn of the controller shows; `speed` is in the running stage's units a second."""

    config: RunConfig
    markers: Markers
    jobs: Mapping[StageRef, Job]
    progress: Mapping[tuple[StageRef, int], Progress]
    speed: float | None


def block(turn: Turn, now: float) -> RenderableType:
    """The live lines: place, stage at work, last scores, verdicts, time left."""
    config, markers = turn.config, turn.markers
    live = sorted(turn.jobs) or sorted({ref for ref, _ in turn.progress})
    current = max([ref.round for ref in live if ref.phase != "report"], default=_newest(markers))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", f"{config.run}, round {current} of {config.rounds}")
    for ref in live:
        table.add_row("stage", stage_text(turn, ref))
    known = rounds.rounds(markers)
    latest = next((r for r in reversed(known) if r.metrics), None)
    if latest is not None and rounds.scores(latest.metrics):
        table.add_row("scores", f"round {latest.number}: {rounds.scores(latest.metrics)}")
    verdicts = Text()
    for round_ in known:
        if round_.number and round_.standing != "open":
            verdicts.append(f"{round_.number} {round_.standing}  ", style=STYLE[round_.standing])
    if verdicts:
        table.add_row("verdicts", verdicts)
    left = time_left(config, markers, now)
    table.add_row("left", "known after round 1" if left is None else f"about {rounds.duration(left)}")
    return table


def stage_text(turn: Turn, ref: StageRef) -> Text:
    """One live stage: its state, its shards, how far it is and how fast."""
    parts = [rounds.stage_name(ref) + (" at half step" if ref.attempt_no else "")]
    job = turn.jobs.get(ref)
    if job is not None and job.state != "running":
        parts.append(job.state + (f": {_printable(job.reason)}" if job.reason else ""))
    total = plan.shard_count(turn.config, ref, turn.markers)
    if total > 1:
        done = sum((ref, shard) in turn.markers for shard in range(total))
        parts.append(f"{done} of {total} shards")
    said = [p for (of, _), p in turn.progress.items() if of == ref]
    if said:
        parts.append(f"{sum(p.done for p in said)} of {sum(p.total for p in said)} {said[0].unit}")
        if turn.speed is not None:
            parts.append(f"{turn.speed:.1f} {said[0].unit}/s")
    return Text(", ".join(parts))


def time_left(config: RunConfig, markers: Markers, now: float) -> float | None:
    """Seconds to the end if rounds take as long as the last few did; None before the first."""
    known = [r for r in rounds.rounds(markers) if r.number]
    closed = [r for r in known if r.standing != "open"]
    if not closed:
        return None

    def of(number: int) -> list[Marker]:
        return [m for (ref, _), m in markers.items() if ref.round == number]

    recent = [rounds.busy(of(r.number)) for r in closed[-RECENT:]]
    mean = sum(recent) / len(recent)
    begun = [m.started for r in known if r.standing == "open" for m in of(r.number)]
    spent = min(mean, max(0.0, now - min(begun))) if begun else 0.0
    return max(0.0, (config.rounds - len(closed)) * mean - spent)
