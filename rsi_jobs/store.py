"""The object store that a run lives in: S3 or a folder, with the same keys and the same promises.

Three promises carry everything that is built on a store:
- an object appears whole or not at all, and is still there after a crash;
- of several writers that create one key (`put_new`), or swap one version (`replace`), one wins;
- a read after a write, by anyone, sees that write.

A key is a relative path with `/` between its parts. It is never also the prefix of another key
(`a/b` and `a/b/c`): a folder cannot hold both, nor can an S3 server that keeps its objects in one.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from rsi_jobs.errors import ConfigError, RsiError

RESERVED = ".rsi-"  # parts that start so are the store's own (locks, temporary files), never keys
ACCEPTED = "a folder (runs, /data/runs, file:///data/runs) or s3://BUCKET/PREFIX"
MAX_KEY_BYTES = 1024  # S3's limit, the store's prefix included
MAX_PART_BYTES = 255  # a file name's limit
MAX_SKEW = 30.0  # seconds between this machine's clock and the store's; leases compare the two
_ROUNDS = 4  # races of two writers in a probe
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class Entry:
    """One object: its size in bytes, a tag that changes with the content, and unix seconds."""

    key: str
    size: int
    etag: str
    modified: float


class Store(Protocol):
    """What a folder and S3 both do.

    Every method may raise StoreDenied (read-only, wrong credentials, no rights), CannotCreate (no
    space left), PassingFault (no answer, also after asking again) and ConfigError (not a key).
    """

    @property
    def uri(self) -> str:
        """The absolute folder, or s3://bucket/prefix."""

    def get(self, key: str) -> bytes:
        """The whole object; NotFoundError if there is none."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer (down to none) where the object ends before."""

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite, whole or not at all."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Create, never overwrite: whether `data` is what stands there.

        True also when an earlier answer to this very write was lost, which only the content can
        tell. So data must hold something that no other writer has, such as an attempt's id.
        """

    def replace(self, key: str, data: bytes, etag: str | None) -> str | None:
        """Swap the version `etag` (None: nothing there yet) for `data`, which must be unique.

        Returns the new etag, or None when another version stands there: someone else was first,
        or (only after a lost answer) has replaced ours since.
        """

    def upload(self, key: str, path: Path) -> None:
        """`put` for a file of any size."""

    def download(self, key: str, path: Path) -> None:
        """The object as the file `path`, which appears whole or not at all."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose key starts with `prefix` (any string), in the order of their keys."""

    def delete(self, keys: Iterable[str]) -> int:
        """Remove; a key that is not there is no error. Returns how many keys were asked for."""

    def delete_if(self, key: str, etag: str) -> bool:
        """Remove the version `etag`; False, and nothing removed, if that is not what stands."""

    def exists(self, key: str) -> bool:
        """Whether an object stands there."""

    def sweep(self, older_than: float = 86400.0) -> int:
        """Remove what killed writers left unfinished, older than this many seconds; how many."""


