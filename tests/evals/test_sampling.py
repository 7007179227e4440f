"""Tokens from logits: what is drawn, how often, and that the company in a batch changes nothing."""

import numpy as np
import pytest
import torch

from flex.errors import ConfigError
from flex.evals.sampling import Sampling, choose, nucleus, sample_seed, uniform


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 0.0, 0.0, 5.0]])
    assert choose(logits, Sampling(), []) == [1, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, [0, 1, 2, 3]),
        (0.95, [0, 1, 2]),
        (0.8, [0, 1]),
        (0.5, [0]),
        (0.51, [0, 1]),
        (1e-9, [0]),
    ],
)
def test_the_nucleus_by_hand(top_p, kept):
    # 0.5, 0.3, 0.16, 0.04, in another order than the vocabulary's
    p = torch.tensor([[0.3, 0.04, 0.5, 0.16]], dtype=torch.float64)
    places = [2, 0, 3, 1]
    found = nucleus(p, top_p)[0]
    assert set(found.nonzero()[:, 0].tolist()) == {places[k] for k in kept}
    assert all(found[i] == p[0, i] for i in found.nonzero()[:, 0])


def test_a_wide_nucleus_is_sorted_as_a_whole():
    flat = torch.full((1, 1000), 1e-3, dtype=torch.float64)
    flat += torch.linspace(0, 1e-6, 1000, dtype=torch.float64)
    flat /= flat.sum()
    peaked = torch.zeros(1, 1000, dtype=torch.float64)
    peaked[0, 7] = 1.0
    found = nucleus(torch.cat([flat, peaked]), 0.9)
    expected = int((flat[0].flip(0).cumsum(0) < 0.9).sum()) + 1
    assert int((found[0] > 0).sum()) == expected == 900
    assert found[1].nonzero().tolist() == [[7]]


def test_draws_have_the_softmax_frequencies():
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    numbers = [uniform(sample_seed(0, "T", 0), i) for i in range(4000)]
    counts = np.bincount(choose(logits.repeat(4000, 1), Sampling(1.0), numbers), minlength=3)
    assert np.abs(counts / 4000 - [0.1, 0.6, 0.3]).max() < 0.025  # 3 standard errors
    cool = np.bincount(choose(logits.repeat(4000, 1), Sampling(0.5), numbers), minlength=3)
    expected = np.array([0.01, 0.36, 0.09]) / 0.46  # squared, normalised
    assert np.abs(cool / 4000 - expected).max() < 0.025
    # 0.6 and 0.3 make the nucleus of 0.8, and are normalised again
    cut = np.bincount(choose(logits.repeat(4000, 1), Sampling(1.0, 0.8), numbers), minlength=3)
    assert cut[0] == 0 and abs(cut[1] / 4000 - 2 / 3) < 0.025


def test_the_ends_of_the_range_draw_a_token_that_has_a_chance():
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]])
    assert choose(logits, Sampling(1.0), [0.0]) == [1]
    assert choose(logits, Sampling(1.0), [1 - 2.0**-53]) == [3]
    assert choose(logits, Sampling(1.0, 0.3), [1 - 2.0**-53]) == [3]


def test_a_draw_does_not_depend_on_the_other_rows():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(9, 3000, generator=generator)
    numbers = [uniform(sample_seed(1, f"T{i}", 0), 5) for i in range(9)]
    how = Sampling(0.8, 0.95)
    together = choose(logits, how, numbers)
    assert together == [choose(logits[i : i + 1], how, numbers[i : i + 1])[0] for i in range(9)]
    assert len(set(together)) > 5


def test_the_counter():
    seed = sample_seed(0, "HumanEval/0", 0)
    numbers = np.array([uniform(seed, i) for i in range(2000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert (
        abs(numbers.mean() - 0.5) < 0.02
        and abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.07
    )
    seeds = {sample_seed(s, t, n) for s in range(3) for t in "ab" for n in range(5)}
    assert len(seeds) == 30 and max(seeds) < 2**53
    # written down: another numbering would silently change every sampled result
    assert (seed, numbers[0]) == (6423444108018357, 0.5051420279285401)


@pytest.mark.parametrize(
    ("temperature", "top_p", "word"),
    [
        (-1, 1, "temperature"),
        (float("nan"), 1, "temperature"),
        (1, 0, "top_p"),
        (1, 1.1, "top_p"),
        (0, 0.9, "greedy"),
    ],
)
def test_settings_that_mean_nothing_are_refused(temperature, top_p, word):
    with pytest.raises(ConfigError, match=word):
        Sampling(temperature, top_p)


def test_nan_is_no_likelihood():
    with pytest.raises(ConfigError, match="NaN"):
        choose(torch.tensor([[0.0, float("nan")]]), Sampling(), [])
