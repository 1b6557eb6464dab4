"""What the loop needs of several processes, and of the signals that end one.

Gradients are summed once per update instead of by a wrapper around the model: objectives get the bare model,
processes may run different numbers of micro-batches, and a forward pass that ran out of memory can be redone by one
process alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
from accelerate import PartialState
from torch import Tensor, nn

from stillhouse.runtime.files import staged_directory
from stillhouse.runtime.logs import logger

# EX_TEMPFAIL of sysexits.h: "try again later"; a scheduler can tell it from a failure and requeue.
INTERRUPTED_STATUS = 75
BUCKET_ELEMENTS = 2**25


class TrainingInterrupted(SystemExit):
    """Training stopped on SIGTERM after saving its state; the process exits with `INTERRUPTED_STATUS`."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED_STATUS)


class StopRequest:
    """Notes the first SIGTERM instead of dying of it; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        # Only the main thread may set handlers.
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        logger.warning("SIGTERM: saving the state after this step; the same command will continue from it")
        self.received = True
        signal.signal(signal.SIGTERM, self._previous)


@contextmanager
def staged_output(final: Path) -> Iterator[Path]:
    """`staged_directory` for programs of several processes: the first one stages, all of them see the folder."""
    processes = PartialState()
    if processes.is_main_process:
        with staged_directory(final) as staging:
            processes.wait_for_everyone()
            yield staging
            processes.wait_for_everyone()
    else:
        processes.wait_for_everyone()
        yield final.parent / f".{final.name}.staging"
        processes.wait_for_everyone()


def slice_of_process(items: Sequence[int], rank: int, processes: int) -> Sequence[int]:
    """The contiguous share of one process; the shares of all processes, in order, are the items."""
    return items[len(items) * rank // processes : len(items) * (rank + 1) // processes]


def sum_statistics(values: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Sum named scalars over processes, in fp64; the names must be the same everywhere."""
    names = sorted(values)
    packed = torch.stack([torch.as_tensor(values[name]).to(device, torch.float64).reshape(()) for name in names])
    _sum_over_processes(packed)
    return dict(zip(names, packed.tolist(), strict=True))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over processes, in place.

    A parameter that no example reached gets a zero gradient, so that one process and many do the same to it.
    """
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
            _sum_bucket(bucket)
            bucket = []
    _sum_bucket(bucket)


def _sum_bucket(gradients: list[Tensor]) -> None:
    if PartialState().num_processes == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    _sum_over_processes(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _sum_over_processes(tensor: Tensor) -> None:
    if PartialState().num_processes > 1:
        torch.distributed.all_reduce(tensor)
