"""`rsi compare`: which of these runs is better, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsi_jobs.commands.options import STORE, JsonOption, StoreOption, console, open_run, say_json

if TYPE_CHECKING:
    from rsi_jobs.comparison import Difference, Rows, Side


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="A B [C...]", help="two runs or more", show_default=False)
    ],
    *,
    store: StoreOption = STORE,
    json: JsonOption = False,
) -> None:
    """Lay runs side by side, round by round.

    Below, how the best rounds differ, image by image from the same prompts and noise.

    Example: rsi compare shapes sft paper
    """
    from rsi_jobs import comparison
    from rsi_jobs.errors import UserError

    if len(set(runs)) < 2:
        raise UserError(f"compare {' '.join(runs)}: give at least two runs")
    opened = [open_run(store, run) for run in dict.fromkeys(runs)]
    where = opened[0][0]
    sides = [comparison.Side(config, markers) for _, config, markers in opened]
    metrics = {m: comparison.by_round(sides, m) for m in comparison.SHOWN}
    pairs = [(side, *comparison.differences(where, sides[0], side)) for side in sides[1:]]
    if json:
        say_json(_document(sides, metrics, pairs))
        return
    for metric, rows in metrics.items():
        if rows:
            _print_metric(sides, metric, rows)
    for side, found, why in pairs:
        head = f"{side.name} round {side.best()[0]} less {sides[0].name} round {sides[0].best()[0]}"
        typer.echo(f"{head}, paired over the gate's prompts:" if found else f"{head}: not paired, {why}")
        for d in found:
            typer.echo(f"  {d.metric:<16} {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {d.unit}".rstrip())
        for line in _unlike(sides[0], side):
            typer.echo(f"  its {line}")


def _document(
    sides: list[Side], metrics: dict[str, Rows], pairs: list[tuple[Side, list[Difference], str]]
) -> dict[str, Any]:
    return {
        "runs": [{"run": s.name, "best": s.best()[0], "identity": s.config.identity_digest()} for s in sides],
        "metrics": {m: {str(n): values for n, values in rows.items()} for m, rows in metrics.items()},
        "differences": [
            {"of": side.name, "from": sides[0].name, "unpaired": why, "metrics": [vars(d) for d in found]}
            for side, found, why in pairs
        ],
        "settings": {side.name: _unlike(sides[0], side) for side in sides[1:]},
    }


def _unlike(a: Side, b: Side) -> list[str]:
    from rsi_jobs import runs

    return runs.differences(b.config, a.config)


def _print_metric(sides: list[Side], metric: str, rows: Rows) -> None:
    """A table of one metric: a row a round, a column a run, the best round of each marked."""
    from rich.table import Table

    from rsi_jobs.comparison import SHOWN

    title = f"{SHOWN[metric]} (* best round)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("round", justify="right")
    for side in sides:
        table.add_column(side.name, no_wrap=True)
    for number, values in rows.items():
        cells = []
        for side, value in zip(sides, values, strict=True):
            mark = "*" if number == side.best()[0] else " "
            cells.append("" if value is None else f"{mark}{value[0]:+.3f} [{value[1]:+.3f}, {value[2]:+.3f}]")
        table.add_row(str(number), *cells)
    said = console()
    said.print(table)
    said.print()
