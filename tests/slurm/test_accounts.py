"""A cluster that keeps books and bills accounts: the profile is changed as docs/cluster.md says."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from slurm import one_node
from slurm.jobs import (
    IMPATIENT,
    PROFILE,
    STUDENT,
    continued,
    held_in_training,
    messages,
    preempted_by_a_more_urgent_job,
    start_again,
)
from slurm.test_cluster_page import COST
from support.workflow import Workflow, make_workflow

SEED = 1
STUDY = {
    "conditions": ["baseline"],
    "seeds": [SEED],
    "defaults": {"training": {"steps": 48, "save_every": 48, "resume_every": 1}},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(900),
    pytest.mark.parametrize("slurm", ["books"], indirect=True),
]


def test_each_attempt_is_charged_to_the_account_and_none_is_taken_for_a_failure(
    slurm: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training is preempted, and the workflow reads its jobs' states in the books."""
    project = make_workflow(tmp_path, tiny_model, STUDY)
    project.run("data", "resources/models/tiny")
    change_profile(project)
    monkeypatch.setenv("STILLHOUSE_FAKE_GPUS", ",".join(f"GPU-{number}" for number in range(one_node.GPUS)))
    process = project.start(*PROFILE, *IMPATIENT, f"results/{STUDENT.format(seed=SEED)}", cores=None)
    try:
        [job] = held_in_training(project, process, [SEED])
        preempted_by_a_more_urgent_job({job}, process, gpus=one_node.GPUS)
        start_again(job, process)
        assert process.wait(600) == 0, messages(project)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert continued(project, SEED) == 1
    attempts = [line.split() for line in one_node.run(*COST.split()).splitlines() if line.split()[0] == job]
    assert [state for _, _, _, state in attempts] == ["REQUEUED", "COMPLETED"]
    assert all("gres/gpu=1," in resources for _, _, resources, _ in attempts)
    accounts = one_node.run("sacct", "--allocations", "--noheader", "--format=Account", f"--jobs={job}")
    assert accounts.split() == [one_node.ACCOUNT]


def change_profile(project: Workflow) -> None:
    """What the page tells a reader whose cluster bills accounts and has an accounting database."""
    path = project.directory / "profiles/slurm/config.yaml"
    text = path.read_text()
    text = re.sub(r"^slurm-no-account: .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^default-resources:\n", rf"\g<0>  slurm_account: {one_node.ACCOUNT}\n", text, flags=re.MULTILINE)
    text = re.sub(r"^slurm-status-command: .*$", "slurm-status-command: sacct", text, flags=re.MULTILINE)
    path.write_text(text)
