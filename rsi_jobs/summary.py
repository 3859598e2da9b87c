"""What is printed when a run has ended: its rounds, where the time went, what to do next."""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rsi_jobs import layout, plan, rounds
from rsi_jobs.config import RunConfig
from rsi_jobs.marker import Markers
from rsi_jobs.plan import Finish
from rsi_jobs.rounds import Round

STYLE = {"accepted": "green", "half step": "green", "rolled back": "yellow", "rejected": "red"}


def summary(
    config: RunConfig, markers: Markers, finish: Finish, store_uri: str, seconds: float
) -> list[RenderableType]:
    """What is printed at the end, part by part; `seconds` is the controller's wall time."""
    run = config.run
    lines = [f"{finish.reason}; the best round is {_best(finish, markers)}"]
    test = rounds.gain_on_test(markers, finish.best)
    if test is not None:
        lines.append(f"on the test prompts, looked at once: held-out {rounds.signed(test)} vs base")
    report = f"{_short(store_uri)}/{layout.run_key(run, layout.REPORT)}"
    where = [
        f"report   {report}",
        f"export   rsi export {run} --round best --to DIR",
        f"compare  rsi compare {run} OTHER",
        "mlflow   rsi mlflow",
    ]
    return [
        Text("\n".join(lines)), "", round_table(markers), "", time_table(markers, seconds), "",
        Text("\n".join(where), overflow="fold"),
    ]  # fmt: skip


def _short(store_uri: str) -> str:
    """A folder below this one as a relative path: it fits a line, and can be clicked."""
    path = Path(store_uri)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else store_uri.rstrip("/")


def _best(finish: Finish, markers: Markers) -> str:
    if not finish.best:
        return "0, the untouched base: no round was better"
    best = next(r for r in rounds.rounds(markers) if r.number == finish.best)
    found = rounds.scores(best.metrics)
    return f"{finish.best}" + (f": {found}" if found else "")


def round_table(markers: Markers) -> Table:
    """A row a round; columns that no round has a figure for are left out."""
    known = rounds.rounds(markers)
    has = {name for r in known for name in r.metrics}
    faults = "judge.extra" in has
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("round", justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("held-out vs base", no_wrap=True)
    if "judge.right" in has:
        table.add_column("right", justify="right")
    table.add_column("extra" if faults else "distance", justify="right")
    table.add_column("diversity", justify="right")
    table.add_column("seconds", justify="right")
    for r in known:
        gain = rounds.interval(r.metrics, f"{plan.GATE_SCORE}.vs_base")
        row: list[str | Text] = [
            str(r.number),
            Text(r.standing, style=STYLE.get(r.standing, "")),
            rounds.signed(gain) if gain and r.number else "",
        ]
        if "judge.right" in has:
            row.append(_cell(r, "judge.right", "{:.1%}"))
        row.append(_cell(r, "judge.extra" if faults else "distance", "{:.3f}"))
        row.append(_cell(r, "diversity", "{:.3f}"))
        row.append(f"{r.seconds:.0f}")
        table.add_row(*row)
    return table


def _cell(round_: Round, name: str, form: str) -> str:
    value = round_.metrics.get(name)
    return "" if value is None else form.format(value)


def time_table(markers: Markers, seconds: float) -> Table:
    """Seconds by stage. The last row is the sum of the others and the controller's wall time.

    Work at the same time is taken off once; a run that was continued took more than this session's
    `seconds`, so then the sum of the stages is the total.
    """
    times = rounds.stage_times(markers)
    work = sum(t.seconds for t in times.values())
    alone = rounds.busy(m for (ref, _), m in markers.items() if ref.stage != "gate")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("stage")
    for name in ("seconds", "model arithmetic", "everything else"):
        table.add_column(name, justify="right")

    def row(name: str, total: float, arithmetic: float | None = None) -> None:
        cells = ["", ""]
        if arithmetic is not None:
            share = arithmetic / total if total > 0 else 0.0
            cells = [f"{arithmetic:.1f} ({share:.0%})", f"{total - arithmetic:.1f}"]
        table.add_row(name, f"{total:.1f}", *cells)

    for name, t in times.items():
        row(name, t.seconds, t.arithmetic)
    if work - alone > 0.05:
        row("done at the same time", alone - work)
    total = max(seconds, alone)
    if seconds > alone:
        row("waiting and start-up", seconds - alone)
    row("total", total, sum(t.arithmetic for t in times.values()))
    return table
