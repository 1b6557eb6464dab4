"""SIGTERM for every process of a job, where a scheduler tells only the first.

Slurm announces the end of a job by a signal. Where it tracks processes by control groups, as most clusters do, it sends
it to the first process of each step alone. In a job of the workflow that is Snakemake, which then waits for its step
and tells it nothing: a training would not hear that its time is nearly over. The same signal comes when Slurm ends the
job at once for a more urgent one; then the job asks to be started again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from stillhouse.runtime.scheduler import requeue_preempted_job


def hand_on_termination() -> None:
    """From now on SIGTERM goes on to every process below this one; call it in the main thread.

    It works beside the handler of SIGTERM that the program has or gets, and not without one.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_hand_on, args=(reader,), name="termination", daemon=True).start()


def _hand_on(reader: int) -> None:
    requeued = False
    while received := os.read(reader, 1):
        if received[0] == signal.SIGTERM:
            for process in list(_below(os.getpid())):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGTERM)
            requeued = requeued or requeue_preempted_job()


def _below(process: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have; none where the system has no /proc."""
    children: list[int] = []
    # A process or a thread may end while it is looked at.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children += map(int, (thread / "children").read_text().split())
    for child in children:
        yield child
        yield from _below(child)
