"""Intervals and paired tests for per-item scores: every reported number comes with its n and its interval.

Items are the unit of sampling: intervals say what another draw of test items would give. Paired forms resample
the two systems' answers to the same item together. Percentiles lie further out the fewer the items, as Student's t:
a bare bootstrap of a handful is too sure. Imports numpy and scipy only: figures and tables may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

_REMEMBERED_DRAWS = 20_000_000  # at most 40 MB for one number of items
_CHUNK_DRAWS = 4_000_000  # indices drawn at a time: bounds memory at about 64 MB whatever the number of items


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval `[low, high]` and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedComparison:
    """The difference a - b on the same items, its interval, and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


@dataclass(frozen=True)
class McNemarResult:
    """Two systems' right and wrong answers to the same n items; `p_value` is exact and two-sided."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float

    @property
    def n(self) -> int:
        """Number of items."""
        return self.both + self.only_a + self.only_b + self.neither


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Proportion with Wilson's score interval (1927): sound at 0, at 1 and for small n, unlike the bootstrap."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} items is no proportion")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def bootstrap_mean_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean over items with its expanded percentile bootstrap interval (Efron 1979, Hesterberg 2015)."""
    (items,) = _aligned(values)
    return bootstrap_ratio_interval(items, np.ones_like(items), confidence, resamples, seed)


