"""A job of the workflow goes back into the queue, unless somebody wants it to end (tests/slurm: on a real Slurm)."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_slurm import CANCELLED, GRACE, PREEMPTED, RUNNING, FakeSlurm

from stillhouse.runtime.scheduler import REQUEUE_VARIABLE, requeue_interrupted_job, requeue_preempted_job, slurm_job


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


@pytest.mark.parametrize("job", [RUNNING, GRACE])
def test_a_step_that_has_saved_its_state_puts_its_running_job_back(slurm: FakeSlurm, job: str) -> None:
    slurm.knows(job)
    requeue_interrupted_job()
    assert slurm.asked == ["requeue 17"]


def test_a_job_that_is_ended_for_another_s_sake_goes_back_at_once(slurm: FakeSlurm) -> None:
    slurm.knows(PREEMPTED)
    assert requeue_preempted_job()
    assert slurm.asked == ["requeue 17"]


def test_a_job_in_its_grace_time_is_left_to_save_its_state_first(slurm: FakeSlurm) -> None:
    slurm.knows(GRACE)
    assert not requeue_preempted_job()
    assert slurm.asked == []


def test_a_cancelled_job_stays_cancelled(slurm: FakeSlurm) -> None:
    slurm.knows(CANCELLED)
    requeue_interrupted_job()
    assert not requeue_preempted_job()
    assert slurm.asked == []


def test_a_step_in_somebody_s_own_job_leaves_that_job_alone(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.knows(RUNNING)
    monkeypatch.delenv(REQUEUE_VARIABLE)
    requeue_interrupted_job()
    assert slurm.asked == []


def test_a_refusal_is_a_line_in_the_log_and_ends_nothing(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    slurm.knows(RUNNING, requeue="echo 'Job is pending execution' >&2; exit 1")
    with caplog.at_level(logging.WARNING):
        requeue_interrupted_job()
    assert caplog.messages == ["Slurm does not start job 17 again itself: Job is pending execution"]


def test_the_request_outlives_a_repeated_sigterm(slurm: FakeSlurm) -> None:
    slurm.knows(RUNNING, requeue="kill -TERM $$; echo outlived >> $0.outlived")
    step = "from stillhouse.runtime.scheduler import requeue_interrupted_job as ask; ask()"
    done = subprocess.run([sys.executable, "-c", step], check=True, capture_output=True, text=True)
    assert (slurm.program.parent / "scontrol.outlived").exists(), done.stderr


def test_the_record_says_how_often_slurm_started_the_job_again(slurm: FakeSlurm) -> None:
    """Slurm is asked: the executor takes the variable that would say so out of a step's environment."""
    slurm.knows(f"{RUNNING} Restarts=2")
    assert slurm_job()["restarts"] == "2"
    slurm.program.write_text("#!/bin/sh\nexit 1\n")
    assert slurm_job()["restarts"] is None
