"""A folder as the object store: one file an object, keys are relative paths."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from rsi_jobs.errors import (
    NO_SPACE,
    CannotCreate,
    ConfigError,
    NotFoundError,
    PassingFault,
    RsiError,
    StoreDenied,
)
from rsi_jobs.store import RESERVED, Entry, check_key, check_prefix

_TEMP = RESERVED + "tmp-"
_LOCK = RESERVED + "lock"
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_ATTEMPTS = 16  # to write into a folder that others empty and remove at the same time


class FolderStore:
    """Objects are published with a hard link (`put_new`) or a rename of a synced temporary file.

    What checks a version and then acts (and every overwrite and removal) holds a lock on a file
    of the store, so that writers in other processes, and on other machines where the file system
    passes locks on (NFS 4), cannot come between.
    """

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)
        if create:
            try:
                with _translated(self.root):
                    self.root.mkdir(parents=True, exist_ok=True)
            except CannotCreate:
                raise ConfigError(f"store {self.uri} is not a folder; give a folder") from None
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise NotFoundError(f"store {self.uri} {what}; give the folder of an earlier run")

    def get(self, key: str) -> bytes:
        """The whole object."""
        with self._open(key) as file:
            return file.read()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer at the end."""
        if start < 0 or length < 0:
            raise ValueError(f"a range starts at 0 or later, not at {start}, {length} bytes")
        with self._open(key) as file:
            file.seek(start)
            return file.read(length)

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite."""
        self._overwrite(key, lambda file: _write(file, data))

    def upload(self, key: str, path: Path) -> None:
        """Copy a file in."""
        check_key(key)
        with _translated(path):
            source = path.open("rb")
        with source:
            self._overwrite(key, lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def put_new(self, key: str, data: bytes) -> bool:
        """Create, never overwrite."""
        target = self._path(key)
        with _translated(target), self._temporary(target, lambda f: _write(f, data)) as temporary:
            for _ in range(_ATTEMPTS):
                if self._publish_new(temporary, target):
                    _sync_folder(target.parent)
                    return True
                with contextlib.suppress(FileNotFoundError):  # removed just now: try again
                    return target.read_bytes() == data
        raise PassingFault(f"{target} is created and removed by others all the time; try again")

    def replace(self, key: str, data: bytes, etag: str | None) -> str | None:
        """Compare and swap."""
        target = self._path(key)
        with _translated(target), self._temporary(target, lambda f: _write(f, data)) as temporary:
            new = _etag(temporary.stat())
            with self._locked():
                if etag is None:
                    _make_way(target)
                    if not self._link_or_rename(temporary, target):
                        return None
                elif self._etag_of(target) != etag:
                    return None
                else:
                    os.replace(temporary, target)
            _sync_folder(target.parent)
            return new

    def download(self, key: str, path: Path) -> None:
        """Copy an object out."""
        temporary = path.with_name(f"{_TEMP}{uuid.uuid4().hex}")
        with self._open(key) as source, _translated(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose key starts with `prefix`, sorted by key."""
        folder, _, start = check_prefix(prefix).rpartition("/")
        return self._walk(folder + "/" if folder else "", start)

    def delete(self, keys: Iterable[str]) -> int:
        """Remove, and the folders that this empties."""
        paths = [self._path(key) for key in keys]
        for path in paths:
            with _translated(path), self._locked():
                self._remove(path)
        return len(paths)

    def delete_if(self, key: str, etag: str) -> bool:
        """Remove one version."""
        path = self._path(key)
        with _translated(path), self._locked():
            if self._etag_of(path) != etag:
                return False
            self._remove(path)
        return True

    def exists(self, key: str) -> bool:
        """Whether an object stands there."""
        path = self._path(key)
        with _translated(path):
            return self._etag_of(path) is not None

    def sweep(self, older_than: float = 86400.0) -> int:
        """Remove temporary files that killed writers left."""
        old = [p for p in self.root.rglob(f"{_TEMP}*") if time.time() - _modified(p) > older_than]
        for path in old:
            with _translated(path):
                path.unlink(missing_ok=True)
        return len(old)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with _translated(path):
            try:
                return path.open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NotFoundError(f"store {self.uri} has no object {key!r}") from None

    def _overwrite(self, key: str, write: Callable[[BinaryIO], object]) -> None:
        target = self._path(key)
        with _translated(target), self._temporary(target, write) as temporary:
            with self._locked():
                _make_way(target)
                os.replace(temporary, target)
            _sync_folder(target.parent)

    @contextlib.contextmanager
    def _temporary(self, target: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
        """A synced file beside `target`, gone afterwards unless it was renamed."""
        path = target.with_name(f"{_TEMP}{uuid.uuid4().hex}")
        try:
            with self._create(path) as file:
                write(file)
                file.flush()
                # The clock of files ticks every few milliseconds: too coarse to tell versions.
                now = time.time_ns()
                os.utime(file.fileno(), ns=(now, now))
                os.fsync(file.fileno())
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _create(self, path: Path) -> BinaryIO:
        for _ in range(_ATTEMPTS):
            _make_folder(path.parent)
            with contextlib.suppress(FileNotFoundError):  # emptied and removed since
                return path.open("xb")
        raise PassingFault(f"{path.parent} is removed by others all the time; try again")

    def _publish_new(self, temporary: Path, target: Path) -> bool:
        """Give a temporary file its name unless that is taken; whether it was free."""
        _make_way(target)
        try:
            os.link(temporary, target)
        except FileExistsError:
            # On NFS the answer to a link that was made can get lost.
            with contextlib.suppress(FileNotFoundError):
                return target.samefile(temporary)
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self._locked():  # no hard links here: the lock keeps the others out
                return self._link_or_rename(temporary, target)
        return True

    def _link_or_rename(self, temporary: Path, target: Path) -> bool:
        """As _publish_new, for one who holds the lock."""
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(target):
                return False
            os.rename(temporary, target)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise StoreDenied(
                    f"store {self.uri}: its file system has no file locks; give a local folder, "
                    "an NFS 4 mount or s3://BUCKET/PREFIX"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def _etag_of(self, path: Path) -> str | None:
        try:
            return _etag(path.stat()) if path.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or not ours to remove: a folder is no object

    def _walk(self, folder: str, start: str) -> Iterator[Entry]:
        """Entries below the key prefix `folder` whose name starts with `start`."""
        path = self.root / folder
        with _translated(path):
            try:
                with os.scandir(path) as scan:
                    found = [e for e in scan if e.name.startswith(start)]
            except (FileNotFoundError, NotADirectoryError):
                return
            # "a.b" < "a/b": a folder sorts as its keys do, with the slash.
            named = [(e.name + "/" if e.is_dir() else e.name, e) for e in found]
        for name, entry in sorted(named, key=lambda pair: pair[0]):
            if name.startswith(RESERVED):
                continue
            if name.endswith("/"):
                yield from self._walk(folder + name, "")
                continue
            with _translated(path):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # removed since
                    continue
            yield Entry(folder + name, status.st_size, _etag(status), status.st_mtime)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _make_way(target: Path) -> None:
    """Remove an empty folder that a removed object's key left in the way."""
    if target.is_dir():
        target.rmdir()


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, each synced into the one above it."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir()
        except FileExistsError:
            if not new.is_dir():
                raise
        except FileNotFoundError:  # a parent was emptied and removed since: the caller tries again
            return
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # emptied and removed since, by someone who could see what we wrote
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about `path` into ours."""
    try:
        yield
    except OSError as error:
        raise translate(path, error) from error


def translate(path: Path, error: OSError) -> RsiError:
    """Our error for the operating system's about `path`."""
    reason = error.strerror or type(error).__name__
    if error.errno in NO_SPACE:
        return CannotCreate(f"{path}: no space left on the file system of {path.parent}")
    if error.errno in _DENIED:
        return StoreDenied(f"{path}: {reason}; give a folder that this user may write to")
    if error.errno == errno.ENAMETOOLONG:
        return CannotCreate(f"{path}: the name is too long for this file system")
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY):
        return CannotCreate(
            f"{path}: {reason}: no file can be a folder too, and no key the folder of another"
        )
    if error.errno == errno.ENOENT:
        return NotFoundError(f"{path} does not exist")
    return PassingFault(f"{path}: {reason}; try again")
