"""What a run is doing, and what its stages said: `rsi status`, `rsi logs`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsi_jobs.commands.options import STORE, JsonOption, RunArgument, StoreOption, console, open_run, say_json

if TYPE_CHECKING:
    from rsi_jobs.attempts import AttemptRecord
    from rsi_jobs.config import RunConfig
    from rsi_jobs.marker import Markers
    from rsi_jobs.store import Store


def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="the run's name", show_default="all runs")
    ] = None,
    *,
    store: StoreOption = STORE,
    json: JsonOption = False,
) -> None:
    """List the runs, or show one of them.

    Of one run: its rounds, what is at work, and what failed last.

    Example: rsi status shapes
    """
    if run is None:
        _list(store, json)
        return
    where, config, markers = open_run(store, run)
    facts = _facts(where, config, markers)
    work = _work(where, config, markers, live=facts["controller"] is not None)
    if json:
        say_json(facts | work | {"table": _rounds(markers)})
        return
    from rsi_jobs.summary import round_table

    said = console()
    said.print(f"run {run}: {facts['state']}, {facts['done']} of {facts['rounds']} rounds done")
    if facts["controller"]:
        said.print(f"controller: process {facts['controller']['pid']} on {facts['controller']['host']}")
    for line in work["at_work"]:
        said.print(f"{'at work' if facts['controller'] else 'next'}: {line}", markup=False)
    if work["last_failure"]:
        said.print(f"last failure: {work['last_failure']}", markup=False)
    if markers:
        said.print()
        said.print(round_table(markers))


def logs(
    run: RunArgument,
    *,
    round_: Annotated[int | None, typer.Option("--round", metavar="N", help="only this round's")] = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="only this stage's")] = None,
    shard: Annotated[int | None, typer.Option(metavar="K", help="only this shard's")] = None,
    phase: Annotated[
        str | None, typer.Option(metavar="train|eval|test|report", help="only this phase's")
    ] = None,
    attempt_no: Annotated[
        int | None, typer.Option("--try", metavar="0|1", help="1: those at half the step")
    ] = None,
    attempt: Annotated[
        str, typer.Option(metavar="ID|latest|all", help="which attempt of those there were")
    ] = "latest",
    store: StoreOption = STORE,
) -> None:
    """List attempts, or print what they said.

    With --round and --stage it prints, without them it lists.

    Example: rsi logs shapes --round 3 --stage sample
    """
    from rsi_jobs import attempts
    from rsi_jobs.errors import NotFoundError, UserError
    from rsi_jobs.layout import PHASES, STAGES

    for option, value, known in (("--stage", stage, STAGES), ("--phase", phase, PHASES)):
        if value is not None and value not in known:
            raise UserError(f"{option} {value!r} is unknown: choose from {', '.join(known)}")
    where, _, markers = open_run(store, run)
    found = [
        a
        for a in attempts.read(where, run, markers)
        if round_ in (None, a.ref.round)
        and stage in (None, a.ref.stage)
        and shard in (None, a.shard)
        and phase in (None, a.ref.phase)
        and attempt_no in (None, a.ref.attempt_no)
    ]
    if not found:
        raise NotFoundError(f"run {run} has no attempts that match: `rsi logs {run}` lists those there are")
    if round_ is None or stage is None:
        _list_attempts(found)
        return
    chosen = attempts.choose(found, attempt)
    for each in chosen:
        if len(chosen) > 1:
            typer.echo(f"--- {each.ref} shard {each.shard}, attempt {each.id}")
        typer.echo(attempts.log(where, run, each), nl=False)


def _list_attempts(found: list[AttemptRecord]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("round", "phase", "try", "stage", "shard", "attempt", "state", "last written"):
        table.add_column(name, no_wrap=True)
    for a in found:
        place = (str(a.ref.round), a.ref.phase, str(a.ref.attempt_no), a.ref.stage, str(a.shard))
        table.add_row(*place, a.id, a.state, _clock(a.modified))
    console().print(table)


def _list(where: str, as_json: bool) -> None:
    from rich.table import Table

    from rsi_jobs import runs
    from rsi_jobs.marker import MarkerReader
    from rsi_jobs.store import open_store

    store = open_store(where, create=False)
    rows = []
    for name in runs.names(store):
        config, markers = runs.load(store, name), MarkerReader(store, name, repair=False).read()
        rows.append(_facts(store, config, markers))
    if as_json:
        say_json(rows)
        return
    if not rows:
        typer.echo(f"there are no runs in {store.uri}; `rsi run --store {where}` starts one")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("run", "recipe", "seed", "rounds", "best", "held-out vs base", "state"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            row["run"], row["recipe"], str(row["seed"]), f"{row['done']}/{row['rounds']}",
            str(row["best"]), row["gain"], row["state"],
        )  # fmt: skip
    console().print(table)


def _facts(store: Store, config: RunConfig, markers: Markers) -> dict[str, Any]:
    """A run in one row."""
    from rsi_jobs import lease, plan, rounds, runs

    known = rounds.rounds(markers)
    best = plan.best_round(markers, config.rounds + 1)[0]
    held = lease.holder(store, config.run)
    metrics = next((r.metrics for r in known if r.number == best), {})
    gain = rounds.interval(metrics, f"{plan.GATE_SCORE}.vs_base")
    todo = plan.plan(config, markers, {})
    # Reports hold nothing up: where only they are missing, the run is done.
    done = all(
        isinstance(action, plan.Finish) or (isinstance(action, plan.Launch) and action.ref.phase == "report")
        for action in todo
    )
    if held is not None:
        state = "running"
    elif runs.is_cancelled(store, config.run):
        state = "cancelled"
    else:
        state = "done" if done else "stopped"
    return {
        "run": config.run,
        "recipe": config.identity.recipe,
        "seed": config.identity.seed,
        "rounds": config.rounds,
        "done": sum(r.number > 0 and r.standing != "open" for r in known),
        "best": best,
        "gain": rounds.signed(gain) if gain is not None and best else "",
        "state": state,
        "controller": {k: held[k] for k in ("host", "pid")} if held is not None else None,
    }


def _rounds(markers: Markers) -> list[dict[str, Any]]:
    from rsi_jobs import rounds

    return [
        {"round": r.number, "standing": r.standing, "reason": r.reason, "seconds": r.seconds,
         "metrics": dict(r.metrics)}
        for r in rounds.rounds(markers)
    ]  # fmt: skip


def _work(store: Store, config: RunConfig, markers: Markers, *, live: bool) -> dict[str, Any]:
    """The stages that stand next, how far their shards are, and the last attempt at one that failed."""
    from rsi_jobs import attempts, plan

    lines, failure = [], ""
    launches = [a for a in plan.plan(config, markers, {}) if isinstance(a, plan.Launch)]
    for launch in launches:
        ref, total = launch.ref, plan.shard_count(config, launch.ref, markers)
        line = str(ref) + (f", {total - len(launch.shards)} of {total} shards done" if total > 1 else "")
        tried = attempts.read(store, config.run, markers, ref)
        begun = [a.started for a in tried if a.state == "open" and a.started]
        if live and begun:
            line += f", begun {time.time() - max(begun):.0f} s ago"
        lines.append(line)
        failure = failure or attempts.last_error(store, config.run, tried)
    return {"at_work": lines, "last_failure": failure}


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
