"""Drawing tokens: the distribution, what narrows it, and that a row depends on itself alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipelines.engine.draw import Draw
from pipelines.engine.sampler import BROKEN, _edit, sample
from pipelines.sampling import Sampling

GREEDY = Sampling(temperature=0)
NAN, INF = float("nan"), float("inf")


class Allowing:
    """A constraint that allows these tokens, always."""

    complete = False

    def __init__(self, *tokens, words=200):
        bits = np.zeros(words * 32, np.uint8)
        bits[list(tokens)] = 1
        self.bits = np.packbits(bits, bitorder="little").view(np.int32)
        self.taken = []

    def mask(self):
        return self.bits

    def accept(self, token_id):
        self.taken.append(token_id)


def draw(prompt=(), said=(), eos=(), constraint=None, seed=1, **fields):
    one = Draw(Sampling(seed=seed, **fields), prompt, eos, constraint)
    for token in said:
        one.accept(token)
    return one


def tokens(logits, *draws):
    return [choice.token_id for choice in sample(logits, draws)]


def drawn(logits, count=4000, **fields):
    """What is drawn of these logits over as many seeds."""
    rows = torch.as_tensor(logits).expand(count, -1)
    return torch.tensor(tokens(rows, *(draw(seed=seed, **fields) for seed in range(count))))


def shares(logits, count=4000, **fields):
    return torch.bincount(drawn(logits, count, **fields), minlength=len(logits)) / count


def assert_drawn_by(logits, wanted, count=4000, **fields):
    """Pearson's test at one in a million; what has no probability is never drawn."""
    found = torch.bincount(drawn(logits, count, **fields), minlength=len(wanted)).double()
    wanted = wanted.double()
    assert not found[wanted == 0].any()
    many = wanted * count >= 5  # the rare ones together
    expected = torch.cat([wanted[many], wanted[~many].sum()[None]]) * count
    seen = torch.cat([found[many], found[~many].sum()[None]])
    kept = expected > 0
    statistic = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    if freedom:  # Wilson and Hilferty's normal, at 4.75 deviations
        assert (statistic / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))


def random_logits(size, seed=0, scale=2.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def test_temperature_0_is_the_likeliest_and_needs_no_seed():
    greedy = Draw(GREEDY, (), ())
    assert tokens(torch.tensor([[0.1, 3.0, 2.0], [5.0, 1.0, 0.0]]), greedy, greedy) == [1, 0]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 128, 129, 1000, 4096, 4099])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_likeliest_is_argmax_and_the_first_of_equals(size, kind):
    logits = torch.randint(0, 50, (40, size), generator=torch.Generator().manual_seed(size)).to(kind)
    wanted = [row.index(max(row)) for row in logits.tolist()]
    assert tokens(logits, *[Draw(GREEDY, (), ())] * 40) == wanted
    edited = [Draw(Sampling(temperature=0, logit_bias=((0, 0.0),)), (), ())] * 40
    assert tokens(logits, *edited) == wanted


def test_draws_follow_the_probabilities_and_the_temperature():
    logits = random_logits(3000)
    assert_drawn_by(logits, torch.softmax(logits, -1))
    assert_drawn_by(logits, torch.softmax(logits / 0.5, -1), temperature=0.5)
    assert_drawn_by(logits.bfloat16(), torch.softmax(logits.bfloat16().float() / 1.7, -1), temperature=1.7)


def test_a_long_tail_is_drawn_from():
    """Each of it is a hundred thousandth of the head, and together they are as likely."""
    logits = torch.zeros(2**17)
    logits[5] = math.log(2**17)
    assert float((drawn(logits, 400) == 5).float().mean()) == pytest.approx(0.5, abs=0.12)
    assert len(set(drawn(logits, 400).tolist())) > 150


WARPED = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 200},
    {"top_p": 0.97},
    {"min_p": 0.0005},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 500, "top_p": 0.9, "min_p": 0.001},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 0.99},
    {"temperature": 1.4, "min_p": 0.05, "top_p": 0.9},
]


