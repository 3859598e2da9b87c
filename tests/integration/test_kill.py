"""Nothing is lost: a run killed at random ends as one that was left alone, to the last bit."""

from __future__ import annotations

from pathlib import Path

from tests import killer


def test_a_run_killed_at_random_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    tally = killer.torture(tmp_path, kills=5, seed=11, longest=6.0)
    assert sum(tally.kills.values()) >= 3, "the run was over before it was killed often enough"
    assert killer.results(tmp_path) == killer.results(undisturbed)
    assert killer.ran_after_commit(tmp_path) == []


def test_the_same_command_again_has_nothing_to_do(undisturbed: Path) -> None:
    before = killer.results(undisturbed)
    killer.finish(undisturbed)
    assert killer.results(undisturbed) == before
    assert killer.ran_after_commit(undisturbed) == []


def test_another_number_of_shards_gives_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    killer.finish(tmp_path, "--set", "operations.shards=2", "--set", "operations.workers=2")
    ignored = ("/sample/", "/score/")  # their files are cut elsewhere
    one, two = killer.results(undisturbed), killer.results(tmp_path)
    kept = {k: v.split()[1] for k, v in one.items() if not any(part in k for part in ignored)}
    selects = [k for k in kept if "/finetune/" in k or "/gate/" in k]
    assert selects
    assert {k: kept[k] for k in selects} == {k: two[k].split()[1] for k in selects}
