from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_jobs.weighting import (
    SMALLEST_GROUP,
    distances,
    effective_sample_size,
    reference_set,
    weights,
)

MEASURES = ["knn", "mahalanobis"]


def cloud(n: int = 300, d: int = 12, seed: int = 0) -> tuple[Any, Any]:
    """Features (n, d) whose axes differ in spread, and half of the rows as reference."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.linspace(0.5, 2.0, d), rng.random(n) < 0.5


# --- distances --------------------------------------------------------------------------------


def test_knn_is_the_mean_over_the_nearest_reference_rows_but_itself() -> None:
    features, reference = cloud(700, 5)
    found = distances(features, reference, scheme="knn", k=4)
    for row in (0, 1, 2, 3, 600, 699):
        others = np.flatnonzero(reference & (np.arange(700) != row))
        near = np.sort(np.linalg.norm(features[others] - features[row], axis=1))[:4]
        assert found[row] == pytest.approx(near.mean())


def test_knn_counts_an_equal_image_as_a_neighbour_at_zero() -> None:
    features = np.array([[0.1, 0.2], [0.1, 0.2], [3.1, 4.2], [0.1, 0.2]])
    reference = np.array([True, True, True, False])
    found = distances(features, reference, k=2)
    assert found[0] == pytest.approx(2.5)
    assert found[1] == pytest.approx(2.5)
    assert found[3] == 0.0
    assert found[2] == pytest.approx(5.0)
    assert (distances(features + 1e6, reference, k=1)[[0, 1, 3]] == 0.0).all()


def test_mahalanobis_is_near_its_known_value_on_a_normal_cloud() -> None:
    rng = np.random.default_rng(3)
    sd = np.linspace(0.5, 2.0, 6)
    features = rng.normal(size=(4000, 6)) * sd
    exact = np.square(features / sd).sum(axis=1)
    found = distances(features, rng.random(4000) < 0.5, scheme="mahalanobis")
    assert np.corrcoef(found, exact)[0, 1] > 0.99
    assert found.mean() == pytest.approx(6.0, rel=0.05)


@pytest.mark.parametrize("scheme", MEASURES)
def test_a_member_of_the_reference_is_not_nearer_for_being_one(scheme: Any) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(600, 80))
    reference = rng.random(600) < 0.5
    found = distances(features, reference, scheme=scheme)
    gap = found[~reference].mean() - found[reference].mean()
    assert abs(gap) < 0.25 * found.std()


@pytest.mark.parametrize("scheme", MEASURES)
def test_a_rotation_and_a_shift_change_nothing(scheme: Any) -> None:
    features, reference = cloud()
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(12, 12)))[0]
    before = distances(features, reference, scheme=scheme)
    after = distances(features @ rotation + 5.0, reference, scheme=scheme)
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(("scheme", "factor"), [("knn", 7.0), ("mahalanobis", 1.0)])
def test_scale_multiplies_knn_cancels_in_mahalanobis_and_never_reaches_the_weights(
    scheme: Any, factor: float
) -> None:
    features, reference = cloud()
    before = distances(features, reference, scheme=scheme)
    after = distances(7.0 * features, reference, scheme=scheme)
    assert after == pytest.approx(factor * before, rel=1e-6)
    assert weights(after, reference).weights == pytest.approx(weights(before, reference).weights)


@pytest.mark.parametrize("scheme", MEASURES)
def test_order_of_rows_changes_nothing(scheme: Any) -> None:
    features, reference = cloud()
    group = np.arange(300) % 3
    order = np.random.default_rng(2).permutation(300)
    before = distances(features, reference, scheme=scheme, group=group)
    after = distances(features[order], reference[order], scheme=scheme, group=group[order])
    assert after == pytest.approx(before[order], rel=1e-9)


@pytest.mark.parametrize("scheme", MEASURES)
def test_a_planted_outlier_is_farthest_and_gets_the_least_weight(scheme: Any) -> None:
    features, reference = cloud()
    for row in (np.flatnonzero(reference)[0], np.flatnonzero(~reference)[0]):
        planted = features.copy()
        planted[row] += 25.0
        found = distances(planted, reference, scheme=scheme)
        assert found.argmax() == row
        assert weights(found, reference).weights[row] == 0.0  # beyond the cut
        uncut = weights(found, reference, cut=1.0, min_ess=0.0).weights
        assert uncut[row] == uncut.min() > 0


def test_distance_is_measured_within_the_group() -> None:
    features, reference = cloud(400, 6)
    group = np.array(["one", "two"])[np.arange(400) % 2]
    features[group == "two"] += 100.0
    # An image that looks like the other group's is an outlier of its own.
    stray = np.flatnonzero(group == "one")[5]
    features[stray] += 100.0
    assert distances(features, reference, group=group).argmax() == stray
    assert distances(features, reference).argmax() != stray


def test_a_group_too_small_for_a_reference_shares_one_with_others() -> None:
    features, reference = cloud(400, 6)
    group = np.zeros(400, int)
    group[:3] = 1
    reference[:3] = False
    alone = distances(features, reference, group=group)
    assert np.array_equal(alone, distances(features, reference))
    assert reference.sum() > SMALLEST_GROUP


def test_residuals_forget_what_the_prompt_asks_for() -> None:
    features, reference = cloud(320, 6)
    prompt = np.repeat(np.arange(40), 8)
    scene = 50.0 * np.random.default_rng(4).normal(size=(40, 6))[prompt]
    options: dict[str, Any] = {"prompt": prompt, "residual": True}
    before = distances(features, reference, **options)
    assert distances(features + scene, reference, **options) == pytest.approx(before)
    assert distances(features + scene, reference).mean() > 5 * before.mean()
    with pytest.raises(ValueError, match="prompt"):
        distances(features, reference, residual=True)


def test_trajectory_uniform_and_a_function_of_ones_own() -> None:
    features, reference = cloud(60, 3)
    variance = np.arange(60.0)
    variance[7] = np.nan
    found = distances(features, reference, scheme="trajectory", variance=variance)
    assert found[7] == np.inf
    assert np.array_equal(np.delete(found, 7), np.delete(variance, 7))
    assert not distances(features, reference, scheme="uniform").any()
    own = distances(features, reference, scheme=lambda f, r: f[:, 0] - f[r, 0].min())
    assert own == pytest.approx(features[:, 0] - features[reference, 0].min())
    with pytest.raises(ValueError, match="variance"):
        distances(features, reference, scheme="trajectory")
    with pytest.raises(ValueError, match="'cosine'"):
        distances(features, reference, scheme="cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", MEASURES)
def test_an_image_without_features_is_infinitely_far_and_nobodys_neighbour(scheme: Any) -> None:
    features, reference = cloud()
    reference[0] = True
    without = distances(np.delete(features, 0, 0), np.delete(reference, 0), scheme=scheme)
    features[0, 3] = np.nan
    found = distances(features, reference, scheme=scheme)
    assert found[0] == np.inf
    assert np.array_equal(found[1:], without)
    assert weights(found, reference).weights[0] == 0.0


@pytest.mark.parametrize("scheme", MEASURES)
def test_few_or_equal_references_give_finite_distances(scheme: Any) -> None:
    features, _ = cloud(10, 4)
    for count in (1, 2, 3):
        assert np.isfinite(distances(features, np.arange(10) < count, scheme=scheme)).all()
    same = np.full((10, 4), 0.3)
    found = distances(same, np.arange(10) < 5, scheme=scheme)
    assert not found.any()
    with pytest.raises(ValueError, match="no reference image"):
        distances(features, np.zeros(10, bool), scheme=scheme)


# --- reference set ----------------------------------------------------------------------------


def test_reference_is_the_better_half_of_each_group() -> None:
    score = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 10.0, 30.0, 20.0])
    group = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    expected = [False, False, True, True, False, False, True, True]
    assert reference_set(score, group=group).tolist() == expected
    assert reference_set(score).sum() == 4
    assert reference_set(score)[[3, 5, 6, 7]].all()
    assert reference_set(np.ones(5)).all()  # ties with the last one in are in
    assert not reference_set(np.full(3, np.nan)).any()


# --- weights ----------------------------------------------------------------------------------

spreads = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(spreads, st.integers(0, 5), st.floats(0, 1), st.randoms(use_true_random=False))
def test_weights_are_finite_add_up_and_reach_the_sample_size(
    values: list[float], infinite: int, min_ess: float, random: Any
) -> None:
    distance = np.array(values + [np.inf] * infinite)
    reference = np.array([random.random() < 0.5 for _ in distance])
    selected = np.array([random.random() < 0.7 for _ in distance])
    group = np.array([random.randrange(3) for _ in distance])
    found = weights(distance, reference, selected=selected, group=group, min_ess=min_ess)
    count = int(selected.sum())
    assert np.isfinite(found.weights).all()
    assert (found.weights >= 0).all()
    assert not found.weights[~selected].any()
    assert found.weights.sum() == pytest.approx(count)
    assert found.ess >= min_ess * count * (1 - 1e-9)
    assert found.ess == pytest.approx(effective_sample_size(found.weights[selected]))
    assert 0 <= found.tau <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 0.9))
def test_tau_is_the_largest_that_reaches_the_sample_size(seed: int, min_ess: float) -> None:
    rng = np.random.default_rng(seed)
    distance = rng.lognormal(sigma=1.0, size=200)
    reference = distance < np.median(distance)
    found = weights(distance, reference, cut=1.0, min_ess=min_ess)
    raw = weights(distance, reference, cut=1.0, min_ess=0.0)
    assert raw.tau == 1.0
    if found.tau == 1.0:
        assert raw.ess >= min_ess * 200
        return
    assert effective_sample_size(raw.weights**found.tau) >= min_ess * 200 - 1e-6
    assert effective_sample_size(raw.weights ** (found.tau * 1.0001)) < min_ess * 200


def test_weights_follow_the_formula() -> None:
    distance = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 4.5, 1000.0])
    reference = np.array([True] * 5 + [False] * 2)
    z = (distance - 3.0) / 1.4826
    raw = np.clip(np.exp(-z / 2), 0.05, 3)
    free = weights(distance, reference, cut=1.0, min_ess=0.0)
    assert free.weights == pytest.approx(raw / raw.mean())
    cut = weights(distance, reference, cut=0.75, min_ess=0.0)  # the reference's quantile: 4.0
    raw[[4, 5, 6]] = 0.0
    assert cut.weights == pytest.approx(raw / raw.mean())


def test_a_farther_image_never_counts_more() -> None:
    distance = np.sort(np.random.default_rng(0).gamma(2.0, size=500))
    for min_ess in (0.0, 0.5, 0.95):
        found = weights(distance, distance < 2.0, min_ess=min_ess).weights
        assert (np.diff(found) <= 0).all()
        assert found[0] > found[-1]


def test_the_scale_comes_from_the_reference_not_from_what_is_selected() -> None:
    rng = np.random.default_rng(0)
    distance = np.concatenate([rng.normal(5, 1, 200), rng.normal(50, 1, 100)])
    reference = np.arange(300) < 200
    selected = np.arange(300) >= 180  # mostly bad ones: their own middle would call them normal
    found = weights(distance, reference, selected=selected, min_ess=0.1).weights
    assert found[180:200].sum() > 0.95 * selected.sum()


def test_the_robust_scale_is_each_groups_own() -> None:
    rng = np.random.default_rng(0)
    one = rng.gamma(3.0, size=200)
    distance = np.concatenate([one, 1000 + 50 * one])
    group = np.repeat(["near", "far"], 200)
    reference = np.concatenate([one, one]) < np.median(one)
    found = weights(distance, reference, group=group).weights
    assert found[:200] == pytest.approx(found[200:])
    ungrouped = weights(distance, reference).weights
    assert ungrouped[200:].sum() < 0.6 * ungrouped[:200].sum()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2, 1e9])
def test_equal_distances_are_all_ones(value: float) -> None:
    distance = np.full(50, value) * (1 + 1e-15 * np.arange(50))
    found = weights(distance, np.arange(50) < 25)
    assert np.array_equal(found.weights, np.ones(50))
    assert found.tau == 1.0
    assert found.ess == pytest.approx(50)


def test_when_the_cut_takes_too_many_they_get_little_instead_of_nothing() -> None:
    distance = np.concatenate([np.linspace(1, 2, 40), np.full(60, 30.0)])
    found = weights(distance, np.arange(100) < 40)
    assert (found.weights > 0).all()
    assert found.ess >= 50 - 1e-6
    assert found.weights[40:].max() < found.weights[:39].min()  # the 40th is beyond the cut


def test_nothing_selected_and_no_reference() -> None:
    none = weights(np.ones(4), np.ones(4, bool), selected=np.zeros(4, bool))
    assert not none.weights.any()
    assert none.ess == 0.0
    blind = weights(np.arange(4.0), np.zeros(4, bool))
    assert np.array_equal(blind.weights, np.ones(4))
    assert np.array_equal(weights(np.full(4, np.inf), np.ones(4, bool)).weights, np.ones(4))


def test_effective_sample_size_of_known_weights() -> None:
    assert effective_sample_size(np.full(7, 3.0)) == pytest.approx(7)
    assert effective_sample_size(np.array([0.0, 5.0, 0.0])) == pytest.approx(1)
    assert effective_sample_size(np.array([1.0, 2.0])) == pytest.approx(9 / 5)
    assert effective_sample_size(np.zeros(3)) == 0.0


@pytest.mark.parametrize("bad", [{"low": 0.0}, {"temperature": 0.0}, {"cut": 1.5}, {"high": 0.5}])
def test_settings_outside_their_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights need"):
        weights(np.arange(4.0), np.ones(4, bool), **bad)  # type: ignore[arg-type]
