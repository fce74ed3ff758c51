"""Drawing tokens: the distribution, the nucleus, and that a row depends on its seed and position alone."""

import pytest
import torch

from pipelines.engine.sampler import BROKEN, uniform
from pipelines.engine.sampler import tokens_of as sample
from pipelines.sampling import Sampling

GREEDY = Sampling(temperature=0)


def shares(logits, count=4000, **fields):
    """How often each token is drawn, over as many seeds."""
    rows = torch.tensor([logits]).expand(count, -1)
    drawn = sample(rows, [Sampling(seed=seed, **fields) for seed in range(count)], [0] * count)
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


def test_temperature_0_is_the_likeliest_and_needs_no_seed():
    assert sample(torch.tensor([[0.1, 3.0, 2.0], [5.0, 1.0, 0.0]]), [GREEDY, GREEDY], [0, 9]) == [1, 0]


def test_draws_follow_the_probabilities_and_the_temperature():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert shares(logits.tolist()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    colder = torch.softmax(logits / 0.5, -1)
    assert shares(logits.tolist(), temperature=0.5) == pytest.approx(colder.tolist(), abs=0.03)


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert shares(logits, top_p=0.75) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert shares(logits, top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert shares(logits, top_p=0) == pytest.approx([0, 1, 0, 0])
    assert (shares([1.0, 1.0, 1.0, 1.0], top_p=0.5) > 0).sum() == 2  # of equals too, no more than it takes


def test_a_nucleus_larger_than_what_is_sorted_first():
    drawn = sample(torch.zeros(300, 5000), [Sampling(top_p=0.9, seed=seed) for seed in range(300)], [0] * 300)
    assert len(set(drawn)) > 200
    peaked = torch.zeros(2, 5000)
    peaked[1, 7] = 50.0  # a row beside it whose nucleus is one token
    flat, one = sample(peaked, [Sampling(top_p=0.9, seed=3)] * 2, [0, 0])
    assert (flat, one) == (drawn[3], 7)


def test_the_coldest_draw_is_the_likeliest():
    assert sample(torch.tensor([[1.0, 2.0, 1.9]]), [Sampling(temperature=1e-300, seed=1)], [0]) == [1]


def test_a_row_does_not_depend_on_the_rows_beside_it():
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(seed=row, temperature=0.1 * row, top_p=1 - 0.1 * (row % 3)) for row in range(8)]
    together = sample(logits, samplings, list(range(8)))
    alone = [sample(logits[row : row + 1], [samplings[row]], [row])[0] for row in range(8)]
    assert together == alone


def test_uniform_is_uniform_and_differs_by_seed_and_position():
    draws = [uniform(seed, position) for seed in (0, 1, -5, 2**62) for position in range(500)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.03)
    assert uniform(7, 3) == uniform(7, 3)


def test_a_row_without_a_finite_logit_is_broken_and_only_that_row():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 1.0], [0.0, 2.0, -inf], [-inf, -inf, -inf]])
    assert sample(logits, [Sampling(seed=1), GREEDY, GREEDY], [0, 0, 0]) == [BROKEN, 1, BROKEN]


def test_a_draw_without_a_seed_is_a_mistake():
    with pytest.raises(ValueError, match="with_seed"):
        sample(torch.zeros(1, 3), [Sampling()], [0])
