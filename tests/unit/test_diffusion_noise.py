"""Every random draw has a name: order, batch and device of the others do not matter."""

from __future__ import annotations

import itertools

import pytest
import torch

from rsi_jobs.diffusion import noise


def test_candidate_seeds_are_fixed_for_ever_and_all_different() -> None:
    # A literal: a changed hash would silently change every published run.
    assert noise.candidate_seed(0, 1, "p", 2) == 5885556268973456337
    keys = itertools.product(range(3), range(3), ["a", "b", "1"], range(3))
    seeds = [noise.candidate_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Parts do not run into each other.
    assert noise.hash63("a", 1, 12) != noise.hash63("a", 11, 2)
    assert noise.hash63("1:a") != noise.hash63("1", "a")


def test_candidate_noise_is_each_seeds_own() -> None:
    both = noise.candidate_noise([7, 8], (4, 8, 8))
    assert both.shape == (2, 4, 8, 8)
    assert torch.equal(both[1:], noise.candidate_noise([8], (4, 8, 8)))
    alone = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(both[0], alone)


@pytest.mark.parametrize("split", [1, 3, 8])
def test_training_draws_follow_the_sample(split: int) -> None:
    ids = [11, 5, 900, 3, 42, 7, 8, 1]
    order = [3, 0, 7, 1, 6, 2, 5, 4]

    def draws(samples: list[int]) -> torch.Tensor:
        args = (1, 2, 3, samples)
        columns = (
            noise.keyed_noise(*args, (2, 2)).flatten(1).double(),
            noise.keyed_times(*args)[:, None],
            noise.keyed_dropout(*args, 0.5)[:, None].double(),
        )
        return torch.cat(columns, 1)

    whole = draws(ids)
    shuffled = [ids[i] for i in order]
    parts = [draws(shuffled[i : i + split]) for i in range(0, len(ids), split)]
    assert torch.equal(torch.cat(parts), whole[order])
    other_step = noise.keyed_noise(1, 2, 4, ids, (2, 2)).flatten(1)
    assert not torch.isclose(other_step, whole[:, :4].float()).any()


def test_draws_have_the_distribution_they_should() -> None:
    ids = range(4000)
    times = noise.keyed_times(0, 0, 0, ids)
    assert 0 <= times.min() < times.max() < 1
    assert abs(float(times.mean()) - 0.5) < 0.02
    assert abs(float(times.var()) - 1 / 12) < 0.005
    dropped = noise.keyed_dropout(0, 0, 0, ids, 0.1).double().mean()
    assert abs(float(dropped) - 0.1) < 0.02
    drawn = noise.keyed_noise(0, 0, 0, ids, (4,))
    assert abs(float(drawn.mean())) < 0.03
    assert abs(float(drawn.std()) - 1) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([times, drawn[:, 0].double()]))[0, 1])) < 0.06


def test_stratified_times_fill_every_part_once_and_ignore_order() -> None:
    ids = list(range(16))
    times = noise.keyed_times(0, 1, 2, ids, stratified=True)
    assert (times * 16).long().sort().values.tolist() == ids
    backwards = noise.keyed_times(0, 1, 2, ids[::-1], stratified=True)
    assert torch.equal(backwards.flip(0), times)
    # One sample's times are uniform over the steps.
    own = torch.tensor([noise.keyed_times(0, 1, s, ids, stratified=True)[3] for s in range(400)])
    assert abs(float(own.mean()) - 0.5) < 0.05
    assert abs(float(own.var()) - 1 / 12) < 0.012
