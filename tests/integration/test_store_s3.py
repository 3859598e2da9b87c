"""One suite for every kind of store: a folder, an S3 server, and that server behind a bad network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rsi_jobs.errors import CannotCreate, ConfigError, NotFoundError, PassingFault, RsiError, StoreDenied
from rsi_jobs.store import Store, open_store, probe, sha256_file
from rsi_jobs.store_s3 import S3Store
from tests.faultproxy import Fate, FaultProxy, faulty
from tests.s3server import Server, serve

MIB = 1 << 20
FAULTS = {Fate.BUSY: 0.03, Fate.RESET: 0.02, Fate.LOSE: 0.03, Fate.CUT: 0.01, Fate.DELAY: 0.01}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def bad_network(server: Server) -> Iterator[FaultProxy]:
    with faulty(server.endpoint, FAULTS, seed=1) as proxy:
        yield proxy


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    """A proxy that only fails on demand."""
    with faulty(server.endpoint) as on_demand:
        yield on_demand


Connect = Callable[..., S3Store]


@pytest.fixture
def connect(server: Server, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Opens a store of this test's own on the server, or on a proxy in front of it."""
    prefix = uuid.uuid4().hex

    def through(proxy: FaultProxy | None = None, patience: float = 20.0) -> S3Store:
        for name, value in server.environment(proxy.endpoint if proxy else None).items():
            monkeypatch.setenv(name, value)
        store = open_store(f"s3://{server.bucket}/{prefix}/runs", patience=patience)
        assert isinstance(store, S3Store)
        return store

    return through


