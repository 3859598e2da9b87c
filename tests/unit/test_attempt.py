"""One attempt at one shard: it commits whole or not at all, and never on damaged input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rsi_jobs import layout, marker, recipes, runs
from rsi_jobs.config import RunConfig
from rsi_jobs.errors import Damaged, DataError
from rsi_jobs.layout import StageRef
from rsi_jobs.stages.attempt import Attempt, Outcome, Rejected, main
from rsi_jobs.store import Store, open_store

PROMPTS = StageRef(1, "train", 0, "prompts")
SAMPLE = StageRef(1, "train", 0, "sample")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = open_store(str(tmp_path))
    runs.begin(opened, RunConfig(run="r", identity=recipes.recipe("smoke")))
    return opened


def argv(store: Store, ref: StageRef) -> list[str]:
    return ["--run", f"{store.uri}/r", "--round", str(ref.round), "--phase", ref.phase]


def write_words(attempt: Attempt) -> Outcome:
    attempt.write("words.txt").write_text("a b c")
    return Outcome({"words": 3, "nan": float("nan")})


def read_words(attempt: Attempt) -> Outcome:
    attempt.write("count.txt").write_text(str(len(attempt.read(PROMPTS, "words.txt").read_text().split())))
    return Outcome()


def test_a_marker_names_every_output_with_size_and_digest(store: Store) -> None:
    assert main("prompts", write_words, argv(store, PROMPTS)) == 0
    made = marker.read_one(store, "r", PROMPTS, 0)
    assert (made.outcome, made.metrics) == ("ok", {"words": 3.0, "nan": None})
    assert store.get(made.output("words.txt").key) == b"a b c"
    assert made.output("words.txt").size == 5
    assert made.versions["python"]


def test_a_second_attempt_changes_nothing_and_exits_0(store: Store) -> None:
    main("prompts", write_words, argv(store, PROMPTS))
    first = store.get(layout.marker_key("r", PROMPTS, 0))
    assert main("prompts", lambda attempt: pytest.fail("it ran"), argv(store, PROMPTS)) == 0
    assert store.get(layout.marker_key("r", PROMPTS, 0)) == first


def test_two_attempts_at_once_leave_one_marker_and_no_mixture(store: Store) -> None:
    def beaten(attempt: Attempt) -> Outcome:
        main("prompts", write_words, argv(store, PROMPTS))  # the other attempt commits meanwhile
        attempt.write("words.txt").write_text("x y")
        return Outcome({"words": 2})

    assert main("prompts", beaten, argv(store, PROMPTS)) == 0
    made = marker.read_one(store, "r", PROMPTS, 0)
    assert made.metrics["words"] == 3.0
    assert store.get(made.output("words.txt").key) == b"a b c"


def test_a_bad_result_is_committed_as_rejected_with_its_reason(store: Store) -> None:
    def bad(attempt: Attempt) -> Outcome:
        raise Rejected("the loss is not finite", {"steps": 3})

    assert main("prompts", bad, argv(store, PROMPTS)) == 0
    made = marker.read_one(store, "r", PROMPTS, 0)
    assert (made.outcome, made.reason, made.metrics) == ("rejected", "the loss is not finite", {"steps": 3.0})


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: b"X" + d[1:], lambda d: None], ids=["cut", "flip", "gone"]
)
def test_damaged_input_is_named_taken_back_and_never_used(
    store: Store, damage: object, capfd: pytest.CaptureFixture[str]
) -> None:
    main("prompts", write_words, argv(store, PROMPTS))
    key = marker.read_one(store, "r", PROMPTS, 0).output("words.txt").key
    changed = damage(store.get(key))  # type: ignore[operator]
    store.delete([key]) if changed is None else store.put(key, changed)
    assert main("sample", read_words, argv(store, SAMPLE)) == Damaged.exit_code
    assert key in capfd.readouterr().err
    assert not store.exists(layout.marker_key("r", PROMPTS, 0))
    assert not store.exists(layout.marker_key("r", SAMPLE, 0))
    assert main("prompts", write_words, argv(store, PROMPTS)) == 0
    assert main("sample", read_words, argv(store, SAMPLE)) == 0
    assert marker.read_one(store, "r", SAMPLE, 0).outcome == "ok"


def test_a_marker_made_again_leaves_the_digests_of_later_stages_right(store: Store) -> None:
    main("prompts", write_words, argv(store, PROMPTS))
    main("sample", read_words, argv(store, SAMPLE))
    before = marker.read_one(store, "r", SAMPLE, 0).inputs
    marker.take_back(store, "r", PROMPTS, 0)
    marker.take_back(store, "r", SAMPLE, 0)
    main("prompts", write_words, argv(store, PROMPTS))
    main("sample", read_words, argv(store, SAMPLE))
    assert marker.read_one(store, "r", SAMPLE, 0).inputs == before


def test_a_marker_of_a_newer_format_is_refused_not_misread(store: Store) -> None:
    main("prompts", write_words, argv(store, PROMPTS))
    key = layout.marker_key("r", PROMPTS, 0)
    store.put(key, json.dumps(json.loads(store.get(key)) | {"format": 99}).encode())
    with pytest.raises(DataError, match=r"format 99.*upgrade"):
        marker.MarkerReader(store, "r").read()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": 1}'])
def test_a_marker_that_is_none_counts_as_not_written(store: Store, data: bytes) -> None:
    key = layout.marker_key("r", PROMPTS, 0)
    store.put(key, data)
    assert marker.MarkerReader(store, "r").read() == {}


def test_a_crash_is_exit_1_and_leaves_no_marker(store: Store) -> None:
    def crash(attempt: Attempt) -> Outcome:
        raise ZeroDivisionError("planted")

    assert main("prompts", crash, argv(store, PROMPTS)) == 1
    assert not store.exists(layout.marker_key("r", PROMPTS, 0))


def test_what_a_stage_prints_outlives_its_process_in_the_store(store: Store, tmp_path: Path) -> None:
    identity = recipes.recipe("smoke")
    missing = identity.prompts.model_copy(update={"source": "file", "file": "/nowhere/prompts.txt"})
    config = RunConfig(run="f", identity=identity.model_copy(update={"prompts": missing}))
    runs.begin(store, config)
    command = [sys.executable, "-m", "rsi_jobs.stages.prompts", "--run", f"{store.uri}/f", "--round", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 64 <= ended.returncode <= 78
    assert "/nowhere/prompts.txt" in ended.stderr
    logs = [store.get(e.key).decode() for e in store.list("f/") if e.key.endswith(layout.LOG)]
    assert logs == [ended.stderr]


def test_no_space_left_is_one_sentence_and_a_users_exit_code(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(attempt: Attempt) -> Outcome:
        raise OSError(28, "No space left on device")

    assert main("prompts", full, argv(store, PROMPTS)) == 73
    assert "no space left" in capfd.readouterr().err


def test_usage_errors_exit_64(store: Store) -> None:
    assert main("prompts", write_words, ["--run", "nowhere"]) == 64
    assert main("prompts", write_words, ["--run", "x", "--round", "one"]) == 64
