"""A real S3 server for the tests: versitygw where its binary is found, else moto's server.

`python -m tests.s3server` serves until interrupted and prints what to set to use it;
`--install` builds versitygw into .cache/bin with Go.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULE = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bin"


@dataclass(frozen=True)
class Server:
    """A running server with one bucket."""

    kind: str  # "versitygw" or "moto"
    endpoint: str
    access_key: str
    secret_key: str
    bucket: str = "tests"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a process needs to use the server, perhaps through a proxy at `endpoint`."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> Any:
        """A boto3 client of its own for the server, to look behind the store's back."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )


def find() -> Path | None:
    """The versitygw binary: $VERSITYGW (empty: none, so moto), PATH, ~/go/bin or .cache/bin."""
    named = os.environ.get("VERSITYGW")
    if named == "":
        return None
    if named:
        if not os.access(named, os.X_OK):
            raise FileNotFoundError(f"VERSITYGW={named} is not a program")
        return Path(named)
    places = [shutil.which("versitygw"), Path.home() / "go/bin/versitygw", CACHE / "versitygw"]
    return next((Path(p) for p in places if p and os.access(p, os.X_OK)), None)


def install() -> None:
    """Build versitygw into .cache/bin."""
    if not shutil.which("go"):
        sys.exit("Go is not installed: the S3 tests will run against moto's server")
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run(["go", "install", MODULE], check=True, env={**os.environ, "GOBIN": str(CACHE)})


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server on a free port of this machine, gone with all its objects afterwards."""
    binary = find()
    start = _versitygw(binary) if binary else _moto()
    with start as server:
        source = str(binary) if binary else f"versitygw not found ({Path(__file__).name} --install)"
        print(f"S3 server of the tests: {server.kind} ({source})", file=sys.stderr)
        server.client().create_bucket(Bucket=server.bucket)
        yield server


@contextlib.contextmanager
def _versitygw(binary: Path) -> Iterator[Server]:
    access, secret = "tests" + secrets.token_hex(4), secrets.token_hex(20)
    with tempfile.TemporaryDirectory(prefix="rsi-s3-") as folder:
        objects, log = Path(folder, "objects"), Path(folder, "log")
        objects.mkdir()
        for _ in range(5):  # another process may take the free port before the server does
            port = _free_port()
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [str(binary), "--port", f"127.0.0.1:{port}", "--quiet", "posix", str(objects)],
                    env={"ROOT_ACCESS_KEY": access, "ROOT_SECRET_KEY": secret, "PATH": ""},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            try:
                if _answers(port, process.poll):
                    yield Server("versitygw", f"http://127.0.0.1:{port}", access, secret)
                    return
            finally:
                process.terminate()
                process.wait(10)
        raise RuntimeError(f"{binary} does not start: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def _moto() -> Iterator[Server]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    application = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start: Any) -> list[bytes]:
        # moto checks a condition and then writes: one request at a time makes that atomic. Its
        # body is read before, so that a client that stops in the middle holds up nobody else.
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with lock:
            return list(application(environ, start))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Server("moto", f"http://127.0.0.1:{server.port}", "tests", secrets.token_hex(20))
    finally:
        server.shutdown()
        thread.join(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, ended: Callable[[], int | None]) -> bool:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and ended() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1)
        except urllib.error.HTTPError:
            return True  # it refuses an unsigned request: it is there
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False


def main() -> None:
    """Serve until interrupted, or install."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="build versitygw into .cache/bin")
    if parser.parse_args().install:
        install()
        return
    with serve() as server, contextlib.suppress(KeyboardInterrupt):
        for name, value in server.environment().items():
            print(f"export {name}={value}")
        print(f"# --store s3://{server.bucket}/runs", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
