"""What a folder store does when the disk, its rights or its writers fail."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_jobs.errors import CannotCreate, PassingFault, StoreDenied
from rsi_jobs.store import open_store
from rsi_jobs.store_folder import FolderStore
from tests import disks

MIB = 1 << 20


def _files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".rsi-lock")


def _writers(store: FolderStore, big: Path) -> dict[str, Callable[[], object]]:
    data = b"x" * (2 * MIB)
    big.write_bytes(data)
    return {
        "put": lambda: store.put("a/put", data),
        "put_new": lambda: store.put_new("a/new", data),
        "replace": lambda: store.replace("a/replace", data, None),
        "upload": lambda: store.upload("a/upload", big),
    }


@pytest.mark.parametrize("how", ["put", "put_new", "replace", "upload"])
def test_a_full_disk_is_named_and_nothing_half_written_remains(tmp_path: Path, how: str) -> None:
    big, disk = tmp_path / "big", tmp_path / "disk"
    big.write_bytes(b"x" * 2 * MIB)
    with disks.without_room(disk):
        store = FolderStore(disk)
        store.put("a/before", b"kept")
        with pytest.raises(CannotCreate, match=f"{disk}/a/.*: no space left on"):
            _writers(store, big)[how]() if how != "upload" else store.upload("a/upload", big)
        assert _files(disk) == ["before"]
        assert store.get("a/before") == b"kept"


def test_a_download_onto_a_full_disk_names_the_local_path(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "runs")
    store.put("big", b"x" * 2 * MIB)
    with disks.without_room(tmp_path / "disk"):
        with pytest.raises(CannotCreate, match=f"{tmp_path}/disk/copy: no space left"):
            store.download("big", tmp_path / "disk/copy")
        assert _files(tmp_path / "disk") == []


@pytest.mark.parametrize("how", ["put", "put_new", "replace", "upload", "delete", "delete_if"])
def test_a_read_only_folder_is_refused_but_can_be_read(tmp_path: Path, how: str) -> None:
    disk = tmp_path / "disk"
    with disks.mounted(disk) as mounted:
        FolderStore(disk).put("a/old", b"old")
        if mounted:
            disks.remount(disk, "ro")
        elif os.geteuid() == 0:
            pytest.fail("root without the right to mount: run as another user")
        else:
            (disk / "a").chmod(0o555)
            (disk / ".rsi-lock").chmod(0o444)
        try:
            store = FolderStore(disk)
            etag = next(store.list("")).etag
            acts = _writers(store, tmp_path / "big") | {
                "delete": lambda: store.delete(["a/old"]),
                "delete_if": lambda: store.delete_if("a/old", etag),
            }
            with pytest.raises(StoreDenied, match=str(disk)):
                acts[how]()
            assert store.get("a/old") == b"old"
            assert _files(disk) == ["old"]
        finally:
            if not mounted:
                (disk / "a").chmod(0o755)


def test_a_disk_that_cannot_sync_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "runs")
    acts = _writers(store, tmp_path / "big")
    (tmp_path / "runs/a").mkdir()

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    for act in acts.values():
        with pytest.raises(PassingFault, match="Input/output error"):
            act()
    assert _files(tmp_path / "runs") == []


_KILLED = """
import hashlib, pathlib, sys
from rsi_jobs.store import open_store
store, path = open_store(sys.argv[1]), pathlib.Path(sys.argv[2])
for number in range(10**6):
    if number == 1:
        print("ready", flush=True)
    for how in ("put", "put_new", "upload"):
        key = f"{sys.argv[3]}/{how}/{number % 5 if how == 'put' else number}"
        data = hashlib.sha256(f"{key} {number}".encode()).hexdigest().encode() * 20_000
        data += hashlib.sha256(data).hexdigest().encode()
        if how == "upload":
            path.write_bytes(data)
            store.upload(key, path)
        else:
            getattr(store, how)(key, data)
