"""Keeps the tail of a stage's output in the store, so that it outlives the process and its pod."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType

from rsi_jobs.errors import RsiError
from rsi_jobs.store import Store

EVERY = 15.0  # seconds between two uploads
TAIL = 256 * 1024  # bytes kept


class LogTail:
    """Copies file descriptors 1 and 2 to where they went and, at intervals, to a key of the store.

    At the level of descriptors, so that what native code and a traceback write is kept too. SIGTERM
    uploads at once: an evicted pod is gone within seconds.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        self.finished = False
        self._kept = bytearray()
        self._dirty = False
        self._lock = threading.Lock()
        self._done = threading.Event()

    def __enter__(self) -> LogTail:
        sys.stdout.flush()
        sys.stderr.flush()
        self._out = os.dup(1)
        self._err = os.dup(2)
        read, write = os.pipe()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        self._reader = threading.Thread(target=self._copy, args=(read,), daemon=True)
        self._uploader = threading.Thread(target=self._upload_often, daemon=True)
        self._reader.start()
        self._uploader.start()
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self._out, 1)
        os.dup2(self._err, 2)
        self._reader.join(timeout=5)
        self._done.set()
        self._upload()
        os.close(self._out)
        os.close(self._err)

    def _copy(self, read: int) -> None:
        while chunk := os.read(read, 65536):
            with contextlib.suppress(OSError):
                os.write(self._err, chunk)
            with self._lock:
                self._kept += chunk
                del self._kept[:-TAIL]
                self._dirty = True
        os.close(read)

    def _upload_often(self) -> None:
        while not self._done.wait(EVERY):
            self._upload()

    def _upload(self) -> None:
        with self._lock:
            data, dirty = bytes(self._kept), self._dirty
            self._dirty = False
        if dirty:
            try:
                self.store.put(self.key, data)
            except (RsiError, OSError) as error:  # a log must never fail a stage
                with contextlib.suppress(OSError):
                    os.write(self._err, f"the log could not be stored: {error}\n".encode())

    def _terminated(self, signum: int, frame: FrameType | None) -> None:
        self._upload()
        os._exit(128 + signum)
