"""A whole run on a disk that fills up, or turns read-only, on the way."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rsi_jobs.layout import StageRef
from rsi_jobs.marker import MarkerReader
from rsi_jobs.store import open_store
from tests import disks, killer


def test_a_disk_that_fills_up_ends_the_run_and_with_room_it_goes_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with disks.without_room(disk, mib=6) as make_room:
        run = killer.start(disk)
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 73, output.decode()
        assert b"no space left" in output
        assert b"Traceback" not in output
        make_room()
        killer.finish(disk)
        assert killer.results(disk) == killer.results(undisturbed)
        assert killer.ran_after_commit(disk) == []


def test_a_disk_that_turns_read_only_ends_the_run_and_writable_it_goes_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with disks.mounted(disk) as here:
        if not here and os.geteuid() == 0:
            pytest.fail("root without the right to mount: run as another user")
        run = killer.start(disk)
        deadline = time.monotonic() + 120
        while not begun(disk):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        writable(disk, here, False)
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 77, output.decode()
        assert str(disk) in output.decode()
        assert b"Traceback" not in output
        writable(disk, here, True)
        killer.finish(disk)
        assert killer.results(disk) == killer.results(undisturbed)


def begun(disk: Path) -> bool:
    """Whether the base's images are drawn: the run is in full swing."""
    try:
        markers = MarkerReader(open_store(str(disk)), "smoke").read()
    except OSError:
        return False
    return (StageRef(0, "eval", 0, "sample"), 0) in markers


def writable(disk: Path, here: bool, yes: bool) -> None:
    if here:
        disks.remount(disk, "rw" if yes else "ro")
        return
    for folder in [disk, *(p for p in disk.rglob("*") if p.is_dir())]:
        folder.chmod(0o755 if yes else 0o555)
