"""What a run's markers say that MLflow should show."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsi_jobs.layout import StageRef
from rsi_jobs.store import open_store
from rsi_jobs.tracking_entries import NOTE_ROWS, RoundEntry, experiment_name, run_entry
from tests import tracked
from tests.tracked import Past


@pytest.fixture
def past(tmp_path: Path) -> Past:
    return Past(open_store(str(tmp_path)), tracked.config())


def entry(past: Past, round_: int) -> RoundEntry:
    found = run_entry(past.store, past.config, past.markers, "RUNNING")
    assert found is not None
    return next(each for each in found.rounds if each.round == round_)


def values(points: object) -> dict[str, float]:
    return {point.name: point.value for point in points}  # type: ignore[attr-defined]


def test_nothing_is_shown_before_the_first_marker_unless_the_run_waits(past: Past) -> None:
    assert run_entry(past.store, past.config, past.markers, "RUNNING") is None
    waiting = run_entry(past.store, past.config, past.markers, "RUNNING", note="no GPU is free")
    assert waiting is not None
    assert "no GPU is free" in waiting.tags["mlflow.note.content"]


def test_an_open_round_shows_its_finished_stages_and_no_result(past: Past) -> None:
    past.base().train(1)
    found = entry(past, 1)
    assert found.ended is None
    assert found.checkpoint is None
    assert found.results == ()
    assert values(found.points)["seconds/train.finetune"] == 10.0
    assert values(found.points)["select/ess"] == 120.5
    assert found.tags["rsi.stage"] == "round 1 train finetune"


def test_points_of_an_open_round_are_still_there_when_it_is_closed(past: Past) -> None:
    past.base().train(1)
    before = set(entry(past, 1).points)
    past.judge(1, 0.3)
    past.gate(1, "accept")
    assert before <= set(entry(past, 1).points)


def test_the_try_that_the_gate_looked_at_last_gives_the_results(past: Past) -> None:
    past.base(0.5).train(1)
    past.judge(1, 0.1)
    past.gate(1, "half")
    assert entry(past, 1).results == ()
    past.train(1, attempt_no=1)
    past.judge(1, 0.7, attempt_no=1)
    past.gate(1, "accept", attempt_no=1)
    found = entry(past, 1)
    assert values(found.results)["heldout"] == 0.7
    assert found.params["try"] == "1"
    assert found.params["lr_scale"] == "0.5"
    assert found.checkpoint is not None
    assert "/r001/train-t1/finetune/" in found.checkpoint.uri
    assert {"seconds/train.finetune", "seconds/train.finetune.half"} <= set(values(found.points))


def test_a_rolled_back_round_shows_its_score_but_not_as_the_best(past: Past) -> None:
    past.base(0.1).round(1, 0.4).round(2, 0.2, "rollback").round(3, 0.3)
    results = values(entry(past, 2).results)
    assert (results["heldout"], results["accepted"]) == (0.2, 0.0)
    assert (results["best/round"], results["best/heldout"]) == (1.0, 0.4)
    assert entry(past, 3).start_from == 1
    assert entry(past, 3).params["lr_scale"] == "0.5"


def test_a_round_whose_training_was_rejected_has_no_checkpoint(past: Past) -> None:
    past.base(0.1).train(1, upto="select")
    past.add(StageRef(1, "train", 0, "finetune"), outcome="rejected", reason="the loss is not finite")
    past.gate(1, "rollback", reason="finetune was rejected")
    found = entry(past, 1)
    assert found.checkpoint is None
    assert found.tags["rsi.reason"] == "finetune was rejected"
    assert values(found.results)["accepted"] == 0.0


def test_a_point_carries_its_markers_time_and_its_round(past: Past) -> None:
    past.base().round(1, 0.3)
    select = past.markers[StageRef(1, "eval", 0, "select"), 0]
    heldout = next(point for point in entry(past, 1).results if point.name == "heldout")
    assert heldout.time == int((select.started + select.seconds) * 1000)
    assert heldout.step == 1


def test_missing_and_infinite_metrics_are_left_out(past: Past) -> None:
    past.train(1, upto="score")
    odd = {"a": None, "b": float("nan"), "c": float("inf"), "d%é": 1.0}
    past.add(StageRef(1, "train", 0, "select"), odd)
    shown = {
        name: value for name, value in values(entry(past, 1).points).items() if name.startswith("select/")
    }
    assert shown == {"select/d__": 1.0}


def test_shards_add_up_and_are_shown_when_the_last_is_done(tmp_path: Path) -> None:
    past = Past(open_store(str(tmp_path)), tracked.config(shards=2))
    ref = StageRef(1, "train", 0, "score")
    past.add(ref, {"images": 100.0, "heldout": 1.0}, shard=0)
    assert "score/heldout" not in values(entry(past, 1).points)
    past.add(ref, {"images": 300.0, "heldout": 2.0}, shard=1)
    found = values(entry(past, 1).points)
    assert found["score/images"] == 400.0
    assert found["score/heldout"] == pytest.approx(1.75)
    assert found["seconds/train.score"] == 20.0


def test_gpu_hours_count_only_stages_that_had_a_gpu_and_not_the_final_test(past: Past) -> None:
    past.base(0.1).train(1)
    past.judge(1, 0.3)
    past.gate(1, "accept")  # no GPU
    hours = values(entry(past, 1).results)["gpu_hours"]
    assert hours == pytest.approx(8 * 10 / 3600)
    past.judge(1, 0.35, phase="test")
    after = values(entry(past, 1).results)
    assert after["gpu_hours"] == hours
    assert after["test/heldout"] == 0.35


def test_the_dataset_is_known_by_what_is_in_it(past: Past, tmp_path: Path) -> None:
    past.base().train(1)
    dataset = entry(past, 1).dataset
    assert dataset is not None
    assert dataset.uri == f"{past.store.uri}/shapes/r001/train-t0/select/s0000/a-a1/dataset"
    assert (Path(dataset.uri) / "part-00000.parquet").exists()
    other = Past(open_store(str(tmp_path / "other")), tracked.config())
    other.base().train(1)
    assert entry(other, 1).dataset != dataset
    assert entry(other, 1).dataset.digest == dataset.digest  # type: ignore[union-attr]


def test_the_description_names_the_best_round_and_fits_a_tag(tmp_path: Path) -> None:
    past = Past(open_store(str(tmp_path)), tracked.config(), files=False).base(0.1)
    for number in range(1, 61):
        past.round(number, 0.2 + (number == 58))
    found = run_entry(past.store, past.config, past.markers, "FINISHED", reason="all rounds are done")
    assert found is not None
    note = found.tags["mlflow.note.content"]
    assert "Best so far: **round 58**" in note
    assert "| 58 (best) | 1.2000 | 1.1000 to 1.3000 | accept |" in note
    assert note.count("| accept |") == NOTE_ROWS
    assert len(note) < 8000


def test_identity_is_flat_and_holds_nothing_that_may_change(past: Past) -> None:
    found = run_entry(past.store, past.config, past.base().markers, "RUNNING")
    assert found is not None
    assert found.params["training.lr"] == str(past.config.identity.training.lr)
    assert found.params["rewards.use"] == "dual,fused"
    assert found.params["seed"] == "0"
    assert not [name for name in found.params if name.startswith("operations") or name == "rounds"]
    assert found.tags["rsi.rounds"] == "8"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("shapes:base", "shapes:base"),
        ("/cache/models/sd14/", "sd14"),
        ("CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-4"),
    ],
)
def test_one_experiment_for_a_base_model_wherever_it_lies(path: str, name: str) -> None:
    assert experiment_name(path) == name