@pytest.mark.parametrize("size", [50, 3000])
@pytest.mark.parametrize("fields", WARPED, ids=str)
def test_narrowed_as_transformers_does(size, fields):
    logits = random_logits(size, seed=3)
    warped = logits[None].clone()
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in fields:
            warped = warper(fields[name])(None, warped)
    assert_drawn_by(logits, torch.softmax(warped[0], -1), **fields)


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert shares(logits, top_p=0.75) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert shares(logits, top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert shares(logits, top_p=0) == pytest.approx([0, 1, 0, 0])
    assert shares(logits, min_p=1) == pytest.approx([0, 1, 0, 0])
    assert shares(logits, top_k=1) == pytest.approx([0, 1, 0, 0])


def test_of_equals_no_more_are_kept_than_it_takes():
    assert set(drawn([1.0] * 4, top_p=0.5).tolist()) == {0, 1}
    assert set(drawn([1.0] * 4, top_k=3).tolist()) == {0, 1, 2}
    assert set(drawn([0.0, 1.0, 1.0, 1.0], min_p=1).tolist()) == {1, 2, 3}
    flat = torch.zeros(5000)
    flat[4000:] = 1
    assert set(drawn(flat, top_k=30, temperature=0.5).tolist()) == set(range(4000, 4030))
    assert set(drawn(flat, 6000, top_k=1010, temperature=2.0).tolist()) <= {*range(4000, 5000), *range(10)}


@pytest.mark.parametrize("kept", [63, 64, 65, 1023, 1024, 1025, 8191, 8192, 8193, 9999, 10000])
def test_a_head_of_any_length(kept):
    """The lengths at which a longer head is looked at: the cut is after the last that is kept."""
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(1))
    logits = torch.empty(10000)
    logits[order] = -torch.arange(10000) * 1e-4
    found = set(drawn(logits, 1000, top_k=kept).tolist())
    assert found <= set(order[:kept].tolist())
    share = torch.softmax(-torch.arange(10000) * 1e-4, -1)[:kept].sum().item()
    again = set(drawn(logits, 1000, top_p=share - 1e-6).tolist())
    assert again <= set(order[:kept].tolist())
    ranks = order.argsort().tolist()
    assert max(ranks[token] for token in again) > 0.99 * kept - 5


def test_the_coldest_draw_is_the_likeliest():
    for temperature in (1e-300, 5e-324, 1e-9):
        assert tokens(torch.tensor([[1.0, 2.0, 1.9]]), draw(temperature=temperature)) == [1]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_as_transformers_has_it(penalty):
    """Of prompt and answer, once however often it was said."""
    logits = random_logits(300)
    prompt, said = [5, 9, 9, 200], [9, 17]
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + said]), logits[None].clone())[0]
    edits = draw(prompt, said, repetition_penalty=penalty).edits(300)
    assert sorted(edits.ids.tolist()) == [5, 9, 17, 200]
    assert scores(logits, prompt, said, repetition_penalty=penalty) == pytest.approx(wanted.tolist(), rel=1e-6)


def scores(logits, prompt, said, **fields):
    """The scores after penalties and biases: of that step alone, since a draw would show them as probabilities."""
    changed = logits[None].clone()
    _edit(changed, [draw(prompt, said, **fields)])
    return changed[0].tolist()


def test_presence_and_frequency_count_the_answer_alone():
    logits = torch.zeros(10)
    found = scores(logits, [1, 2, 2], [2, 3, 3, 3], presence_penalty=0.5, frequency_penalty=0.25)
    assert found == pytest.approx([0, 0, -0.75, -1.25, 0, 0, 0, 0, 0, 0])


def test_many_tokens_are_counted():
    said = [token % 500 for token in range(1234)]
    found = scores(torch.zeros(600), [], said, frequency_penalty=1)
    assert found == [-float(said.count(token)) for token in range(600)]


def test_a_bias_is_added_after_the_penalties():
    fields = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "logit_bias": ((1, 5.0), (3, -7.0), (900, 1.0))}
    assert scores(torch.tensor([3.0, -3.0, 3.0, 3.0]), [1], [2], **fields) == pytest.approx([3, -1, 0.5, -4])
    assert tokens(torch.tensor([[0.0, 3.0, 2.0]]), draw(temperature=0, logit_bias=((0, 3.5),))) == [0]


def test_an_end_is_forbidden_until_min_tokens():
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    for temperature in (0, 0.01):
        fields = {"eos": (1, 2, 77), "min_tokens": 2, "temperature": temperature}
        assert [tokens(logits, draw(said=[3] * count, **fields))[0] for count in (0, 1, 2)] == [3, 3, 1]


def test_a_constraint_narrows_everything_and_min_tokens_only_what_it_leaves():
    logits = random_logits(5000)[None]
    assert set(drawn(logits[0], 500, constraint=Allowing(3, 4, 4999)).tolist()) == {3, 4, 4999}
    assert tokens(logits, draw(temperature=0, constraint=Allowing(7))) == [7]
    assert tokens(logits, draw(temperature=0, constraint=Allowing(7, 8), eos=(8,), min_tokens=1)) == [7]
    assert tokens(logits, draw(temperature=0, constraint=Allowing(8), eos=(8,), min_tokens=1)) == [8]
    short = torch.arange(5000.0)[None]  # a tokenizer smaller than the model's width: what is beyond is not allowed
    assert tokens(short, draw(temperature=0, constraint=Allowing(7, 31, words=1))) == [31]
    assert tokens(short[:, :20], draw(temperature=0, constraint=Allowing(7, 31, words=1))) == [7]


def test_a_constraint_is_told_what_was_taken():
    constraint = Allowing(1)
    draw(constraint=constraint, said=[4, 5])
    assert constraint.taken == [4, 5]


