"""Real training processes for the fault suite: forked off a server that has torch loaded, so that each takes a second.

A process leaves what a step program leaves: `output/` whole or not at all, `work/`, its messages in `stderr.txt`, and
its exit status.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from support.forked import SERVER

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import configure_logging
from stillhouse.training.processes import staged_output
from stillhouse.training.tracking import read_metrics
from tests.training.tiny_run import tiny_settings, tiny_train

SETTINGS: dict[str, Any] = {"steps": 12, "resume_every": 2, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}}


def start(
    model: Path, folder: Path, prepare: Callable[[], None] | None = None, objective: Any = None
) -> ForkServerProcess:
    """Start a training in `folder`; `prepare` runs in the process before it."""
    folder.mkdir(exist_ok=True)
    process = SERVER.Process(target=_train, args=(model, folder, prepare, objective))
    process.start()
    return process


def finish(process: ForkServerProcess, seconds: float = 120) -> int:
    """Wait for the end; returns the exit status, negative for a signal."""
    process.join(seconds)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def run(model: Path, folder: Path, **options: Any) -> int:
    """Train to the end; returns the exit status."""
    return finish(start(model, folder, **options))


def wait_for_state(folder: Path, process: ForkServerProcess) -> None:
    """Return once the training has saved its first state."""
    while not list((folder / "work").glob("state-*")) and process.is_alive():
        time.sleep(0.002)


def results(folder: Path) -> tuple[dict[str, str], list[float]]:
    """What must not depend on disturbances: the digest of each file of the checkpoints, and the losses."""
    output = folder / "output"
    digests = {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.glob("checkpoint-*/*"))
    }
    return digests, [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


def messages(folder: Path) -> str:
    """All that the trainings of this folder have said."""
    return (folder / "stderr.txt").read_text()


def _train(model: Path, folder: Path, prepare: Callable[[], None] | None, objective: Any) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    sys.stderr = (folder / "stderr.txt").open("a", buffering=1)
    configure_logging()
    if prepare:
        prepare()
    try:
        with staged_output(folder / "output") as staging:
            tiny_train(model, folder, tiny_settings(**SETTINGS), objective, output_dir=staging)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
