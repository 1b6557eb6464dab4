"""Programs that a test starts, and may kill: forked off a server that has torch loaded, a second each instead of ten.

Unlike `warm_python`, the process that is started is the one that works: signals reach it, and its status is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pydantic import BaseModel
from support.warm_python import PRELOADED

from stillhouse.runtime.commands import dotted_arguments

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*PRELOADED["stillhouse"], "stillhouse.training.loop"])


@dataclass(frozen=True)
class Program:
    """One started program; what it prints goes to files."""

    process: ForkServerProcess
    folder: Path

    def finish(self, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; the status is negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the program hangs"
        stdout, stderr = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], self.process.exitcode, stdout, stderr)


def start(module: str, *arguments: object, **environment: str) -> Program:
    """What `python -m module arguments` does, with `environment` over this process's own."""
    folder = Path(tempfile.mkdtemp())
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = SERVER.Process(target=_run, args=(module, [str(each) for each in arguments], variables, folder))
    process.start()
    return Program(process, folder)


def start_two(module: str, *arguments: object) -> list[Program]:
    """The two ranks of `accelerate launch --cpu --num_processes 2`, without its start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    return [start(module, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def run_step_in_two(module: str, step: BaseModel) -> None:
    """A step program in two processes, to its end; an assertion says what they said where one fails."""
    programs = start_two(module, *dotted_arguments(step.model_dump(mode="json")))
    done = [program.finish() for program in programs]
    assert [one.returncode for one in done] == [0, 0], done


def _run(module: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
