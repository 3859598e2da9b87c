"""`rsi mlflow`: an MLflow server on the database of a folder store."""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from rsi_jobs.errors import ConfigError

# Job workers are for evaluations that are started from the page: five more processes that no one needs here.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(store_uri: str, port: int = 5000, host: str = "127.0.0.1") -> NoReturn:
    """Become an MLflow server that shows the runs of a folder store.

    Raises:
        ConfigError: the store is not a folder, or the port is taken.
    """
    argv = command(store_uri, port, host)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port} on --host {host} cannot be used ({error.strerror}): give another"
            ) from None
    shown = "localhost" if host in ("0.0.0.0", "::", *LOCAL) else host
    print(f"MLflow: http://{shown}:{port} (Ctrl-C ends it)", flush=True)
    os.execve(sys.executable, argv, {**ENVIRONMENT, **os.environ})


def command(store_uri: str, port: int, host: str) -> list[str]:
    """The server's argv. SQLite bears one worker; MLflow refuses Host headers it was not told of."""
    from rsi_jobs.tracking import default_uri

    argv = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    argv += ["--host", host, "--port", str(port)]
    argv += ["--backend-store-uri", default_uri(store_uri)]
    argv += ["--artifacts-destination", f"{store_uri}/mlartifacts"]
    if host not in LOCAL:
        names = {socket.gethostname(), socket.getfqdn(), *(() if host in ("0.0.0.0", "::") else (host,))}
        private = ["localhost", "127.0.0.1", "10.*", "192.168.*", *(f"172.{n}.*" for n in range(16, 32))]
        hosts = [each for name in [*private, *sorted(names)] for each in (name, f"{name}:*")]
        argv += ["--allowed-hosts", ",".join(hosts)]
    return argv
