"""What can be refused before any work is asked for, so that no GPU waits for a mistake.

`check` needs the configuration alone; `check_here` looks at files, functions and devices of this machine,
which are the stages' own where they run as local processes.
"""

from __future__ import annotations

import difflib
import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from rsi_jobs import devices
from rsi_jobs.config import Identity, RunConfig
from rsi_jobs.errors import ConfigError, DataError, StoreDenied
from rsi_jobs.names import PROMPT_SOURCES, REWARDS, WEIGHTINGS
from rsi_jobs.runners import interpreter
from rsi_jobs.store import Store, probe
from rsi_jobs.tracking import DATABASES, NONE

BACKENDS = ("local",)
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_LOAD = """
import sys
from rsi_jobs.errors import RsiError
from rsi_jobs.plugins import load_function
try:
    load_function(sys.argv[1])
except RsiError as error:
    sys.exit(" ".join(str(error).split()))
"""


def check(config: RunConfig) -> None:
    """Refuse names that no stage would find.

    Raises:
        ConfigError: an unknown reward, prompt source or weighting scheme.
    """
    for where, name, known in _named(config.identity):
        if ":" in name and not _FUNCTION.fullmatch(name):
            raise ConfigError(f"{where}={name!r} does not name a function: write package.module:function")
        if ":" not in name and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "choose from " + ", ".join(known) + "."
            raise ConfigError(f"{where}={name!r} is unknown: {hint} Your own is package.module:function")


def check_mlflow(uri: str) -> None:
    """Refuse what is no address of an MLflow server or database, before a store is made for the run."""
    scheme = urlsplit(uri).scheme
    if uri != NONE and scheme not in ("http", "https") and scheme.partition("+")[0] not in DATABASES:
        raise ConfigError(
            f"--mlflow {without_password(uri)!r} is not accepted: give http(s)://HOST:PORT, "
            "sqlite:///FILE, another database that MLflow supports, or none"
        )


def without_password(uri: str) -> str:
    """An address as it may be printed: without its user and password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def check_backend(name: str) -> None:
    """Refuse a backend that this version does not have."""
    if name not in BACKENDS:
        raise ConfigError(f"--backend {name!r} is not available: this version has {', '.join(BACKENDS)}")


def check_here(config: RunConfig) -> None:
    """Refuse what this machine lacks: prompts, a user's function, a GPU, the model.

    Raises:
        ConfigError, DataError, NotFoundError: the sentence says which, and what is accepted.
    """
    from rsi_jobs.diffusion import base_folder

    identity = config.identity
    for where, name, _ in _named(identity):
        if ":" in name:
            _loads(where, name)
    _check_prompts(identity)
    if config.operations.device.startswith("cuda"):
        _check_device(config.operations.device)
    base_folder(identity.model.path)


def check_store(store: Store) -> None:
    """Refuse a store that cannot be written, or that breaks a promise which runs rest on.

    Raises:
        StoreDenied: the first thing that is wrong with it.
    """
    bad = next((c for c in probe(store) if not c.ok), None)
    if bad is None:
        return
    if bad.name == "write":
        raise StoreDenied(f"store {store.uri} cannot be used: {bad.detail}")
    raise StoreDenied(f"store {store.uri} is not safe for runs ({bad.name}): {bad.detail}")


def _named(identity: Identity) -> list[tuple[str, str, tuple[str, ...]]]:
    """Every field that holds a name: where it stands, the name, the names there are."""
    rewards = identity.rewards
    selecting = [("rewards.use", name, tuple(REWARDS)) for name in rewards.use]
    return [
        *selecting,
        ("rewards.heldout", rewards.heldout, tuple(REWARDS)),
        ("rewards.features", rewards.features, tuple(REWARDS)),
        ("prompts.source", identity.prompts.source, PROMPT_SOURCES),
        ("weighting.scheme", identity.weighting.scheme, WEIGHTINGS),
    ]


def _loads(where: str, spec: str) -> None:
    """Import a user's function in a process of its own: what it imports is no business of the controller."""
    done = subprocess.run([interpreter(), "-c", _LOAD, spec], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"its import ended with code {done.returncode}"]
        raise ConfigError(f"{where}: {said[-1]}")


def _check_prompts(identity: Identity) -> None:
    """The evaluation sets are there and large enough, and no prompt of theirs is trained on."""
    from rsi_jobs.prompts import evalsets, filters, sources

    settings, prompts = identity.evaluation, identity.prompts
    evalsets.load(settings.gate, settings.gate_prompts)
    if settings.test_prompts:
        evalsets.load(settings.test, settings.test_prompts)
    if prompts.source != "file":
        return
    found = [row.prompt for row in sources.read_file(Path(prompts.file))]
    if len(found) < prompts.raw:
        raise DataError(
            f"prompts.file={prompts.file} holds {len(found)} prompts, but prompts.raw={prompts.raw} of them "
            "are drawn each round: give a longer file, or a smaller prompts.raw and prompts.keep"
        )
    key = sources.DOMAIN_KEYS.get(identity.model.domain)
    seen = filters.seen_before(found, [], evalsets.all_prompts(settings), key)
    first = next((n for n, verdict in enumerate(seen) if verdict.reason), None)
    if first is not None:
        raise DataError(
            f"prompts.file={prompts.file} holds a prompt of the evaluation set, {found[first]!r}: take it "
            "out, or scores on it mean nothing"
        )


def _check_device(device: str) -> None:
    count = len(devices.ask().gpus) if devices.has_driver() else 0
    if int(device.partition(":")[2] or 0) >= count:
        there = f"it has {count}, from cuda:0" if count else "it has none"
        raise ConfigError(
            f"operations.device={device}: this machine has no such CUDA device ({there}): use cpu or auto"
        )