def student_mean_interval(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of a few values with Student's interval: a bootstrap of two or three takes them for all there are.

    One value says nothing of others: its interval has no bounds.
    """
    (items,) = _aligned(values)
    n, mean = len(items), float(items.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * items.std(ddof=1) / np.sqrt(n)) if n > 1 else np.inf
    return Estimate(mean, mean - half, mean + half, n)


def bootstrap_ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """`sum(numerators) / sum(denominators)`, such as nats per token, with its bootstrap interval.

    An item is drawn whole, its nats together with its tokens.
    """
    above, below = _aligned(numerators, denominators)
    draws = _bootstrap(len(above), resamples, seed, lambda rows: _ratio(above[rows], below[rows]))
    low, high = _percentiles(draws, confidence, len(above))
    return Estimate(float(_ratio(above, below)), low, high, len(above))


def mcnemar(a: Sequence[bool] | NDArray[Any], b: Sequence[bool] | NDArray[Any]) -> McNemarResult:
    """McNemar's test (1947) of whether each system gets as many items right that the other gets wrong.

    Exact: binomial with p = 1/2 over the discordant items; p_value is 1 where there are none.
    """
    first, second = (values.astype(bool) for values in _aligned(a, b))
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemarResult(int((first & second).sum()), only_a, only_b, int((~first & ~second).sum()), p_value)


def paired_rate_interval(only_a: float, only_b: float, n: int, confidence: float = 0.95) -> Estimate:
    """Difference of two rates on the same n items, of which only `a` or only `b` gets so many right.

    Bonett and Price's adjusted Wald interval (2012, eq. 8): it keeps its width where no item tells the two apart, which
    the bootstrap takes for certainty. The counts may be means over seeds.
    """
    if only_a < 0 or only_b < 0 or only_a + only_b > n or n == 0:
        raise ValueError(f"{only_a} and {only_b} discordant items of {n} make no difference of rates")
    first, second = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((first + second - (first - second) ** 2) / (n + 2))
    low, high = max(-1.0, first - second - half), min(1.0, first - second + half)
    return Estimate((only_a - only_b) / n, float(low), float(high), n)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedComparison:
    """Difference of means a - b over the same items, resampled in pairs."""
    ones = np.ones(np.shape(a))
    return paired_bootstrap_ratio(a, ones, b, ones, confidence, resamples, seed)


def paired_bootstrap_ratio(
    a_numerators: ArrayLike,
    a_denominators: ArrayLike,
    b_numerators: ArrayLike,
    b_denominators: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Difference of ratios of sums, a - b, over the same items: gold NLL per token of two conditions, say."""
    a_above, a_below, b_above, b_below = _aligned(a_numerators, a_denominators, b_numerators, b_denominators)

    def difference(rows: NDArray[np.intp] | slice) -> Floats:
        return _ratio(a_above[rows], a_below[rows]) - _ratio(b_above[rows], b_below[rows])

    draws = _bootstrap(len(a_above), resamples, seed, difference)
    return _comparison(float(difference(slice(None))), draws, confidence, len(a_above))


def paired_difference_over_seeds(
    a: ArrayLike,
    b: ArrayLike,
    tokens: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Difference a - b of two recipes, each trained with the same seeds and scored on the same items.

    `a` and `b` are [seeds, items]; `tokens` [items] turns sums into values per token. Seeds and items are both
    resampled (a two-way bootstrap, Owen 2007): both are a sample of what the recipe could have met. With one
    seed only items vary, as in `paired_bootstrap`; with two or three the seeds' part is a rough lower bound.
    `n` counts items.
    """
    first, second = np.atleast_2d(np.asarray(a, float)), np.atleast_2d(np.asarray(b, float))
    if first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape} of two paired systems differ")
    differences = first - second
    seeds, items = differences.shape
    weights = np.ones(items) if tokens is None else np.asarray(tokens, float)
    _aligned(differences[0], weights)
    resampled = _remembered_resamples if resamples * items <= _REMEMBERED_DRAWS else _two_way_resamples
    columns = np.column_stack([*differences, weights])
    sums = ((seed_weights, counts @ columns) for seed_weights, counts in resampled(seeds, items, resamples, seed))
    draws = np.concatenate([(both[:, :-1] * shares).sum(axis=1) / both[:, -1] for shares, both in sums])
    return _comparison(float(differences.mean(axis=0).sum() / weights.sum()), draws, confidence, items)


def _aligned(*arrays: ArrayLike) -> list[Floats]:
    """The arrays as float vectors of one length, refused when empty, unequal or not finite."""
    vectors = [np.asarray(array, dtype=float) for array in arrays]
    if len({vector.shape for vector in vectors}) > 1 or vectors[0].ndim != 1:
        raise ValueError(f"per-item values must be vectors of one length, not {[v.shape for v in vectors]}")
    if vectors[0].size == 0:
        raise ValueError("no items: a mean of nothing has no interval")
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise ValueError("per-item values must be finite")
    return vectors


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    ratio: Floats = numerators.sum(axis=-1) / denominators.sum(axis=-1)
    return ratio


def _chunks(resamples: int, items: int) -> list[slice]:
    size = max(1, _CHUNK_DRAWS // items)
    return [slice(start, min(start + size, resamples)) for start in range(0, resamples, size)]


def _two_way_resamples(seeds: int, items: int, resamples: int, seed: int) -> Iterator[tuple[Floats, NDArray[Any]]]:
    """Chunks of resamples: the weights of the seeds, [rows, seeds], and how often each item is in, [rows, items]."""
    random = np.random.default_rng(seed)
    seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    for rows in _chunks(resamples, items):
        counts = random.multinomial(items, np.full(items, 1 / items), size=rows.stop - rows.start)
        yield seed_weights[rows], counts.astype(np.min_scalar_type(items))


@lru_cache(maxsize=32)  # a report's sets, each of its size, with one seed and with several
def _remembered_resamples(seeds: int, items: int, resamples: int, seed: int) -> list[tuple[Floats, NDArray[Any]]]:
    """The same: they depend on sizes alone, and a study compares many systems on the same items."""
    return list(_two_way_resamples(seeds, items, resamples, seed))


def _bootstrap(items: int, resamples: int, seed: int, statistic: Callable[[NDArray[np.intp]], Floats]) -> Floats:
    """The statistic of each resample; it gets item indices of shape [resamples, items]."""
    random = np.random.default_rng(seed)
    chunks = [(rows.stop - rows.start, items) for rows in _chunks(resamples, items)]
    return np.concatenate([statistic(random.integers(items, size=shape)) for shape in chunks])


def _expansion(items: int) -> tuple[int, float]:
    """Degrees of freedom and factor by which a bootstrap's normal quantile becomes that of so many items.

    A resample varies by the sample's own variance, (n - 1)/n of an unbiased estimate of the truth's, and the
    percentiles of resamples are normal where those of n items are Student's t.
    """
    degrees = max(items - 1, 1)
    return degrees, float(np.sqrt(1 + 1 / degrees))


def _percentiles(draws: Floats, confidence: float, items: int) -> tuple[float, float]:
    """The expanded percentile interval (Hesterberg 2015, The American Statistician 69(4), section 5.3).

    It stays inside the draws: with fewer than 6 items no percentile reaches 95 %, and it spans all draws.
    """
    degrees, factor = _expansion(items)
    tail = float(stats.norm.cdf(factor * stats.t.ppf((1 - confidence) / 2, degrees)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _comparison(difference: float, draws: Floats, confidence: float, items: int) -> PairedComparison:
    """Interval and p from the resampled differences.

    p is the level at which the interval would just touch zero, from the smaller share of draws on either side of it,
    with one draw added so that it is never 0 (Davison and Hinkley 1997, eq. 4.11); and never below 2^(1-n), the least
    that any test by the signs of n items can find.
    """
    low, high = _percentiles(draws, confidence, items)
    degrees, factor = _expansion(items)
    share = (min((draws <= 0).sum(), (draws >= 0).sum()) + 1) / (len(draws) + 1)
    p_value = 2 * float(stats.t.cdf(stats.norm.ppf(share) / factor, degrees))
    return PairedComparison(difference, low, high, min(1.0, max(p_value, 2.0 ** (1 - items))), items)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the k-th smallest of m counts m - k + 1 times, and never less than before."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return [float(value) for value in adjusted]