"""


def test_killed_writers_leave_no_visible_half_and_no_lock(tmp_path: Path) -> None:
    chance = random.Random(0)
    store = FolderStore(tmp_path / "runs")
    for number in range(8):
        arguments = [str(tmp_path / "runs"), str(tmp_path / "source"), f"w{number}"]
        process = subprocess.Popen([sys.executable, "-c", _KILLED, *arguments], stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.02, 0.12))
            process.send_signal(signal.SIGKILL)
        for entry in store.list("w"):
            data = store.get(entry.key)
            assert hashlib.sha256(data[:-64]).hexdigest().encode() == data[-64:], entry
        store.put("after", b"the lock is free")
    assert len(list(store.list("w"))) >= 8 * 3
    assert store.sweep(3600) == 0
    left = [name for name in _files(tmp_path / "runs") if name.startswith(".rsi-")]
    assert store.sweep(-1) == len(left)
    assert len(_files(tmp_path / "runs")) == len(list(store.list("")))


def test_without_hard_links_still_one_writer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = FolderStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            mine = [f"{number} {writer}".encode() for writer in range(8)]
            won = list(pool.map(lambda data, n=number: store.put_new(f"k{n}", data), mine))
            assert won.count(True) == 1
            assert store.get(f"k{number}") == mine[won.index(True)]
    assert store.replace("k0", b"other", None) is None
    assert store.replace("new", b"other", None) is not None
    assert len(list(store.list(""))) == 21


_COUNTER = """
import sys
from rsi_jobs.store import open_store
store = open_store(sys.argv[1])
for number in range(25):
    while True:
        entry = next(store.list("counter"))
        value = int(store.get("counter").split()[0])
        if store.replace("counter", f"{value + 1} {sys.argv[2]} {number}".encode(), entry.etag):
            break
"""


def test_processes_that_swap_lose_no_update(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("counter", b"0 start")
    processes = [
        subprocess.Popen([sys.executable, "-c", _COUNTER, str(tmp_path), str(number)]) for number in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert store.get("counter").split()[0] == b"100"


def test_writers_and_removers_of_one_folder_do_not_trip_each_other(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)

    def write_and_remove(writer: int) -> None:
        for number in range(60):
            store.put(f"a/b/{writer}-{number}", b"x")
            store.delete([f"a/b/{writer}-{number}"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_remove, range(4)))
    assert list(store.list("")) == []
    assert not (tmp_path / "a").exists()


def test_every_version_has_an_etag_of_its_own(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    seen = set()
    for number in range(60):  # the same size, within few ticks of the clock of files
        store.put("lease", f"{number:03}".encode())
        seen.add(next(store.list("lease")).etag)
    assert len(seen) == 60


def test_runs_moved_to_another_disk_behind_a_link_are_still_listed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "runs")
    store.put("run/a", b"x")
    (tmp_path / "runs/run").rename(tmp_path / "moved")
    (tmp_path / "runs/run").symlink_to(tmp_path / "moved")
    store.put_new("run/b", b"y")
    assert [e.key for e in store.list("")] == ["run/a", "run/b"]
    assert store.get("run/a") == b"x"


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.text("ab./-é", min_size=1, max_size=6), max_size=8),
    st.text("ab./-é", max_size=3),
)
def test_a_listing_is_the_sorted_keys_that_start_so(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], prefix: str
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("runs")))
    names = {n for n in names if not {"", ".", ".."} & set(n.split("/"))}
    kept = {n for n in names if not any(o.startswith(n + "/") for o in names)}
    for name in kept:
        store.put(name, name.encode())
    if not {"", ".", ".."} & set(prefix.removesuffix("/").split("/")):
        wanted = sorted((n for n in kept if n.startswith(prefix)), key=str.encode)
        assert [entry.key for entry in store.list(prefix)] == wanted
    assert [entry.key for entry in store.list("")] == sorted(kept, key=str.encode)