@pytest.fixture(params=["folder", "s3", "s3 behind a bad network"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, connect: Connect, bad_network: FaultProxy
) -> Callable[[], Store]:
    """Opens one and the same store anew, as each process does."""
    if request.param == "folder":
        return lambda: open_store(str(tmp_path / "runs"))
    return lambda: connect(bad_network if "bad" in request.param else None)


@pytest.fixture
def store(opened: Callable[[], Store]) -> Store:
    return opened()


def test_what_was_written_is_read(store: Store) -> None:
    for data in (b"", b"\0\xff" * 5, os.urandom(MIB)):
        store.put("a/b.bin", data)
        assert store.get("a/b.bin") == data
    assert store.exists("a/b.bin")
    assert not store.exists("a/b")
    assert not store.exists("a/b.bin2")


def test_ranges_end_with_the_object(store: Store) -> None:
    store.put("a", b"0123456789")
    assert store.get_range("a", 0, 4) == b"0123"
    assert store.get_range("a", 8, 4) == b"89"
    assert store.get_range("a", 10, 4) == b""
    assert store.get_range("a", 99, 4) == b""
    assert store.get_range("a", 3, 0) == b""
    with pytest.raises(ValueError, match="starts at 0 or later"):
        store.get_range("a", -1, 4)


def test_what_is_missing_is_named(store: Store, tmp_path: Path) -> None:
    for read in (
        lambda: store.get("no/such"),
        lambda: store.get_range("no/such", 0, 1),
        lambda: store.get_range("no/such", 0, 0),
        lambda: store.download("no/such", tmp_path / "copy"),
    ):
        with pytest.raises(NotFoundError, match="no/such"):
            read()
    assert not (tmp_path / "copy").exists()
    assert store.delete(["no/such"]) == 1
    assert not store.delete_if("no/such", "etag")
    assert list(store.list("no")) == []
    with pytest.raises(NotFoundError, match="source"):
        store.upload("a", tmp_path / "source")


def test_put_new_never_overwrites(store: Store) -> None:
    assert store.put_new("run/_SUCCESS.json", b"attempt 1")
    assert not store.put_new("run/_SUCCESS.json", b"attempt 2")
    assert store.get("run/_SUCCESS.json") == b"attempt 1"
    assert store.put_new("run/_SUCCESS.json", b"attempt 1")  # the same write, sent once more
    store.delete(["run/_SUCCESS.json"])
    assert store.put_new("run/_SUCCESS.json", b"attempt 2")


def test_replace_swaps_only_the_version_that_was_meant(store: Store) -> None:
    first = store.replace("lease", b"one", None)
    assert first is not None
    assert store.replace("lease", b"two", None) is None
    second = store.replace("lease", b"two", first)
    assert second not in (None, first)
    assert store.replace("lease", b"three", first) is None
    assert store.get("lease") == b"two"
    assert [(e.key, e.size, e.etag) for e in store.list("lease")] == [("lease", 3, second)]
    assert store.replace("none", b"x", first) is None
    assert not store.exists("none")


def test_delete_if_removes_only_the_version_that_was_meant(store: Store) -> None:
    old = store.replace("lease", b"one", None)
    assert old is not None
    new = store.replace("lease", b"two", old)
    assert new is not None
    assert not store.delete_if("lease", old)
    assert store.get("lease") == b"two"
    assert store.delete_if("lease", new)
    assert not store.exists("lease")


def test_listings_are_whole_sorted_and_paged(store: Store) -> None:
    names = ["a", "a b+c%20&=?#", "a-b", "a.b", "ab/c/d", "ab/c.d", "b", "Z", "é", "ラン/x"]
    before = time.time()
    for name in reversed(names):
        store.put(f"r/{name}", name.encode())
    if isinstance(store, S3Store):
        store.page = 3
    found = list(store.list("r/"))
    assert [e.key for e in found] == sorted((f"r/{n}" for n in names), key=str.encode)
    assert all(e.size == len(e.key.encode()) - 2 for e in found)
    assert all(before - 2 < e.modified < time.time() + 2 for e in found)
    assert [e.key for e in store.list("r/a")] == [e.key for e in found if e.key.startswith("r/a")]
    assert [e.key for e in store.list("r/ab/")] == ["r/ab/c.d", "r/ab/c/d"]
    assert list(store.list("r/x/y")) == []
    assert store.delete(e.key for e in found) == len(names)
    assert list(store.list("")) == []


def test_files_go_and_come_whole(store: Store, tmp_path: Path) -> None:
    for size in (0, 1, 3 * MIB, 21 * MIB):
        source, copy = tmp_path / f"{size}", tmp_path / "new" / f"{size}"
        source.write_bytes(os.urandom(size))
        if isinstance(store, S3Store):
            store.multipart_from = 16 * MIB  # the last one goes up in two parts
        store.upload(f"files/{size}", source)
        store.download(f"files/{size}", copy)
        assert sha256_file(copy) == sha256_file(source)
    assert [e.size for e in store.list("files/")] == [0, 1, 21 * MIB, 3 * MIB]
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_keys_outside_the_store_are_refused(store: Store, tmp_path: Path) -> None:
    for key in ("../x", "/x", "a/../../x", "", "a//b", ".rsi-x"):
        with pytest.raises(ConfigError):
            store.put(key, b"x")
        with pytest.raises(ConfigError):
            store.upload(key, tmp_path)
    with pytest.raises(ConfigError):
        list(store.list("../"))


def test_no_key_is_the_folder_of_another(store: Store, server: Server) -> None:
    if isinstance(store, S3Store) and server.kind == "moto":
        return  # like AWS it can hold both: nothing to refuse
    store.put("a/b", b"x")
    for write in (store.put, store.put_new):
        for key in ("a", "a/b/c"):
            with pytest.raises(CannotCreate, match="folder of another"):
                write(key, b"y")
    store.delete(["a/b"])
    store.put("a", b"y")
    assert [e.key for e in store.list("")] == ["a"]


def test_of_eight_racing_writers_one_wins(opened: Callable[[], Store]) -> None:
    writers = [opened(), opened()] * 4
    start = threading.Barrier(8)

    def write(number: int) -> list[bool]:
        won = []
        for race in range(20):
            start.wait(60)
            try:
                won.append(writers[number].put_new(f"race/{race}/marker", f"{race} {number}".encode()))
            except BaseException:
                start.abort()  # the others need not wait for this one
                raise
        return won

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(write, range(8)))
    for race in range(20):
        winners = [n for n in range(8) if results[n][race]]
        assert len(winners) == 1, f"race {race}: {winners}"
        assert writers[0].get(f"race/{race}/marker") == f"{race} {winners[0]}".encode()