def test_a_constraint_that_fails_ends_its_own_row_and_says_why():
    class Failing(Allowing):
        def mask(self):
            raise RuntimeError("no mask")

        def accept(self, token_id):
            raise RuntimeError("not that")

    good = draw(temperature=0)
    for failing, error in (
        (draw(constraint=Failing()), "RuntimeError: no mask"),
        (draw(constraint=Failing(), said=[1]), "RuntimeError: not that"),
        (draw(constraint=Allowing()), "the constraint allows no token"),
    ):
        assert tokens(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), failing, good) == [BROKEN, 0]
        assert failing.error == error
        assert not good.error


def test_logprobs_are_of_the_scores_as_they_came():
    logits = random_logits(3000)[None].repeat(4, 1)
    wanted = torch.log_softmax(logits.double(), -1)[0]
    draws = [
        draw(temperature=0, logprobs=True),
        draw(temperature=0, logprobs=True, top_logprobs=20),
        draw(temperature=0.3, logprobs=True, top_logprobs=3, logit_bias=((5, 100.0),)),
        draw(temperature=0),
    ]
    greedy, twenty, biased, none = sample(logits, draws)
    assert none.logprob is None
    assert greedy.logprob.top == []
    assert greedy.logprob.logprob == pytest.approx(wanted.max().item(), abs=1e-5)
    values, ids = wanted.topk(20)
    assert [token for token, _ in twenty.logprob.top] == ids.tolist()
    assert [value for _, value in twenty.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert (biased.token_id, biased.logprob.token_id) == (5, 5)
    assert biased.logprob.logprob == pytest.approx(wanted[5].item(), abs=1e-5)
    assert biased.logprob.top == twenty.logprob.top[:3]


def test_the_likeliest_are_no_more_than_there_are():
    logprob = sample(torch.tensor([[0.0, 1.0, -INF]]), [draw(temperature=0, logprobs=True, top_logprobs=5)])[0].logprob
    assert [token for token, _ in logprob.top] == [1, 0]


def test_the_logits_are_left_as_they_are():
    logits = random_logits(300)[None].repeat(2, 1)
    before = logits.clone()
    sample(logits, [draw(top_p=0.9, logit_bias=((1, 5.0),)), draw(temperature=0, constraint=Allowing(2), min_tokens=1)])
    assert torch.equal(logits, before)


DRAWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.01, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 70, 1500]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.3, 0.0]),
        "min_p": st.sampled_from([0.0, 0.001, 0.1]),
        "presence_penalty": st.sampled_from([0.0, 0.7]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "logit_bias": st.sampled_from([(), ((3, 4.0), (2000, 9.0))]),
        "min_tokens": st.sampled_from([0, 5]),
        "top_logprobs": st.sampled_from([0, 2, 20]),
        "seed": st.integers(0, 5),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(DRAWS, min_size=2, max_size=33), st.sampled_from([97, 2999]), st.integers(0, 3), st.booleans())
def test_a_row_does_not_depend_on_the_rows_beside_it(rows, size, seed, coarse):
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(seed)) * 3
    logits = (logits * 2).round() / 2 if coarse else logits  # many are equal

    def draws():
        return [draw([row, 7], [row, 3], (1,), logprobs=True, **fields) for row, fields in enumerate(rows)]

    together = sample(logits, draws())
    alone = [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(draws())]
    assert together == alone


def test_uniform_is_uniform_and_differs_by_seed_and_position():
    draws = []
    for seed in (0, 1, -5, 2**62):
        one = draw(seed=seed)
        for token in range(500):
            draws.append(one.uniform())
            one.accept(token)
    assert all(0 <= number < 1 for number in draws)
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.03)
    assert draw(seed=7, said=[1, 2]).uniform() == draw(seed=7, said=[5, 6]).uniform()


@pytest.mark.parametrize(
    "fields", [{}, {"top_p": 0.5}, {"min_p": 0.5, "top_k": 3}, {"temperature": 0, "min_tokens": 1}]
)
@pytest.mark.parametrize("width", [3, 200])
def test_a_row_without_a_finite_logit_is_broken_and_only_that_row(fields, width):
    logits = torch.full((5, width), -INF)
    logits[0, :3] = torch.tensor([0.0, NAN, 1.0])
    logits[1, :3] = torch.tensor([0.0, 2.0, -INF])
    logits[3, :3] = torch.tensor([0.0, INF, 1.0])
    logits[4, 2] = 0
    found = sample(logits, [draw(**fields), Draw(GREEDY, (), ()), draw(**fields), draw(**fields), draw(**fields)])
    assert [choice.token_id for choice in found] == [BROKEN, 1, BROKEN, BROKEN, 2]
    assert found[0].logprob is None


def test_a_draw_without_a_seed_is_a_mistake():
    with pytest.raises(ValueError, match="with_seed"):
        Draw(Sampling(), (), ())
