"""The tracker's thread with a fake writer, and its writer with a real MLflow on SQLite."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsi_jobs import tracking, tracking_mlflow
from rsi_jobs.errors import ConfigError
from rsi_jobs.plan import Finish
from rsi_jobs.store import Store, open_store
from rsi_jobs.tracking import MlflowTracker
from rsi_jobs.tracking_entries import RunEntry, Status, run_entry
from rsi_jobs.tracking_mlflow import Writer
from tests import tracked
from tests.tracked import Past


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database: its migrations take seconds, so they are made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking_mlflow.connect(f"sqlite:///{path}").search_experiments()
    return path


class Place:
    """A folder store with its MLflow database."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.store: Store = open_store(str(folder))
        shutil.copy(database, folder / "mlflow.db")
        self.uri = tracking.default_uri(self.store.uri)
        self.client: Any = tracking_mlflow.connect(self.uri)

    def write(self, past: Past, status: Status = "RUNNING", through: Any = None, reason: str = "") -> None:
        """As a controller does that was just started."""
        entry = run_entry(self.store, past.config, past.markers, status, reason=reason)
        assert entry is not None
        Writer(through or self.client, self.uri, self.store).write(entry)

    def shown(self) -> dict[str, Any]:
        return tracked.shown(self.client)


@pytest.fixture
def place(tmp_path: Path, empty_database: Path) -> Place:
    (tmp_path / "a").mkdir()
    return Place(tmp_path / "a", empty_database)


def some_rounds(store: Store) -> Past:
    past = Past(store, tracked.config(rounds=3))
    past.base(0.1).round(1, 0.3).round(2, 0.2, "rollback")
    past.train(3)
    return past


class Killed(BaseException):
    """The controller's process ends here."""


class Dies:
    """A client whose process is killed at its n-th writing request: before it, or before the answer."""

    WRITES = ("create_", "log_", "set_", "update_", "finalize_", "delete_")

    def __init__(self, client: Any, left: int, carried_out: bool) -> None:
        self.client, self.left, self.carried_out = client, left, carried_out

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if not name.startswith(self.WRITES):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left > 0:
                return method(*args, **kwargs)
            if self.carried_out:
                method(*args, **kwargs)
            raise Killed

        return call


def test_mlflow_shows_the_whole_run(place: Place) -> None:
    past = some_rounds(place.store)
    place.write(past)
    found = place.shown()
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == ["shapes", "shapes-r000", "shapes-r001", "shapes-r002", "shapes-r003"]
    parent = runs["shapes"]
    assert [(step, value) for step, _, value in parent["history"]["heldout"]] == [
        (0, 0.1),
        (1, 0.3),
        (2, 0.2),
    ]
    assert parent["params"]["sampling.candidates"] == "8"
    assert parent["artifacts"] == [f"grid/round_00{n}.png" for n in range(3)]
    assert parent["status"] == "RUNNING"
    first = runs["shapes-r001"]
    assert first["tags"]["mlflow.parentRunId"] == "shapes"
    assert first["datasets"][0][0] == "shapes-r001"
    assert (first["models_in"], first["models_out"]) == (["shapes-r000"], [("shapes-r001", 1)])
    assert [runs[f"shapes-r00{n}"]["status"] for n in range(4)] == ["FINISHED"] * 3 + ["RUNNING"]
    models = {model["name"]: model for model in found["models"]}
    assert list(models) == ["shapes-r000", "shapes-r001", "shapes-r002"]
    assert {"heldout", "train/loss", "accepted"} <= {metric[0] for metric in models["shapes-r001"]["metrics"]}
    assert all(model["status"] == "READY" for model in models.values())
    registered = found["registered"][0]
    assert (registered["name"], registered["best"]) == ("shapes", "1")
    assert registered["versions"][0][1] == "shapes-r001"


def test_the_dataset_and_the_grid_are_the_ones_in_the_store(place: Place, tmp_path: Path) -> None:
    import mlflow.data

    past = some_rounds(place.store)
    place.write(past)
    experiment = place.client.get_experiment_by_name("shapes:base")
    assert experiment.artifact_location == f"{place.store.uri}/mlartifacts"
    run = place.client.search_runs([experiment.experiment_id], "tags.`rsi.round` = '1'")[0]
    source = mlflow.data.get_source(run.inputs.dataset_inputs[0])
    assert (Path(source.uri) / "part-00000.parquet").exists()
    grid = Path(place.client.download_artifacts(run.info.run_id, "grid/round_001.png", str(tmp_path)))
    assert grid.read_bytes().startswith(tracked.PNG + b"round 1 eval select grid.png")


def test_logging_twice_changes_nothing(place: Place) -> None:
    past = some_rounds(place.store)
    place.write(past)
    once = place.shown()
    place.write(past)
    assert place.shown() == once


def test_a_restarted_controller_with_nothing_new_writes_nothing(place: Place) -> None:
    past = some_rounds(place.store)
    place.write(past)
    place.write(past, through=Dies(place.client, left=1, carried_out=False))


