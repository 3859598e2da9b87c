"""An HTTP proxy that stands in front of an S3 server and fails as networks and servers do.

Requests are forwarded as they came, Host header included, so signatures made for the proxy's
address stay valid.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>no</Message></Error>"
DELAY = 0.05  # seconds
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


class Fate(Enum):
    """What becomes of one request."""

    PASS = "passed on"
    BUSY = "answered with 503 SlowDown, not passed on"
    RESET = "connection reset, not passed on"
    DELAY = "passed on late"
    LOSE = "passed on, then the connection is reset instead of an answer"
    CONFLICT = "answered with 409 ConditionalRequestConflict, not passed on"
    CUT = "passed on, the answer's body is cut in the middle"


class FaultProxy:
    """`endpoint` is its address; `counts` tells how many requests met which fate."""

    def __init__(self, upstream: str, shares: Mapping[Fate, float], seed: int) -> None:
        self.upstream = urlsplit(upstream)
        self.counts: Counter[Fate] = Counter()
        self.always: dict[str, Fate] = {}  # fates of requests whose line contains this text
        self._shares = dict(shares)
        self._random = random.Random(seed)
        self._script: list[Fate] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            def fate(self) -> Fate:
                return proxy._draw(self.requestline)

            def upstream(self) -> tuple[str, int]:
                return str(proxy.upstream.hostname), int(proxy.upstream.port or 80)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def script(self, *fates: Fate) -> None:
        """The fates of the next requests, before chance decides again."""
        with self._lock:
            self._script = list(fates)

    def _draw(self, line: str) -> Fate:
        with self._lock:
            fate = next((f for text, f in self.always.items() if text in line), None)
            if fate is None:
                fate = self._script.pop(0) if self._script else self._chance()
            self.counts[fate] += 1
            return fate

    def _chance(self) -> Fate:
        at = self._random.random()
        for fate, share in self._shares.items():
            at -= share
            if at < 0:
                return fate
        return Fate.PASS

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def faulty(
    upstream: str, shares: Mapping[Fate, float] | None = None, *, seed: int = 0
) -> Iterator[FaultProxy]:
    """A proxy to `upstream` (http://host:port) that gives each share of requests its fate."""
    proxy = FaultProxy(upstream, shares or {}, seed)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def fate(self) -> Fate:
        raise NotImplementedError

    def upstream(self) -> tuple[str, int]:
        raise NotImplementedError

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.fate()
        if fate is Fate.BUSY:
            self._answer(503, [], ERROR.format("SlowDown").encode())
            return
        if fate is Fate.CONFLICT:
            self._answer(409, [], ERROR.format("ConditionalRequestConflict").encode())
            return
        if fate is Fate.RESET:
            self._reset()
            return
        if fate is Fate.DELAY:
            time.sleep(DELAY)
        status, headers, answer = self._forward(body)
        if fate is Fate.LOSE:
            self._reset()
        elif fate is Fate.CUT and len(answer) > 1 and self.command != "HEAD":
            self._answer(status, headers, answer, sent=len(answer) // 2)
            self._reset()
        else:
            self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815 (the base's names)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.upstream(), timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int | None = None
    ) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value  # of the object, though no body follows
            elif name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def _reset(self) -> None:
        self.wfile.flush()
        # Linger of zero seconds: the client sees a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: faults are what it is for."""
