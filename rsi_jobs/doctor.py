"""Whether a run can work here: the store's promises, MLflow, devices, the model, versions, room."""

from __future__ import annotations

import base64
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from rsi_jobs import devices
from rsi_jobs.errors import RsiError
from rsi_jobs.preflight import without_password
from rsi_jobs.runners import interpreter
from rsi_jobs.store import Check, open_store, probe
from rsi_jobs.tracking import NONE, default_uri

ROOM = 2 << 30  # bytes of scratch space below which a round may not fit
PATIENCE = 10.0  # seconds for a server that does not answer
_VERSIONS = ("rsi-jobs", "mlflow", "boto3", "diffusers", "transformers", "peft")
_DATABASE = """
import sys
from mlflow import MlflowClient
MlflowClient(sys.argv[1]).search_experiments(max_results=1)
"""


def examine(store: str, mlflow: str | None) -> list[Check]:
    """One check a line; all of them are made, whatever the others said."""
    checks = _store(store)
    questions: dict[str, Callable[[], str]] = {
        "mlflow": lambda: _mlflow(store, mlflow),
        "devices": _devices,
        "model": _model,
        "scratch": _scratch,
        "versions": _versions,
    }
    for name, question in questions.items():
        try:
            checks.append(Check(name, True, question()))
        except (_AmissError, RsiError) as error:
            checks.append(Check(name, False, " ".join(str(error).split())))
    return checks


class _AmissError(Exception):
    """Something that is not as a run needs it."""


def _store(uri: str) -> list[Check]:
    try:
        found = probe(open_store(uri, patience=PATIENCE))
    except RsiError as error:
        return [Check("store", False, str(error))]
    return [Check(f"store: {check.name}", check.ok, check.detail) for check in found]


def _mlflow(store: str, given: str | None) -> str:
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(_absolute(store))
    if uri == NONE:
        return "off: nothing is logged"
    parts, shown = urlsplit(uri), without_password(uri)
    if parts.scheme in ("http", "https"):
        return f"{shown} answers, version {_server_version(uri)}"
    if parts.scheme == "sqlite" and not Path(parts.path[1:]).exists():
        return f"{shown} will be made by the first run"
    command = [interpreter(), "-c", _DATABASE, uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise _AmissError(f"{shown} cannot be used: {said[-1].replace(uri, shown)}")
    return f"{shown} can be used"


def _absolute(store: str) -> str:
    return store if "://" in store and not store.startswith("file:") else open_store(store, create=False).uri


def _server_version(uri: str) -> str:
    parts, shown = urlsplit(uri), without_password(uri)
    request = urllib.request.Request(f"{shown.rstrip('/')}/version")
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    secret = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user:
        packed = base64.b64encode(f"{user}:{secret}".encode()).decode()
        request.add_header("Authorization", f"Basic {packed}")
    elif token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return str(answer.read(100).decode(errors="replace").strip())
    except urllib.error.HTTPError as error:
        raise _AmissError(f"{shown} answers {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise _AmissError(f"{shown} does not answer: {getattr(error, 'reason', error)}") from None


def _devices() -> str:
    found = devices.ask()
    if found.fault:
        raise _AmissError(f"{found.fault}; install rsi-jobs[stages] where stages run")
    gpus = [f"{g.name}, {g.free / 2**30:.1f} of {g.total / 2**30:.1f} GiB free" for g in found.gpus]
    return f"{'; '.join(gpus) or 'no CUDA device'}; {found.threads} CPU threads; torch {found.torch}"


def _model() -> str:
    from rsi_jobs.diffusion import base_folder

    return f"shapes:base lies in {base_folder('shapes:base')}"


def _scratch() -> str:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise _AmissError(f"{folder} has {free / 2**30:.1f} GiB free, a stage needs {ROOM >> 30}: set TMPDIR")
    return f"{folder} has {free / 2**30:.1f} GiB free"


def _versions() -> str:
    missing = [name for name in ("mlflow", "pydantic", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise _AmissError(f"{', '.join(missing)} cannot be imported: install rsi-jobs again")
    found = [f"python {platform.python_version()}"]
    for name in _VERSIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
