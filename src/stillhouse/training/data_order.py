"""Which examples an update sees: a function of the seed and the step, never of the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from stillhouse.runtime.seeds import generator


def examples_of_step(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Indices of the examples of update `step` >= 1: the next `batch_size` of all permutations in a row."""
    positions = range((step - 1) * batch_size, step * batch_size)
    return [_permutation(position // examples, examples, seed)[position % examples] for position in positions]


@lru_cache(maxsize=2)
def _permutation(epoch: int, examples: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(examples, generator=generator(seed, "data order", epoch)).tolist()
    return order


def slice_of_process(items: Sequence[int], rank: int, processes: int) -> Sequence[int]:
    """The contiguous share of one process; the shares of all processes, in order, are the items."""
    return items[len(items) * rank // processes : len(items) * (rank + 1) // processes]
