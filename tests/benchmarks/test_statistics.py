"""What the page's numbers are made of: medians, their intervals, exponents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.results import growth_exponent, median_interval


def test_the_interval_of_a_median_is_of_order_statistics() -> None:
    """Nine values: the 2nd and the 8th hold the median with probability 1 - 2 * 10 / 2^9 = 96 %."""
    estimate = median_interval([5, 1, 9, 3, 7, 2, 8, 4, 6])
    assert (estimate.low, estimate.value, estimate.high, estimate.n) == (2, 5, 8, 9)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_rounds_give_their_whole_range(n: int) -> None:
    estimate = median_interval(range(n))
    assert (estimate.low, estimate.high) == (0, n - 1)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(size=(2000, 15))
    intervals = [median_interval(row) for row in draws]
    covered = np.mean([one.low <= 1 <= one.high for one in intervals])
    assert 0.95 <= covered <= 0.98  # 96.5 % by the binomial


def test_the_exponent_is_that_of_a_power_law_s_largest_sizes() -> None:
    sizes = [1, 2, 4, 8, 16]
    assert growth_exponent(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert growth_exponent(sizes, [100, 100, 4, 8, 16]) == pytest.approx(1)
    assert math.isnan(growth_exponent([1], [1]))
