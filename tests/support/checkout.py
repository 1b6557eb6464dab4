"""A fresh clone of the repository, as somebody has it who types a page's commands, with an environment at once.

What takes minutes and 3 GB is there already: the clone's `.venv` sees the packages of the environment that runs the
tests. `make .venv/installed` finds each pin of the environment file satisfied and installs the clone itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.workflow import REPOSITORY


@dataclass(frozen=True)
class Checkout:
    """The folder of the clone, and a shell in it."""

    directory: Path

    def type(self, command: str, activated: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as it is printed, in a new shell, and wait for its end."""
        return subprocess.run(
            self._shell(command, activated), cwd=self.directory, env=_environment(), capture_output=True, text=True
        )

    def start(self, command: str, heard: bool = True) -> subprocess.Popen[str]:
        """Start a command that stays, in a session of its own; what it says is read from it, or by nobody."""
        return subprocess.Popen(
            # Whoever runs the suite in the background (`nohup ... &`) bequeaths that Ctrl-C is ignored.
            ["env", "--default-signal=INT", *self._shell(command, True)],
            cwd=self.directory,
            env=_environment(),
            stdout=subprocess.PIPE if heard else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _shell(self, command: str, activated: bool) -> list[str]:
        return ["bash", "-c", f". .venv/bin/activate && {command}" if activated else command]


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: the signal goes to all that the shell has started. Raises `TimeoutExpired` for what does not heed it."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(120)
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """End all that the shell has started, as a reboot would."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clone(directory: Path) -> Checkout:
    """Clone what is committed, lay the working tree's changes over it, and prepare `.venv`."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the sources are no git clone, so that none can be made of them")
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(directory)], check=True)
    for arguments in (["-m"], ["-o", "--exclude-standard"]):
        listed = subprocess.run(["git", "ls-files", "-z", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            (directory / name).unlink(missing_ok=True)
            if (REPOSITORY / name).exists():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / name, directory / name)
    _lend_packages(directory / ".venv")
    return Checkout(directory)


def _lend_packages(environment: Path) -> None:
    """An environment without packages of its own, and with the programs of the one that runs the tests."""
    venv.create(environment, symlinks=True)
    [site_packages] = environment.glob("lib/python*/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    for program in Path(sys.executable).parent.iterdir():
        lent = python.with_name(program.name)
        if not lent.exists() and program.is_file() and program.read_bytes()[:2] == b"#!":
            _, _, rest = program.read_text().partition("\n")
            lent.write_text(f"#!{python}\n{rest}")
            lent.chmod(0o755)


def _environment() -> dict[str, str]:
    """The variables of a login shell: none of those by which tests find their sources."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