def test_stage_by_stage_or_all_at_once_is_the_same(
    place: Place, tmp_path: Path, empty_database: Path
) -> None:
    past = some_rounds(place.store)
    whole = past.markers
    entries = sorted(whole.items(), key=lambda item: item[1].started)
    writer = Writer(place.client, place.uri, place.store)
    for upto in range(1, len(entries) + 1):
        entry = run_entry(place.store, past.config, dict(entries[:upto]), "RUNNING")
        assert entry is not None
        writer.write(entry)
    (tmp_path / "b").mkdir()
    other = Place(tmp_path / "b", empty_database)
    other.write(some_rounds(other.store))
    assert _without_addresses(place.shown()) == _without_addresses(other.shown())


@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "answer lost"])
def test_killed_at_any_request_and_started_again(
    place: Place, tmp_path: Path, empty_database: Path, carried_out: bool
) -> None:
    """One controller after another is killed at its fourth request; the first one's shift moves the cuts."""
    past = Past(place.store, tracked.config(rounds=1)).base(0.1).round(1, 0.3)
    place.write(past, "FINISHED", reason="all 1 rounds are done")
    wanted = _without_addresses(place.shown())
    for first in range(1, 5):
        folder = tmp_path / str(first)
        folder.mkdir()
        other = Place(folder, empty_database)
        again = Past(other.store, tracked.config(rounds=1)).base(0.1).round(1, 0.3)
        deaths = 0
        while True:
            client = Dies(other.client, left=4 if deaths else first, carried_out=carried_out)
            try:
                other.write(again, "FINISHED", through=client, reason="all 1 rounds are done")
            except Killed:
                deaths += 1
                assert deaths < 50
            else:
                break
        assert deaths > 5
        assert _without_addresses(other.shown()) == wanted


def test_the_alias_best_moves_and_versions_are_never_made_twice(place: Place) -> None:
    past = Past(place.store, tracked.config()).base(0.1)
    place.write(past)
    assert place.shown()["registered"] == []  # the base is not ours to register
    wanted = []
    for round_, heldout, best in ((1, 0.3, 1), (2, 0.25, 1), (3, 0.6, 3), (4, 0.5, 3)):
        place.write(past.round(round_, heldout))
        (found,) = place.shown()["registered"]
        version = place.client.get_model_version_by_alias("shapes", "best")
        assert version.tags["rsi.key"].endswith(f"/r00{best}")
        assert version.tags["rsi.uri"].endswith(f"/r00{best}/train-t0/finetune/s0000/a-a1/checkpoint")
        wanted = sorted({*wanted, best})
        assert [name for _, name, _ in found["versions"]] == [f"shapes-r00{n}" for n in wanted]


def test_a_request_that_was_carried_out_late_leaves_no_twin(place: Place) -> None:
    past = some_rounds(place.store)
    place.write(past)
    once = place.shown()
    experiment = place.client.get_experiment_by_name("shapes:base").experiment_id
    run = place.client.search_runs([experiment], "tags.`rsi.round` = '1'")[0]
    place.client.create_run(experiment, run.info.start_time, dict(run.data.tags), run.info.run_name)
    place.write(past)
    place.write(past)
    assert _without_addresses(place.shown()) == _without_addresses(once)


def test_a_resumed_run_is_running_again(place: Place) -> None:
    past = some_rounds(place.store)
    place.write(past, "KILLED", reason="was cancelled")
    states = {run["name"]: run["status"] for run in place.shown()["runs"]}
    assert (states["shapes"], states["shapes-r003"], states["shapes-r002"]) == (
        "KILLED",
        "KILLED",
        "FINISHED",
    )
    place.write(past)
    states = {run["name"]: run["status"] for run in place.shown()["runs"]}
    assert (states["shapes"], states["shapes-r003"], states["shapes-r002"]) == (
        "RUNNING",
        "RUNNING",
        "FINISHED",
    )


def test_a_run_begun_anew_under_an_old_name_is_another(place: Place) -> None:
    place.write(Past(place.store, tracked.config()).base(0.1).round(1, 0.3), "FINISHED")
    shutil.rmtree(Path(place.store.uri) / "shapes")
    place.write(Past(place.store, tracked.config()).base(0.1).round(1, 0.9), "FINISHED")
    found = place.shown()
    scores = [run["history"]["heldout"][-1][2] for run in found["runs"] if run["name"] == "shapes"]
    assert sorted(scores) == [0.3, 0.9]
    assert len(found["registered"]) == 2


def test_a_moved_store_is_the_same_run(place: Place, tmp_path: Path) -> None:
    past = some_rounds(place.store)
    place.write(past)
    moved = tmp_path / "moved"
    shutil.copytree(Path(place.store.uri) / "shapes", moved / "shapes")
    past.store = open_store(str(moved))
    entry = run_entry(past.store, past.config, past.round(3, 0.4).markers, "RUNNING")
    assert entry is not None
    Writer(place.client, place.uri, past.store).write(entry)
    assert [run["name"] for run in place.shown()["runs"]].count("shapes") == 1


