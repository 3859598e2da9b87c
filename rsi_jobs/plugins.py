"""A user's own function, named in the configuration as `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rsi_jobs.errors import ConfigError


def is_spec(name: str) -> bool:
    """Whether a name in the configuration means a user's own function."""
    return ":" in name


def load_function(spec: str) -> Callable[..., Any]:
    """Import what `package.module:function` names.

    Raises ConfigError, with the reason, if the spec is malformed, the module cannot be imported
    (whatever it raises on import), the name is not in it, or it is not callable.
    """
    module_name, _, path = spec.partition(":")
    parts = (*module_name.split("."), *path.split("."))
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{spec!r} does not name a function: write package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    # A user's module may raise anything at all while it is imported; all of it is theirs to mend.
    except Exception as error:
        raise ConfigError(
            f"{spec!r}: module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {error}); it must be installed or on PYTHONPATH"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigError(f"{spec!r}: module {module_name!r} has no {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"{spec!r} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function
