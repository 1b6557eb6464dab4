"""Intervals and paired tests against scipy, published values and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from stillhouse.evaluation.statistics import (
    bootstrap_mean_interval,
    bootstrap_ratio_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_bootstrap_ratio,
    paired_difference_over_seeds,
    paired_rate_interval,
    student_mean_interval,
    wilson_interval,
)

SKEWED = np.random.default_rng(0).exponential(size=60)


def test_the_bootstrap_of_a_mean_agrees_with_scipy() -> None:
    ours = bootstrap_mean_interval(SKEWED)
    theirs = stats.bootstrap((SKEWED,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert ours.value == pytest.approx(SKEWED.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)
    assert ours.n == 60


def test_the_bootstrap_of_a_ratio_agrees_with_scipy() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(20, 200, size=50).astype(float)
    nats = tokens * random.normal(1.2, 0.2, size=50)
    ours = bootstrap_ratio_interval(nats, tokens)
    theirs = stats.bootstrap(
        (nats, tokens),
        lambda above, below, axis: above.sum(axis) / below.sum(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert ours.value == pytest.approx(nats.sum() / tokens.sum())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_a_seed_fixes_the_interval_and_chunking_does_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bootstrap_mean_interval(SKEWED, seed=3)
    assert bootstrap_mean_interval(SKEWED, seed=3) == first
    assert bootstrap_mean_interval(SKEWED, seed=4) != first
    monkeypatch.setattr("stillhouse.evaluation.statistics._CHUNK_DRAWS", 60 * 17)
    assert bootstrap_mean_interval(SKEWED, seed=3) == first


def test_a_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    samples = random.normal(loc=2.0, size=(300, 40))
    intervals = [bootstrap_mean_interval(sample, resamples=400) for sample in samples]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in intervals])
    assert 0.89 <= covered <= 0.98


@pytest.mark.parametrize(("successes", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634)])
def test_wilsons_interval_has_the_textbook_values(successes: int, n: int, low: float, high: float) -> None:
    estimate = wilson_interval(successes, n)
    assert (estimate.value, estimate.n) == (successes / n, n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)


def test_mcnemars_p_is_that_of_the_exact_binomial_test() -> None:
    a = np.array([1] * 30 + [1] * 12 + [0] * 3 + [0] * 5, dtype=bool)
    b = np.array([1] * 30 + [0] * 12 + [1] * 3 + [0] * 5, dtype=bool)
    result = mcnemar(a, b)
    assert (result.both, result.only_a, result.only_b, result.neither, result.n) == (30, 12, 3, 5, 50)
    assert result.p_value == pytest.approx(stats.binomtest(3, 15).pvalue)
    assert result.p_value == pytest.approx(0.03516, abs=1e-5)


def test_mcnemar_without_discordant_items_finds_no_difference() -> None:
    assert mcnemar([True, False], [True, False]).p_value == 1.0


def test_a_paired_comparison_sees_what_unpaired_intervals_hide() -> None:
    random = np.random.default_rng(0)
    difficulty = random.normal(scale=3.0, size=80)
    a, b = difficulty + random.normal(0.3, 0.2, size=80), difficulty
    comparison = paired_bootstrap(a, b)
    assert comparison.difference == pytest.approx((a - b).mean())
    assert comparison.low > 0 and comparison.p_value < 0.001
    assert bootstrap_mean_interval(a).low < bootstrap_mean_interval(b).high
    assert paired_bootstrap(b, a).difference == pytest.approx(-comparison.difference)


def test_the_paired_p_is_uniform_enough_when_nothing_differs() -> None:
    random = np.random.default_rng(0)
    p_values = [
        paired_bootstrap(random.normal(size=40), random.normal(size=40), resamples=300).p_value for _ in range(300)
    ]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.10


def test_a_paired_ratio_takes_each_items_tokens_along() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(20, 200, size=50)
    nats = tokens * random.normal(1.2, 0.3, size=50)
    comparison = paired_bootstrap_ratio(nats + 0.05 * tokens, tokens, nats, tokens)
    assert comparison.difference == pytest.approx(0.05)
    assert (comparison.low, comparison.high) == pytest.approx((0.05, 0.05))


def test_identical_systems_differ_by_nothing_with_p_one() -> None:
    comparison = paired_bootstrap([0.5, 1.0, 2.0], [0.5, 1.0, 2.0])
    assert (comparison.difference, comparison.low, comparison.high, comparison.p_value) == (0, 0, 0, 1)


def test_equal_values_give_an_interval_of_no_width() -> None:
    estimate = bootstrap_mean_interval([2.0, 2.0, 2.0])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 2.0, 2.0)


def test_one_seed_gives_the_items_bootstrap_and_more_seeds_widen_it() -> None:
    random = np.random.default_rng(0)
    items = random.normal(0.2, 1.0, size=100)
    single = paired_difference_over_seeds(items, np.zeros(100))
    flat = paired_bootstrap(items, np.zeros(100))
    assert (single.low, single.high) == pytest.approx((flat.low, flat.high), abs=0.02)
    seeds = items + random.normal(scale=0.5, size=(4, 1))
    several = paired_difference_over_seeds(seeds, np.zeros((4, 100)))
    assert several.difference == pytest.approx(seeds.mean())
    assert several.high - several.low > 1.5 * (single.high - single.low)


def test_seeds_and_tokens_combine_to_a_difference_per_token() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(20, 200, size=30)
    nats = tokens * random.normal(1.2, 0.3, size=(2, 30))
    comparison = paired_difference_over_seeds(nats + 0.1 * tokens, nats, tokens)
    assert (comparison.difference, comparison.low, comparison.high) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize("items", [6, 8, 16])
def test_few_items_are_covered_and_called_different_as_often_as_stated(items: int) -> None:
    # A bare percentile bootstrap of 8 normal items covers 88 % and finds a difference in 12 % of nothing.
    random = np.random.default_rng(items)
    found = [paired_difference_over_seeds(sample, np.zeros(items)) for sample in random.normal(size=(600, items))]
    assert 0.925 <= np.mean([one.low <= 0 <= one.high for one in found]) <= 0.98
    assert 0.02 <= np.mean([one.p_value < 0.05 for one in found]) <= 0.075


@pytest.mark.parametrize("items", [1, 2, 4, 6, 8, 16])
def test_items_that_all_agree_are_no_stronger_than_the_test_of_their_signs(items: int) -> None:
    differences = 1 + np.linspace(0, 0.01, items) + np.zeros((3, items))
    found = paired_difference_over_seeds(differences, np.zeros((3, items)))
    assert found.p_value >= max(2.0 ** (1 - items), 0.001)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean_interval([]), "no items"),
        (lambda: wilson_interval(0, 0), "no proportion"),
        (lambda: wilson_interval(3, 2), "no proportion"),
        (lambda: mcnemar([], []), "no items"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), "one length"),
        (lambda: bootstrap_mean_interval([1.0, float("nan")]), "finite"),
        (lambda: paired_difference_over_seeds(np.ones((2, 3)), np.ones((3, 3))), "differ"),
    ],
)
def test_impossible_input_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_holm_adjusts_as_in_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_paired_rate_interval_follows_its_formula() -> None:
    # 10 and 3 discordant pairs among 40.
    first, second = 11 / 42, 4 / 42
    half = 1.959964 * ((first + second - (first - second) ** 2) / 42) ** 0.5
    interval = paired_rate_interval(10, 3, 40)
    assert interval.value == pytest.approx(7 / 40)
    assert (interval.low, interval.high) == pytest.approx((first - second - half, first - second + half), abs=1e-6)


def test_a_paired_rate_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = generator.multinomial(16, [0.2, 0.05, 0.75], size=4000)
    covered = [
        interval.low <= 0.15 <= interval.high
        for only_a, only_b, _ in draws
        for interval in [paired_rate_interval(only_a, only_b, 16)]
    ]
    assert 0.94 <= np.mean(covered) <= 0.99


def test_no_discordant_item_is_no_certainty() -> None:
    interval = paired_rate_interval(0, 0, 16)
    assert interval.value == 0
    assert interval.low == -interval.high
    assert 0.1 < interval.high < 0.2
    with pytest.raises(ValueError, match="make no difference of rates"):
        paired_rate_interval(9, 8, 16)


def test_students_interval_is_scipys_and_one_value_bounds_nothing() -> None:
    values = [0.2, -0.1, 0.4]
    found = student_mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.n == 3
    assert (student_mean_interval([0.3]).low, student_mean_interval([0.3]).high) == (-np.inf, np.inf)