def _without_addresses(shown: dict[str, Any]) -> dict[str, Any]:
    for each in shown["registered"]:
        each["versions"] = [(number, name) for number, name, _ in each["versions"]]
    return shown


class FakeWriter:
    """Takes entries, fails while told to, and can be made to wait."""

    def __init__(self) -> None:
        self.entries: list[RunEntry] = []
        self.made = 0
        self.error: Exception | None = None
        self.free = threading.Event()
        self.free.set()
        self.tried = threading.Semaphore(0)

    def make(self) -> FakeWriter:
        self.made += 1
        return self

    def write(self, entry: RunEntry) -> None:
        self.tried.release()
        self.free.wait(10)
        if self.error is not None:
            raise self.error
        self.entries.append(entry)


@pytest.fixture
def fake(tmp_path: Path) -> tuple[FakeWriter, MlflowTracker, Past]:
    writer = FakeWriter()
    store = open_store(str(tmp_path))
    past = Past(store, tracked.config())
    return writer, MlflowTracker("http://mlflow:5000", store, writer.make, patience=0.3), past


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


Fake = tuple[FakeWriter, MlflowTracker, Past]


def test_the_loop_does_not_wait_for_mlflow(fake: Fake) -> None:
    writer, tracker, past = fake
    writer.free.clear()
    tracker.sync(past.config, past.base().markers)
    assert writer.tried.acquire(timeout=10)
    for number in range(1, 6):
        past.round(number, 0.3)
        tracker.sync(past.config, past.markers)  # would hang here
    writer.free.set()
    tracker.finish(past.config, past.markers, Finish(1, "all done"))
    assert tracker.trouble == ""
    assert len(writer.entries[0].rounds) == 1
    assert (len(writer.entries[-1].rounds), writer.entries[-1].status) == (6, "FINISHED")
    assert len(writer.entries) <= 3  # what was overtaken is not written


def test_nothing_new_is_not_written_again(fake: Fake) -> None:
    writer, tracker, past = fake
    past.base()
    for _ in range(3):
        tracker.sync(past.config, dict(past.markers))
        until(lambda: writer.entries)
    tracker.stop(past.config, past.markers, "KILLED", "cancelled")
    assert [entry.status for entry in writer.entries] == ["RUNNING", "KILLED"]


def test_an_outage_is_told_and_made_up_for(fake: Fake) -> None:
    writer, tracker, past = fake
    writer.error = ConnectionError("refused")
    tracker.sync(past.config, past.base().markers)
    until(lambda: tracker.trouble)
    assert "http://mlflow:5000" in tracker.trouble
    assert "ConnectionError: refused" in tracker.trouble
    tracker.sync(past.config, past.round(1, 0.3).markers)
    writer.error = None
    until(lambda: writer.entries)
    until(lambda: not tracker.trouble)
    assert len(writer.entries[0].rounds) == 2
    assert writer.made >= 2  # what it knew before the outage is not trusted after it


def test_a_run_ends_without_mlflow_and_says_so(fake: Fake) -> None:
    writer, tracker, past = fake
    writer.error = ConnectionError("refused")
    begun = time.monotonic()
    tracker.finish(past.config, past.base().markers, Finish(0, "all done"))
    assert time.monotonic() - begun < 10
    assert "does not have all of run shapes yet" in tracker.trouble


def test_the_note_says_what_the_run_waits_for_until_it_is_taken_back(fake: Fake) -> None:
    writer, tracker, past = fake
    tracker.note(past.config, "quota: 0 of 4 GPUs are free")
    until(lambda: writer.entries)
    assert "quota: 0 of 4" in writer.entries[-1].tags["mlflow.note.content"]
    tracker.note(past.config, "")
    tracker.sync(past.config, past.base().markers)
    tracker.finish(past.config, past.markers, Finish(0, "all done"))
    assert "Waiting" not in writer.entries[-1].tags["mlflow.note.content"]


def test_none_is_a_tracker_that_does_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    tracker = tracking.open_tracker("none", store)
    tracker.sync(tracked.config(), {})
    tracker.finish(tracked.config(), {}, Finish(0, ""))
    assert tracker.trouble == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["", "mlruns", "file:///tmp/mlruns", "ftp://host", "5000"])
def test_an_address_mlflow_cannot_be_at_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sqlite:///FILE"):
        tracking.open_tracker(uri, open_store(str(tmp_path)))


def test_a_bucket_has_no_default_address() -> None:
    assert tracking.default_uri("/data/runs") == "sqlite:////data/runs/mlflow.db"
    with pytest.raises(ConfigError, match="s3://bucket/runs"):
        tracking.default_uri("s3://bucket/runs")


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    tracker = tracking.open_tracker("https://me:secret@mlflow.example:8443/x", open_store(str(tmp_path)))
    assert isinstance(tracker, MlflowTracker)
    assert tracker.name == "https://me@mlflow.example:8443/x"
