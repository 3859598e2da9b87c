"""Pruning: what a standing marker names survives whatever else lies around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rsi_jobs import cli, layout, marker, prune
from rsi_jobs.layout import StageRef
from rsi_jobs.store import Store, open_store
from tests.fakerun import FakeRun, small_config

RUN = "made-up"
SELECT = StageRef(1, "train", 0, "select")
FINETUNE = StageRef(1, "train", 0, "finetune")
OPEN = StageRef(2, "train", 0, "finetune")  # no marker: an attempt may be at work


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    run = FakeRun(open_store(str(folder)), small_config(RUN, rounds=2))
    run.evaluation(0)
    run.round(1, "accept")
    return folder


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return open_store(str(tmp_path))


def keys(store: Store) -> set[str]:
    return {entry.key for entry in store.list("")}


def litter(store: Store) -> dict[str, str]:
    """Everything that can go, and why."""
    found = {
        layout.attempt_key(RUN, SELECT, 0, "loser", "selection.parquet"): "losing attempt",
        layout.attempt_key(RUN, SELECT, 0, "loser", layout.LOG): "losing attempt",
        layout.attempt_key(RUN, SELECT, 0, "a0", "half-written.parquet"): "unnamed object",
        layout.damaged_key(RUN, SELECT, 0, "abc"): "damaged marker",
        f"{layout.state_prefix(RUN, FINETUNE)}/step-000020-a0/weights": "training state",
    }
    for number, key in enumerate(found):
        store.put(key, b"x" * (number + 1))
    return found


def treasure(store: Store) -> set[str]:
    """Things that look like litter and must stay."""
    kept = {
        layout.attempt_key(RUN, SELECT, 0, "a0", layout.LOG),
        layout.attempt_key(RUN, SELECT, 0, "a0", layout.START),
        layout.attempt_key(RUN, OPEN, 0, "working", "out.parquet"),
        f"{layout.state_prefix(RUN, OPEN)}/step-000020-working/weights",
        layout.damaged_key(RUN, OPEN, 0, "abc"),
        f"{RUN}/report.html",
        f"{RUN}/cancel.json",
        f"{RUN}/readme-of-a-user.txt",
        f"{RUN}-2/config.json",
    }
    for key in kept:
        store.put(key, b"keep")
    return kept


def test_it_finds_what_can_go_and_removes_only_that(store: Store) -> None:
    kept = treasure(store) | keys(store)
    gone = litter(store)
    waste = prune.find(store, RUN)
    assert {each.key: each.why for each in waste} == gone
    assert sum(each.size for each in waste) == 15
    assert keys(store) == kept | set(gone), "finding must not change anything"
    assert prune.remove(store, RUN, waste) == len(gone)
    assert keys(store) == kept
    assert prune.find(store, RUN) == []


def test_every_marker_still_stands_afterwards_with_whole_outputs(store: Store) -> None:
    before = marker.MarkerReader(store, RUN).read()
    litter(store)
    prune.remove(store, RUN, prune.find(store, RUN))
    assert marker.MarkerReader(store, RUN).read() == before
    sizes = {entry.key: entry.size for entry in store.list("")}
    assert all(sizes[o.key] == o.size for m in before.values() for o in m.outputs)


def test_an_output_named_from_another_attempts_folder_stays(store: Store) -> None:
    key = layout.attempt_key(RUN, SELECT, 0, "other", "shared.parquet")
    store.put(key, b"shared")
    body = json.loads(store.get(layout.marker_key(RUN, FINETUNE, 0)))
    body["outputs"].append({"name": "shared", "key": key, "size": 6, "sha256": "0"})
    store.put(layout.marker_key(RUN, FINETUNE, 0), json.dumps(body).encode())
    assert key not in {each.key for each in prune.find(store, RUN)}


def test_what_became_the_winner_since_it_was_found_is_not_removed(store: Store) -> None:
    key = layout.attempt_key(RUN, SELECT, 0, "late", "selection.parquet")
    store.put(key, b"late")
    waste = prune.find(store, RUN)
    assert [each.key for each in waste] == [key]
    body = json.loads(store.get(layout.marker_key(RUN, SELECT, 0)))
    body |= {"attempt": "late", "outputs": [{"name": "s", "key": key, "size": 4, "sha256": "0"}]}
    store.put(layout.marker_key(RUN, SELECT, 0), json.dumps(body).encode())
    assert prune.remove(store, RUN, waste) == 0
    assert store.get(key) == b"late"


def test_a_stage_with_a_damaged_marker_is_left_alone(store: Store) -> None:
    store.put(layout.marker_key(RUN, SELECT, 0), b"{")
    before = keys(store)
    assert prune.find(store, RUN) == []
    assert keys(store) == before, "a look must not repair anything either"


def test_the_command_deletes_only_with_yes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = keys(store)
    gone = litter(store)
    assert cli.main(["prune", RUN, "--store", store.uri]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in gone)
    assert "nothing was deleted: `rsi prune made-up --yes`" in said
    assert keys(store) == before | set(gone)
    assert cli.main(["prune", RUN, "--store", store.uri, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == len(gone)
    assert keys(store) == before
