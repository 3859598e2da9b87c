from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_jobs.errors import DataError
from rsi_jobs.evaluation import (
    Phase,
    bootstrap_mean,
    diversity,
    paired_difference,
    paired_ratio,
    prompt_means,
    summarise,
    win_rate,
)


def a_phase(prompts: int = 40, n: int = 2, seed: int = 0, gain: float = 0.0) -> Phase:
    """Two scores, the same difficulty of prompts for every seed, rows in a shuffled order."""
    rng = np.random.default_rng(seed)
    hard = np.repeat(np.random.default_rng(99).normal(size=prompts), n)
    order = rng.permutation(prompts * n)
    quality = hard + gain + 0.3 * rng.normal(size=prompts * n)
    return Phase(
        prompt=np.repeat(np.arange(prompts) + 5, n)[order],
        candidate=np.tile(np.arange(n), prompts)[order],
        scores={"pick": quality[order], "judge.right": (quality > 0)[order]},
        diversity=rng.uniform(0.2, 0.4, size=prompts),
    )


# --- intervals --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "share", "skewed"])
def test_the_intervals_hold_the_true_mean_as_often_as_they_say(kind: str) -> None:
    rng = np.random.default_rng(7)
    truth, rounds = {
        "normal": (3.0, rng.normal(3.0, 2.0, (600, 120))),
        "share": (0.3, rng.random((600, 120)) < 0.3),
        "skewed": (1.5, rng.exponential(1.5, (600, 120))),
    }[kind]
    found = [bootstrap_mean(values, seed=trial, n=300) for trial, values in enumerate(rounds)]
    both = np.mean([i.low <= truth <= i.high for i in found])
    below = np.mean([i.low95 <= truth for i in found])
    above = np.mean([truth <= i.high95 for i in found])
    assert 0.92 < both < 0.975
    assert 0.91 < below < 0.985
    assert 0.91 < above < 0.975


def test_an_interval_is_ordered_repeatable_and_widens_with_its_level() -> None:
    values = np.random.default_rng(0).normal(size=200)
    found = bootstrap_mean(values, seed=3)
    assert found == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    assert found.low < found.low95 < found.mean < found.high95 < found.high
    assert found.mean == values.mean()
    wide = bootstrap_mean(values, seed=3, level=0.99)
    assert wide.low < found.low
    assert wide.high > found.high
    assert (wide.low95, wide.high95) == (found.low95, found.high95)
    sd = (found.high - found.low) / (2 * 1.96)
    assert sd == pytest.approx(values.std() / np.sqrt(200), rel=0.1)


def test_values_that_are_not_finite_do_not_count() -> None:
    values = np.array([1.0, 2.0, 3.0])
    holes = np.array([np.nan, 1.0, np.inf, 2.0, -np.inf, 3.0])
    assert bootstrap_mean(holes) == bootstrap_mean(values)
    assert np.isnan([bootstrap_mean(np.full(3, np.nan)).mean, bootstrap_mean(np.zeros(0)).low]).all()


def test_pairing_sees_a_gain_that_unpaired_means_hide() -> None:
    rng = np.random.default_rng(0)
    old = 10 * rng.normal(size=256)
    new = old + 0.1 + 0.3 * rng.normal(size=256)
    gain = paired_difference(new, old)
    assert 0 < gain.low < 0.1 < gain.high
    assert gain.high - gain.low < 0.1
    back = paired_difference(old, new)
    assert back.high95 < 0
    assert back.mean == pytest.approx(-gain.mean)
    assert bootstrap_mean(new).low < bootstrap_mean(old).mean < bootstrap_mean(new).high


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_nothing_changes_against_itself(values: list[float]) -> None:
    x = np.array(values)
    same = win_rate(x, x, n=20)
    assert (same.mean, same.low, same.high, same.low95, same.high95) == (0.5,) * 5
    none = paired_difference(x, x, n=20)
    assert (none.mean, none.low, none.high) == (0.0,) * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30))
def test_wins_of_one_are_losses_of_the_other(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    rate = win_rate(a, b, n=20)
    assert rate.mean + win_rate(b, a, n=20).mean == pytest.approx(1)
    assert rate.mean == pytest.approx(np.mean([(x > y) + (x == y) / 2 for x, y in pairs]))
    assert 0 <= rate.low <= rate.high <= 1


def test_a_pair_with_a_hole_is_left_out() -> None:
    new, old = np.array([1.0, np.nan, 5.0, np.inf]), np.array([0.0, 1.0, np.nan, np.inf])
    assert win_rate(new, old).mean == 1.0
    assert paired_difference(new, old).mean == 1.0
    assert paired_ratio(new, old + 0.5).mean == 2.0
    with pytest.raises(ValueError, match="shapes"):
        win_rate(new, old[1:])


def test_a_ratio_is_of_the_means_and_paired() -> None:
    old = np.random.default_rng(0).uniform(0.1, 1.0, size=200)
    exact = paired_ratio(0.9 * old, old)
    assert exact.low == pytest.approx(0.9)
    assert exact.high == pytest.approx(0.9)
    found = paired_ratio(np.roll(old, 1), old)
    assert found.mean == pytest.approx(1.0)
    assert found.low < 0.95
    assert found.high > 1.05
    assert np.isnan(paired_ratio(old, np.zeros(200)).mean)


# --- diversity and means ----------------------------------------------------------------------


def test_diversity_is_the_mean_pairwise_cosine_distance_of_those_that_pass() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 7))
    prompt = rng.permutation(np.repeat([11, 4, 8, 6], [20, 20, 18, 2]))
    passing = rng.random(60) < 0.6
    passing[prompt == 6] = [True, False]
    found = diversity(features, prompt, passing)
    assert np.isnan(found[1])  # 6, of which one passes
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for place, number in ((0, 4), (2, 8), (3, 11)):
        rows = np.flatnonzero((prompt == number) & passing)
        expected = [1 - unit[i] @ unit[j] for i in rows for j in rows if i < j]
        assert found[place] == pytest.approx(np.mean(expected))


