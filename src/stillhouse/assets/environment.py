"""Step program: packages over ours, for a library whose pins exclude what ours holds.

They lie in a plain folder, which PYTHONPATH puts before every package of the environment that runs the workflow: torch
in its build for this machine stays ours. So it takes seconds and a few megabytes, and can travel to another machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import staged_directory
from stillhouse.runtime.logs import logger


class EnvironmentStep(StrictModel):
    """The step's command line."""

    requirements: Annotated[Path, Field(description="Pinned list of all that ours lacks; installed without its needs.")]
    output: Path


def main(step: EnvironmentStep) -> None:
    """Install the list into a folder of its own, whole or not at all. Raises `UserError` with pip's reason."""
    with staged_directory(step.output) as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        run([*pip, "--target", str(folder), "--requirement", str(step.requirements)])
        count = len(list(folder.glob("*.dist-info")))
    logger.info("%s: %d packages over those of %s", step.output, count, sys.prefix)


def run(command: list[str]) -> None:
    """Run a command to its end; a `UserError` with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"{' '.join(command[:4])}: {lines[-1].removeprefix('ERROR: ')}: mend that, and run again")


if __name__ == "__main__":
    run_step(EnvironmentStep, main)
