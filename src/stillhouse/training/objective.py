"""What a study hands to the training loop: an objective, and data that yields micro-batches.

An objective is a small class. It returns *sums* over units (for a language model: answer tokens); the loop
divides by the units of the whole update, over micro-batches and processes. So neither the micro-batch size
nor packing nor the number of processes changes a result beyond rounding, but for what is drawn in a forward
pass: dropout masks, the Gumbel noise of the consistency lens and the latent dropout of LatentWire are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LossTerms:
    """The loss of one micro-batch, in sums.

    total: scalar, differentiable, the sum of the loss over the counted units.
    count: the number of those units.
    terms: named parts of the total, for the log: scalars, detached sums over the same units.
    """

    total: Tensor
    count: int
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class MicroBatch(Protocol):
    """The examples of one forward pass."""

    @property
    def tokens(self) -> int:
        """Tokens that the forward pass reads, padding not counted; for the throughput."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same micro-batch with its tensors on `device`."""
        ...


BatchOut = TypeVar("BatchOut", bound=MicroBatch, covariant=True)
BatchIn = TypeVar("BatchIn", bound=MicroBatch, contravariant=True)


class TrainingData(Protocol[BatchOut]):
    """Indexed training examples."""

    def __len__(self) -> int: ...

    def micro_batches(self, indices: Sequence[int], token_budget: int) -> Iterator[BatchOut]:
        """The examples of `indices` in micro-batches of at most `token_budget` tokens, on the CPU.

        An example longer than the budget stands alone: the budget bounds memory and drops nothing. They are made
        ahead in a thread of their own, so they draw nothing from global random generators.
        """
        ...


class Objective(Protocol[BatchIn]):
    """The loss of a study. It may hold constants, but no state that changes between steps (it would not
    resume).

    It draws randomness from torch's global generators, which the loop seeds for each step, or from a
    generator that it seeds with `step`.
    """

    def __call__(self, model: nn.Module, micro_batch: BatchIn, step: int) -> LossTerms:
        """The loss terms of a micro-batch in the update number `step`, counted from 1."""
        ...
