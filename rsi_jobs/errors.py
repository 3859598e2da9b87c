"""Every error this package raises on purpose, and the exit code each one ends a process with.

    RsiError                 1   a defect of ours, unless a subclass says otherwise
    ├── UserError           64   a mistake the caller can mend: retrying cannot help
    │   ├── ConfigError     78   a value in the configuration
    │   ├── DataError       65   input whose content cannot be used
    │   ├── NotFoundError   66   a run, round, image or object that does not exist
    │   ├── StoreDenied     77   the store refuses: read-only, wrong credentials, no bucket
    │   └── CannotCreate    73   an output that cannot be written
    ├── PassingFault        75   try again: a store that does not answer, a second controller
    │   └── Damaged         75   an object whose bytes do not match its marker; it will be made again
    └── Cancelled          130   the run was cancelled

64 to 74 and 76 to 78 mean that a retry cannot help (sysexits.h); 75 means that it can.
"""

from __future__ import annotations

import errno
from typing import Final

NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""How the system says that a disk or a quota is full."""


class RsiError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the process ends with."""

    exit_code = 1


class UserError(RsiError):
    """A mistake the caller can mend. The message names the value, its origin and what is accepted."""

    exit_code = 64


class ConfigError(UserError):
    """A value in the configuration that cannot be used."""

    exit_code = 78


class DataError(UserError):
    """Input whose content cannot be used."""

    exit_code = 65


class NotFoundError(UserError):
    """A run, round, image or object that does not exist."""

    exit_code = 66


class CannotCreate(UserError):
    """An output that cannot be written."""

    exit_code = 73


class StoreDenied(UserError):
    """The store refuses: read-only, wrong credentials, no such bucket."""

    exit_code = 77


class PassingFault(RsiError):
    """Something outside that may work the next time."""

    exit_code = 75


class Damaged(PassingFault):
    """An object whose bytes do not match what its marker says."""


class Cancelled(RsiError):
    """The run was cancelled by its user."""

    exit_code = 130


def is_retryable(exit_code: int) -> bool:
    """Whether starting the same command again can help (75, signals and unknown crashes: yes)."""
    return not (64 <= exit_code <= 78 and exit_code != 75) and exit_code != 130
