"""What a run stands on: `rsi doctor`, `rsi mlflow`."""

from __future__ import annotations

from typing import Annotated

import typer

from rsi_jobs.commands.options import STORE, JsonOption, StoreOption, say_json


def doctor(
    *,
    store: StoreOption = STORE,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow's tracking URI (else MLFLOW_TRACKING_URI)")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check whether a run can work here.

    Ends with 0 only when all is well.

    Example: rsi doctor --store s3://bucket/runs --mlflow http://mlflow:5000
    """
    from rsi_jobs import doctor as doctors
    from rsi_jobs.errors import ConfigError

    checks = doctors.examine(store, mlflow)
    if json:
        say_json([vars(check) for check in checks])
    else:
        wide = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name:<{wide}}  {check.detail}")
    bad = [check.name for check in checks if not check.ok]
    if bad:
        raise ConfigError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}")


def mlflow(
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="where it listens")] = 5000,
    host: Annotated[str, typer.Option(help="0.0.0.0: also for other machines")] = "127.0.0.1",
    store: StoreOption = STORE,
) -> None:
    """Serve MLflow for a folder store.

    Example: rsi mlflow --port 5000
    """
    from rsi_jobs.store import open_store
    from rsi_jobs.tracking import serve

    serve(open_store(store, create=False).uri, port, host)