def test_identical_images_have_no_diversity_and_scale_does_not_matter() -> None:
    one = np.random.default_rng(0).normal(size=16)
    features = np.stack([one, 3 * one, one, one, -one])
    prompt = np.array([0, 0, 0, 1, 1])
    found = diversity(features, prompt, np.ones(5, bool))
    assert 0 <= found[0] < 1e-12
    assert found[1] == pytest.approx(2.0)


def test_an_embedding_without_a_direction_does_not_count() -> None:
    features = np.array([[1.0, 0], [0, 1.0], [0, 0], [np.nan, 1]])
    assert diversity(features, np.zeros(4, int), np.ones(4, bool)).tolist() == [1.0]
    assert np.isnan(diversity(features[1:], np.zeros(3, int), np.ones(3, bool))).all()


def test_prompt_means_ignore_holes_and_follow_the_order_of_prompts() -> None:
    values = np.array([4.0, 1.0, np.nan, 3.0, np.inf])
    found = prompt_means(values, np.array([9, 2, 2, 2, 5]))
    assert found[0] == 2.0
    assert np.isnan(found[1])
    assert found[2] == 4.0
    assert prompt_means(np.array([True, False]), np.array([1, 1])).tolist() == [0.5]


# --- the summary ------------------------------------------------------------------------------


def test_the_summary_names_every_metric_and_nothing_else() -> None:
    alone = summarise(a_phase(), n=50)
    three = ("", ".low", ".high")
    five = (*three, ".low95", ".high95")
    scores = ("pick", "judge.right")
    assert set(alone) == {f"{s}{e}" for s in (*scores, "diversity") for e in three}
    full = summarise(a_phase(seed=2), base=a_phase(seed=1), reference=a_phase(seed=3), n=50)
    assert set(full) == (
        set(alone)
        | {f"{s}.vs_{o}{e}" for s in (*scores, "diversity") for o in ("base", "ref") for e in five}
        | {f"{s}.win_{o}{e}" for s in scores for o in ("base", "ref") for e in three}
        | {f"diversity.ratio{e}" for e in five}
    )
    assert json.loads(json.dumps(full, allow_nan=False)) == full


def test_the_summary_compares_the_same_image_whatever_the_order_of_rows() -> None:
    new, base = a_phase(seed=1, gain=0.2), a_phase(seed=1)
    order = np.random.default_rng(5).permutation(len(base))
    shuffled = Phase(
        base.prompt[order],
        base.candidate[order],
        {name: values[order] for name, values in base.scores.items()},
        base.diversity,
    )
    found = summarise(new, base=shuffled)
    assert found["pick.vs_base"] == pytest.approx(0.2)
    assert found["pick.vs_base.low"] == pytest.approx(0.2)  # every image gains the same
    assert found["pick.win_base"] == 1.0
    assert found["diversity.ratio"] == pytest.approx(1.0)
    assert found == pytest.approx(summarise(new, base=base))
    assert found["judge.right"] == pytest.approx(new.scores["judge.right"].mean())


def test_images_of_a_prompt_are_one_draw_not_many() -> None:
    hard = np.random.default_rng(0).normal(size=50)
    few = Phase(np.arange(50), np.zeros(50, int), {"r": hard})
    many = Phase(np.repeat(np.arange(50), 8), np.tile(np.arange(8), 50), {"r": np.repeat(hard, 8)})
    assert summarise(many) == pytest.approx(summarise(few))


def test_other_images_are_refused_and_other_scores_left_out() -> None:
    new, other = a_phase(), a_phase(prompts=39)
    with pytest.raises(DataError, match=r"80 images .* of the base \(78\)"):
        summarise(new, base=other)
    swapped = Phase(new.prompt, new.candidate + 1, new.scores)
    with pytest.raises(DataError, match="of the ref"):
        summarise(new, reference=swapped)
    lesser = Phase(new.prompt, new.candidate, {"pick": new.scores["pick"]})
    found = summarise(new, base=lesser, n=20)
    assert "pick.vs_base" in found
    assert "judge.right" in found
    assert not any(key.startswith(("judge.right.vs", "diversity.vs")) for key in found)


def test_a_metric_without_a_finite_value_is_left_out_not_written_as_nan() -> None:
    new = a_phase()
    blank = np.full(80, np.nan)
    empty = Phase(new.prompt, new.candidate, {"pick": blank}, np.full(40, np.nan))
    assert summarise(empty, base=new, reference=new) == {}
    holes = np.where(new.candidate == 0, np.nan, new.scores["pick"])
    found = summarise(Phase(new.prompt, new.candidate, {"pick": holes}), base=new)
    assert found["pick"] == pytest.approx(new.scores["pick"][new.candidate == 1].mean())
    assert found["pick.vs_base"] == 0.0
    assert found["pick.win_base"] == 0.5


@pytest.mark.parametrize("scores", [{"r": np.zeros(3)}, {"diversity": np.zeros(4)}])
def test_a_phase_that_does_not_fit_is_refused(scores: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"shape|called diversity"):
        Phase(np.arange(4), np.zeros(4, int), scores)
