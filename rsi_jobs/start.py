"""Start or continue a run: resolve its configuration, check it, hold its lease, drive the loop."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from rsi_jobs import config as configs
from rsi_jobs import layout, preflight, recipes, runs
from rsi_jobs.config import Identity, RunConfig
from rsi_jobs.controller import StageFailed, control
from rsi_jobs.diffusion import base_folder, fingerprint
from rsi_jobs.errors import Cancelled, ConfigError, NotFoundError
from rsi_jobs.lease import Lease
from rsi_jobs.marker import MarkerReader
from rsi_jobs.runners import Runner
from rsi_jobs.store import Store, open_store
from rsi_jobs.tracking import NONE, default_uri, open_tracker
from rsi_jobs.tracking_entries import Status
from rsi_jobs.view import open_view, summary


@dataclass(frozen=True)
class Request:
    """What a user asked for on the command line; None is "not said"."""

    rounds: int | None = None
    recipe: str | None = None
    run: str | None = None
    store: str = "./runs"
    mlflow: str | None = None
    backend: str | None = None
    seed: int | None = None
    sets: tuple[str, ...] = ()
    config: Path | None = None


def resolve(request: Request, store: Store | None) -> RunConfig:
    """The configuration a request means: the recipe, then the file, then --set, then --seed.

    A run that exists keeps what the request does not say: `--run NAME --rounds 12` goes on with NAME.
    `store` is None where there is none yet.

    Raises:
        ConfigError: an unknown recipe, section or field, or a value out of range.
    """
    recipe = "shapes" if request.recipe is None else request.recipe
    name = recipe if request.run is None else request.run
    fault = layout.check_run_name(name)
    if fault:
        raise ConfigError(f"--run {name!r} {fault}")
    says_identity = request.recipe is not None or request.sets or request.config or request.seed is not None
    begun = store is not None and store.exists(layout.run_key(name, layout.CONFIG))
    if store is not None and begun and request.run and not says_identity:
        config = runs.load(store, name)
    else:
        identity: Identity = recipes.recipe(recipe)
        config = RunConfig(run=name, identity=identity)
    if request.config is not None:
        config = configs.apply(config, _flat(request.config), f"--config {request.config}")
    config = configs.apply(config, _sets(request.sets), "--set")
    if request.seed is not None:
        config = configs.apply(config, {"seed": request.seed}, "--seed")
    if request.rounds is not None:
        body = config.model_dump(mode="json") | {"rounds": request.rounds}
        config = configs.build(RunConfig, body, "--rounds")
    return config


def _existing(uri: str) -> Store | None:
    """The store, if it is there: nothing is made before all is checked."""
    try:
        return open_store(uri, create=False)
    except NotFoundError:
        return None


def _sets(sets: tuple[str, ...]) -> dict[str, Any]:
    changes = {}
    for item in sets:
        name, sign, value = item.partition("=")
        if not sign:
            raise ConfigError(f"--set {item!r} is not section.field=value, e.g. --set training.lr=5e-5")
        changes[name.strip()] = value
    return changes


def _flat(path: Path) -> dict[str, Any]:
    """A JSON file {"section": {"field": value}} as dotted fields."""
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read as JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError(
            f'--config {path} is not an object of sections, e.g. {{"training": {{"lr": 5e-5}}}}'
        )
    changes: dict[str, Any] = {}
    for section, fields in body.items():
        if isinstance(fields, dict):
            changes |= {f"{section}.{field}": value for field, value in fields.items()}
        else:
            changes[section] = fields
    return changes


def with_digest(config: RunConfig) -> RunConfig:
    """The configuration with the base's digest in it, so that another base is another identity.

    Raises:
        ConfigError: the base is not the one the run began with.
    """
    path, known = config.identity.model.path, config.identity.model.digest
    found = fingerprint(base_folder(path))
    if known and known != found:
        raise ConfigError(
            f"model.path={path!r} has digest {found}, but run {config.run!r} began with {known}: "
            "restore that base, or give this run another name with --run"
        )
    return configs.apply(config, {"model.digest": found}, "model.path")


def start(request: Request, console: Console | None = None) -> int:
    """Run to the end; returns the exit code 0. Errors are raised, see errors.py."""
    began = time.monotonic()
    console = console or Console()
    config = resolve(request, _existing(request.store))
    backend = request.backend or ("kubernetes" if os.environ.get("KUBERNETES_SERVICE_HOST") else "local")
    preflight.check_backend(backend)
    preflight.check(config)
    preflight.check_here(config)
    config = with_digest(config)
    mlflow = request.mlflow or os.environ.get("MLFLOW_TRACKING_URI")
    preflight.check_mlflow(mlflow or NONE)
    store = open_store(request.store)
    mlflow = mlflow or default_uri(store.uri)
    if not store.exists(layout.run_key(config.run, layout.CONFIG)):
        preflight.check_store(store)
    if runs.is_cancelled(store, config.run):
        raise Cancelled(f"run {config.run} was cancelled: `rsi resume {config.run}` goes on with it")
    config = runs.begin(store, config)
    lease = Lease(store, config.run)
    lease.acquire()
    signal.signal(signal.SIGTERM, _terminated)
    runner: Runner = _local(store, config)
    view = open_view(console)
    tracker = open_tracker(mlflow, store)
    try:
        finish = control(store, config, runner, tracker, view, lease)
    except (StageFailed, Cancelled) as error:
        status: Status = "KILLED" if isinstance(error, Cancelled) else "FAILED"
        tracker.stop(config, MarkerReader(store, config.run).read(), status, str(error))
        raise
    finally:
        if tracker.trouble:
            view.message(tracker.trouble)
        view.close()
        runner.stop()
        lease.release()
    markers = MarkerReader(store, config.run).read()
    for part in summary(config, markers, finish, store.uri, time.monotonic() - began):
        console.print(part)
    return 0


def _local(store: Store, config: RunConfig) -> Runner:
    from rsi_jobs.runners.local import LocalRunner

    return LocalRunner(f"{store.uri}/{config.run}", config)


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
