"""Training tests run on the processor, also where there is a GPU; those marked `gpu` start programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_the_processor() -> Iterator[None]:
    """Bit-equality is promised on the processor; the tensors are tiny, threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_CPU", "true")
        yield
    torch.set_num_threads(threads)
