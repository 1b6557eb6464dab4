"""A Slurm of one job, which is asked to start that job again: what it says of the job is the test's choice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse.runtime.scheduler import REQUEUE_VARIABLE

RUNNING = "JobState=RUNNING Reason=None PreemptTime=None"
GRACE = "JobState=RUNNING Reason=None PreemptTime=2026-01-01T00:00:00"
PREEMPTED = "JobState=COMPLETING Reason=None PreemptTime=2026-01-01T00:00:00"
CANCELLED = "JobState=COMPLETING Reason=None PreemptTime=None"


class FakeSlurm:
    """A `scontrol` that knows one job, and notes what it is asked to do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program, self.asked_file = folder / "scontrol", folder / "asked"
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv(REQUEUE_VARIABLE, "1")

    def knows(self, job: str, requeue: str = "exit 0") -> None:
        self.program.write_text(
            f'#!/bin/sh\n[ "$*" = "show job 17" ] && echo "JobId=17 {job}" && exit 0\n'
            f'echo "$*" >> {self.asked_file}\n{requeue}\n'
        )
        self.program.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        return self.asked_file.read_text().splitlines() if self.asked_file.exists() else []
