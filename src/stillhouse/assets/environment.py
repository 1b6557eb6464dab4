"""Step program: an environment over ours, for a library whose pins exclude what ours holds.

The new environment sees every package of the one that runs this program, torch in its build for this machine included,
and its own pinned packages first. So it takes seconds and a few megabytes.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import disk_errors
from stillhouse.runtime.logs import logger


class EnvironmentStep(StrictModel):
    """The step's command line."""

    requirements: Annotated[Path, Field(description="Pinned list of all that ours lacks; installed without its needs.")]
    output: Path


def main(step: EnvironmentStep) -> None:
    """Make the environment at its final place: its programs know their path. Raises `UserError` with pip's reason."""
    python = step.output / "bin/python"
    with disk_errors(step.output):
        run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(step.output)])
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        run([*pip, "--disable-pip-version-check", "--requirement", str(step.requirements)])
        own = Path(sysconfig.get_path("purelib", vars={"base": str(step.output)}))
        # addsitedir, unlike a bare path, also follows the .pth files there: those of editable installations.
        ours = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
        lines = [f"import site; site.addsitedir({path!r})\n" for path in ours]
        (own / "zz_underlying_environment.pth").write_text("".join(lines), encoding="utf-8")
    logger.info("%s: %d packages over those of %s", step.output, len(list(own.glob("*.dist-info"))), sys.prefix)


def run(command: list[str]) -> None:
    """Run a command to its end; a `UserError` with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"{' '.join(command[:4])}: {lines[-1].removeprefix('ERROR: ')}: mend that, and run again")


if __name__ == "__main__":
    run_step(EnvironmentStep, main)