def test_racing_swaps_lose_no_update(opened: Callable[[], Store]) -> None:
    writers = [opened(), opened()] * 2
    writers[0].put("names", b"start")

    def add(number: int) -> None:
        for step in range(6):
            name = f"{number}-{step}"
            while True:  # a lost answer may hide that the name is there: look first
                etag = next(writers[number].list("names")).etag
                old = writers[number].get("names").decode()
                if name in old.split() or writers[number].replace("names", f"{old} {name}".encode(), etag):
                    break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    names = writers[0].get("names").decode().split()
    assert sorted(names) == sorted(["start", *(f"{n}-{s}" for n in range(4) for s in range(6))])


def test_every_store_here_passes_the_probe(store: Store) -> None:
    assert [c for c in probe(store) if not c.ok] == []
    assert list(store.list("")) == []


def test_the_bad_network_was_bad(bad_network: FaultProxy, connect: Connect) -> None:
    store = connect(bad_network)
    for number in range(60):
        store.put("a", str(number).encode())
        assert store.get("a") == str(number).encode()
    assert all(bad_network.counts[fate] > 0 for fate in FAULTS), bad_network.counts


def test_a_lost_answer_does_not_cost_the_winner_its_win(connect: Connect, proxy: FaultProxy) -> None:
    store, other = connect(proxy), connect()
    proxy.script(Fate.LOSE)
    assert store.put_new("marker", b"attempt 1")
    assert proxy.counts[Fate.LOSE] == 1
    assert not other.put_new("marker", b"attempt 2")
    assert other.get("marker") == b"attempt 1"
    proxy.script(Fate.LOSE)
    assert not store.put_new("marker", b"attempt 3")
    proxy.script(Fate.LOSE, Fate.LOSE, Fate.CONFLICT, Fate.CUT, Fate.BUSY)
    assert store.put_new("second", b"attempt 1")
    assert other.get("marker") == b"attempt 1"


def test_a_lost_answer_does_not_cost_a_swap_or_a_removal(connect: Connect, proxy: FaultProxy) -> None:
    store, other = connect(proxy), connect()
    proxy.script(Fate.LOSE)
    first = store.replace("lease", b"one", None)
    assert first == next(other.list("lease")).etag
    proxy.script(Fate.LOSE)
    second = store.replace("lease", b"two", first)
    assert second == next(other.list("lease")).etag != first
    proxy.script(Fate.LOSE)
    assert other.replace("lease", b"three", first) is None
    assert store.replace("lease", b"four", first) is None
    proxy.script(Fate.PASS, Fate.LOSE)
    assert second is not None
    assert store.delete_if("lease", second)
    assert not other.exists("lease")


def test_lost_answers_of_a_large_upload(connect: Connect, proxy: FaultProxy, tmp_path: Path) -> None:
    store = connect(proxy)
    store.multipart_from = 16 * MIB
    (tmp_path / "big").write_bytes(os.urandom(17 * MIB))
    # create, two parts, complete: the answer to each is lost once
    proxy.script(*[Fate.LOSE, Fate.PASS, Fate.LOSE, Fate.LOSE, Fate.PASS, Fate.PASS, Fate.LOSE])
    store.upload("big", tmp_path / "big")
    store.download("big", tmp_path / "copy")
    assert sha256_file(tmp_path / "copy") == sha256_file(tmp_path / "big")


