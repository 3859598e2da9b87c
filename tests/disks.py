"""Disks of a test's own: full ones and read-only ones, mounted where that is permitted."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

MIB = 1 << 20


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """A small file system of its own; False where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False) if os.geteuid() == 0 else None
    here = done is not None and done.returncode == 0
    try:
        yield here
    finally:
        if here:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


@contextlib.contextmanager
def without_room(folder: Path, mib: int = 1) -> Iterator[Callable[[], None]]:
    """A disk of `mib` MiB, else a limit on the files of this process; gives what makes room."""
    with mounted(folder, "-o", f"size={mib}m") as here:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def make_room() -> None:
            if here:
                remount(folder, "size=500m")
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        try:
            if not here:
                resource.setrlimit(resource.RLIMIT_FSIZE, (min(mib, 1) * MIB, hard))
            yield make_room
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