def open_store(uri: str, *, create: bool = True, patience: float = 60.0) -> Store:
    """The store at `uri`: a plain path, a file: URI or s3://bucket/prefix.

    create: make the folder if it is missing (otherwise NotFoundError); a bucket is never made.
    patience: for how many seconds a server that does not answer is asked again.
    No request is sent to S3 here: `probe` does that.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", uri)
    if scheme is None or scheme[1].lower() == "file":
        from rsi_jobs.store_folder import FolderStore

        return FolderStore(_folder_of(uri) if scheme else _plain(uri), create=create)
    if scheme[1].lower() != "s3":
        raise ConfigError(f"store {uri!r}: {scheme[0]} is not supported; give {ACCEPTED}")
    bucket, _, prefix = uri[len("s3:") :].removeprefix("//").partition("/")
    if not uri[len("s3:") :].startswith("//") or not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"store {uri!r}: {bucket!r} is no bucket name; give {ACCEPTED}")
    prefix = prefix.strip("/")
    if prefix:
        check_key(prefix, origin=f"the prefix of store {uri!r}")
    from rsi_jobs.store_s3 import S3Store

    return S3Store(bucket, prefix, patience=patience)


def _plain(path: str) -> Path:
    if not path.strip() or "\0" in path:
        raise ConfigError(f"store {path!r} is no folder; give {ACCEPTED}")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:  # an unknown ~user
        raise ConfigError(f"store {path!r}: there is no such home folder; give {ACCEPTED}") from None


def _folder_of(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigError(f"store {uri!r}: a file: URI needs an absolute path; give {ACCEPTED}")
    if parts.query or parts.fragment:
        raise ConfigError(f"store {uri!r}: a file: URI has no ? or # part; give {ACCEPTED}")
    return _plain(unquote(parts.path))


def check_key(key: str, *, origin: str = "store key") -> str:
    """`key` itself, if both kinds of store can hold it; ConfigError if not."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"{origin} {key!r}: give a relative path with no empty, . or .. part")
    if any(ord(c) < 32 or c in "\\\x7f" or 0xD800 <= ord(c) < 0xE000 for c in key):
        raise ConfigError(f"{origin} {key!r}: control characters and \\ are not accepted")
    if any(part.startswith(RESERVED) for part in parts):
        raise ConfigError(f"{origin} {key!r}: parts that start with {RESERVED} are reserved")
    if len(key.encode()) > MAX_KEY_BYTES or any(len(p.encode()) > MAX_PART_BYTES for p in parts):
        raise ConfigError(
            f"{origin} {key!r}: at most {MAX_KEY_BYTES} bytes, {MAX_PART_BYTES} a part, accepted"
        )
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` itself, if it can start a key; ConfigError if not."""
    if prefix:
        check_key(prefix + "x" if prefix.endswith("/") else prefix, origin="store prefix")
    return prefix


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Check:
    """One thing that `probe` tried, and in a few words what came of it."""

    name: str
    ok: bool
    detail: str


def probe(store: Store) -> list[Check]:
    """Try on a throwaway folder whether `store` keeps its promises, and clean up.

    Where it cannot even be written to, that is the only check.
    """
    folder = f"rsi-doctor-{uuid.uuid4().hex[:12]}"
    questions: dict[str, Callable[[Store, str], str]] = {
        "write": _writes,
        "read after write": _reads,
        "list": _lists,
        "one of two writers wins": _creates_once,
        "compare and swap": _swaps_once,
        "conditional delete": _deletes_one_version,
        "clock": _tells_time,
        "delete": _deletes,
    }
    checks: list[Check] = []
    for name, question in questions.items():
        try:
            checks.append(Check(name, True, question(store, folder)))
        except (_BrokenError, RsiError) as error:
            checks.append(Check(name, False, str(error)))
            if name == "write":
                break
    return checks


class _BrokenError(Exception):
    """A promise that a store did not keep."""


def _require(kept: bool, otherwise: str) -> None:
    if not kept:
        raise _BrokenError(otherwise)


def _writes(store: Store, folder: str) -> str:
    store.put(f"{folder}/object", b"first")
    return f"{store.uri} can be written to"


def _reads(store: Store, folder: str) -> str:
    key = f"{folder}/object"
    for version in (b"0123456789", b"9876543210"):
        store.put(key, version)
        _require(store.get(key) == version, "a read gave an older version than was written")
        _require(store.get_range(key, 2, 3) == version[2:5], "a range gave other bytes")
    return "a read sees the latest write, ranges too"


def _lists(store: Store, folder: str) -> str:
    wanted = [f"{folder}/list/{name}" for name in ("a.b", "a/b", "b")]
    for key in reversed(wanted):
        store.put(key, key.encode())
    found = [(entry.key, entry.size) for entry in store.list(f"{folder}/list/")]
    _require(found == [(k, len(k)) for k in wanted], f"wrote {wanted}, listed {found}")
    store.delete(wanted[:1])
    left = [entry.key for entry in store.list(f"{folder}/list/")]
    _require(left == wanted[1:], f"removed {wanted[0]}, listed {left}")
    return "a listing sees the latest write and removal"


def _creates_once(store: Store, folder: str) -> str:
    for number in range(_ROUNDS):
        key = f"{folder}/race-{number}"
        won = _race(partial(store.put_new, key))
        _require(
            len(won) == 1,
            f"{len(won)} of 2 writers created the same key: the store does not honour "
            "If-None-Match, so runs are not safe there; use another store",
        )
        _require(store.get(key) == won[0], "the winner's object was overwritten")
    return f"{_ROUNDS} races of 2 writers, 1 winner each"


def _swaps_once(store: Store, folder: str) -> str:
    key = f"{folder}/swap"
    etag = store.replace(key, b"start", None)
    for _ in range(_ROUNDS):
        old = etag
        won = _race(partial(store.replace, key, etag=old))
        _require(
            len(won) == 1,
            f"{len(won)} of 2 writers replaced the same version: the store does not honour "
            "If-Match, so two controllers could run at once",
        )
        etag = next(entry.etag for entry in store.list(key))
        _require(etag != old, "the etag did not change with the content")
    return f"{_ROUNDS} races of 2 writers, 1 winner each"


def _deletes_one_version(store: Store, folder: str) -> str:
    key = f"{folder}/version"
    old, new = store.replace(key, b"old", None), None
    if old is not None:
        new = store.replace(key, b"new", old)
    _require(old is not None and new is not None, "could not write two versions")
    _require(not store.delete_if(key, str(old)), "an older version's etag removed a newer one")
    _require(store.delete_if(key, str(new)) and not store.exists(key), "it was not removed")
    return "only the version that was meant is removed"


def _tells_time(store: Store, folder: str) -> str:
    key = f"{folder}/clock"
    before = time.time()
    store.put(key, b"tick")
    after = time.time()
    modified = next(entry.modified for entry in store.list(key))
    # S3 lists whole seconds, so up to one less than it was.
    skew = max(0.0, modified - after) or min(0.0, modified + 1 - before)
    _require(
        abs(skew) <= MAX_SKEW,
        f"the store's clock is {skew:+.0f} s from this machine's, at most {MAX_SKEW:.0f} s "
        "is safe; set the clocks",
    )
    return f"{skew:+.1f} s from this machine's" if skew else "the same as this machine's"


def _deletes(store: Store, folder: str) -> str:
    store.delete([entry.key for entry in store.list(folder + "/")])
    left = [entry.key for entry in store.list(folder + "/")]
    _require(not left, f"{len(left)} objects below {store.uri}/{folder} are still there")
    return "nothing is left of these checks"


def _race(write: Callable[[bytes], object]) -> list[bytes]:
    """What those of two writers wrote who were told that they had won."""
    start = threading.Barrier(2)

    def writer(number: int) -> bytes | None:
        # Large enough that the two requests overlap in a server that looks before it writes.
        data = f"writer {number} {uuid.uuid4().hex}\n".encode() * 1000
        start.wait()
        return data if write(data) else None

    with ThreadPoolExecutor(2) as pool:
        return [data for data in pool.map(writer, range(2)) if data is not None]
