"""The Slurm job that a process is part of, and how that job gets itself started again.

A job that ends before its work is done would fail. The workflow submits failed jobs again, but a few times only, and
nobody knows how often a long training will meet its time limit, or a job that is more urgent.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable

from stillhouse.runtime.logs import logger

# Set in the jobs that the workflow has submitted: a step that runs in somebody's own job leaves that job alone.
REQUEUE_VARIABLE = "STILLHOUSE_REQUEUE"
SECONDS_TO_ANSWER = 20


def slurm_job() -> dict[str, str | None]:
    """The Slurm job that the run is part of, its node, and how often Slurm started it again (None: it does not say)."""
    number = os.environ["SLURM_JOB_ID"]
    try:
        restarts = _shown(number).get("Restarts")
    except (OSError, subprocess.SubprocessError):
        restarts = None
    return {
        "slurm_job_id": number,
        "node": os.environ.get("SLURMD_NODENAME"),
        "partition": os.environ.get("SLURM_JOB_PARTITION"),
        "restarts": restarts,
    }


def requeue_interrupted_job() -> None:
    """Put this job back into Slurm's queue: for a step that was told to end and has saved how far it came.

    So Slurm announces the end of a job's time, or of the grace time of one that it preempts. A job that somebody has
    cancelled is not running any more, and stays cancelled.
    """
    _requeue(lambda job: job["JobState"] == "RUNNING")


def requeue_preempted_job() -> bool:
    """Put this job back into Slurm's queue if Slurm ends it for another's sake, which on some clusters cancels it."""
    return _requeue(lambda job: job["JobState"] == "COMPLETING" and job.get("PreemptTime", "None") != "None")


def _requeue(wanted: Callable[[dict[str, str]], bool]) -> bool:
    """Start this job again, under its number, if what Slurm says of it is `wanted`; a refusal is a line in the log."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number or REQUEUE_VARIABLE not in os.environ:
        return False
    try:
        if not wanted(_shown(number)):
            return False
        _scontrol("requeue", number)
    except subprocess.CalledProcessError as error:
        logger.warning("Slurm does not start job %s again itself: %s", number, (error.stderr + error.stdout).strip())
    except (OSError, subprocess.TimeoutExpired, KeyError) as error:
        logger.warning("Slurm does not start job %s again itself: %r", number, error)
    else:
        logger.warning("job %s goes back into Slurm's queue and will go on from there", number)
        return True
    return False


def _shown(number: str) -> dict[str, str]:
    """What Slurm says of a job, by name."""
    return dict(re.findall(r"(\w+)=(\S+)", _scontrol("show", "job", number)))


def _scontrol(*arguments: str) -> str:
    # Slurm repeats SIGTERM to every process of the job, and this is one.
    command = ["sh", "-c", "trap '' TERM; exec scontrol \"$@\"", "scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_TO_ANSWER).stdout
