"""Two processes (gloo) train to the weights of one; they differ by rounding only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from support import forked
from support.fake_slurm import RUNNING, FakeSlurm

from stillhouse.runtime.errors import UserError
from stillhouse.training.processes import INTERRUPTED_STATUS
from stillhouse.training.tracking import read_metrics
from tests.training.tiny_run import REPOSITORY, tiny_settings, tiny_train

# One worker: a server that has imported torch forks their processes.
pytestmark = pytest.mark.xdist_group("programs")


def run_two(model: Path, folder: Path, *options: str) -> list[CompletedProcess[str]]:
    """The tiny run in two processes, to its end."""
    return [program.finish() for program in forked.start_two("tests.training.tiny_run", model, folder, *options)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sharding"), [("lora", "none"), ("full", "none"), ("full", "fsdp"), ("full", "zero2")]
)
def test_two_processes_give_the_loss_curve_and_the_weights_of_one(
    tiny_model: Path, tmp_path: Path, method: str, sharding: str
) -> None:
    """The batch of five splits unevenly, 2 and 3, with answers of uneven length."""
    _, alone = tiny_train(tiny_model, tmp_path / "one", tiny_settings(method=method))
    options = ["--method", method, "--sharding", sharding]
    done = run_two(tiny_model, tmp_path / "two", *options)
    assert [one.returncode for one in done] == [0, 0], done
    told = "processes: 2\n" if sharding == "none" else "processes: 2 sharded\n"
    assert [one.stdout for one in done] == [told] * 2
    outputs_of = [tmp_path / folder / "output" for folder in ("one", "two")]
    curves = [[row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in outputs_of]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    weights = [load_file(next((output / "checkpoint-8").glob("*model.safetensors"))) for output in outputs_of]
    torch.testing.assert_close(weights[1], weights[0], atol=2e-5, rtol=0)
    assert alone.processes == 1


@pytest.mark.slow
def test_a_lease_of_two_gpus_starts_a_training_of_two_processes(tiny_model: Path, tmp_path: Path) -> None:
    """The way of a job of the workflow: lease, `accelerate launch`, training. The GPUs exist by name only."""
    lease = [sys.executable, "workflow_scripts/gpu_lease.py", "2", "--distributed", "--"]
    job = [sys.executable, "-m", "tests.training.tiny_run", str(tiny_model), str(tmp_path / "two")]
    machine = {"STILLHOUSE_FAKE_GPUS": "GPU-a,GPU-b", "STILLHOUSE_LOCK_DIR": str(tmp_path / "leases")}
    done = subprocess.run(
        [*lease, *job], cwd=REPOSITORY, env=os.environ | machine, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("processes: 2") == 2
    tiny_train(tiny_model, tmp_path / "one", tiny_settings())
    weights = [load_file(tmp_path / run / "output/checkpoint-8/adapter_model.safetensors") for run in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.fault("kill -9 of one of two sharded training processes", "resumed; equal within rounding")
def test_a_sharded_training_that_is_killed_is_continued(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--method", "full", "--sharding", "fsdp"]
    run_two(tiny_model, tmp_path / "two", *options, "--kill-at", "6", "--kill-rank", "1")
    assert not (tmp_path / "two" / "output").exists()
    first, _ = run_two(tiny_model, tmp_path / "two", *options)
    assert "continuing from step 4 of 8" in first.stderr
    tiny_train(tiny_model, tmp_path / "one", tiny_settings(method="full"))
    weights = [load_file(tmp_path / run / "output/checkpoint-8/model.safetensors") for run in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_that_are_told_to_end_ask_once_for_their_job_to_be_started_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path, monkeypatch)
    slurm.knows(RUNNING, requeue=f"ls -d {tmp_path}/two/work/state-5 >> {slurm.asked_file}")
    done = run_two(tiny_model, tmp_path / "two", "--terminate-at", "5")
    assert [one.returncode for one in done] == [INTERRUPTED_STATUS] * 2
    assert slurm.asked == ["requeue 17", str(tmp_path / "two/work/state-5")], "asked before the state was saved"


def test_sharding_is_refused_for_lora() -> None:
    with pytest.raises(ValidationError, match="sharding fsdp needs method full"):
        tiny_settings(sharding="fsdp")


def test_fewer_examples_per_update_than_processes_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 4))
    with pytest.raises(UserError, match=r"batch_size \(2\) is below 4 processes"):
        tiny_train(tiny_model, tmp_path, tiny_settings(batch_size=2))
