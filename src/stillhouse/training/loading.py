"""Micro-batches; for a GPU they are made ahead: a thread makes the next, also the next update's, while one is used.

The thread moves it to the device as well. It may wait for a copy out of ordinary memory; the thread that gives the GPU
its work does not, so nothing needs to be pinned. On processors, where making and learning share the cores, each is made
when it is wanted: a second thread's parallel products would only compete (`python -m benchmarks only=[loading]`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

Make = Callable[[int, int], Iterable[Any]]


@dataclass(frozen=True)
class Made:
    """A micro-batch of update `step` on its device with the tokens that it has, or the error in making it."""

    step: int
    micro_batch: Any = None
    tokens: int = 0
    error: Exception | None = None


class Loader:
    """What `make(step, token_budget)` gives for one update after another, up to number `last`, on `device`.

    ahead: make the next one in a thread meanwhile.

    The same micro-batches in the same order as without it: they depend on their arguments alone (`TrainingData`). An
    error in making one is raised where that one is asked for.
    """

    def __init__(self, make: Make, last: int, device: torch.device, *, ahead: bool) -> None:
        self.make, self.last, self.device, self.ahead = make, last, device, ahead
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="micro-batches")
        self.expected: tuple[int, int] | None = None
        self.stream: Iterator[Made] = iter(())
        self.upcoming: Callable[[], Made | None]

    def micro_batches(self, step: int, token_budget: int) -> Iterator[tuple[Any, int]]:
        """The micro-batches of update `step`, and the tokens of each; again from the first where it is asked again."""
        if (step, token_budget) != self.expected:
            self.stream = self._from(step, token_budget)
            self.upcoming = self._next()
        self.expected = step + 1, token_budget
        while (made := self.upcoming()) is not None and made.step == step:
            if made.error is not None:
                raise made.error
            self.upcoming = self._next()
            yield made.micro_batch, made.tokens

    def close(self) -> None:
        """Make no more."""
        self.thread.shutdown(cancel_futures=True)

    def _next(self) -> Callable[[], Made | None]:
        """What gives the next micro-batch of the stream, the same one however often it is asked."""
        if self.ahead:
            return self.thread.submit(next, self.stream, None).result
        return cache(partial(next, self.stream, None))

    def _from(self, first: int, token_budget: int) -> Iterator[Made]:
        for step in range(first, self.last + 1):
            try:
                for micro_batch in self.make(step, token_budget):
                    # Counted before it is moved: afterwards the count would wait for the device.
                    tokens = micro_batch.tokens
                    yield Made(step, micro_batch.to(self.device), tokens)
            except Exception as error:
                yield Made(step, error=error)
                return
