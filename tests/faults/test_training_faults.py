"""Whatever ends or disturbs a training process, the next one ends with an undisturbed run's weights, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import forked

from stillhouse.training.checkpoints import numbered_directories
from tests.faults import trainer
from tests.faults.conftest import Undisturbed
from tests.training.tiny_run import AnswerCrossEntropy, tiny_settings, tiny_train

# One worker: a server that has imported torch forks their processes.
pytestmark = pytest.mark.xdist_group("programs")
RESUMED = "resumed from the last state; weights and losses bit for bit those of an undisturbed run"
SEED = 7


def stop_and_finish(model: Path, folder: Path, undisturbed: Undisturbed, seconds: float, number: int) -> bool:
    """Send a signal after so many seconds, run again, compare; returns whether the signal met a running process."""
    process = trainer.start(model, folder)
    process.join(seconds)
    met = process.is_alive()
    if met:
        os.kill(process.pid, number)
    status = trainer.finish(process)
    if met and number == signal.SIGKILL:
        assert status in (-signal.SIGKILL, 0)
    last = max((step for step, _ in numbered_directories(folder / "work", "state")), default=0)
    # A checkpoint beyond the last state (the stop came between the two) is made again with the steps behind it.
    checkpoints = numbered_directories(folder / "work", "checkpoint")
    kept = {path: path.stat().st_ino for step, path in checkpoints if step <= last}
    finished_before = (folder / "output").exists()
    # The stop may also come between the last move into place and the process' end.
    assert finished_before or status != 0
    assert trainer.run(model, folder) == 0, trainer.messages(folder)
    assert undisturbed == folder
    if last and not finished_before:
        assert f"continuing from step {last} of" in trainer.messages(folder)
    for path, inode in kept.items():
        assert path.stat().st_ino == inode, f"{path.name} was finished and made again"
    return met


def random_moments(seconds: float) -> Iterator[float]:
    """Moments over the whole life of a process, from its start to its end."""
    draw = random.Random(SEED)
    while True:
        yield draw.uniform(0, seconds)


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.faults)])
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.fault("kill -9 of a trainer at random moments", RESUMED)),
        pytest.param(signal.SIGTERM, marks=pytest.mark.fault("SIGTERM to a trainer at random moments", RESUMED)),
    ],
    ids=["kill", "terminate"],
)
def test_a_training_stopped_at_any_moment_is_continued(
    tiny_model: Path, tmp_path: Path, undisturbed: Undisturbed, number: int, count: int, record_property: Any
) -> None:
    record_property("fault_cases", count)
    met = 0
    for place, seconds in enumerate(random_moments(undisturbed.seconds)):
        met += stop_and_finish(tiny_model, tmp_path / str(place), undisturbed, seconds, number)
        if met == count:
            return
        assert place < 5 * count, "most of the signals must meet a running process"


@pytest.mark.slow
@pytest.mark.fault("kill -9 of one of two training processes", "the other ends too; resumed; equal within rounding")
def test_a_process_whose_partner_is_killed_ends_and_the_run_is_continued(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--kill-at", "6", "--kill-rank", "1"]
    programs = forked.start_two("tests.training.tiny_run", tiny_model, tmp_path / "two", *options)
    try:
        statuses = [program.finish(120).returncode for program in programs]
    finally:
        for program in programs:
            program.process.kill()
    assert statuses[1] == -signal.SIGKILL and statuses[0] != 0
    assert not (tmp_path / "two" / "output").exists()
    _, result = tiny_train(tiny_model, tmp_path / "two", tiny_settings())
    assert result.resumed_from == 4
    tiny_train(tiny_model, tmp_path / "one", tiny_settings())
    weights = [load_file(tmp_path / run / "output/checkpoint-8/adapter_model.safetensors") for run in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], atol=2e-5, rtol=0)


@pytest.mark.fault(
    "job that outlives its killed workflow, started again beside itself", "the second waits; equal weights"
)
def test_two_trainings_of_the_same_output_take_turns(
    tiny_model: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    first = trainer.start(tiny_model, tmp_path)
    trainer.wait_for_state(tmp_path, first)
    second = trainer.start(tiny_model, tmp_path)
    assert [trainer.finish(first), trainer.finish(second)] == [0, 0], trainer.messages(tmp_path)
    assert "another process is making it: waiting until it has ended" in trainer.messages(tmp_path)
    assert undisturbed == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "stderr.txt", "work"]


def set_the_clock_back() -> None:
    """Let each look at the wall clock show an hour before the last one."""
    real, looks = time.time, iter(range(10**9))
    time.time = lambda: real() - 3600 * next(looks)


@pytest.mark.fault("clock going backwards while a training runs and between two attempts", RESUMED)
def test_a_clock_that_goes_backwards_changes_nothing(
    tiny_model: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    process = trainer.start(tiny_model, tmp_path)
    trainer.wait_for_state(tmp_path, process)
    process.kill()
    trainer.finish(process)
    for age, (_, state) in enumerate(reversed(numbered_directories(tmp_path / "work", "state"))):
        os.utime(state, (10**9 - age * 10**6,) * 2)  # The newest state has the oldest time.
    assert trainer.run(tiny_model, tmp_path, prepare=set_the_clock_back) == 0, trainer.messages(tmp_path)
    assert undisturbed == tmp_path


class DeviceFailsAt:
    """The objective, with a device that fails at a step as CUDA tells it."""

    def __init__(self, step: int) -> None:
        self.step, self.objective = step, AnswerCrossEntropy()

    def __call__(self, model: Any, micro_batch: Any, step: int) -> Any:
        if step == self.step:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
        return self.objective(model, micro_batch, step)


@pytest.mark.fault("GPU that fails in a step (CUDA error)", f"a line that says what to do; {RESUMED}")
def test_a_device_that_vanishes_is_a_clear_error_and_the_run_is_continued(
    tiny_model: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    assert trainer.run(tiny_model, tmp_path, objective=DeviceFailsAt(7)) == 1
    assert "error: step 7: the device failed (CUDA error: unspecified launch failure): see" in trainer.messages(
        tmp_path
    )
    assert trainer.run(tiny_model, tmp_path) == 0
    assert "continuing from step 6 of 12" in trainer.messages(tmp_path)
    assert undisturbed == tmp_path


@pytest.mark.fault("disk full while a training writes (a real, small disk)", f"one line that names the path; {RESUMED}")
def test_a_training_on_a_full_disk_continues_when_there_is_space(
    tiny_model: Path, small_disk: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    taken = sum(path.stat().st_size for path in undisturbed.folder.rglob("*") if path.is_file())
    subprocess.run(["mount", "-o", f"remount,size={taken // 2}", small_disk], check=True)
    run = small_disk / "run"
    assert trainer.run(tiny_model, run) == 1
    assert "the disk is full (" in trainer.messages(run) and "free some space" in trainer.messages(run)
    last = max((step for step, _ in numbered_directories(run / "work", "state")), default=0)
    assert last > 0, "the disk was full before anything was saved"
    subprocess.run(["mount", "-o", f"remount,size={4 * taken}", small_disk], check=True)
    assert trainer.run(tiny_model, run) == 0, trainer.messages(run)
    assert f"continuing from step {last} of 12" in trainer.messages(run)
    assert undisturbed == run


@pytest.mark.fault("host memory that a step cannot get", "one line that says what to lower; no result is left")
def test_a_step_that_runs_out_of_host_memory_ends_with_a_clear_line() -> None:
    program = (
        "import torch; from stillhouse.config.base import StrictModel; from stillhouse.runtime import commands; "
        "commands.run_step(StrictModel, lambda settings: torch.empty(2**52, dtype=torch.uint8))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: out of memory (") and "lower the token budget" in line
