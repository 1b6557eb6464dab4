"""Crashes: whatever ends a run, the same command continues it to the same weights, bit for bit on the CPU."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support import forked

from stillhouse.runtime.errors import UserError
from stillhouse.training.checkpoints import latest_valid_state, numbered_directories
from stillhouse.training.processes import INTERRUPTED_STATUS
from stillhouse.training.tracking import read_metrics
from tests.training.tiny_run import AnswerCrossEntropy, tiny_settings, tiny_train

# One worker: a server that has imported torch forks their processes.
pytestmark = pytest.mark.xdist_group("programs")


def run_program(model: Path, folder: Path, *arguments: str, use_cpu: str = "true") -> CompletedProcess[str]:
    return forked.start("tests.training.tiny_run", model, folder, *arguments, ACCELERATE_USE_CPU=use_cpu).finish()


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    [path] = (folder / "output" / "checkpoint-8").glob("*model.safetensors")
    return load_file(path)


def assert_bit_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.fault(
    "kill -9 of a trainer in a step, then while it writes a state",
    "resumed where it stopped; weights and losses bit for bit those of an undisturbed run",
)
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    options = ["--method", method, "--dropout", "0.2"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    settings = tiny_settings(method=method, lora={"rank": 4, "alpha": 8, "dropout": 0.2})
    tiny_train(tiny_model, undisturbed, settings)

    crash = run_program(tiny_model, killed, *options, "--kill-at", "6")
    assert crash.returncode == -signal.SIGKILL
    assert not (killed / "output").exists()
    crash_in_state = run_program(tiny_model, killed, *options, "--kill-in-state", "6")
    assert crash_in_state.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".state-6") for path in (killed / "work").iterdir())
    finished = run_program(tiny_model, killed, *options)
    assert finished.returncode == 0
    assert "continuing from step 4 of 8" in finished.stderr

    assert_bit_equal(final_weights(killed), final_weights(undisturbed))
    rows = [read_metrics(folder / "output" / "metrics.jsonl") for folder in (killed, undisturbed)]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


@pytest.mark.fault(
    "SIGTERM to a trainer",
    "saves its state within the step and exits with status 75 for a requeue; resumed from there",
)
@pytest.mark.slow
def test_sigterm_saves_the_state_and_exits_with_a_status_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    stopped = run_program(tiny_model, tmp_path, "--terminate-at", "5")
    assert stopped.returncode == INTERRUPTED_STATUS
    assert "SIGTERM: saving the state after this step" in stopped.stderr
    assert re.search(r"step 1/8: loss [\d.]+, \d+ tokens/s, \d+ MiB, ETA \d+:\d\d:\d\d\n", stopped.stderr)
    assert (tmp_path / "work" / "state-5").is_dir()
    _, result = tiny_train(tiny_model, tmp_path, tiny_settings())
    assert result.resumed_from == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_killed_run_on_a_gpu_ends_with_the_weights_of_an_undisturbed_one(tiny_model: Path, tmp_path: Path) -> None:
    """Within rounding: kernels on a GPU may add in any order."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run_program(tiny_model, undisturbed, "--dropout", "0.2", use_cpu="false").returncode == 0
    run_program(tiny_model, killed, "--dropout", "0.2", "--kill-at", "6", use_cpu="false")
    assert run_program(tiny_model, killed, "--dropout", "0.2", use_cpu="false").returncode == 0
    torch.testing.assert_close(final_weights(killed), final_weights(undisturbed), atol=1e-4, rtol=0)


@pytest.mark.fault(
    "bit flip or cut in a resumable state or a checkpoint",
    "named in the log; resumed from the state before; equal weights",
)
@pytest.mark.parametrize("victim", ["state-6/state.safetensors", "checkpoint-8/adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is corrupt", id="flip"),
        pytest.param(lambda data: data[: len(data) // 2], "bytes, not ", id="cut"),
    ],
)
def test_a_damaged_file_makes_the_run_continue_from_an_earlier_state(
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    monkeypatch.setattr(logging.getLogger("stillhouse"), "propagate", True)
    tiny_train(tiny_model, tmp_path, tiny_settings())
    expected = final_weights(tmp_path)
    work = tmp_path / "work"
    if victim.startswith("state-6"):
        (work / "state-8" / "progress.json").unlink()
    damaged = damage((work / victim).read_bytes())
    (work / victim).unlink()  # the output may be a link to the same file
    (work / victim).write_bytes(damaged)

    _, result = tiny_train(tiny_model, tmp_path, tiny_settings())
    assert result.resumed_from == (0 if victim.startswith("state-6") else 6)
    assert str(work / victim) in caplog.text and message in caplog.text
    assert_bit_equal(final_weights(tmp_path), expected)


def test_only_the_newest_states_are_kept_and_every_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    tiny_train(tiny_model, tmp_path, tiny_settings(resume_every=1, keep_resume_states=3, save_every=3))
    work = tmp_path / "work"
    assert [step for step, _ in numbered_directories(work, "state")] == [8, 7, 6]
    assert [step for step, _ in numbered_directories(work, "checkpoint")] == [8, 6, 3]
    assert latest_valid_state(work, (3, 6, 8)) == work / "state-8"


def test_a_finished_run_does_nothing_but_hand_out_its_results_again(tiny_model: Path, tmp_path: Path) -> None:
    tiny_train(tiny_model, tmp_path, tiny_settings())
    first = final_weights(tmp_path)
    _, result = tiny_train(tiny_model, tmp_path, tiny_settings(), objective=AnswerCrossEntropy(kill_at=1))
    assert result.resumed_from == result.steps == 8
    assert_bit_equal(final_weights(tmp_path), first)


@pytest.mark.fault(
    "disk full while a state is written, as safetensors tells it",
    "one line that names the path; earlier states kept and resumed from",
)
def test_a_full_disk_is_named_and_loses_no_earlier_state(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.training import checkpoints

    def save_or_fail(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "state-6" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_or_fail)
    with pytest.raises(UserError, match="state-6: the disk is full"):
        tiny_train(tiny_model, tmp_path, tiny_settings())
    monkeypatch.undo()
    _, result = tiny_train(tiny_model, tmp_path, tiny_settings())
    assert result.resumed_from == 4


def test_a_state_of_another_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    tiny_train(tiny_model, tmp_path, tiny_settings())
    with pytest.raises(UserError, match="trains other parameters"):
        tiny_train(tiny_model, tmp_path, tiny_settings(lora={"rank": 2, "dropout": 0.0}))


@pytest.mark.fault("torn last line of a metrics file", "dropped; the resumed curve has each step once")
def test_metrics_after_the_resumed_step_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    from stillhouse.training.tracking import MetricsFile

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste', encoding="utf-8")
    metrics = MetricsFile(path, completed_steps=2)
    metrics.append({"step": 3, "loss": 1.0})
    metrics.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[-1]["loss"] == 1.0
