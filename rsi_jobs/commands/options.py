"""What several commands share: options, explained once, and how they print."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rsi_jobs.config import RunConfig
    from rsi_jobs.marker import Markers
    from rsi_jobs.store import Store

STORE = "./runs"  # where runs lie unless --store or RSI_STORE says otherwise
PIPE_WIDTH = 160  # columns of a table that no terminal limits

StoreOption = Annotated[
    str,
    typer.Option(
        "--store", envvar="RSI_STORE", metavar="FOLDER|s3://BUCKET/PREFIX", help="where the runs lie"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="the run's name", show_default=False)]
RoundOption = Annotated[str, typer.Option("--round", metavar="best|N", help="a round; 0 is the base")]


def open_run(where: str, run: str) -> tuple[Store, RunConfig, Markers]:
    """A run as it stands, for commands that only look at it.

    Raises:
        NotFoundError: no such store, or no such run in it.
    """
    from rsi_jobs import runs
    from rsi_jobs.marker import MarkerReader
    from rsi_jobs.store import open_store

    store = open_store(where, create=False)
    config = runs.load(store, run)
    return store, config, MarkerReader(store, run, repair=False).read()


def console() -> Console:
    """For tables: as wide as the terminal, and wide enough for any table where there is none."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def say_json(value: Any) -> None:
    """Print one JSON document; what is not a number there is null, which every reader knows."""
    typer.echo(json.dumps(_strict(value), indent=1, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _strict(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
