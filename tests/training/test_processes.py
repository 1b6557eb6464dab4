"""Two processes (gloo) train to the weights of one; they differ by rounding only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.runtime.errors import UserError
from stillhouse.training.tracking import read_metrics
from tests.training.tiny_run import REPOSITORY, tiny_settings, tiny_train


def run_two_processes(model: Path, folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """The environment of `accelerate launch --cpu --num_processes 2`, without its start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.tiny_run", model, folder, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_give_the_loss_curve_and_the_weights_of_one(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    """The batch of five splits unevenly, 2 and 3, with answers of uneven length."""
    _, alone = tiny_train(tiny_model, tmp_path / "one", tiny_settings(method=method))
    processes = run_two_processes(tiny_model, tmp_path / "two", "--method", method)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output for output, _ in outputs] == ["processes: 2\n"] * 2
    outputs_of = [tmp_path / folder / "output" for folder in ("one", "two")]
    curves = [[row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in outputs_of]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    weights = [load_file(next((output / "checkpoint-8").glob("*model.safetensors"))) for output in outputs_of]
    torch.testing.assert_close(weights[1], weights[0], atol=2e-5, rtol=0)
    assert alone.processes == 1


def test_fewer_examples_per_update_than_processes_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 4))
    with pytest.raises(UserError, match=r"batch_size \(2\) is below 4 processes"):
        tiny_train(tiny_model, tmp_path, tiny_settings(batch_size=2))
