"""A run as a whole: begin or continue it, cancel it, find it."""

from __future__ import annotations

import json
import time

from rsi_jobs import config as configs
from rsi_jobs import layout
from rsi_jobs.config import RunConfig
from rsi_jobs.errors import ConfigError, NotFoundError
from rsi_jobs.store import Store


def begin(store: Store, wanted: RunConfig) -> RunConfig:
    """Write a new run's configuration, or continue the run of that name.

    The target may only grow, operations may change, another identity is refused.

    Raises:
        ConfigError: the name is taken by a run with another identity.
    """
    key = layout.run_key(wanted.run, layout.CONFIG)
    if store.put_new(key, wanted.dumps()):
        return wanted
    stands = load(store, wanted.run)
    if stands.identity_digest() != wanted.identity_digest():
        changes = ", ".join(differences(stands, wanted))
        raise ConfigError(
            f"run {wanted.run!r} in {store.uri} has other settings ({changes}): "
            "give this one another name with --run, or the same settings"
        )
    rounds = max(stands.rounds, wanted.rounds)
    merged = stands.model_copy(update={"rounds": rounds, "operations": wanted.operations})
    if merged != stands:
        store.put(key, merged.dumps())
    return merged


def load(store: Store, run: str) -> RunConfig:
    """A run's configuration.

    Raises:
        NotFoundError: there is no such run; the message lists those there are.
    """
    key = layout.run_key(run, layout.CONFIG)
    try:
        return configs.loads(store.get(key), f"{store.uri}/{key}")
    except NotFoundError:
        known = ", ".join(names(store)) or "none"
        raise NotFoundError(f"there is no run {run!r} in {store.uri}; it has: {known}") from None


def names(store: Store) -> list[str]:
    """The runs in a store."""
    suffix = f"/{layout.CONFIG}"
    found = [e.key.removesuffix(suffix) for e in store.list("") if e.key.endswith(suffix)]
    return sorted(name for name in found if "/" not in name)


def cancel(store: Store, run: str) -> None:
    load(store, run)
    store.put(layout.run_key(run, layout.CANCEL), json.dumps({"at": time.time()}).encode())


def uncancel(store: Store, run: str) -> bool:
    """Take a cancellation back; whether there was one."""
    if not is_cancelled(store, run):
        return False
    store.delete([layout.run_key(run, layout.CANCEL)])
    return True


def is_cancelled(store: Store, run: str) -> bool:
    return store.exists(layout.run_key(run, layout.CANCEL))


def differences(stands: RunConfig, wanted: RunConfig) -> list[str]:
    """What of two identities differs, field by field."""
    old, new = stands.identity.model_dump(), wanted.identity.model_dump()
    found = []
    for name, value in new.items():
        if isinstance(value, dict):
            found += [f"{name}.{k} is {old[name][k]}, not {v}" for k, v in value.items() if old[name][k] != v]
        elif old[name] != value:
            found.append(f"{name} is {old[name]}, not {value}")
    return found
