"""Start, continue and cancel: `rsi run` (which is `python -m rsi_jobs.controller`), `resume`, `cancel`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsi_jobs.commands.options import STORE, RunArgument, StoreOption

RoundsOption = Annotated[
    int | None, typer.Option(help="rounds in all; a larger number goes on", show_default="8")
]
MlflowOption = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="MLflow's tracking URI (else MLFLOW_TRACKING_URI), or none; needed with S3",
        show_default="sqlite:///<store>/mlflow.db",
    ),
]
BackendOption = Annotated[
    str | None, typer.Option(metavar="local|kubernetes", help="where stages run", show_default="local")
]


def run(
    *,
    rounds: RoundsOption = None,
    recipe: Annotated[
        str | None, typer.Option(help="the named settings to start from", show_default="shapes")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="the run's name", show_default="the recipe's")
    ] = None,
    store: StoreOption = STORE,
    mlflow: MlflowOption = None,
    backend: BackendOption = None,
    seed: Annotated[
        int | None, typer.Option(help="every random choice derives from it", show_default="0")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="change one setting; may be given often"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help='a JSON file of settings: {"training": {"lr": 5e-5}}')
    ] = None,
) -> int:
    """Start a run, or continue it where it stopped.

    Example: rsi run --recipe shapes --rounds 8 --set training.lr=5e-5
    """
    from rsi_jobs.start import Request, start

    return start(Request(rounds, recipe, name, store, mlflow, backend, seed, tuple(sets or ()), config))


def resume(
    run: RunArgument,
    *,
    rounds: RoundsOption = None,
    store: StoreOption = STORE,
    mlflow: MlflowOption = None,
    backend: BackendOption = None,
) -> int:
    """Go on with a cancelled or stopped run.

    It keeps its settings; a cancellation is taken back.

    Example: rsi resume shapes --rounds 12
    """
    from rsi_jobs import runs
    from rsi_jobs.start import Request, start
    from rsi_jobs.store import open_store

    where = open_store(store, create=False)
    runs.load(where, run)
    if runs.uncancel(where, run):
        typer.echo(f"run {run} was cancelled; it goes on")
    return start(Request(rounds=rounds, run=run, store=store, mlflow=mlflow, backend=backend))


def cancel(run: RunArgument, *, store: StoreOption = STORE) -> None:
    """Stop a run, wherever its controller is.

    What is done stays, and `rsi resume` goes on from there.

    Example: rsi cancel shapes
    """
    from rsi_jobs import runs
    from rsi_jobs.store import open_store

    runs.cancel(open_store(store, create=False), run)
    typer.echo(f"run {run} is cancelled: its controller stops within seconds; `rsi resume {run}` goes on")
