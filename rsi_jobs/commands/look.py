"""What a run is made of and what it made: `rsi show`, `path`, `report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsi_jobs.commands.options import (
    STORE,
    JsonOption,
    RoundOption,
    RunArgument,
    StoreOption,
    open_run,
    say_json,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

    from rsi_jobs.config import RunConfig
    from rsi_jobs.layout import StageRef
    from rsi_jobs.marker import Markers, Output
    from rsi_jobs.store import Store

WHAT = ("dataset", "checkpoint", "report", "log")


def show(
    run: RunArgument,
    *,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="show the command of this stage")] = None,
    round_: Annotated[int, typer.Option("--round", metavar="N", help="the round of that stage")] = 1,
    phase: Annotated[str, typer.Option(metavar="train|eval|test|report", help="its phase")] = "train",
    store: StoreOption = STORE,
    json: JsonOption = False,
) -> None:
    """Show a run's settings, or a stage's command.

    Settings that differ from the defaults are marked.

    Example: rsi show shapes --stage sample --round 3
    """
    where, config, _ = open_run(store, run)
    if stage is not None:
        _show_command(where, config, _ref(stage, round_, phase), json)
        return
    if json:
        say_json(config.model_dump(mode="json"))
        return
    typer.echo(f"# run {run}: identity {config.identity_digest()}; * differs from the default")
    for line in _settings(config):
        typer.echo(line)


def _ref(stage: str, round_: int, phase: str) -> StageRef:
    from rsi_jobs.errors import UserError
    from rsi_jobs.layout import PHASES, STAGES, StageRef

    runnable = [s for s in STAGES if s != "gate"]  # the controller decides by itself
    if stage not in runnable:
        raise UserError(f"--stage {stage!r} is unknown: choose from {', '.join(runnable)}")
    if phase not in PHASES:
        raise UserError(f"--phase {phase!r} is unknown: choose from {', '.join(PHASES)}")
    if round_ < 0:
        raise UserError(f"--round {round_} is no round: give 0 (the base) or more")
    return StageRef(round_, phase, 0, stage)  # type: ignore[arg-type]


def _show_command(store: Store, config: RunConfig, ref: StageRef, as_json: bool) -> None:
    from rsi_jobs import plan
    from rsi_jobs.marker import MarkerReader
    from rsi_jobs.runners import command, interpreter

    uri, markers = f"{store.uri}/{config.run}", MarkerReader(store, config.run, repair=False).read()
    lines = [
        [interpreter(), *command(uri, ref, shard)] for shard in range(plan.shard_count(config, ref, markers))
    ]
    if as_json:
        say_json(lines)
        return
    for argv in lines:
        typer.echo(shlex.join(argv))


def _settings(config: RunConfig) -> list[str]:
    """`section.field = value`, one line each, with a mark and the default where they differ."""
    from rsi_jobs.config import SECTIONS

    identity, lines = config.identity, [f"  rounds = {config.rounds}", f"  recipe = {config.identity.recipe}"]
    lines.append(_setting("seed", type(identity), identity.seed))
    for name in SECTIONS:
        section = config.operations if name == "operations" else getattr(identity, name)
        lines += [
            _setting(f"{name}.{field}", type(section), getattr(section, field))
            for field in type(section).model_fields
        ]
    return lines


def _setting(dotted: str, section: type[BaseModel], value: Any) -> str:
    default = section.model_fields[dotted.rpartition(".")[2]].default
    shown = ",".join(value) if isinstance(value, tuple) else value
    if value == default:
        return f"  {dotted} = {shown}"
    was = ",".join(default) if isinstance(default, tuple) else default
    return f"* {dotted} = {shown}  (default {was})"


def path(
    run: RunArgument,
    what: Annotated[str, typer.Argument(metavar="|".join(WHAT), help="what to name", show_default=False)],
    *,
    round_: RoundOption = "best",
    store: StoreOption = STORE,
    json: JsonOption = False,
) -> None:
    """Print where a round's files lie, one a line.

    Example: rsi path shapes dataset --round 3
    """
    from rsi_jobs import outputs
    from rsi_jobs.errors import UserError

    if what not in WHAT:
        raise UserError(f"{what!r} cannot be named: choose from {', '.join(WHAT)}")
    where, config, markers = open_run(store, run)
    number = outputs.pick_round(round_, markers, config.rounds)
    if what == "log":
        from rsi_jobs import attempts

        tried = attempts.read(where, run, markers)
        won = [a for a in tried if a.ref.round == number and a.state == "won" and a.logged]
        uris: list[dict[str, Any]] = [{"uri": f"{where.uri}/{attempts.log_key(run, a)}"} for a in won]
    else:
        found = _round_outputs(config, markers, number, what)
        uris = [{"uri": f"{where.uri}/{o.key}", "size": o.size, "sha256": o.sha256} for o in found]
        if what == "checkpoint" and number == 0:
            uris = [{"uri": config.identity.model.path}]
    if json:
        say_json(uris)
        return
    for each in uris:
        typer.echo(each["uri"])


def _round_outputs(config: RunConfig, markers: Markers, number: int, what: str) -> list[Output]:
    """What the markers of a round name.

    Raises:
        NotFoundError: the round has none of it.
    """
    from rsi_jobs import outputs
    from rsi_jobs.errors import NotFoundError
    from rsi_jobs.layout import StageRef

    if what == "checkpoint":
        place = outputs.checkpoint_place(markers, number)
        return outputs.checkpoint_files(markers[outputs.finetune(*place), 0]) if number else []
    if what == "dataset":
        marker = markers.get((StageRef(number, "train", 0, "select"), 0))
        found = [o for o in marker.outputs if o.name.startswith(outputs.DATASET)] if marker else []
    else:
        reports = [markers.get((StageRef(number, "report", n, "report"), 0)) for n in (1, 0)]
        found = list(next((m.outputs for m in reports if m is not None), ()))
    if not found:
        base = ": the base is only evaluated" if number == 0 else " yet"
        raise NotFoundError(f"round {number} of run {config.run} has no {what}{base}")
    return found


def report(
    run: RunArgument,
    *,
    open_: Annotated[bool, typer.Option("--open", help="open it in a browser (a folder store)")] = False,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="copy it there")] = None,
    store: StoreOption = STORE,
) -> None:
    """Print where the run's report lies.

    Example: rsi report shapes --open
    """
    from rsi_jobs import layout
    from rsi_jobs.errors import CannotCreate, NotFoundError, UserError

    where, _, _ = open_run(store, run)
    key = layout.run_key(run, layout.REPORT)
    if not where.exists(key):
        raise NotFoundError(f"run {run} has no report yet: it is written after round 1")
    remote = "://" in where.uri
    if open_ and remote and to is None:
        raise UserError(f"--open needs a file: add --to FILE, as the store {where.uri} is no folder")
    if to is not None and (to.exists() or not to.parent.is_dir()):
        fault = "is there already" if to.exists() else "lies in a folder that is not there"
        raise CannotCreate(f"--to {to} {fault}: name a new file")
    if to is not None:
        where.download(key, to)
    typer.echo(str(to) if to is not None else f"{where.uri}/{key}")
    if open_:
        typer.launch((to or Path(where.uri) / key).absolute().as_uri())
