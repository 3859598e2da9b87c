"""The tracker against a real `mlflow server`, as `rsi mlflow` starts it, over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rsi_jobs import tracking, tracking_mlflow, tracking_server
from rsi_jobs.errors import ConfigError
from rsi_jobs.plan import Finish
from rsi_jobs.store import open_store
from tests import tracked
from tests.tracked import Past

START = 400.0  # seconds a server may take to answer: it imports much, on a machine that may be busy


class Server:
    """An MLflow server that can be stopped and started again on the same port and database."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = tracking_server.command(str(self.folder), self.port, "127.0.0.1")
        environment = {**os.environ, **tracking_server.ENVIRONMENT}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        end = time.monotonic() + START
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.2)

    def answers(self, path: str = "/version", host: str | None = None) -> bool:
        request = urllib.request.Request(self.uri + path, headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_a_run_through_an_outage_loses_nothing(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    past = Past(open_store(str(tmp_path)), tracked.config(rounds=2))
    tracker = tracking.open_tracker(server.uri, past.store)
    client: Any = tracking_mlflow.connect(server.uri)
    tracker.sync(past.config, past.base(0.1).round(1, 0.3).markers)
    _until(lambda: any("best" in model.aliases for model in client.search_registered_models()))

    server.stop()
    begun = time.monotonic()
    tracker.sync(past.config, past.round(2, 0.6).markers)
    assert time.monotonic() - begun < 1
    _until(lambda: tracker.trouble)
    assert server.uri in tracker.trouble
    server.start()

    tracker.finish(past.config, past.markers, Finish(2, "all 2 rounds are done"))
    assert tracker.trouble == ""
    found = tracked.shown(client)
    runs = {run["name"]: run for run in found["runs"]}
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    history = runs["shapes"]["history"]["heldout"]
    assert [(step, value) for step, _, value in history] == [(0, 0.1), (1, 0.3), (2, 0.6)]
    assert runs["shapes"]["artifacts"] == [f"grid/round_00{n}.png" for n in range(3)]
    assert (runs["shapes-r002"]["models_in"], runs["shapes-r002"]["models_out"]) == (
        ["shapes-r001"],
        [("shapes-r002", 2)],
    )
    assert [model["name"] for model in found["models"]] == [f"shapes-r00{n}" for n in range(3)]
    assert found["registered"][0]["best"] == "2"
    # The next controller, with nothing left to do, changes nothing.
    again = tracking.open_tracker(server.uri, past.store)
    again.finish(past.config, past.markers, Finish(2, "all 2 rounds are done"))
    assert again.trouble == ""
    assert tracked.shown(client) == found
    assert capfd.readouterr().out == ""  # the terminal is the view's


def test_the_server_refuses_a_host_it_was_not_told_of(server: Server) -> None:
    assert server.answers("/", host=f"localhost:{server.port}")
    assert not server.answers("/", host="attacker.example")


def test_a_taken_port_is_a_users_mistake(server: Server) -> None:
    with pytest.raises(ConfigError, match=f"--port {server.port}"):
        tracking_server.serve(str(server.folder), server.port)


def test_only_a_folder_can_be_served() -> None:
    with pytest.raises(ConfigError, match="s3://bucket/runs"):
        tracking_server.serve("s3://bucket/runs", 5000)


def _until(condition: Any) -> None:
    end = time.monotonic() + START
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
