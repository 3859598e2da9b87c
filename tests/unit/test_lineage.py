"""Lineage: an image's prompt, maker and scores, and the trainings that drew it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from rsi_jobs import cli, dataset, layout, lineage
from rsi_jobs.config import RunConfig
from rsi_jobs.errors import Damaged, UserError
from rsi_jobs.layout import StageRef
from rsi_jobs.lineage import ImageId, Use
from rsi_jobs.marker import MarkerReader
from rsi_jobs.store import Store, open_store
from tests.fakerun import FakeRun, small_config

RUN = "made-up"


def finetune(round_: int, attempt_no: int = 0) -> StageRef:
    return StageRef(round_, "train", attempt_no, "finetune")


def add_output(store: Store, ref: StageRef, name: str, data: bytes) -> str:
    """One more output of a stage that has committed; its digest."""
    body = json.loads(store.get(layout.marker_key(RUN, ref, 0)))
    key = layout.attempt_key(RUN, ref, 0, "a0", name)
    store.put(key, data)
    digest = sha256(data).hexdigest()
    body["outputs"].append({"name": name, "key": key, "size": len(data), "sha256": digest})
    store.put(layout.marker_key(RUN, ref, 0), json.dumps(body).encode())
    return digest


def drew(store: Store, round_: int, *rows: tuple[int, str, int, int, float, int]) -> None:
    """The record of what a finetune drew: source_round, group, prompt_id, candidate, weight, uses."""
    names = ("source_round", "group", "prompt_id", "candidate", "weight", "uses")
    columns: dict[str, Any] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    with tempfile.NamedTemporaryFile() as file:
        dataset.write(Path(file.name), dataset.table(columns))
        add_output(store, finetune(round_), "samples.parquet", Path(file.name).read_bytes())


@dataclass(frozen=True)
class Run:
    store: Store
    config: RunConfig


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round 1 accepted, round 2 accepted at half the step, round 3 rolled back."""
    folder = tmp_path_factory.mktemp("template")
    made = FakeRun(open_store(str(folder)), small_config(RUN, rounds=3))
    made.evaluation(0)
    made.round(1, "accept")
    made.round(2, "half", "accept")
    made.round(3, "half", "rollback")
    return folder


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Run:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return Run(open_store(str(tmp_path)), small_config(RUN, rounds=3))


def trace(run: Run, image: ImageId) -> lineage.Lineage:
    return lineage.trace(run.store, run.config, MarkerReader(run.store, RUN).read(), image)


def test_an_id_is_read_as_datasets_and_people_write_it() -> None:
    assert lineage.parse_id("r003-00012-05") == lineage.parse_id("003-00012-05.png") == ImageId(3, 12, 5)
    assert str(ImageId(3, 12, 5)) == "r003-00012-05"
    for text in ("3-12-5", "r003-00012", "r003-00012-05.jpg", "", "r003-00012-05 "):
        with pytest.raises(UserError, match="--image"):
            lineage.parse_id(text)


def test_the_uses_are_those_that_the_trainings_recorded(run: Run) -> None:
    drew(run.store, 1, (1, "round", 4, 0, 0.75, 9), (1, "round", 5, 0, 1.0, 3))
    drew(run.store, 2, (2, "round", 4, 0, 1.0, 2), (1, "replay", 4, 0, 0.75, 5))
    drew(run.store, 3, (3, "round", 4, 0, 1.0, 2))
    found = trace(run, ImageId(1, 4, 0))
    assert found.uses == (Use(1, "round", 9, 0.75, "accepted"), Use(2, "replay", 5, 0.75, "half step"))
    assert found.selected
    assert found.reason == ""
    assert set(found.scores) == {
        "dual", "fused", "heldout", "judge.right", "judge.extra", "judge.malformed", "score", "margin",
        "distance",
    }  # fmt: skip


def test_without_a_record_it_says_where_the_image_may_have_been(run: Run) -> None:
    # Replay draws from earlier rounds that were accepted, so from 1 and 2 but not from 3.
    assert [(u.round, u.part, u.uses) for u in trace(run, ImageId(1, 4, 0)).uses] == [
        (1, "round", None), (2, "replay", None), (3, "replay", None),
    ]  # fmt: skip
    assert [(u.round, u.part) for u in trace(run, ImageId(3, 4, 0)).uses] == [(3, "round")]


def test_the_maker_is_the_checkpoint_accepted_last_before_the_round(run: Run) -> None:
    whole = add_output(run.store, finetune(1), "checkpoint/unet/weights", b"of round 1")
    half = add_output(run.store, finetune(2, 1), "checkpoint/unet/weights", b"half of round 2")
    of = {n: trace(run, ImageId(n, 0, 0)) for n in (1, 2, 3)}
    assert {n: found.made_by for n, found in of.items()} == {1: (0, 0), 2: (1, 0), 3: (2, 1)}
    assert of[1].checkpoint == ()
    assert [o.sha256 for o in of[2].checkpoint] == [whole]
    assert [o.sha256 for o in of[3].checkpoint] == [half]


def test_an_image_that_was_not_selected_says_why_and_was_never_trained_on(run: Run) -> None:
    found = trace(run, ImageId(1, 4, 3))
    assert not found.selected
    assert found.reason == "another candidate was preferred"
    assert found.uses == ()


def test_a_damaged_table_is_noticed_not_believed(run: Run) -> None:
    key = layout.attempt_key(RUN, StageRef(1, "train", 0, "select"), 0, "a0", "selection.parquet")
    run.store.put(key, run.store.get(key)[:-1] + b"x")
    with pytest.raises(Damaged, match=r"selection\.parquet does not match its marker"):
        trace(run, ImageId(1, 4, 0))


def test_the_command_prints_both_ways(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    drew(run.store, 1, (1, "round", 4, 0, 0.75, 9))
    command = ["lineage", RUN, "--store", run.store.uri, "--image", "001-00004-00.png"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "image     r001-00004-00, seed 16" in said
    assert "made by   the base shapes:base" in said
    assert "trained   in round 1 (accepted), 9 times, weight 0.750" in said
    assert cli.main([*command, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["made_by"] == {"round": 0, "try": 0, "base": "shapes:base", "files": []}
    assert body["uses"][0]["uses"] == 9
