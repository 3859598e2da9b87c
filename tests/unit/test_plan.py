"""plan() and gate() are pure: every case is a table of markers in, actions out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rsi_jobs import plan
from rsi_jobs.config import Gate, Identity, Operations, RunConfig
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Marker, Markers
from rsi_jobs.plan import Decide, Fail, Finish, Job, Launch, Wait

CONFIG = RunConfig(run="r", rounds=3)
GOOD = {"heldout": 0.1, "heldout.vs_ref.high95": 0.2}
BAD = {"heldout": -0.5, "heldout.vs_ref.high95": -0.4}


def mark(ref: StageRef, **fields: object) -> Marker:
    values: dict[str, object] = {"stage": ref.folder, "shard": 0, "attempt": "a", "inputs": "", "started": 0.0,
                                 "seconds": 1.0}  # fmt: skip
    return Marker.model_validate(values | fields)


def drive(
    config: RunConfig,
    evals: dict[tuple[int, int], dict[str, float]],
    rejected: frozenset[StageRef] = frozenset(),
) -> tuple[Markers, list[StageRef], Finish]:
    """Play every action at once until the run finishes: the markers, the launches in order, the end."""
    markers: Markers = {}
    launched: list[StageRef] = []
    for _ in range(1000):
        for action in plan.plan(config, markers, {}):
            match action:
                case Finish():
                    return markers, launched, action
                case Decide(ref, verdict, reason):
                    markers[ref, 0] = mark(ref, decision=verdict, reason=reason)
                case Launch(ref, shards):
                    launched.append(ref)
                    for shard in shards:
                        metrics = (
                            evals.get((ref.round, ref.attempt_no), GOOD) if ref.stage == "select" else {}
                        )
                        outcome = {"outcome": "rejected", "reason": "why"} if ref in rejected else {}
                        markers[ref, shard] = mark(ref, metrics=metrics, **outcome)
    raise AssertionError("the run never finished")


def test_a_run_evaluates_the_base_then_trains_and_judges_each_round_in_order() -> None:
    _, launched, finish = drive(CONFIG, {})
    of_round_1 = [f"{ref.phase}.{ref.stage}" for ref in launched if ref.round == 1]
    assert [ref.folder for ref in launched[:3]] == [
        f"r000/eval-t0/{s}" for s in ("sample", "score", "select")
    ]
    assert of_round_1 == [
        "train.prompts", "train.sample", "train.score", "train.select", "train.finetune",
        "eval.sample", "eval.score", "eval.select", "report.report",
    ]  # fmt: skip
    assert len(launched) == len(set(launched))
    assert finish.reason == "all 3 rounds are done"


def test_best_is_the_accepted_round_with_the_highest_held_out_score_not_the_last() -> None:
    evals = {
        (1, 0): GOOD | {"heldout": 0.3},
        (2, 0): GOOD | {"heldout": 0.9},
        (3, 0): GOOD | {"heldout": 0.5},
    }
    assert drive(CONFIG, evals)[2].best == 2


def test_a_rejected_round_is_tried_once_at_half_step_then_rolled_back() -> None:
    markers, launched, _ = drive(CONFIG, {(2, 0): BAD, (2, 1): BAD})
    assert [r.folder for r in launched if r.round == 2 and r.attempt_no == 1] == [
        "r002/train-t1/finetune", "r002/eval-t1/sample", "r002/eval-t1/score", "r002/eval-t1/select",
    ]  # fmt: skip
    past = plan.history(markers, 3)
    assert past.accepted == ((0, 0), (1, 0))
    assert past.lr_scale == 0.5
    assert past.verdicts == {1: "accept", 2: "rollback"}


def test_half_a_step_that_passes_is_accepted_and_the_next_round_starts_from_it() -> None:
    markers, _, _ = drive(CONFIG, {(2, 0): BAD, (2, 1): GOOD})
    assert plan.history(markers, 3).last == (2, 1)


def test_two_rollbacks_in_a_row_end_the_run_early_with_the_best_round() -> None:
    evals = {(r, t): BAD for r in (2, 3) for t in (0, 1)} | {(1, 0): GOOD | {"heldout": 0.4}}
    _, launched, finish = drive(CONFIG.model_copy(update={"rounds": 8}), evals)
    assert finish == Finish(1, "stopped early: rounds 2 to 3 were rolled back")
    assert max(ref.round for ref in launched) == 3


def test_a_stage_that_commits_rejected_rolls_the_round_back_without_an_evaluation() -> None:
    nan_loss = StageRef(2, "train", 0, "finetune")
    markers, launched, _ = drive(CONFIG, {}, frozenset({nan_loss}))
    assert StageRef(2, "eval", 0, "sample") not in launched
    gate = markers[plan.gate_ref(2, 0), 0]
    assert gate.decision == "rollback"
    assert "finetune was rejected: why" in gate.reason


def test_a_base_that_cannot_be_evaluated_fails_the_run_with_the_reason() -> None:
    ref = StageRef(0, "eval", 0, "sample")
    markers: Markers = {(ref, 0): mark(ref, outcome="rejected", reason="48 of 48 images are black")}
    assert plan.plan(CONFIG, markers, {}) == [Fail(Job(ref, "failed", "48 of 48 images are black", 65))]


def test_with_the_gate_off_every_round_is_accepted() -> None:
    off = RunConfig(run="r", rounds=3, identity=Identity(gate=Gate(enabled=False)))
    markers, _, _ = drive(off, {(2, 0): BAD})
    assert [place[0] for place in plan.history(markers, 4).accepted] == [0, 1, 2, 3]


def test_test_prompts_are_looked_at_once_at_the_end_for_the_base_and_the_best_round() -> None:
    identity = Identity(evaluation=Identity().evaluation.model_copy(update={"test_prompts": 10}))
    _, launched, finish = drive(
        RunConfig(run="r", rounds=2, identity=identity), {(2, 0): GOOD | {"heldout": 2.0}}
    )
    tests = [ref for ref in launched if ref.phase == "test"]
    assert {ref.round for ref in tests} == {0, finish.best}
    assert launched.index(tests[0]) > launched.index(StageRef(2, "eval", 0, "select"))


def test_more_rounds_later_go_on_where_the_run_ended() -> None:
    markers, _, _ = drive(CONFIG, {})
    longer = CONFIG.model_copy(update={"rounds": 4})
    assert plan.plan(longer, markers, {}) == [Launch(StageRef(4, "train", 0, "prompts"), (0,))]
    assert isinstance(plan.plan(CONFIG, markers, {})[0], Finish)


@pytest.mark.parametrize("state", ["pending", "running", "backoff"])
def test_a_live_job_is_waited_for_never_started_twice(state: str) -> None:
    ref = StageRef(0, "eval", 0, "sample")
    assert plan.plan(CONFIG, {}, {ref: Job(ref, state)}) == [Wait(ref)]  # type: ignore[arg-type]


def test_a_failed_job_fails_the_run_but_not_when_it_is_only_the_report() -> None:
    ref = StageRef(0, "eval", 0, "sample")
    failed = Job(ref, "failed", "exit code 64", 64)
    assert plan.plan(CONFIG, {}, {ref: failed}) == [Fail(failed)]
    markers, _, _ = drive(CONFIG, {})
    report = StageRef(1, "report", 0, "report")
    del markers[report, 0]
    assert isinstance(plan.plan(CONFIG, markers, {report: replace(failed, ref=report)})[0], Finish)


def test_only_the_shards_without_a_marker_are_started() -> None:
    config = CONFIG.model_copy(update={"operations": Operations(shards=4)})
    ref = StageRef(0, "eval", 0, "sample")
    markers: Markers = {(ref, 0): mark(ref, shards=4), (ref, 2): mark(ref, shards=4)}
    assert plan.plan(config, markers, {}) == [Launch(ref, (1, 3))]


def test_a_stage_keeps_the_shards_it_began_with_when_the_setting_changes() -> None:
    ref = StageRef(0, "eval", 0, "sample")
    markers: Markers = {(ref, 2): mark(ref, shards=3)}
    config = CONFIG.model_copy(update={"operations": Operations(shards=5)})
    assert plan.plan(config, markers, {}) == [Launch(ref, (0, 1))]
    markers |= {(ref, 0): mark(ref, shards=3), (ref, 1): mark(ref, shards=3)}
    assert plan.plan(config, markers, {}) == [Launch(StageRef(0, "eval", 0, "score"), (0, 1, 2))]


def test_a_marker_taken_back_in_an_old_round_is_made_again_before_anything_else() -> None:
    markers, _, _ = drive(CONFIG, {})
    lost = StageRef(1, "train", 0, "select")
    del markers[lost, 0]
    assert plan.plan(CONFIG, markers, {}) == [Launch(lost, (0,))]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, "accept"),
        ({"heldout.vs_ref.high95": 0.01}, "accept"),
        ({"heldout.vs_ref.high95": -0.01}, "half"),
        ({"distance.vs_base.low95": 0.31}, "half"),
        ({"distance.vs_base.low95": 0.29}, "accept"),
        ({"diversity.ratio.high95": 0.94}, "half"),
        ({"diversity.ratio.high95": 0.96}, "accept"),
        ({"heldout.vs_ref.high95": None}, "accept"),
    ],
)
def test_the_gate_rejects_only_what_is_surely_beyond_a_margin(
    metrics: dict[str, float | None], expected: str
) -> None:
    assert plan.gate(metrics, Gate(margin=0.0), 0)[0] == expected
    if expected == "half":
        assert plan.gate(metrics, Gate(margin=0.0), 1)[0] == "rollback"


def test_gate_margins_are_in_spreads_of_the_base() -> None:
    metrics = {"heldout.vs_ref.high95": -0.05}
    assert plan.gate(metrics, Gate(margin=0.1), 0)[0] == "accept"
    assert plan.gate(metrics, Gate(margin=0.01), 0)[0] == "half"


def test_history_ignores_the_rounds_from_the_asked_one_on() -> None:
    markers, _, _ = drive(CONFIG, {(3, 0): BAD, (3, 1): BAD})
    assert plan.history(markers, 3).rollbacks == 0
    assert plan.history(markers, 4).rollbacks == 1


def test_best_round_never_picks_a_round_without_a_score() -> None:
    markers, _, _ = drive(CONFIG, {(1, 0): {"heldout.vs_ref.high95": 1.0}})
    assert plan.best_round(markers, 2) == (0, 0)
    assert not math.isnan(plan.history(markers, 2).lr_scale)
