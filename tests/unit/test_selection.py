from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rsi_jobs.errors import ConfigError
from rsi_jobs.selection import (
    DegenerateRewardError,
    Selection,
    degenerate_reward,
    margins,
    quotas,
    rank_average,
    select,
)

EVERYTHING: dict[str, Any] = {"keep": 10_000, "margin": -1e9, "floor": None, "ceiling": None}


def a_round(
    prompts: int = 60, n: int = 8, rewards: int = 2, seed: int = 0, categories: int = 3
) -> dict[str, Any]:
    """Correlated rewards whose prompts differ in difficulty; rows in a shuffled order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(prompts * n)
    prompt = np.repeat(np.arange(prompts) * 7 + 3, n)[order]
    quality = rng.normal(size=prompts * n) + 0.5 * np.repeat(rng.normal(size=prompts), n)[order]
    return {
        "rewards": {f"r{i}": quality + rng.normal(size=prompts * n) for i in range(rewards)},
        "prompt": prompt,
        "candidate": np.tile(np.arange(n), prompts)[order],
        "category": np.array([f"c{p % categories}" for p in prompt]),
    }


def picks(data: dict[str, Any], chosen: Selection) -> dict[int, int]:
    rows = chosen.picked
    return dict(zip(data["prompt"][rows].tolist(), data["candidate"][rows].tolist(), strict=True))


@st.composite
def small_rounds(draw: st.DrawFn) -> dict[str, Any]:
    """Whole-number rewards with many ties, so that arithmetic is exact and ties are common."""
    prompts, n = draw(st.integers(2, 6)), draw(st.integers(2, 5))
    size = prompts * n
    column = st.lists(st.integers(-4, 4), min_size=size, max_size=size).filter(
        lambda values: len(set(values)) > 1
    )
    return {
        "rewards": {f"r{i}": np.array(draw(column), float) for i in range(draw(st.integers(1, 3)))},
        "prompt": np.repeat(np.arange(prompts), n),
        "candidate": np.tile(np.arange(n), prompts),
        "category": np.array(["a", "b"])[np.repeat(np.arange(prompts) % 2, n)],
    }


# --- the pick ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(small_rounds(), st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing(data: dict[str, Any], random: Any) -> None:
    order = list(range(len(data["prompt"])))
    random.shuffle(order)
    moved = {key: data[key][order] for key in ("prompt", "candidate", "category")}
    moved["rewards"] = {name: data["rewards"][name][order] for name in reversed(list(data["rewards"]))}
    for method in ("rank", "mean_z", "random", "first"):
        settings_: dict[str, Any] = {"keep": 2, "method": method, "seed": 5}
        a, b = select(**data, **settings_), select(**moved, **settings_)
        assert np.array_equal(a.picked[order], b.picked)
        assert np.array_equal(a.selected[order], b.selected)
        assert np.array_equal(a.score[order], b.score)
        assert np.array_equal(a.margin[order], b.margin)
        assert a.dropped == b.dropped


@settings(max_examples=60, deadline=None)
@given(small_rounds(), st.sampled_from([np.exp, lambda x: x**3, lambda x: np.tanh(x / 3) - 9]))
def test_a_monotone_change_keeps_the_rank_averages_and_a_sole_leader(
    data: dict[str, Any], change: Any
) -> None:
    changed = {**data, "rewards": {**data["rewards"], "r0": change(data["rewards"]["r0"])}}
    a, b = select(**data, **EVERYTHING), select(**changed, **EVERYTHING)
    assert np.array_equal(a.score, b.score)
    for prompt in np.unique(data["prompt"]):
        rows = data["prompt"] == prompt
        leads = rows & (a.score == a.score[rows].max())
        assert (b.picked & leads).sum() == 1
        if leads.sum() == 1:
            assert np.array_equal(a.picked[rows], b.picked[rows])


@settings(max_examples=60, deadline=None)
@given(small_rounds(), st.integers(-8, 8), st.sampled_from([0.5, 2.0, 8.0]))
def test_scale_offset_and_a_prompts_own_constant_do_not_change_the_pick(
    data: dict[str, Any], offset: int, scale: float
) -> None:
    own = data["prompt"] * 3.0
    moved = {**data, "rewards": {k: v * scale + offset + own for k, v in data["rewards"].items()}}
    assume(degenerate_reward(moved["rewards"]) is None)  # the constants can cancel a reward out
    for method in ("rank", "mean_z"):
        a = select(**data, **EVERYTHING, method=method)
        b = select(**moved, **EVERYTHING, method=method)
        assert np.array_equal(a.picked, b.picked)
        assert np.array_equal(a.selected, b.selected)


def test_equal_rank_averages_go_to_the_higher_mean_z_and_then_the_lower_number() -> None:
    category = np.array(["x"] * 6)
    prompt, candidate = np.repeat([0, 1], 3), np.tile([2, 0, 1], 2)
    # Candidates 2 and 0 share the best rank average; 0 leads further where it leads.
    a = np.array([3.0, 2.0, 0.0, 3.0, 2.0, 0.0])
    b = np.array([2.0, 9.0, 0.0, 2.0, 9.0, 0.0])
    chosen = select({"a": a, "b": b}, prompt, candidate, category, **EVERYTHING)
    assert chosen.score[0] == chosen.score[1] == 0.75
    assert candidate[chosen.picked].tolist() == [0, 0]
    chosen = select({"a": a, "b": b}, prompt, 2 - candidate, category, **EVERYTHING)
    assert (2 - candidate)[chosen.picked].tolist() == [2, 2]
    # Nothing parts twins but their numbers.
    twins = {"a": np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])}
    chosen = select(twins, prompt, candidate, category, **EVERYTHING)
    assert candidate[chosen.picked].tolist() == [0, 0]


def test_margins_are_in_robust_spreads_of_each_reward() -> None:
    prompt = np.repeat([0, 1], 3)
    a = np.array([0.0, 10.0, 30.0, 100.0, 110.0, 120.0])  # distances from medians 10 0 20 10 0 10
    lead = np.array([-10.0, 0, 20, -10, 0, 10]) / (1.4826 * 10)
    assert margins({"a": a}, prompt) == pytest.approx(lead)
    assert margins({"a": a, "b": a / 1000}, prompt) == pytest.approx(lead)
    assert margins({"a": a, "flat": np.ones(6)}, prompt) == pytest.approx(lead / 2)


def test_rank_beats_one_wild_reward_that_mean_z_follows() -> None:
    data = a_round(40, 6, rewards=3)
    worst = data["rewards"]["r0"].argmin()
    data["rewards"]["r0"][worst] = 1e6
    rows = data["prompt"] == data["prompt"][worst]
    data["rewards"]["r1"][worst] = data["rewards"]["r1"].min() - 1
    data["rewards"]["r2"][worst] = data["rewards"]["r2"].min() - 1
    assert not select(**data, **EVERYTHING, method="rank").picked[worst]
    chosen = select(**data, **EVERYTHING, method="mean_z")
    assert chosen.picked[worst]
    assert chosen.picked[rows].sum() == 1


def test_the_pick_is_better_than_the_first_and_a_random_one() -> None:
    data = a_round(300, 8)
    truth = sum(data["rewards"].values())
    quality = {
        method: truth[select(**data, **EVERYTHING, method=method).picked].mean()
        for method in ("rank", "mean_z", "random", "first")
    }
    assert quality["rank"] > quality["random"] + 1
    assert quality["rank"] > quality["first"] + 1
    assert quality["mean_z"] >= quality["rank"]


def test_rank_average_of_known_ranks() -> None:
    prompt = np.array([5, 5, 5, 9, 9, 2])
    a = np.array([1.0, 3.0, 3.0, 4.0, 2.0, 7.0])
    b = np.array([10.0, 20.0, 30.0, 1.0, 1.0, 7.0])
    expected = [0.0, (0.75 + 0.5) / 2, (0.75 + 1) / 2, 0.75, 0.25, 0.5]
    assert rank_average({"a": a, "b": b}, prompt) == pytest.approx(expected)


def test_random_depends_on_the_seed_and_first_takes_the_lowest_number() -> None:
    data = a_round()
    first = select(**data, keep=5, method="first")
    assert set(picks(data, first).values()) == {0}
    assert sorted(data["prompt"][first.selected])[0] == data["prompt"].min()
    one, same, other = (select(**data, keep=5, method="random", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.picked, same.picked)
    assert np.array_equal(one.selected, same.selected)
    assert not np.array_equal(one.picked, other.picked)
    assert len(set(picks(data, one).values())) > 4


def test_one_candidate_a_prompt_is_kept_whatever_its_rewards() -> None:
    data = a_round(20, 1)
    data["rewards"]["r0"][:] = 0.0
    chosen = select(**data, keep=20, method="rank")
    assert chosen.picked.all()
    assert chosen.selected.all()
    assert not chosen.dropped


# --- NaN and rewards that say nothing ---------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["rank", "mean_z", "random", "first"])
def test_a_row_without_a_finite_reward_is_never_picked(bad: float, method: Any) -> None:
    data = a_round(30, 4)
    whole = select(**data, **EVERYTHING, method=method)
    data["rewards"]["r1"][whole.picked] = bad
    lost = data["prompt"] == data["prompt"][0]
    data["rewards"]["r0"][lost] = bad
    chosen = select(**data, **EVERYTHING, method=method)
    assert not (chosen.picked & whole.picked).any()
    assert chosen.picked.sum() == 29
    assert chosen.dropped == {int(data["prompt"][0]): "invalid"}
    assert np.isnan(chosen.score[whole.picked | lost]).all()
    assert np.isfinite(chosen.score[~whole.picked & ~lost]).all()


def test_invalid_rows_do_not_shift_the_others_ranks() -> None:
    prompt = np.zeros(4, int)
    values = np.array([1.0, np.nan, 2.0, 3.0])
    assert rank_average({"a": values}, prompt)[[0, 2, 3]].tolist() == [0.0, 0.5, 1.0]
    assert margins({"a": values}, prompt)[2] == 0.0


def test_a_degenerate_reward_is_named() -> None:
    data = a_round(10, 4)
    assert degenerate_reward(data["rewards"]) is None
    data["rewards"]["flat"] = np.full(40, 0.25)
    data["rewards"]["flat"][3] = np.nan
    assert degenerate_reward(data["rewards"]) == "reward flat is 0.25 for all of 39 candidates"
    with pytest.raises(DegenerateRewardError, match=r"flat is 0\.25"):
        select(**data, keep=3)
    data["rewards"]["flat"] = np.full(40, np.nan)
    assert degenerate_reward(data["rewards"]) == "reward flat is not finite for any of 40 candidates"
    with pytest.raises(ValueError, match="flat"):
        select(**data, keep=3)


def test_a_boolean_reward_selects_what_is_right() -> None:
    data = a_round(20, 4)
    right = data["rewards"]["r0"] > 0.5
    data["rewards"] = {"judge": right}
    chosen = select(**data, keep=20, margin=0.25, floor=0.3)
    assert right[chosen.selected].all()
    assert chosen.selected.sum() > 5
    hopeless = [p for p in np.unique(data["prompt"]) if not right[data["prompt"] == p].any()]
    assert hopeless
    assert all(p in chosen.dropped for p in hopeless)


# --- what is dropped and kept -----------------------------------------------------------------


def test_each_drop_reason_has_its_cause() -> None:
    # Prompts: 0 all at the ceiling; 1 hopeless; 2 no spread; 3 and 4 good; 5 not scored; 6 weak.
    a = {
        0: [9.0, 9, 9, 9],
        1: [0.0, 0, 0, 1],
        2: [5.0, 5, 5, 5],
        3: [3.0, 4, 5, 8],
        4: [2.0, 4, 5, 9],
        5: [np.nan] * 4,
        6: [4.0, 5, 6, 6.5],
    }
    prompt, candidate = np.repeat(np.arange(7), 4), np.tile(np.arange(4), 7)
    rewards = {"a": np.concatenate([a[p] for p in range(7)])}
    category = np.array(["x"] * 28)
    chosen = select(rewards, prompt, candidate, category, keep=2, margin=0.5, floor={"a": 2.0}, ceiling=1.0)
    assert chosen.dropped == {
        0: "at ceiling",
        1: "below floor",
        2: "no margin",
        5: "invalid",
        6: "quota",
    }
    assert prompt[chosen.selected].tolist() == [3, 4]
    assert chosen.picked.sum() == 6  # every prompt that was scored has a pick, kept or not


@settings(max_examples=40, deadline=None)
@given(small_rounds(), st.integers(1, 8), st.booleans())
def test_every_prompt_is_either_selected_once_or_dropped_with_a_reason(
    data: dict[str, Any], keep: int, quota: bool
) -> None:
    chosen = select(**data, keep=keep, quota=quota)
    selected = data["prompt"][chosen.selected].tolist()
    assert len(selected) == len(set(selected)) <= keep
    assert set(selected) | set(chosen.dropped) == set(data["prompt"].tolist())
    assert not set(selected) & set(chosen.dropped)
    assert (chosen.selected <= chosen.picked).all()
    if "quota" in chosen.dropped.values():
        assert len(selected) == keep


def test_keep_is_by_margin_within_the_prompt_not_by_absolute_reward() -> None:
    data = a_round(50, 8, categories=1)
    easy = np.isin(data["prompt"], np.unique(data["prompt"])[:25])
    before = select(**data, keep=20, floor=None, ceiling=None)
    data["rewards"] = {k: v + 100.0 * easy for k, v in data["rewards"].items()}
    after = select(**data, keep=20, floor=None, ceiling=None)
    assert np.array_equal(before.selected, after.selected)
    kept = after.margin[after.selected].min()
    left_out = [p for p, reason in after.dropped.items() if reason == "quota"]
    rest = after.picked & np.isin(data["prompt"], left_out)
    assert rest.sum() == 50 - 20 - sum(r != "quota" for r in after.dropped.values())
    assert after.margin[rest].max() <= kept


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), min_size=1), st.integers(1, 60))
def test_quotas_add_up_and_are_within_one_of_the_proportion(prompts: dict[str, int], keep: int) -> None:
    total = sum(prompts.values())
    if total == 0:
        prompts, total = {"a": 1}, 1
    places = quotas(prompts, keep)
    assert sum(places.values()) == keep
    assert all(abs(places[name] - keep * prompts[name] / total) < 1 for name in prompts)


def test_quotas_give_the_largest_remainder_first_and_ties_to_the_first_name() -> None:
    assert quotas({"b": 5, "a": 3, "c": 2}, 4) == {"a": 1, "b": 2, "c": 1}
    assert quotas({"b": 1, "a": 1}, 1) == {"a": 1, "b": 0}


def test_quota_keeps_the_shares_that_margin_alone_would_not() -> None:
    data = a_round(90, 8, categories=3)
    strong = data["category"] == "c0"
    data["rewards"] = {k: v * np.where(strong, 5, 1) for k, v in data["rewards"].items()}
    open_: dict[str, Any] = {"keep": 30, "margin": 0.0, "floor": None, "ceiling": None}
    shares = Counter(data["category"][select(**data, **open_).selected])
    assert shares == {"c0": 10, "c1": 10, "c2": 10}
    alone = Counter(data["category"][select(**data, **open_, quota=False).selected])
    assert alone["c0"] > 20


def test_what_a_category_cannot_fill_goes_to_the_others() -> None:
    data = a_round(60, 8, categories=3)
    poor = data["category"] == "c1"
    data["rewards"] = {k: np.where(poor, 0.5, v) for k, v in data["rewards"].items()}
    chosen = select(**data, keep=30, margin=0.25, floor=None, ceiling=None)
    shares = Counter(data["category"][chosen.selected])
    assert sum(shares.values()) == 30
    assert shares["c1"] == 0
    assert min(shares["c0"], shares["c2"]) >= 10


def test_floor_as_a_quantile_drops_the_prompts_whose_best_is_poor() -> None:
    data = a_round(60, 8)
    hard = np.isin(data["prompt"], np.unique(data["prompt"])[:6])
    data["rewards"] = {k: v - 20.0 * hard for k, v in data["rewards"].items()}
    chosen = select(**data, keep=60, margin=0.0, floor=0.3)
    below = {p for p, reason in chosen.dropped.items() if reason == "below floor"}
    assert below == set(data["prompt"][hard].tolist())
    assert "below floor" not in select(**data, keep=60, margin=0.0, floor=0.0).dropped.values()
    assert "below floor" not in select(**data, keep=60, margin=0.0, floor=None).dropped.values()


def test_an_absolute_floor_is_reached_by_a_pick_that_equals_it_in_every_reward_named() -> None:
    prompt, candidate = np.repeat([0, 1, 2], 2), np.tile([0, 1], 3)
    rewards = {"a": np.array([1.0, 2, 1, 1.9, 1, 9]), "b": np.array([1.0, 5, 1, 5, 1, 4.9])}
    chosen = select(
        rewards, prompt, candidate, np.array(["x"] * 6), keep=3, margin=0.0, floor={"a": 2.0, "b": 5.0}
    )
    assert chosen.dropped == {1: "below floor", 2: "below floor"}
    assert prompt[chosen.selected].tolist() == [0]


def test_a_rare_reward_does_not_put_its_zeros_at_the_ceiling() -> None:
    data = a_round(50, 8)
    rare = data["rewards"]["r0"] > np.quantile(data["rewards"]["r0"], 0.97)
    data["rewards"] = {"rare": rare}
    chosen = select(**data, keep=50)
    assert "at ceiling" not in chosen.dropped.values()
    assert rare[chosen.selected].all()


@pytest.mark.parametrize("bound", [{"unheard": 1.0}, 1.5, -0.1])
def test_a_bound_that_cannot_be_used_is_refused(bound: Any) -> None:
    with pytest.raises(ConfigError, match=r"unheard|1\.5|-0\.1"):
        select(**a_round(5, 3), keep=2, floor=bound)


def test_arrays_that_describe_no_round_are_refused() -> None:
    data = a_round(5, 3)
    with pytest.raises(ValueError, match="shape"):
        select(**{**data, "candidate": data["candidate"][1:]}, keep=2)
    with pytest.raises(ValueError, match="same prompt and candidate"):
        select(**{**data, "candidate": np.zeros(15, int)}, keep=2)
    with pytest.raises(ValueError, match="two categories"):
        select(**{**data, "category": np.arange(15).astype(str)}, keep=2)
    with pytest.raises(ValueError, match="keep >= 1"):
        select(**data, keep=0)
