"""What the loop needs of several processes, and of the signals that end one.

Gradients are summed once per update instead of by a wrapper around the model: objectives get the bare model,
processes may run different numbers of micro-batches, and a forward pass that ran out of memory can be redone
by one process alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
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
    """Notes SIGTERM instead of dying of it. Also repeated ones: a scheduler and a launcher may both send it."""

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
        if not self.received:
            logger.warning("SIGTERM: saving the state after this step; the same command continues from it")
        self.received = True


def on_processor() -> bool:
    """Whether processes compute on the CPU, because there is no GPU or because the launcher was told so."""
    return not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def process_state() -> PartialState:
    """Accelerate's state of this process: its rank, and barriers.

    Always got from here: the first call fixes the state for good, and without `cpu` it would take the processes of a
    CPU launch for separate runs.
    """
    return PartialState(cpu=on_processor())


@contextmanager
def staged_output(final: Path) -> Iterator[Path]:
    """`staged_directory` for programs of several processes: the first one stages, all see the folder."""
    processes = process_state()
    if processes.is_main_process:
        with staged_directory(final) as staging:
            processes.wait_for_everyone()
            yield staging
            processes.wait_for_everyone()
    else:
        processes.wait_for_everyone()
        yield final.parent / f".{final.name}.staging"
        processes.wait_for_everyone()


def sum_statistics(values: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Sum named scalars over processes, in fp64; the names must be the same everywhere."""
    names = sorted(values)
    scalars = [torch.as_tensor(values[name], dtype=torch.float64, device=device) for name in names]
    packed = torch.stack([scalar.reshape(()) for scalar in scalars])
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
    if process_state().num_processes == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    _sum_over_processes(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _sum_over_processes(tensor: Tensor) -> None:
    if process_state().num_processes > 1:
        torch.distributed.all_reduce(tensor)