def test_a_failed_large_upload_is_aborted(
    connect: Connect, proxy: FaultProxy, server: Server, tmp_path: Path
) -> None:
    store = connect(proxy, patience=0.3)
    store.multipart_from = 16 * MIB
    (tmp_path / "big").write_bytes(bytes(17 * MIB))
    proxy.always["partNumber="] = Fate.BUSY
    with pytest.raises(PassingFault, match="upload_part of 'big'"):
        store.upload("big", tmp_path / "big")
    assert not store.exists("big")
    uploads = server.client().list_multipart_uploads(Bucket=server.bucket)
    assert [u for u in uploads.get("Uploads", []) if u["Key"].startswith(store.prefix)] == []


_UPLOAD = """
import pathlib, sys
from rsi_jobs.store import open_store
store = open_store(sys.argv[1])
store.multipart_from = 16 << 20
print("ready", flush=True)
store.upload("big", pathlib.Path(sys.argv[2]))
"""


def test_a_killed_upload_leaves_no_key_and_is_swept(
    connect: Connect, proxy: FaultProxy, server: Server, tmp_path: Path
) -> None:
    store = connect()
    (tmp_path / "big").write_bytes(bytes(17 * MIB))
    proxy.always["partNumber=2"] = Fate.BUSY  # it never comes to the end
    environment = os.environ | server.environment(proxy.endpoint)
    command = [sys.executable, "-c", _UPLOAD, store.uri, str(tmp_path / "big")]
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 30
        while proxy.counts[Fate.BUSY] < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert list(store.list("")) == []
    if server.kind != "moto":  # which says of every upload that it began in 2010
        assert store.sweep(3600) == 0
    assert store.sweep(-1) == 1
    assert store.sweep(-1) == 0


def test_a_server_that_stays_away_is_named_in_time(connect: Connect, proxy: FaultProxy) -> None:
    store = connect(proxy, patience=1.0)
    for fate in (Fate.BUSY, Fate.RESET, Fate.CONFLICT):
        proxy.always["HTTP"] = fate
        started = time.monotonic()
        with pytest.raises(PassingFault, match=r"s3://tests/.*put_object of 'a' failed"):
            store.put("a", b"x")
        assert time.monotonic() - started < 5
    proxy.close()
    with pytest.raises(PassingFault, match="EndpointConnectionError"):
        connect(proxy, patience=0.2).get("a")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_refused_without_telling_them(
    connect: Connect, server: Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if server.kind == "moto":
        return  # it looks at no signature: nothing is wrong
    uri = connect().uri
    monkeypatch.setenv(name, "wrong-and-not-to-be-told")
    store = open_store(uri, patience=1)
    for act in (
        lambda: store.put("a", b"x"),
        lambda: store.get("a"),
        lambda: list(store.list("")),
        lambda: store.delete(["a"]),
        lambda: store.exists("a"),
    ):
        with pytest.raises(StoreDenied) as refusal:
            act()
        told = "".join(traceback.format_exception(refusal.value)) + str(probe(store))
        assert "wrong-and-not" not in told
        assert server.secret_key not in told


def test_no_credentials_and_no_bucket(
    connect: Connect, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    for act in (lambda s: s.put("a", b"x"), lambda s: s.get("a"), lambda s: list(s.list(""))):
        with pytest.raises(NotFoundError, match="there is no bucket 'not-there'"):
            act(open_store("s3://not-there/x", patience=1))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreDenied, match="credentials"):
        open_store(f"s3://{server.bucket}/x", patience=1).put("a", b"x")
    monkeypatch.setenv("AWS_PROFILE", "not-there")
    with pytest.raises(RsiError, match="not-there"):
        open_store(f"s3://{server.bucket}/x")


def test_what_arrives_damaged_is_refused_by_the_server(connect: Connect, server: Server) -> None:
    store = connect(patience=0.5)
    assert store._checksums
    if server.kind == "moto":
        return  # it compares no checksum: nothing is refused
    store._sum = lambda data: S3Store._sum(store, data + b"!")  # type: ignore[method-assign]
    with pytest.raises(RsiError):
        store.put("a", b"x")
    assert not store.exists("a")
